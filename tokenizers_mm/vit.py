"""A plain pre-norm transformer over a grid of tokens: the VQ-KD encoder, its decoder and the pixel head.

Positions are fixed 2-D sines (MoCo v3, arXiv 2104.02057), so any grid works without interpolation.

Dimension key: B pictures, N = H x W grid cells in row order, D width, E heads, P pixels a side of one patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention and MLP, each behind a LayerNorm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to the same."""
        num_pictures, num_cells, width = x_BND.shape
        qkv = self.qkv(self.norm1(x_BND)).view(num_pictures, num_cells, 3, self.num_heads, -1)
        q_BEND, k_BEND, v_BEND = qkv.permute(2, 0, 3, 1, 4)
        mixed_BEND = mix(q_BEND, k_BEND, v_BEND)
        x_BND = x_BND + self.out(mixed_BEND.transpose(1, 2).reshape(num_pictures, num_cells, width))
        return x_BND + self.mlp(self.norm2(x_BND))


def mix(q_BEND: Tensor, k_BEND: Tensor, v_BEND: Tensor) -> Tensor:
    """Full attention. On a CPU in training as plain products: SDPA's CPU backward is 1.7x slower on grids of 64."""
    if q_BEND.device.type == "cpu" and q_BEND.requires_grad:
        scores = (q_BEND * q_BEND.shape[-1] ** -0.5) @ k_BEND.transpose(-1, -2)
        return scores.softmax(dim=-1).to(v_BEND.dtype) @ v_BEND
    return F.scaled_dot_product_attention(q_BEND, k_BEND, v_BEND)


class Transformer(nn.Module):
    """`depth` blocks over a grid of tokens, positions added first, a LayerNorm last."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_initialise)

    def forward(self, x_BND: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """B x N x D to the same."""
        x_BND = x_BND + positions(grid_hw, x_BND.shape[-1], x_BND.device)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.norm(x_BND)


class LocalBlocks(nn.Module):
    """`depth` residual MLPs on every vector alone, a LayerNorm last; no positions: equal vectors stay equal."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_initialise)

    def forward(self, x_BND: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """B x N x D to the same."""
        for block in self.blocks:
            x_BND = x_BND + block(x_BND)
        normed: Tensor = self.norm(x_BND)
        return normed


class PatchEncoder(nn.Module):
    """Pictures to one vector a patch, which sees the whole picture, or its own pixels and `margin_px` around them."""

    def __init__(self, width: int, depth: int, num_heads: int, patch_px: int, margin_px: int | None = None) -> None:
        super().__init__()
        self.patch_px, self.margin_px = patch_px, margin_px
        self.embed = nn.Linear(3 * (patch_px + 2 * (margin_px or 0)) ** 2, width)
        self.transformer = Transformer(width, depth, num_heads) if margin_px is None else LocalBlocks(width, depth)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] to B x N x D."""
        grid_hw = (pixels_BCHW.shape[2] // self.patch_px, pixels_BCHW.shape[3] // self.patch_px)
        patches_BNX = windows(pixels_BCHW * 2 - 1, self.patch_px, self.margin_px or 0)
        states_BND: Tensor = self.transformer(self.embed(patches_BNX), grid_hw)
        return states_BND


def to_patches(pixels_BCHW: Tensor, patch_px: int) -> Tensor:
    """Pictures as B x N x (C P P), patches in row order; sides must be multiples of `patch_px`."""
    return F.pixel_unshuffle(pixels_BCHW, patch_px).flatten(2).transpose(1, 2)


def windows(pixels_BCHW: Tensor, patch_px: int, margin_px: int) -> Tensor:
    """Patches with `margin_px` around each, the picture's edge repeated outside: B x N x (C S S)."""
    if not margin_px:
        return to_patches(pixels_BCHW, patch_px)
    padded = F.pad(pixels_BCHW, (margin_px,) * 4, mode="replicate")
    return F.unfold(padded, patch_px + 2 * margin_px, stride=patch_px).transpose(1, 2)


def from_patches(patches_BNX: Tensor, grid_hw: tuple[int, int], patch_px: int) -> Tensor:
    """The inverse of `to_patches`."""
    return F.pixel_shuffle(patches_BNX.transpose(1, 2).unflatten(2, grid_hw), patch_px)


def check_width(width: int, num_heads: int) -> None:
    """Raises ValueError where a transformer cannot have this width."""
    if width % num_heads or width % 4:
        raise ValueError(f"width={width} must be a multiple of num_heads={num_heads} and of 4")


def positions(grid_hw: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Fixed sines of row and column, N x D; D must be a multiple of 4."""
    assert width % 4 == 0, f"width {width} is not a multiple of 4"
    rows, columns = torch.meshgrid(torch.arange(grid_hw[0]), torch.arange(grid_hw[1]), indexing="ij")
    rates = 1.0 / 10_000 ** (torch.arange(width // 4) / (width // 4))
    angles = [axis.reshape(-1, 1) * rates for axis in (rows, columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).to(device)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
