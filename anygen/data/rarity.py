"""Rare things more often: records whose words hardly any other record has are drawn several times an epoch.

Where most records are variations of few things (an emoji in five skin tones), a uniform draw teaches those over and
over and the others hardly at all. As MetaCLIP (arXiv 2309.16671) balances its pairs by the words of their captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anygen.data.coded import CodedRecord

_WORD = re.compile(r"\w+")


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
