"""`anygen::packed_attention`: causal attention inside packed segments as one operator of torch.

`torch.compile` sees a single node whose inputs are tensors and two numbers, so one graph serves every packing; the
backward is an operator too, and needs no autograd inside. CUDA tensors go to the kernel that `attention_kernels` found,
others to the reference.

Kernels have no backward for grouped keys and values: both directions expand them, and the gradients are summed back.

Dimension key: T packed ids, H query heads, G key/value heads, D head width, N offsets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anygen.model.attention_kernels import Kernel, resolve
from anygen.model.attention_reference import Reference, wide


@torch.library.custom_op("anygen::packed_attention", mutates_args=())
def packed_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, offsets_N: Tensor, max_length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and, for its backward, the log of each softmax's denominator (H x T; it has no gradient).

    Args:
        q_THD: queries.
        k_TGD: keys; H is a multiple of G (grouped-query attention).
        v_TGD: values.
        offsets_N: int32 starts of the segments, then T, which may repeat.
        max_length: no segment is longer.
        scale: of the scores.
    """
    if not len(q_THD):
        return _like_output(q_THD), _like_lse(q_THD)
    k_THD, v_THD = (_expand(x, q_THD.shape[1]) for x in (k_TGD, v_TGD))
    out_THD, lse_HT = _kernel(q_THD).forward(q_THD, k_THD, v_THD, offsets_N, max_length, scale)
    return out_THD.contiguous(), lse_HT.contiguous()


@packed_attention.register_fake
def _(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, offsets_N: Tensor, max_length: int, scale: float) -> Any:
    return _like_output(q_THD), _like_lse(q_THD)


@torch.library.custom_op("anygen::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    gradient_THD: Tensor,
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    offsets_N: Tensor,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values."""
    if not len(q_THD):
        return _like_output(q_THD), _like_output(k_TGD), _like_output(v_TGD)
    k_THD, v_THD = (_expand(x, q_THD.shape[1]) for x in (k_TGD, v_TGD))
    dq_THD, dk_THD, dv_THD = _kernel(q_THD).backward(
        gradient_THD.contiguous(), q_THD, k_THD, v_THD, out_THD, lse_HT, offsets_N, max_length, scale
    )
    return dq_THD.contiguous(), _sum_back(dk_THD, k_TGD.shape[1]), _sum_back(dv_THD, v_TGD.shape[1])


@packed_attention_backward.register_fake
def _(gradient_THD: Tensor, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, *rest: Any) -> Any:
    return _like_output(q_THD), _like_output(k_TGD), _like_output(v_TGD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_length, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient_THD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_THD, k_TGD, v_TGD, offsets_N, out_THD, lse_HT = ctx.saved_tensors
    gradients = packed_attention_backward(
        gradient_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, offsets_N, ctx.max_length, ctx.scale
    )
    return (*gradients, None, None, None)


packed_attention.register_autograd(_differentiate, setup_context=_save)


def _kernel(q_THD: Tensor) -> Kernel:
    if not q_THD.is_cuda:
        return Reference()
    kernel = resolve().kernel
    assert kernel is not None, "the door sends CUDA tensors here only where there is a kernel"
    return kernel


def _expand(x_TGD: Tensor, num_heads: int) -> Tensor:
    return x_TGD.repeat_interleave(num_heads // x_TGD.shape[1], dim=1)


def _sum_back(dx_THD: Tensor, num_groups: int) -> Tensor:
    repeats = dx_THD.shape[1] // num_groups
    return dx_THD.contiguous() if repeats == 1 else dx_THD.unflatten(1, (num_groups, repeats)).sum(2)


def _like_output(x_THD: Tensor) -> Tensor:
    return x_THD.new_empty(x_THD.shape)


def _like_lse(q_THD: Tensor) -> Tensor:
    return q_THD.new_empty((q_THD.shape[1], q_THD.shape[0]), dtype=wide(q_THD.dtype))
