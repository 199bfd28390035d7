"""Sounds of different lengths at once: an EnCodec's own layers on padded rows, each row as if it were alone.

EnCodec's convolutions reflect the end of their input, in every layer: zeros behind a shorter sound would change its
last codes. So each convolution's padding is made at each row's own end. LSTMs look back only: what is behind a row
does not reach it. Into transposed convolutions go zeros behind a row, which add nothing.

Dimension key: B sounds, C channels, N units of a layer's input, W units of padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenizers_mm.encodec_folder import is_plain

MAX_UNITS = 2**18
"""Samples that are worked on at once, padding included, unless one sound has more: they bound the memory."""
MAX_PADDING = 0.1
"""Share of a group that its shortest sound may leave empty."""


@dataclass(frozen=True)
class Rows:
    """Signals of different lengths: row b is `x_BCN[b, :, :lengths_B[b]]`, and zeros follow."""

    x_BCN: Tensor
    lengths_B: Tensor

    @classmethod
    def of(cls, signals: Sequence[Tensor]) -> Rows:
        """Rows of C x N signals."""
        x_BNC = pad_sequence([signal_CN.T for signal_CN in signals], batch_first=True)
        return cls(x_BNC.transpose(1, 2), torch.tensor([s.shape[1] for s in signals], device=x_BNC.device))

    @property
    def mask_BN(self) -> Tensor:
        """True where a row is."""
        return torch.arange(self.x_BCN.shape[2], device=self.x_BCN.device) < self.lengths_B[:, None]


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Places of signals in groups of similar length, longest first.

    >>> grouped([100, 5, 99, 98])
    [[0, 2, 3], [1]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        longest = lengths[groups[-1][0]] if groups else math.inf
        if lengths[place] >= (1 - MAX_PADDING) * longest and (len(groups[-1]) + 1) * longest <= MAX_UNITS:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def can_batch(model: Any) -> bool:
    """False for an EnCodec that works in chunks, has norms over time, or pads otherwise than by reflection."""
    return is_plain(model) and model.config.norm_type == "weight_norm" and model.config.pad_mode == "reflect"


def through(layers: Iterable[Any], rows: Rows) -> Rows:
    """What layers of an EnCodec's encoder or decoder make of each row alone."""
    for layer in layers:
        if isinstance(layer, nn.ELU):
            rows = Rows(layer(rows.x_BCN), rows.lengths_B)
        elif hasattr(layer, "lstm"):
            rows = _kept(layer(rows.x_BCN), rows.lengths_B)
        elif hasattr(layer, "block"):
            shortcut = rows if isinstance(layer.shortcut, nn.Identity) else through([layer.shortcut], rows)
            rows = Rows(shortcut.x_BCN + through(layer.block, rows).x_BCN, rows.lengths_B)
        elif isinstance(layer.conv, nn.ConvTranspose1d):
            rows = _kept(layer(rows.x_BCN), rows.lengths_B * layer.conv.stride[0])
        else:
            rows = _convolved(layer, rows)
    return rows


def _convolved(layer: Any, rows: Rows) -> Rows:
    """An `EncodecConv1d` of rows: ceil(length / stride) units each."""
    stride, total = layer.conv.stride[0], int(layer.padding_total)
    lengths_B = -(-rows.lengths_B // stride)
    if not total:
        return _kept(layer.conv(rows.x_BCN), lengths_B)
    right = 0 if layer.causal else total // 2
    right_B = right + lengths_B * stride - rows.lengths_B
    return _kept(layer.conv(_reflected(rows, total - right, right_B)), lengths_B)


def _reflected(rows: Rows, left: int, right_B: Tensor) -> Tensor:
    """Each row with `left` units of its reflection before it and at least `right_B[b]` behind it.

    A row that is too short to be reflected so far gets zeros first, as `EncodecConv1d._pad1d` does it.
    """
    width = int(right_B.max())
    longest = max(rows.x_BCN.shape[2], max(left, width) + 1)
    x_BCN = nn.functional.pad(rows.x_BCN, (0, longest - rows.x_BCN.shape[2]))
    padded_BCN = nn.functional.pad(nn.functional.pad(x_BCN, (left, 0), mode="reflect"), (0, width))
    # the unit at which a row turns round: its last one, or the last of the zeros that it gets
    turn_B = torch.maximum(rows.lengths_B, right_B.clamp_min(left) + 1) - 1
    place_BW = rows.lengths_B[:, None] + torch.arange(width, device=x_BCN.device)
    source_BW = torch.where(place_BW <= turn_B[:, None], place_BW, 2 * turn_B[:, None] - place_BW).clamp_min(0)
    spread = (-1, x_BCN.shape[1], -1)
    behind_BCW = x_BCN.gather(2, source_BW[:, None].expand(spread))
    return padded_BCN.scatter_(2, (place_BW + left)[:, None].expand(spread), behind_BCW)


def _kept(x_BCN: Tensor, lengths_B: Tensor) -> Rows:
    """Zeros behind each row."""
    rows = Rows(x_BCN[:, :, : int(lengths_B.max())], lengths_B)
    return Rows(rows.x_BCN * rows.mask_BN[:, None], lengths_B)
