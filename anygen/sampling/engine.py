"""A Qwen3 checkpoint reduced to what sampling needs: prefill, step, extend, and the output rows that matter.

It reads the weights of a `Qwen3ForCausalLM` (`anygen.sampling.weights`) and keeps keys and values in preallocated
memory (`anygen.sampling.cache`). Rows stand at different positions; nothing is padded but the cache. transformers' own
forward pass is the reference: same logits, same greedy ids.

All passes go through the same blocks; they differ in the attention that they hand in. Activations and, on a CPU, the
cache are fp32 whatever the type of the weights: attention of one query over bf16 keys is four times slower there.

Dimension key: B rows, T packed prompt ids, W ids of a window, M packed ids of any of them, D width, H query heads, G
key/value heads, E head width, F pairs of a head, N cache length, X = M 2 G, Q queries that share keys, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.model.attention import Segments, attend
from anygen.sampling.cache import Cache as Cache
from anygen.sampling.cache import bucket, snug
from anygen.sampling.cached_attention import Window, attend_cached, causal_mask, few_queries, unpacked
from anygen.sampling.linear import Linear
from anygen.sampling.weights import Layer, read_layer, rotations
from tokenizers_mm.codes import IntArray

Attention = Callable[[int, Tensor], Tensor]
"""From the number of a layer and its queries, keys and values (M x (H + 2 G) x E, rotated) to M x (H E)."""
_FEWEST_PACKED = 256


class Engine:
    """Passes over the weights of a Qwen3 model.

    Args:
        model: a `Qwen3ForCausalLM`.
        dtype: of the weights; fp32 is exact against the reference, bf16 streams half as many bytes.
        packed: False keeps to torch's public operators.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype = torch.float32, packed: bool = True) -> None:
        config = model.config
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_width = config.head_dim
        self.max_positions = config.max_position_embeddings
        self.device, self.dtype, self._packed = model.device, dtype, packed
        with torch.no_grad():
            self.embed_VD = model.model.embed_tokens.weight.detach()
            self.head_VD = model.lm_head.weight.detach()
            self.norm_D = model.model.norm.weight.detach().float() * math.sqrt(config.hidden_size)
            self.layers: list[Layer] = [
                read_layer(block, self.num_heads, self.num_kv, dtype, packed=packed) for block in model.model.layers
            ]
            self._turns_N1F = rotations(model, self.max_positions)
        eps = torch.tensor([config.hidden_size, config.head_dim], device=self.device) * config.rms_norm_eps
        self._floor, self._head_floor = eps.float().sqrt()  # an RMSNorm's epsilon, as a length
        self._cache_dtype = dtype if self.device.type == "cuda" else torch.float32
        self.static_steps: dict[tuple[int, int, bool], Any] = {}
        """Static steps that no call uses, by rows, length and filters (`anygen.sampling.static_sampler`)."""
        self._heads: dict[tuple[int, int], Linear] = {}

    def new_cache(self, num_rows: int, length: int) -> Cache:
        """An empty cache for `num_rows` rows of up to `length` ids."""
        like = torch.empty(0, device=self.device, dtype=self._cache_dtype)
        first = min(length, self.room(1)) if self.device.type == "cpu" else length
        return Cache(len(self.layers), num_rows, first, (self.num_kv, self.head_width), like, ahead=length)

    def room(self, length: int) -> int:
        """The length that a cache should have for rows of so many ids."""
        return (snug if self.device.type == "cpu" else bucket)(length, self.max_positions)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[IntArray], cache: Cache, rows: Sequence[int] | None = None) -> Tensor:
        """Read prompts (one a cache row, of any lengths) in one packed pass; hidden state after each, B x D.

        Args:
            prompts: ids.
            cache: with room for them.
            rows: which rows of the cache take them; the first ones by default.
        """
        lengths = tuple(len(prompt) for prompt in prompts)
        segments = Segments(lengths, self.device)
        self._keys(cache, max(lengths))
        lengths_B = torch.tensor(lengths)
        rows_B = torch.arange(len(lengths)) if rows is None else torch.tensor(rows, dtype=torch.long)
        ids_T = torch.cat([torch.from_numpy(prompt) for prompt in prompts])
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        positions_T = positions_T.to(self.device)
        rows_T = torch.repeat_interleave(rows_B, lengths_B).to(self.device)
        slots_X = (cache.first_slots_RP[rows_T] + positions_T[:, None]).flatten()

        def attention(layer: int, qkv_THE: Tensor) -> Tensor:
            cache.write(layer, slots_X, qkv_THE[:, self.num_heads :])
            wide = qkv_THE.to(self._cache_dtype)
            q_THE, k_TGE, v_TGE = wide.split([self.num_heads, self.num_kv, self.num_kv], dim=1)
            return attend(q_THE, k_TGE, v_TGE, segments).flatten(1)

        x_TD = self._blocks(ids_T.to(self.device), self._turns_N1F[positions_T], attention)
        cache.lengths_B[rows_B.to(self.device)] = lengths_B.to(self.device)
        return self._norm(x_TD[(lengths_B.cumsum(0) - 1).to(self.device)])

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Read one id a row; hidden state after it, B x D. The cache is given room for it where it has none."""
        positions_B = cache.lengths_B
        lengths = positions_B.tolist()
        num_keys = self._keys(cache, max(lengths) + 1)
        is_full = min(lengths) + 1 == num_keys
        mask_B1QN = None if is_full else causal_mask(positions_B[:, None], num_keys, self._cache_dtype)
        hidden_BD = self.step_at(ids_B.to(self.device), positions_B, cache, mask_B1QN, num_keys)
        cache.lengths_B = positions_B + 1
        return hidden_BD

    def step_at(
        self, ids_B: Tensor, positions_B: Tensor, cache: Cache, mask_B1QN: Tensor | None, num_keys: int
    ) -> Tensor:
        """A step at given positions that leaves `cache.lengths_B` alone; its shapes depend on its arguments' only."""
        slots_X = (cache.first_slots_RP[: len(ids_B)] + positions_B[:, None]).flatten()
        turns_B1F = self._turns_N1F.index_select(0, positions_B)
        window = self._window(slots_X, mask_B1QN, num_keys, (len(ids_B), 1))
        return self._norm(self._blocks(ids_B, turns_B1F, self._cached(cache, window)))

    @torch.inference_mode()
    def extend(self, ids_BW: Tensor, cache: Cache, counts_B: Tensor | None = None) -> Tensor:
        """Read W ids a row, each row from its own position on; hidden state after each id, B x W x D.

        Lower `cache.lengths_B` to take ids back: what lies beyond a row's length is never seen, and overwritten.

        Args:
            ids_BW: the window; where a row has fewer ids, anything in their place.
            cache: is given room for them where it has none.
            counts_B: how many of its ids each row has, 0 included; all W by default. Hidden states beyond are 0.
        """
        ids_BW = ids_BW.to(self.device)
        num_rows, width = ids_BW.shape
        offsets_W = torch.arange(width, device=self.device)
        positions_BW = cache.lengths_B[:, None] + offsets_W
        counts_B = torch.full_like(cache.lengths_B, width) if counts_B is None else counts_B.to(self.device)
        spots = None
        if bool((counts_B < width).any()):
            rows_M, offsets_M = (offsets_W < counts_B[:, None]).nonzero(as_tuple=True)
            spots = (rows_M, offsets_M)

        def packed(x_BW: Tensor) -> Tensor:
            return x_BW.flatten() if spots is None else x_BW[spots]

        positions_M = packed(positions_BW)
        num_keys = self._keys(cache, int(positions_M.max()) + 1)
        slots_X = cache.first_slots_RP[:num_rows, None] + positions_BW[..., None]
        slots_X = (slots_X if spots is None else slots_X[spots]).flatten()
        mask_B1QN = causal_mask(positions_BW.repeat(1, self.num_heads // self.num_kv), num_keys, self._cache_dtype)
        turns_M1F = self._turns_N1F[positions_M]
        window = self._window(slots_X, mask_B1QN, num_keys, (num_rows, width), spots)
        x_MD = self._blocks(packed(ids_BW), turns_M1F, self._cached(cache, window))
        cache.lengths_B = cache.lengths_B + counts_B
        return unpacked(self._norm(x_MD), window)

    @torch.inference_mode()
    def logits(self, hidden_BD: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        """Scores of the ids in `ranges` only, concatenated, fp32."""
        parts = [self._head(start, stop)(hidden_BD).float() for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _head(self, start: int, stop: int) -> Linear:
        """Rows of the output matrix; the many are packed when they are first asked for, and kept."""
        if stop - start < _FEWEST_PACKED:
            return Linear(self.head_VD[start:stop], self.dtype, packed=False)
        if (start, stop) not in self._heads:
            self._heads[start, stop] = Linear(self.head_VD[start:stop], self.dtype, packed=self._packed)
        return self._heads[start, stop]

    # -- the blocks

    def _blocks(self, ids_M: Tensor, turns_M1F: Tensor, attention: Attention) -> Tensor:
        x_MD = self.embed_VD.index_select(0, ids_M).float()
        for index, layer in enumerate(self.layers):
            qkv_MHE = self._rotated(layer, layer.qkv(_unit(x_MD, self._floor)).float(), turns_M1F)
            x_MD = layer.out.add(attention(index, qkv_MHE), x_MD)
            gate_MO, up_MO = layer.gate_up(_unit(x_MD, self._floor)).chunk(2, dim=-1)
            x_MD = layer.down.add(F.silu(gate_MO).mul_(up_MO), x_MD)
        return x_MD

    def _rotated(self, layer: Layer, qkv: Tensor, turns_M1F: Tensor) -> Tensor:
        """QK-norm and RoPE, written over the queries and keys."""
        qkv_MHE = qkv.view(len(qkv), -1, self.head_width)
        qk_MHE = qkv_MHE[:, : self.num_heads + self.num_kv]
        normed_MHE = _unit(qk_MHE, self._head_floor).mul_(layer.qk_norm_HE)
        torch.mul(_as_complex(normed_MHE), turns_M1F, out=_as_complex(qk_MHE))
        return qkv_MHE

    def _norm(self, x_MD: Tensor) -> Tensor:
        return _unit(x_MD, self._floor).mul_(self.norm_D)

    # -- attention over the cache

    def _keys(self, cache: Cache, longest: int) -> int:
        """How many positions attention looks at, room made for them; on a CPU all there are, so without gaps."""
        if longest > cache.capacity[1]:
            cache.reserve(0, self.room(longest))
        return min(cache.capacity[1], self.room(longest)) if self.device.type == "cpu" else longest

    def _window(
        self,
        slots_X: Tensor,
        mask_B1QN: Tensor | None,
        num_keys: int,
        shape: tuple[int, int],
        spots: tuple[Tensor, Tensor] | None = None,
    ) -> Window:
        mask_bNQ = None
        if self.device.type == "cpu":
            num_queries = shape[1] * (self.num_heads // self.num_kv)
            mask_bNQ = few_queries(mask_B1QN, num_keys, shape[0], self.num_kv, num_queries)
        return Window(slots_X, mask_B1QN, num_keys, shape, mask_bNQ, spots)

    def _cached(self, cache: Cache, window: Window) -> Attention:
        """Attention of a step or a window: write the new keys and values, then look at the row's own."""
        heads = cache.heads(window.shape[0], window.num_keys)

        def attention(layer: int, qkv_MHE: Tensor) -> Tensor:
            cache.write(layer, window.slots_X, qkv_MHE[:, self.num_heads :])
            return self.attend_cached(qkv_MHE[:, : self.num_heads], heads[layer], window)

        return attention

    def attend_cached(self, q_MHE: Tensor, keys_and_values: tuple[Tensor, Tensor], window: Window) -> Tensor:
        """`anygen.sampling.cached_attention`; M x (H E)."""
        return attend_cached(q_MHE, keys_and_values, window)


def _unit(x: Tensor, floor: Tensor) -> Tensor:
    """RMSNorm without its weight and root of the width: three cheap operators (`F.rms_norm` is five on a CPU)."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


def _as_complex(x_MHE: Tensor) -> Tensor:
    return torch.view_as_complex(x_MHE.unflatten(-1, (-1, 2)))
