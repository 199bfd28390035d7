"""Bits per id: how well a model predicts the right answers (`anygen.sampling.likelihood`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from anygen.api import AnyGen
from anygen.documents import Document
from anygen.evaluation.scores import Score, ratio
from anygen.sampling.likelihood import answer_nats


def bits_per_id(model: AnyGen, documents: Sequence[Document]) -> dict[str, Score]:
    """Modality -> mean of -log2 p over the ids of the documents' targets, with a bootstrap interval over documents.

    Control ids (begin, end, shapes) are not counted.
    """
    sequences = [model.sequencer.build(document.encode(model.bundle.tokenizers)) for document in documents]
    vocabulary = model.bundle.vocabulary
    groups = [r.group for r in vocabulary.ranges]
    sums: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, list[float]] = defaultdict(list)
    for labels_P, nats_P in answer_nats(model.bundle.model, vocabulary, sequences):
        kinds_P = vocabulary.range_index(labels_P)
        for modality in vocabulary.modalities:
            mine_P = np.isin(kinds_P, [i for i, g in enumerate(groups) if g == modality])
            if mine_P.any():
                sums[modality].append(float(nats_P[mine_P].sum()) / math.log(2))
                counts[modality].append(float(mine_P.sum()))
    return {modality: ratio(sums[modality], counts[modality]) for modality in sums}
