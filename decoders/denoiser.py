"""`FlowTransformer`: noisy data, time and a grid of conditions to denoised data.

A transformer over patches (DiT, arXiv 2212.09748) in which the condition is one feature a patch, ADDED to the patch's
own: aligned codes are learnt at once, where cross-attention first has to find out which code is whose (measured). One
modulation of the time is shared by all blocks, each with a table of its own (adaLN-single, PixArt, arXiv 2310.00426).

Dimension key: B samples, C H W data, P patches, D width, h heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenizers_mm import compat  # noqa: F401  before diffusers

_FREQUENCIES = 64


class Block(nn.Module):
    """Pre-norm attention (RMS-normed queries and keys) and MLP, each scaled, shifted and gated by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.table_6D = nn.Parameter(torch.randn(6, width) * width**-0.5)

    def forward(self, x_BPD: Tensor, time_B6D: Tensor) -> Tensor:
        """One block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (time_B6D + self.table_6D)[:, :, None].unbind(1)
        x_BPD = x_BPD + gate1 * self._attend(_norm(x_BPD) * (1 + scale1) + shift1)
        hidden = _norm(x_BPD) * (1 + scale2) + shift2
        return x_BPD + gate2 * self.down(F.gelu(self.up(hidden), approximate="tanh"))

    def _attend(self, x_BPD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BPD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FlowTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The denoiser. Keyword arguments only: positional ones are lost by `from_config` (diffusers #14460).

    Args:
        channels: C.
        size: H, W.
        patch: rows and columns of a patch.
        width: D.
        depth: blocks.
        heads: of attention.
        condition_dim: features of the condition.
    """

    @register_to_config
    def __init__(
        self,
        *,
        channels: int = 3,
        size: tuple[int, int] = (64, 64),
        patch: tuple[int, int] = (8, 8),
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        condition_dim: int = 64,
    ) -> None:
        super().__init__()
        self.grid_hw = (size[0] // patch[0], size[1] // patch[1])
        self.patch = (patch[0], patch[1])
        inside = channels * patch[0] * patch[1]
        self.embed, self.condition = nn.Linear(inside, width), nn.Linear(condition_dim, width)
        self.positions_PD = nn.Parameter(torch.randn(self.grid_hw[0] * self.grid_hw[1], width) * 0.02)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_2D = nn.Parameter(torch.zeros(2, width))
        self.out = nn.Linear(width, inside)
        for zero in (self.modulation, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid_hw[0] * self.grid_hw[1]

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition_BPK: Tensor) -> Tensor:
        """Denoised data, B x C x H x W."""
        rows, columns = self.grid_hw
        patches = x_BCHW.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        x_BPD = self.embed(patches.flatten(3).flatten(1, 2)) + self.positions_PD + self.condition(condition_BPK)
        time_BD = self.time(_waves(t_B).to(x_BPD.dtype))
        time_B6D = self.modulation(F.silu(time_BD)).unflatten(-1, (6, -1))
        for block in self.blocks:
            x_BPD = block(x_BPD, time_B6D)
        shift, scale = (time_BD[:, None] + self.final_2D)[:, :, None].unbind(1)
        pixels = self.out(_norm(x_BPD) * (1 + scale) + shift)
        pixels = pixels.unflatten(-1, (-1, *self.patch)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
        return pixels.flatten(4).flatten(2, 3)


def _waves(t_B: Tensor) -> Tensor:
    rates = torch.exp(-math.log(1e4) * torch.arange(_FREQUENCIES, device=t_B.device) / _FREQUENCIES)
    angles = 1000.0 * t_B.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _norm(x: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
