"""The weights of a `Qwen3ForCausalLM`, rearranged for few and fast operators.

- The products for queries, keys and values are one, those for gate and up are one.
- RMSNorm before a product divides by the root mean square only: its weight is folded into the product.
- The two halves of a head that RoPE turns stand side by side, so that turning is one complex product. Scores do not
  change: queries and keys are permuted alike.

Dimension key: D width, H query heads, G key/value heads, E head width, F pairs of a head (E / 2), N positions, V
vocabulary, M rows, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anygen.sampling.linear import Linear


@dataclass(frozen=True)
class Layer:
    """One block."""

    qkv: Linear
    qk_norm_HE: Tensor
    """Weights of QK-norm, times root E, for the H query heads and then the G key heads."""
    out: Linear
    gate_up: Linear
    down: Linear

    @property
    def products(self) -> tuple[Linear, ...]:
        """All its products."""
        return self.qkv, self.out, self.gate_up, self.down


def read_layer(block: Any, num_heads: int, num_kv: int, dtype: torch.dtype, *, packed: bool) -> Layer:
    """A `Qwen3DecoderLayer` rearranged."""
    attention, mlp = block.self_attn, block.mlp
    width = attention.q_norm.weight.shape[0]
    pairs = torch.arange(width, device=attention.q_norm.weight.device).view(2, -1).T.flatten()  # 0, E/2, 1, E/2+1, ...

    def turned(weight: Tensor, heads: int) -> Tensor:
        return _wide(weight).view(heads, width, -1)[:, pairs].flatten(0, 1)

    qkv = [
        turned(attention.q_proj.weight, num_heads),
        turned(attention.k_proj.weight, num_kv),
        _wide(attention.v_proj.weight),
    ]
    gate_up = [_wide(mlp.gate_proj.weight), _wide(mlp.up_proj.weight)]
    norms = [_wide(attention.q_norm.weight)[pairs].expand(num_heads, -1)]
    norms += [_wide(attention.k_norm.weight)[pairs].expand(num_kv, -1)]
    return Layer(
        Linear(_folded(torch.cat(qkv), block.input_layernorm.weight), dtype, packed=packed),
        torch.cat(norms) * math.sqrt(width),
        Linear(attention.o_proj.weight, dtype, packed=packed),
        Linear(_folded(torch.cat(gate_up), block.post_attention_layernorm.weight), dtype, packed=packed),
        Linear(mlp.down_proj.weight, dtype, packed=packed),
    )


def rotations(model: Any, num_positions: int) -> Tensor:
    """RoPE as complex numbers, N x 1 x F, from transformers' own tables."""
    weight = model.model.embed_tokens.weight
    positions = torch.arange(num_positions, device=weight.device)[None]
    cos_1NE, sin_1NE = model.model.rotary_emb(weight[None, :1].float(), positions)
    half = cos_1NE.shape[-1] // 2
    return torch.complex(cos_1NE[0, :, :half], sin_1NE[0, :, :half])[:, None]


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().float()


def _folded(weight_OD: Tensor, norm_D: Tensor) -> Tensor:
    """Takes x over its length instead of x over its root mean square."""
    return weight_OD * (_wide(norm_D) * math.sqrt(weight_OD.shape[1]))
