"""A Qwen3 checkpoint reduced to what sampling needs: prefill, step, and the output rows that matter.

It reads the weights of a `Qwen3ForCausalLM` (fused into fewer products) and keeps keys and values in preallocated
memory. Rows stand at different positions; nothing is padded but the cache. transformers' own forward pass is the
reference: same logits, same greedy ids.

Dimension key: B rows, T packed prompt ids, W ids of a window, M packed ids of any of them, D width, H query heads, G
key/value heads, E head width, N cache length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.model.attention import Segments, attend
from tokenizers_mm.codes import IntArray


@dataclass(frozen=True)
class _Layer:
    norm1_D: Tensor
    qkv: Tensor
    q_norm_E: Tensor
    k_norm_E: Tensor
    out: Tensor
    norm2_D: Tensor
    gate_up: Tensor
    down: Tensor


class Cache:
    """Keys and values of every row and layer, and how many of them each row has."""

    def __init__(
        self, num_layers: int, keys_shape_BGNE: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = [torch.zeros(keys_shape_BGNE, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(keys_shape_BGNE, device=device, dtype=dtype) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(keys_shape_BGNE[0], dtype=torch.long, device=device)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows, in this order."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.lengths_B = self.lengths_B.index_select(0, rows)


class Engine:
    """Prefill and steps over the weights of a Qwen3 model.

    Args:
        model: a `Qwen3ForCausalLM`.
        dtype: of weights, activations and cache; fp32 is exact against the reference.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_width, self.eps = config.head_dim, config.rms_norm_eps
        self.max_positions = config.max_position_embeddings
        self.device, self.dtype = model.device, dtype

        def weight(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype)

        self.embed_VD = weight(model.model.embed_tokens.weight)
        self.head_VD = self.embed_VD if config.tie_word_embeddings else weight(model.lm_head.weight)
        self.norm_D = weight(model.model.norm.weight)
        self.layers = [
            _Layer(
                weight(block.input_layernorm.weight),
                torch.cat(
                    [weight(p.weight) for p in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)]
                ),
                weight(block.self_attn.q_norm.weight),
                weight(block.self_attn.k_norm.weight),
                weight(block.self_attn.o_proj.weight),
                weight(block.post_attention_layernorm.weight),
                torch.cat([weight(block.mlp.gate_proj.weight), weight(block.mlp.up_proj.weight)]),
                weight(block.mlp.down_proj.weight),
            )
            for block in model.model.layers
        ]
        # RoPE tables as transformers computes them, so that positions agree bit for bit
        positions = torch.arange(self.max_positions, device=self.device)[None]
        cos, sin = model.model.rotary_emb(self.embed_VD[None, :1], positions)
        self.cos_NE, self.sin_NE = cos[0].to(dtype), sin[0].to(dtype)

    def new_cache(self, num_rows: int, length: int) -> Cache:
        """An empty cache for `num_rows` rows of up to `length` ids."""
        return Cache(len(self.layers), (num_rows, self.num_kv, length, self.head_width), self.device, self.dtype)

    @torch.inference_mode()
    def prefill(self, prompts: list[IntArray], cache: Cache) -> Tensor:
        """Read prompts (one a cache row, of any lengths) in one packed pass; hidden state after each, B x D."""
        lengths = tuple(len(prompt) for prompt in prompts)
        segments = Segments(lengths, self.device)
        ids_T = torch.cat([torch.from_numpy(prompt) for prompt in prompts]).to(self.device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        rows_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)
        x_TD = self.embed_VD[ids_T]
        for index, layer in enumerate(self.layers):
            q_THE, k_TGE, v_TGE = self._qkv(layer, x_TD, positions_T)
            cache.keys[index][rows_T, :, positions_T] = k_TGE
            cache.values[index][rows_T, :, positions_T] = v_TGE
            x_TD = self._rest(layer, x_TD, attend(q_THE, k_TGE, v_TGE, segments))
        cache.lengths_B.copy_(torch.tensor(lengths))
        last_B = torch.tensor(lengths).cumsum(0).to(self.device) - 1
        return _rms_norm(x_TD[last_B], self.norm_D, self.eps)

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Read one id a row; hidden state after it, B x D."""
        positions_B = cache.lengths_B
        rows_B = torch.arange(len(ids_B), device=self.device)
        num_keys = int(positions_B.max()) + 1
        seen_B11N = (torch.arange(num_keys, device=self.device) <= positions_B[:, None])[:, None, None]
        x_BD = self.embed_VD[ids_B.to(self.device)]
        for index, layer in enumerate(self.layers):
            q_BHE, k_BGE, v_BGE = self._qkv(layer, x_BD, positions_B)
            cache.keys[index][rows_B, :, positions_B] = k_BGE
            cache.values[index][rows_B, :, positions_B] = v_BGE
            mixed_BH1E = F.scaled_dot_product_attention(
                q_BHE[:, :, None],
                cache.keys[index][:, :, :num_keys],
                cache.values[index][:, :, :num_keys],
                attn_mask=seen_B11N,
                enable_gqa=True,
            )
            x_BD = self._rest(layer, x_BD, mixed_BH1E[:, :, 0])
        cache.lengths_B = positions_B + 1
        return _rms_norm(x_BD, self.norm_D, self.eps)

    @torch.inference_mode()
    def extend(self, ids_BW: Tensor, cache: Cache, counts_B: Tensor | None = None) -> Tensor:
        """Read W ids a row, each row from its own position on; hidden state after each id, B x W x D.

        Lower `cache.lengths_B` to take ids back: what lies beyond a row's length is never seen, and overwritten.

        Args:
            ids_BW: the window; where a row has fewer ids, anything in their place.
            cache: with room for them.
            counts_B: how many of its ids each row has; all W by default. Hidden states beyond are 0.
        """
        offsets_W = torch.arange(ids_BW.shape[1], device=self.device)
        counts_B = torch.full_like(cache.lengths_B, ids_BW.shape[1]) if counts_B is None else counts_B.to(self.device)
        rows_M, offsets_M = (offsets_W < counts_B[:, None]).nonzero(as_tuple=True)
        positions_BW = cache.lengths_B[:, None] + offsets_W
        positions_M = positions_BW[rows_M, offsets_M]
        num_keys = int(positions_M.max()) + 1
        seen_B1WN = torch.arange(num_keys, device=self.device) <= positions_BW[:, None, :, None]
        x_MD = self.embed_VD[ids_BW.to(self.device)[rows_M, offsets_M]]
        for index, layer in enumerate(self.layers):
            q_MHE, k_MGE, v_MGE = self._qkv(layer, x_MD, positions_M)
            cache.keys[index][rows_M, :, positions_M] = k_MGE
            cache.values[index][rows_M, :, positions_M] = v_MGE
            q_BWHE = q_MHE.new_zeros(*positions_BW.shape, *q_MHE.shape[1:])
            q_BWHE[rows_M, offsets_M] = q_MHE
            mixed_BHWE = F.scaled_dot_product_attention(
                q_BWHE.transpose(1, 2),
                cache.keys[index][:, :, :num_keys],
                cache.values[index][:, :, :num_keys],
                attn_mask=seen_B1WN,
                enable_gqa=True,
            )
            x_MD = self._rest(layer, x_MD, mixed_BHWE.transpose(1, 2)[rows_M, offsets_M])
        cache.lengths_B = cache.lengths_B + counts_B
        hidden_BWD = x_MD.new_zeros(*positions_BW.shape, x_MD.shape[-1])
        hidden_BWD[rows_M, offsets_M] = _rms_norm(x_MD, self.norm_D, self.eps)
        return hidden_BWD

    @torch.inference_mode()
    def logits(self, hidden_BD: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """Scores of the ids in `ranges` only, concatenated, fp32."""
        return torch.cat([hidden_BD @ self.head_VD[start:stop].T for start, stop in ranges], dim=-1).float()

    def _qkv(self, layer: _Layer, x_MD: Tensor, positions_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = F.linear(_rms_norm(x_MD, layer.norm1_D, self.eps), layer.qkv).view(len(x_MD), -1, self.head_width)
        q, k, v = qkv.split([self.num_heads, self.num_kv, self.num_kv], dim=1)
        cos, sin = self.cos_NE[positions_M][:, None], self.sin_NE[positions_M][:, None]
        q = _rotate(_rms_norm(q, layer.q_norm_E, self.eps), cos, sin)
        k = _rotate(_rms_norm(k, layer.k_norm_E, self.eps), cos, sin)
        return q, k, v

    def _rest(self, layer: _Layer, x_MD: Tensor, mixed_MHE: Tensor) -> Tensor:
        x_MD = x_MD + F.linear(mixed_MHE.flatten(1), layer.out)
        gate, up = F.linear(_rms_norm(x_MD, layer.norm2_D, self.eps), layer.gate_up).chunk(2, dim=-1)
        return x_MD + F.linear(F.silu(gate) * up, layer.down)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Qwen3 has it: mean square in fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
