"""Bits per id: how well a model predicts the right answers, by teacher forcing through the packed forward pass.

The softmax of a code runs over its own codebook, as in sampling, where the grammar allows nothing else (so models that
were trained with `sliced_softmax` compare with others); that of a piece of text runs over the vocabulary.

Dimension key: T packed ids, P predicted ids of answers, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.api import AnyGen
from anygen.documents import Document
from anygen.evaluation.scores import Score, ratio
from anygen.model import attention
from anygen.model.segments import Segments
from anygen.packing import PackedBatch, collate
from anygen.sequence import Sequence as Ids
from anygen.vocabulary import Vocabulary

_ROW = 4096
_NUM_LOGITS = 2048
"""Positions whose scores over the vocabulary are in memory at a time."""


def bits_per_id(model: AnyGen, documents: Sequence[Document]) -> dict[str, Score]:
    """Modality -> mean of -log2 p over the ids of the documents' targets, with a bootstrap interval over documents.

    Control ids (begin, end, shapes) are not counted.
    """
    sequences = [model.sequencer.build(document.encode(model.bundle.tokenizers)) for document in documents]
    vocabulary = model.bundle.vocabulary
    groups = [r.group for r in vocabulary.ranges]
    sums: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, list[float]] = defaultdict(list)
    for row in _rows(sequences):
        packed = collate([row], sum(len(s) for s in row), pad_id=vocabulary.control("pad"))
        bits_P, chosen_P, owners_P = _bits(model.bundle.model, packed, vocabulary)
        kinds_P = vocabulary.range_index(packed.labels_T[chosen_P])
        for owner in range(len(row)):
            for modality in vocabulary.modalities:
                mine_P = (owners_P == owner) & np.isin(kinds_P, [i for i, g in enumerate(groups) if g == modality])
                if mine_P.any():
                    sums[modality].append(float(bits_P[mine_P].sum()))
                    counts[modality].append(float(mine_P.sum()))
    return {modality: ratio(sums[modality], counts[modality]) for modality in sums}


def _rows(sequences: Sequence[Ids]) -> Iterator[list[Ids]]:
    row: list[Ids] = []
    for sequence in sequences:
        if row and sum(map(len, row)) + len(sequence) > _ROW:
            yield row
            row = []
        row.append(sequence)
    if row:
        yield row


@torch.inference_mode()
def _bits(
    model: Any, packed: PackedBatch, vocabulary: Vocabulary
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bits of each predicted id of an answer, its place in the row, and the number of its document; P each."""
    segments = Segments(packed.lengths, model.device)
    with _packed_attention(model):
        hidden_TD = model.model(
            input_ids=torch.from_numpy(packed.ids_T)[None].to(model.device),
            position_ids=torch.from_numpy(packed.positions_T)[None].to(model.device),
            segments=segments,
            use_cache=False,
        ).last_hidden_state[0]
    chosen_P = np.flatnonzero(packed.target_T & packed.predicts_T)
    owners_T = np.repeat(np.arange(len(packed.lengths)), packed.lengths)
    labels_P = torch.from_numpy(packed.labels_T[chosen_P]).to(model.device)
    hidden_PD = hidden_TD[torch.from_numpy(chosen_P).to(model.device)]
    pairs = zip(hidden_PD.split(_NUM_LOGITS), labels_P.split(_NUM_LOGITS), strict=True)
    nats = [_nll(hidden, labels, model.lm_head.weight, vocabulary) for hidden, labels in pairs]
    return torch.cat(nats).cpu().numpy() / math.log(2), chosen_P, owners_T[chosen_P]


def _nll(hidden_PD: Tensor, labels_P: Tensor, weight_VD: Tensor, vocabulary: Vocabulary) -> Tensor:
    logits_PV = (hidden_PD @ weight_VD.T).float()
    nll_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
    for r in vocabulary.ranges:
        mine_P = (labels_P >= r.start) & (labels_P < r.start + r.size)
        if r.group in vocabulary.modalities and r.group != "text" and mine_P.any():
            own = logits_PV[mine_P, r.start : r.start + r.size]
            nll_P[mine_P] = F.cross_entropy(own, labels_P[mine_P] - r.start, reduction="none")
    return nll_P


@contextlib.contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.register())
    try:
        yield
    finally:
        model.set_attn_implementation(before)
