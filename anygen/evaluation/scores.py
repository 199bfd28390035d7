"""Scores: shares with Wilson's interval, word and character error rates with a bootstrap interval over utterances."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from anygen.errors import MissingDependency


@dataclass(frozen=True)
class Score:
    """One figure with its 95 % interval; NaN bounds where there is none."""

    value: float
    low: float
    high: float
    count: int
    examples: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(truth, answer) of some failures."""


def proportion(right: Sequence[bool], pairs: Sequence[tuple[str, str]] = ()) -> Score:
    """Share of True with its Wilson interval.

    >>> score = proportion([True] * 8 + [False] * 2)
    >>> [round(v, 2) for v in (score.value, score.low, score.high)]
    [0.8, 0.49, 0.94]
    """
    n, z = len(right), 1.96
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    p = sum(right) / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    failures = [pair for pair, good in zip(pairs, right, strict=True) if not good] if pairs else []
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return Score(p, max(0.0, low), min(1.0, high), n, tuple(failures[:20]))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Score:
    """Sum over sum, with a bootstrap interval over the pairs (500 draws, always the same).

    >>> ratio([1.0, 1.0], [2.0, 2.0]).high
    0.5
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if not below.sum():
        return Score(math.nan, math.nan, math.nan, 0)
    draws = np.random.default_rng(0).integers(0, len(below), (500, len(below)))
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of nothing but empty ones
        low, high = np.nanpercentile(above[draws].sum(1) / below[draws].sum(1), [2.5, 97.5])
    return Score(float(above.sum() / below.sum()), float(low), float(high), len(below))


def word_error_rate(truths: Sequence[str], answers: Sequence[str]) -> Score:
    """Word errors over words, case and punctuation apart, with a bootstrap interval over utterances."""
    return _error_rate(truths, answers, num_word_errors, lambda text: len(words_of(text)))


def character_error_rate(truths: Sequence[str], answers: Sequence[str]) -> Score:
    """Character errors over characters, of the words that `word_error_rate` compares."""
    return _error_rate(truths, answers, num_character_errors, lambda text: len(" ".join(words_of(text))))


def _error_rate(
    truths: Sequence[str], answers: Sequence[str], errors_of: Callable[[str, str], int], size_of: Callable[[str], int]
) -> Score:
    pairs = list(zip(truths, answers, strict=True))
    errors = [errors_of(truth, answer) for truth, answer in pairs]
    score = ratio(errors, [size_of(truth) for truth in truths])
    failures = [pair for pair, count in zip(pairs, errors, strict=True) if count]
    return Score(score.value, score.low, score.high, score.count, tuple(failures[:20]))


def num_word_errors(truth: str, answer: str) -> int:
    """Substituted, deleted and inserted words (jiwer).

    Raises:
        MissingDependency: jiwer is not there.
    """
    check_jiwer()
    import jiwer

    left, right = words_of(truth), words_of(answer)
    if not left or not right:
        return max(len(left), len(right))
    counts = jiwer.process_words(" ".join(left), " ".join(right))
    return int(counts.substitutions + counts.deletions + counts.insertions)


def num_character_errors(truth: str, answer: str) -> int:
    """Substituted, deleted and inserted characters (jiwer).

    >>> num_character_errors("a red apple", "a read, apple")
    1
    """
    check_jiwer()
    import jiwer

    left, right = " ".join(words_of(truth)), " ".join(words_of(answer))
    if not left or not right:
        return max(len(left), len(right))
    counts = jiwer.process_characters(left, right)
    return int(counts.substitutions + counts.deletions + counts.insertions)


def check_jiwer() -> None:
    """Raise MissingDependency where jiwer is not installed."""
    if importlib.util.find_spec("jiwer") is None:
        raise MissingDependency('error rates need the package jiwer: pip install "anygen[eval]"')


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation.

    >>> words_of("Man, medium-dark skin tone!")
    ['man', 'medium-dark', 'skin', 'tone']
    """
    kept = "".join(c if c.isalnum() or c in "-' " else " " for c in text.lower())
    return kept.split()
