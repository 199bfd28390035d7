"""Attention over packed segments: one door, two rooms.

`attend` is causal inside each segment and blind between segments. Its rooms are one packed kernel (on CUDA, for heads
that it takes: `attention_kernels` says which it is) and torch SDPA (everywhere; the specification). Both work behind
`transformers.AttentionInterface`, so the model is transformers' own.

SDPA sees segments of similar length together, padded at their end: causality hides the padding, so the result is that
of one call per segment. On a CPU in training the plain formula stands in for it, forward and backward.

Dimension key: T packed ids, H query heads, G key/value heads, D head width, n segments of a group, L their padded
length; b and M as `_Plain` says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anygen.model import attention_kernels
from anygen.model.packed_attention import packed_attention
from anygen.model.segments import Segments as Segments
from tokenizers_mm import compat  # noqa: F401  before transformers

NAME = "anygen"


def attend(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None) -> Tensor:
    """Causal attention inside each segment; T x H x D.

    Args:
        q_THD: queries.
        k_TGD: keys; H is a multiple of G (grouped-query attention).
        v_TGD: values.
        segments: lengths that sum to T.
        scale: of the scores; None is D ** -0.5.
    """
    room = attend_packed if has_kernel(v_TGD.device.type, v_TGD.dtype, v_TGD.shape[-1]) else attend_sdpa
    return room(q_THD, k_TGD, v_TGD, segments, scale=scale)


@torch.compiler.assume_constant_result
def has_kernel(device_type: str, dtype: torch.dtype, width: int) -> bool:
    """True where `attend` has a packed kernel for heads like these."""
    if device_type != "cuda" or not attention_kernels.fits(dtype, width):
        return False
    return attention_kernels.resolve().kernel is not None


def attend_packed(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    """The packed room: one kernel call, one node of a compiled graph. Without CUDA it is slow, and the same."""
    # under autocast QK-norm gives fp32 queries and keys beside bf16 values; the kernels want one type
    q_THD, k_TGD = q_THD.to(v_TGD.dtype), k_TGD.to(v_TGD.dtype)
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    return packed_attention(q_THD, k_TGD, v_TGD, segments.offsets_N, segments.max_length, scale)[0]


@torch.compiler.disable
def attend_sdpa(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    """The SDPA room, and the specification of `attend`."""
    num_ids, num_heads, width = q_THD.shape
    num_kv = k_TGD.shape[1]
    if not num_ids:
        return q_THD * (k_TGD.sum() + v_TGD.sum())  # nothing, and a way back to all three for gradients
    packed = torch.cat([q_THD.to(v_TGD.dtype), k_TGD.to(v_TGD.dtype), v_TGD], dim=1).reshape(num_ids, -1)
    padded = _Gather.apply(packed, segments.gather, segments.scatter)
    scale = width**-0.5 if scale is None else scale
    mixed, at = [], 0
    for group in segments.groups:
        count, length = group.num_segments, group.padded_length
        rows = padded[at : at + count * length].view(count, length, -1, width).transpose(1, 2)
        at += count * length
        q_nHLD, k_nGLD, v_nGLD = rows.split([num_heads, num_kv, num_kv], dim=1)
        if padded.device.type == "cpu" and padded.requires_grad:
            o_nHLD = _Plain.apply(q_nHLD, k_nGLD, v_nGLD, scale)
        else:
            o_nHLD = F.scaled_dot_product_attention(
                q_nHLD, k_nGLD, v_nGLD, is_causal=True, scale=scale, enable_gqa=True
            )
        mixed.append(o_nHLD.transpose(1, 2).reshape(count * length, -1))
    out: Tensor = _Scatter.apply(torch.cat(mixed), segments.gather, segments.scatter, segments.is_real)
    return out.view(num_ids, num_heads, width)


class _Plain(torch.autograd.Function):
    """Causal attention by its formula, which for segments of a few hundred ids is what a CPU does fastest.

    Heads that share keys stand under one another (M = H / G x L rows for each of b = n x G), so that nothing is
    expanded. Scores and softmax are fp32 or wider; the probabilities are kept in the type of the values.
    """

    @staticmethod
    def forward(ctx: Any, q_nHLD: Tensor, k_nGLD: Tensor, v_nGLD: Tensor, scale: float) -> Tensor:
        length, width = q_nHLD.shape[2:]
        k_bLD, v_bLD = k_nGLD.reshape(-1, length, width), v_nGLD.reshape(-1, length, width)
        q_bMD = q_nHLD.reshape(len(k_bLD), -1, width)
        wide = torch.promote_types(q_nHLD.dtype, torch.float32)
        with torch.autocast(q_nHLD.device.type, enabled=False):
            later_LL = torch.full((length, length), -torch.inf, dtype=wide).triu_(1)
            later_ML = later_LL.repeat(q_bMD.shape[1] // length, 1)
            scores_bML = torch.baddbmm(later_ML, q_bMD.to(wide), k_bLD.to(wide).mT, alpha=scale)
            p_bML = scores_bML.softmax(-1).to(q_nHLD.dtype)
            out_bMD = p_bML @ v_bLD
        ctx.save_for_backward(q_bMD, k_bLD, v_bLD, p_bML)
        ctx.scale, ctx.shapes = scale, (q_nHLD.shape, k_nGLD.shape)
        return out_bMD.view(q_nHLD.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_nHLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q_bMD, k_bLD, v_bLD, p_bML = ctx.saved_tensors
        q_shape, k_shape = ctx.shapes
        with torch.autocast(q_bMD.device.type, enabled=False):
            d_bMD = gradient_nHLD.reshape(q_bMD.shape)
            ds_bML = torch._softmax_backward_data(d_bMD @ v_bLD.mT, p_bML, -1, p_bML.dtype)
            dq_bMD = (ds_bML @ k_bLD).mul_(ctx.scale)
            dk_bLD = (ds_bML.mT @ q_bMD).mul_(ctx.scale)
            dv_bLD = p_bML.mT @ d_bMD
        return dq_bMD.view(q_shape), dk_bLD.view(k_shape), dv_bLD.view(k_shape), None


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
