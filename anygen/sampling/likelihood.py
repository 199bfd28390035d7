"""How likely a model finds given answers, by teacher forcing through the packed forward pass.

The softmax of a code runs over its own codebook, as in sampling, where the grammar allows nothing else (so models that
were trained with `sliced_softmax` compare with others); that of other ids runs over the vocabulary.

Dimension key: T packed ids, P predicted ids of answers, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.model import attention
from anygen.model.segments import Segments
from anygen.packing import PackedBatch, collate
from anygen.sequence import Sequence as Ids
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import IntArray

Nats = npt.NDArray[np.float32]
_ROW = 4096
_NUM_LOGITS = 2048
"""Positions whose scores over the vocabulary are in memory at a time."""


def answer_nats(model: Any, vocabulary: Vocabulary, sequences: Sequence[Ids]) -> list[tuple[IntArray, Nats]]:
    """Of each sequence the ids of its targets, and -ln p of each of them.

    Args:
        model: a `Qwen3ForCausalLM`.
        vocabulary: its ids.
        sequences: as `Sequencer.build` gives them.
    """
    found: list[tuple[IntArray, Nats]] = []
    for row in _rows(sequences):
        packed = collate([row], sum(map(len, row)), pad_id=vocabulary.control("pad"))
        chosen_P = np.flatnonzero(packed.target_T & packed.predicts_T)
        nats_P = _nats(model, packed, chosen_P, vocabulary)
        owners_P = np.repeat(np.arange(len(row)), packed.lengths)[chosen_P]
        labels_P = packed.labels_T[chosen_P]
        found += [(labels_P[owners_P == owner], nats_P[owners_P == owner]) for owner in range(len(row))]
    return found


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
def _nats(model: Any, packed: PackedBatch, chosen_P: IntArray, vocabulary: Vocabulary) -> Nats:
    with _packed_attention(model):
        hidden_TD = model.model(
            input_ids=torch.from_numpy(packed.ids_T)[None].to(model.device),
            position_ids=torch.from_numpy(packed.positions_T)[None].to(model.device),
            segments=Segments(packed.lengths, model.device),
            use_cache=False,
        ).last_hidden_state[0]
    labels_P = torch.from_numpy(packed.labels_T[chosen_P]).to(model.device)
    hidden_PD = hidden_TD[torch.from_numpy(chosen_P).to(model.device)]
    pairs = zip(hidden_PD.split(_NUM_LOGITS), labels_P.split(_NUM_LOGITS), strict=True)
    parts = [_nll(hidden, labels, model.lm_head.weight, vocabulary) for hidden, labels in pairs]
    nats_P: Nats = torch.cat(parts).cpu().numpy()
    return nats_P


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
