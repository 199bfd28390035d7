"""Cross-entropy of a linear head that never holds more logits than a chunk's, forward or backward.

    loss = sum_p s_p (-log p(label_p) + z (log Z_p)^2)

The loss is a scalar, so its gradients are known, up to one factor, as soon as a chunk's logits are: the forward pass
computes them and lets the logits go (as Liger does, arXiv 2410.10989). Nothing is computed twice; what waits for the
backward is as large as the hidden states and the head.

With a = 1 + 2 z log Z, the gradient of one row of logits is s (a p - onehot) = s a (p - onehot / a): the factor s a
moves to the narrow operands of the products, and the wide matrix is touched as seldom as can be.

Dimension key: P positions, C those of one chunk, D width, V vocabulary, A ids of one slice of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_LOGITS = {"cpu": 2**22, "cuda": 2**28}
"""Logits that exist at once: 16 MB of fp32 on a CPU (larger blocks go back to the system each time), 1 GB on a GPU."""


@dataclass(frozen=True, eq=False)
class Slice:
    """Positions whose softmax runs over ids [start, stop)."""

    positions: Tensor
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Result of `cross_entropy`."""

    loss: Tensor
    nll_P: Tensor
    """-log p of every label, without gradient."""


def cross_entropy(
    hidden_PD: Tensor,
    head_VD: Tensor,
    labels_P: Tensor,
    scales_P: Tensor,
    *,
    z_loss: float,
    slices: Sequence[Slice] | None = None,
    max_logits: int | None = None,
) -> CrossEntropy:
    """The loss above, with gradients for `hidden_PD` and `head_VD`; under autocast the products have its type.

    Args:
        hidden_PD: final hidden states.
        head_VD: output matrix, one row an id.
        labels_P: ids to predict.
        scales_P: s, without gradient.
        z_loss: z.
        slices: hold every position once; None is the whole vocabulary for all.
        max_logits: how many may exist at once; None is what suits the device.
    """
    if slices is None:
        slices = [Slice(torch.arange(len(labels_P), device=labels_P.device), 0, len(head_VD))]
    max_logits = max_logits or _MAX_LOGITS.get(labels_P.device.type, _MAX_LOGITS["cuda"])
    chunks = [
        Slice(positions_C, one.start, one.stop)
        for one in slices
        for positions_C in one.positions.split(max(1, max_logits // (one.stop - one.start)))
        if len(positions_C)
    ]
    wants_gradient = torch.is_grad_enabled() and (hidden_PD.requires_grad or head_VD.requires_grad)
    loss, nll_P = _CrossEntropy.apply(hidden_PD, head_VD, labels_P, scales_P, z_loss, chunks, wants_gradient)
    return CrossEntropy(loss, nll_P)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        head_VD: Tensor,
        labels_P: Tensor,
        scales_P: Tensor,
        z_loss: float,
        chunks: list[Slice],
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_PD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_VD.dtype
        wide = torch.promote_types(head_VD.dtype, torch.float32)
        loss = hidden_PD.new_zeros((), dtype=wide)
        nll_P = hidden_PD.new_empty(len(hidden_PD), dtype=wide)
        dhidden_PD = torch.empty_like(hidden_PD) if wants_gradient else None
        dhead_VD = torch.zeros_like(head_VD, dtype=wide) if wants_gradient else None
        with torch.autocast(device, enabled=False):
            narrow_VD = head_VD.to(dtype)
            for chunk in chunks:
                head_AD, labels_C1 = narrow_VD[chunk.start : chunk.stop], labels_P[chunk.positions, None] - chunk.start
                hidden_CD, scales_C = hidden_PD[chunk.positions].to(dtype), scales_P[chunk.positions]
                logits_CA = hidden_CD @ head_AD.T
                log_p_CA = logits_CA.log_softmax(-1, dtype=wide)
                nll_C = -log_p_CA.gather(1, labels_C1)[:, 0]
                log_z_C = logits_CA.gather(1, labels_C1)[:, 0] + nll_C
                loss += (scales_C * (nll_C + z_loss * log_z_C.square())).sum()
                nll_P[chunk.positions] = nll_C
                if dhidden_PD is not None and dhead_VD is not None:
                    a_C = 1 + 2 * z_loss * log_z_C
                    factors_C1 = (scales_C * a_C)[:, None]
                    d_CA = log_p_CA.exp_().scatter_add_(1, labels_C1, -1 / a_C[:, None]).to(dtype)
                    dhidden_PD[chunk.positions] = (factors_C1 * (d_CA @ head_AD)).to(hidden_PD.dtype)
                    dhead_VD[chunk.start : chunk.stop] += d_CA.T @ (factors_C1 * hidden_CD).to(dtype)
        if dhidden_PD is not None and dhead_VD is not None:
            ctx.save_for_backward(dhidden_PD, dhead_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(nll_P)
        return loss, nll_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden_PD, dhead_VD = ctx.saved_tensors
        return dhidden_PD * gradient, dhead_VD * gradient, *(None,) * 5
