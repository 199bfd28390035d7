"""Attention over packed segments in plain formulas, forward and backward: what every kernel is held to.

softmax(s q k') v for one segment after another, in fp32 or wider. The backward is the one of FlashAttention (arXiv
2205.14135, appendix B.4): the probabilities come back from the log of their denominator.

Dimension key: T packed ids, H heads, D head width, N offsets, L ids of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


class Reference:
    """The kernel that runs everywhere; all heads have keys and values of their own."""

    name = "plain torch"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, offsets_N: Tensor, max_length: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output, T x H x D, and log-sum-exp of the scores, H x T."""
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse_HT = q_THD.new_empty((q_THD.shape[1], len(q_THD)), dtype=wide(q_THD.dtype))
        for span in _spans(offsets_N):
            with torch.autocast(q_THD.device.type, enabled=False):  # it would narrow the products
                q_HLD, k_HLD, v_HLD = (_heads_first(x_THD[span]) for x_THD in (q_THD, k_THD, v_THD))
                scores_HLL = _scores(q_HLD, k_HLD, scale)
                lse_HT[:, span] = scores_HLL.logsumexp(-1)
                out_THD[span] = (scores_HLL.softmax(-1) @ v_HLD).transpose(0, 1).to(q_THD.dtype)
        return out_THD, lse_HT

    def backward(
        self,
        gradient_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor,
        lse_HT: Tensor,
        offsets_N: Tensor,
        max_length: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `q_THD`, `k_THD` and `v_THD`."""
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_THD, v_THD)]
        for span in _spans(offsets_N):
            with torch.autocast(q_THD.device.type, enabled=False):
                q_HLD, k_HLD, v_HLD = (_heads_first(x_THD[span]) for x_THD in (q_THD, k_THD, v_THD))
                out_HLD, do_HLD = _heads_first(out_THD[span]), _heads_first(gradient_THD[span])
                p_HLL = (_scores(q_HLD, k_HLD, scale) - lse_HT[:, span, None]).exp()
                dp_HLL = do_HLD @ v_HLD.transpose(1, 2)
                ds_HLL = p_HLL * (dp_HLL - (do_HLD * out_HLD).sum(-1, keepdim=True)) * scale
                parts = (ds_HLL @ k_HLD, ds_HLL.transpose(1, 2) @ q_HLD, p_HLL.transpose(1, 2) @ do_HLD)
            for gradient, part_HLD in zip(gradients, parts, strict=True):
                gradient[span] = part_HLD.transpose(0, 1).to(gradient.dtype)
        dq_THD, dk_THD, dv_THD = gradients
        return dq_THD, dk_THD, dv_THD


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _spans(offsets_N: Tensor) -> Iterator[slice]:
    for start, stop in pairwise(offsets_N.tolist()):
        if start < stop:
            yield slice(start, stop)


def _heads_first(x_LHD: Tensor) -> Tensor:
    return x_LHD.transpose(0, 1).to(wide(x_LHD.dtype))


def _scores(q_HLD: Tensor, k_HLD: Tensor, scale: float) -> Tensor:
    scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * scale
    is_later_LL = torch.ones(scores_HLL.shape[1:], dtype=torch.bool, device=scores_HLL.device).triu(1)
    return scores_HLL.masked_fill(is_later_LL, -torch.inf)
