"""Where the vokens are: the one place that knows which hidden state belongs to a voken.

It is the state AT the voken (GILL, DreamLLM), not the one that predicts it (MiniGPT-5): the transformer has read the
voken. Training slices here; the sampler keeps the states of the same positions.

Dimension key: B rows, T ids, D width, M voken blocks, N vokens a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizers_mm.errors import DataError


def gather_vokens(states_BTD: Tensor, ids_BT: Tensor, *, first_voken: int, count: int) -> tuple[Tensor, Tensor]:
    """States of every voken block, M x N x D, row by row and from left to right; and the row of each, M.

    >>> ids = torch.tensor([[3, 90, 91, 5], [90, 91, 90, 91]])
    >>> states, rows = gather_vokens(torch.arange(8).reshape(2, 4, 1), ids, first_voken=90, count=2)
    >>> states[:, :, 0].tolist(), rows.tolist()
    ([[1, 2], [4, 5], [6, 7]], [0, 1, 1])

    Raises:
        DataError: vokens that are not whole blocks, 0 to count - 1 in order.
    """
    row_M, place_M = (ids_BT == first_voken).nonzero(as_tuple=True)
    window_MN = place_M[:, None] + torch.arange(count, device=ids_BT.device)
    num_vokens = int(((ids_BT >= first_voken) & (ids_BT < first_voken + count)).sum())
    inside = num_vokens == len(row_M) * count and (not len(row_M) or int(window_MN.max()) < ids_BT.shape[1])
    expected_N = torch.arange(first_voken, first_voken + count, device=ids_BT.device)
    if not inside or (ids_BT[row_M[:, None], window_MN] != expected_N).any():
        raise DataError(f"{num_vokens} vokens in {len(row_M)} blocks: a block is {count} vokens in order")
    return states_BTD[row_M[:, None], window_MN], row_M
