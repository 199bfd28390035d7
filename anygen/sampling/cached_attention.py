"""Attention of a step or a window over the cache, and where its ids stand.

Queries that share keys stand under one another, so that nothing is repeated for them. On a CPU a few queries a head are
two batched products and a softmax: SDPA takes twice as long for them. More queries, and a GPU, take SDPA.

Dimension key: B rows, W ids of a window, M packed ids of any of them, H query heads, G key/value heads, R = H / G, E
head width, Q = R W queries that share keys, N keys, b = B G, P = 2 G, X = M P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_QUERIES = 8
"""From here on SDPA is as fast on a CPU (benchmarks/README.md)."""


@dataclass(frozen=True)
class Window:
    """Where the ids of a step or a window stand, in the cache and among the rows."""

    slots_X: Tensor
    """Of the keys and values of each id (`Cache.first_slots_RP`)."""
    mask_B1QN: Tensor | None
    """0 where a query may look, minus infinity elsewhere; None where it may look everywhere."""
    num_keys: int
    shape: tuple[int, int]
    """B x W."""
    mask_bNQ: Tensor | None = None
    """The mask once more, for the way of few queries; None takes the other way."""
    spots: tuple[Tensor, Tensor] | None = None
    """Row and offset of each id, where rows have different numbers of ids."""


def few_queries(mask_B1QN: Tensor | None, num_keys: int, num_rows: int, num_kv: int, num_queries: int) -> Tensor | None:
    """`Window.mask_bNQ` where that is the faster way, on a CPU; built once for all layers."""
    if num_queries >= _FEW_QUERIES:
        return None
    if mask_B1QN is None:
        return torch.zeros(num_rows * num_kv, num_keys, num_queries)
    mask_BGNQ = mask_B1QN.mT.expand(-1, num_kv, -1, -1)
    return mask_BGNQ.reshape(-1, *mask_BGNQ.shape[2:])


def attend_cached(q_MHE: Tensor, keys_and_values: tuple[Tensor, Tensor], window: Window) -> Tensor:
    """M x (H E), over keys and values of the rows, b x N x E."""
    k_bNE, v_bNE = keys_and_values
    num_rows, width = window.shape
    if width == 1:
        q_bQE = q_MHE.reshape(len(k_bNE), -1, k_bNE.shape[-1])
    else:
        q_BWGRE = unpacked(q_MHE, window).unflatten(2, (len(k_bNE) // num_rows, -1))
        q_bQE = q_BWGRE.permute(0, 2, 3, 1, 4).reshape(len(k_bNE), -1, k_bNE.shape[-1])
    if window.mask_bNQ is None:
        q_bQE, k_bNE, v_bNE = (x.unflatten(0, (num_rows, -1)) for x in (q_bQE.to(k_bNE.dtype), k_bNE, v_bNE))
        mixed = F.scaled_dot_product_attention(q_bQE, k_bNE, v_bNE, attn_mask=window.mask_B1QN)
    else:
        mixed = _attend_few(q_bQE, k_bNE, v_bNE, window.mask_bNQ)
    if width == 1:
        return mixed.reshape(num_rows, -1)
    mixed_BGRWE = mixed.reshape(num_rows, -1, q_BWGRE.shape[3], width, k_bNE.shape[-1])
    mixed_BWH = mixed_BGRWE.permute(0, 3, 1, 2, 4).reshape(num_rows, width, -1)
    return mixed_BWH.flatten(0, 1) if window.spots is None else mixed_BWH[window.spots]


def _attend_few(q_bQE: Tensor, k_bNE: Tensor, v_bNE: Tensor, mask_bNQ: Tensor) -> Tensor:
    """Keys times queries, in this order: the other one, and SDPA, read the keys at half the speed."""
    scores_bNQ = torch.baddbmm(mask_bNQ, k_bNE, q_bQE.mT, alpha=q_bQE.shape[-1] ** -0.5)
    return torch.bmm(scores_bNQ.mT.contiguous().softmax(-1), v_bNE)


def causal_mask(positions_BQ: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """A query looks at its own position and before; B x 1 x Q x N."""
    hidden_BQN = torch.arange(num_keys, device=positions_BQ.device) > positions_BQ[..., None]
    return torch.zeros_like(hidden_BQN, dtype=dtype).masked_fill_(hidden_BQN, -torch.inf)[:, None]


def unpacked(x_MX: Tensor, window: Window) -> Tensor:
    """B x W x ..., 0 where a row has no id."""
    if window.spots is None:
        return x_MX.unflatten(0, window.shape)
    x_BWX = x_MX.new_zeros(*window.shape, *x_MX.shape[1:])
    x_BWX[window.spots] = x_MX
    return x_BWX
