"""Attention over packed segments: one door, two rooms.

`attend` is causal inside each segment and blind between segments. Its rooms are xformers (block-diagonal causal, on
CUDA; this is the only file that imports it) and torch SDPA (everywhere; the specification). Both work behind
`transformers.AttentionInterface`, so the model is transformers' own.

SDPA sees segments of similar length together, padded at their end: causality hides the padding, so the result is that
of one call per segment. On a CPU in training its plain formula is used, whose backward is twice as fast as the
blocked kernel's on segments of a few hundred ids.

Dimension key: T packed ids, H query heads, G key/value heads, D head width, n segments of a group, L their padded
length.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenizers_mm import compat  # noqa: F401  before transformers

logger = logging.getLogger("anygen")
NAME = "anygen"
_BUCKET = 32


@dataclass(frozen=True)
class _Group:
    """Segments whose lengths round up to the same padded length."""

    num_segments: int
    padded_length: int


@dataclass(frozen=True)
class Segments:
    """Lengths of the packed segments, and the index maps of the SDPA room, made once a batch.

    >>> segments = Segments((2, 3), torch.device("cpu"))
    >>> segments.gather.view(2, -1)[:, :4].tolist()  # padding repeats a segment's own last id
    [[0, 1, 1, 1], [2, 3, 4, 4]]
    >>> segments.scatter.tolist()
    [0, 1, 32, 33, 34]
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def groups(self) -> list[_Group]:
        """Groups in the order of `gather`."""
        counts: dict[int, int] = {}
        for length in sorted(self.lengths):
            padded = _padded(length)
            counts[padded] = counts.get(padded, 0) + 1
        return [_Group(count, padded) for padded, count in counts.items()]

    @cached_property
    def gather(self) -> Tensor:
        """For every place of every padded segment, the packed id it reads."""
        return self._maps[0]

    @cached_property
    def scatter(self) -> Tensor:
        """For every packed id, its place in the padded segments."""
        return self._maps[1]

    @cached_property
    def is_real(self) -> Tensor:
        """False for places that are padding; as long as `gather`."""
        return self._maps[2]

    @cached_property
    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        gather, is_real = [], []
        for index in torch.argsort(lengths, stable=True).tolist():
            length = self.lengths[index]
            place = torch.arange(_padded(length))
            gather.append(starts[index] + place.clamp(max=length - 1))
            is_real.append(place < length)
        gather_P, is_real_P = torch.cat(gather), torch.cat(is_real)
        scatter_T = torch.empty(int(lengths.sum()), dtype=torch.long)
        scatter_T[gather_P[is_real_P]] = torch.arange(len(gather_P))[is_real_P]
        return gather_P.to(self.device), scatter_T.to(self.device), is_real_P.to(self.device)


def _padded(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None) -> Tensor:
    """Causal attention inside each segment; T x H x D.

    Args:
        q_THD: queries.
        k_TGD: keys; H is a multiple of G (grouped-query attention).
        v_TGD: values.
        segments: lengths that sum to T.
        scale: of the scores; None is D ** -0.5.
    """
    if q_THD.is_cuda and find_xformers() is not None:
        return attend_xformers(q_THD, k_TGD, v_TGD, segments, scale=scale)
    return attend_sdpa(q_THD, k_TGD, v_TGD, segments, scale=scale)


@torch.compiler.disable
def attend_sdpa(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    """The SDPA room, and the specification of `attend`."""
    num_ids, num_heads, width = q_THD.shape
    num_kv = k_TGD.shape[1]
    packed = torch.cat([q_THD, k_TGD, v_TGD], dim=1).reshape(num_ids, -1)
    padded = _Gather.apply(packed, segments.gather, segments.scatter)
    plain = q_THD.device.type == "cpu" and q_THD.requires_grad
    mixed, at = [], 0
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        for group in segments.groups:
            count, length = group.num_segments, group.padded_length
            rows = padded[at : at + count * length].view(count, length, -1, width).transpose(1, 2)
            at += count * length
            q_nHLD, k_nGLD, v_nGLD = rows.split([num_heads, num_kv, num_kv], dim=1)
            o_nHLD = F.scaled_dot_product_attention(
                q_nHLD, k_nGLD, v_nGLD, is_causal=True, scale=scale, enable_gqa=True
            )
            mixed.append(o_nHLD.transpose(1, 2).reshape(count * length, -1))
    out: Tensor = _Scatter.apply(torch.cat(mixed), segments.gather, segments.scatter, segments.is_real)
    return out.view(num_ids, num_heads, width)


class _Gather(torch.autograd.Function):
    """Packed to padded. Every id has one real place, so the gradient is a gather too (index_add is slow on CPU)."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return packed.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (scatter,) = ctx.saved_tensors
        return gradient.index_select(0, scatter), None, None


class _Scatter(torch.autograd.Function):
    """Padded to packed: the inverse of `_Gather`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, gather: Tensor, scatter: Tensor, is_real: Tensor) -> Tensor:
        ctx.save_for_backward(gather, is_real)
        return padded.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        gather, is_real = ctx.saved_tensors
        return gradient.index_select(0, gather) * is_real[:, None].to(gradient.dtype), None, None, None


def attend_xformers(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    """The xformers room: one block-diagonal causal call."""
    ops = find_xformers()
    assert ops is not None
    # under autocast QK-norm gives fp32 queries and keys beside bf16 values; the kernels want one type
    q_THD, k_TGD = q_THD.to(v_TGD.dtype), k_TGD.to(v_TGD.dtype)
    repeats = q_THD.shape[1] // k_TGD.shape[1]
    # Grouped (5-D) inputs are forward only in every xformers kernel: expand the keys and values.
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    bias = block_diagonal_bias(segments.lengths)
    out: Tensor = ops.memory_efficient_attention(q_THD[None], k_THD[None], v_THD[None], attn_bias=bias, scale=scale)
    return out[0]


def block_diagonal_bias(lengths: tuple[int, ...]) -> Any:
    """Xformers' own description of our mask; its `materialize()` is the oracle of the tests."""
    fmha = importlib.import_module("xformers.ops.fmha.attn_bias")
    return fmha.BlockDiagonalCausalMask.from_seqlens(list(lengths))


@lru_cache(maxsize=1)
def find_xformers() -> Any | None:
    """`xformers.ops` where it imports, else None; says once that the SDPA room is used instead."""
    try:
        return importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        logger.warning("xformers is not usable (%s): attention runs on torch SDPA, with the same results", error)
        return None


def _from_transformers(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' calling convention: (1, heads, T, D) in, (1, T, heads, D) out; `segments` is a model argument."""
    segments = kwargs.get("segments")
    assert isinstance(segments, Segments), "call the model with segments=Segments(...)"
    assert q.shape[0] == 1 and mask is None, f"packed batches have one row and no mask, got {tuple(q.shape)}"
    assert not kwargs.get("sliding_window"), "sliding windows are not part of this attention"
    mixed_THD = attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), segments, scale=scaling)
    return mixed_THD[None], None


def register() -> str:
    """Make `attend` known to transformers; returns the name for `set_attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _from_transformers)
    return NAME
