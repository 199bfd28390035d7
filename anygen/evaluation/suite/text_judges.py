"""Judges of texts: captions, other phrasings, transcripts, answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anygen.evaluation.cider import Cider
from anygen.evaluation.scores import Score, character_error_rate, proportion, ratio, word_error_rate, words_of
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Measured


def judge_captions(bench: Bench, cases: Sequence[Case], texts: list[str]) -> Iterator[Measured]:
    """Exact in any phrasing, and CIDEr-D."""
    pairs = [(case.texts[0], text) for case, text in zip(cases, texts, strict=True)]
    right = [text in case.texts for case, text in zip(cases, texts, strict=True)]
    yield Measured("exact caption", proportion(right, pairs))
    cider = bench.cider if cases[0].scene is None else Cider(case.texts for case in cases)
    for of, candidates in (("", texts), ("the plain phrase", [case.texts[0] for case in cases])):
        scores = [cider.score(text, case.texts) for case, text in zip(cases, candidates, strict=True)]
        yield Measured("CIDEr-D", ratio(scores, [1.0] * len(scores)), of)


def judge_rephrasings(bench: Bench, cases: Sequence[Case], texts: list[str]) -> Iterator[Measured]:
    """The same, and whether the text is another one than the given."""
    yield from judge_captions(bench, cases, texts)
    given = [str(case.request.text) for case in cases]
    new = [text in case.texts and text != old for case, text, old in zip(cases, texts, given, strict=True)]
    yield Measured("another phrasing", proportion(new))


def judge_transcripts(bench: Bench, cases: Sequence[Case], texts: list[str]) -> Iterator[Measured]:
    """Word and character errors against what was said."""
    truths = [case.texts[0] for case in cases]
    if bench.has("jiwer"):
        yield Measured("word error rate", word_error_rate(truths, texts))
        yield Measured("character error rate", character_error_rate(truths, texts))
    yield Measured("exact words", _equal(truths, texts))


def judge_answers(bench: Bench, cases: Sequence[Case], texts: list[str]) -> Iterator[Measured]:
    """The one right answer, or not."""
    yield Measured("exact answer", _equal([case.texts[0] for case in cases], texts))


def _equal(truths: Sequence[str], texts: Sequence[str]) -> Score:
    pairs = list(zip(truths, texts, strict=True))
    return proportion([words_of(truth) == words_of(text) for truth, text in pairs], pairs)
