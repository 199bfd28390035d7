"""Rare things more often: records whose words hardly any other record has are drawn several times an epoch.

Where most records are variations of few things (an emoji in five skin tones), a uniform draw teaches those over and
over and the others hardly at all. As MetaCLIP (arXiv 2309.16671) balances its pairs by the words of their captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator

from anygen.data.coded import CodedRecord

_WORD = re.compile(r"\w+")


def _at_least_once(repeats: float | dict[str, float]) -> float | dict[str, float]:
    if not all(most >= 1 for most in (repeats.values() if isinstance(repeats, dict) else (repeats,))):
        raise ValueError("a record comes at least once an epoch: expected 1 or more")
    return repeats


Repeats = Annotated[float | dict[str, float], AfterValidator(_at_least_once)]
"""In a recipe: how often an epoch holds a record with a word of its own, of every direction or by direction."""


def repeats_by_direction(repeats: float | Mapping[str, float], mixture: Iterable[str]) -> dict[str, float]:
    """Of each direction that is taught; without those that are not named.

    Raises:
        ValueError: one is named that is not taught.
    """
    if not isinstance(repeats, Mapping):
        return dict.fromkeys(mixture, repeats)
    if unknown := repeats.keys() - set(mixture):
        raise ValueError(f"rare_repeats: {', '.join(sorted(unknown))} is no direction of mixture")
    return dict(repeats)


def repeats_by_rarity(records: Sequence[CodedRecord], most: float) -> npt.NDArray[np.int64]:
    """N: how often each record is drawn an epoch.

    A record is as rare as its rarest word, which n records of its kind have: it counts most / sqrt(n) times, rounded,
    and at least once.

    Args:
        records: their captions and what is spoken in them.
        most: of a record with a word of its own; 1 is once each.
    """
    words_N = [_words(record) for record in records]
    counts: dict[str, Counter[str]] = {}
    for record, words in zip(records, words_N, strict=True):
        counts.setdefault(record.kind, Counter()).update(words)
    rarest_N = [
        min((counts[record.kind][word] for word in words), default=len(records))
        for record, words in zip(records, words_N, strict=True)
    ]
    return np.maximum(1, np.rint(most / np.sqrt(rarest_N))).astype(np.int64)


def _words(record: CodedRecord) -> frozenset[str]:
    texts = (*record.captions, *(utterance.text for utterance in record.utterances))
    return frozenset(word for text in texts for word in _WORD.findall(text.casefold()))
