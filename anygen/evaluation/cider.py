"""CIDEr-D, how much a caption says what references say (Vedantam et al., arXiv 1411.5726, section 7).

Captions become vectors of their 1- to 4-grams, weighted by how few sets of references hold them (TF-IDF); a caption's
score is ten times its clipped cosine with each reference, damped by the difference in length (sigma 6), averaged over
references and n. Deviation: words are not stemmed, as in the authors' later code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anygen.evaluation.scores import words_of

MAX_N, SIGMA = 4, 6.0
_Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    weights: tuple[dict[_Gram, float], ...]
    """By n."""
    norms: tuple[float, ...]
    length: int


class Cider:
    """Scores captions against references.

    Args:
        reference_sets: the references of every picture of the world; they say which words are common.

    >>> cider = Cider([["a red apple"], ["a green apple"], ["a cat"]])
    >>> round(cider.score("a red apple", ["a red apple"]), 6), cider.score("some dog", ["a red apple"])
    (7.5, 0.0)

    Three words have no 4-grams, so a quarter of the ten is missing.
    """

    def __init__(self, reference_sets: Iterable[Iterable[str]]) -> None:
        self._holders: Counter[_Gram] = Counter()
        count = 0
        for references in reference_sets:
            self._holders.update({gram for text in references for grams in _grams(text) for gram in grams})
            count += 1
        self._log_count = math.log(max(1, count))

    def score(self, caption: str, references: Sequence[str]) -> float:
        """0 to 10."""
        candidate = self._vector(caption)
        scores = [_similarity(candidate, self._vector(reference)) for reference in references]
        return 10 * sum(scores) / len(scores)

    def _vector(self, text: str) -> _Vector:
        weights = tuple(
            {
                gram: times * (self._log_count - math.log(max(1, self._holders[gram])))
                for gram, times in Counter(grams).items()
            }
            for grams in _grams(text)
        )
        norms = tuple(math.sqrt(sum(value * value for value in grams.values())) for grams in weights)
        return _Vector(weights, norms, len(words_of(text)))


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    damping = math.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for ours, theirs, a, b in zip(candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True):
        if a and b:
            total += sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in ours.items()) / (
                a * b
            )
    return damping * total / MAX_N


def _grams(text: str) -> list[list[_Gram]]:
    """The n-grams of a text, by n."""
    words = words_of(text)
    return [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for n in range(1, MAX_N + 1)]
