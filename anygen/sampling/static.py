"""A whole step, choice included, over memory that stays where it is: what a CUDA graph can replay.

Everything that differs from row to row is a tensor: which ids are allowed, temperature, filters, guidance, the sample's
key. So one graph serves every mixture of modality states; it is captured once for a number of rows and a length of the
cache. On a CPU the same function runs without a graph, which is how it is tested.

A step writes the ids that it chose where the next step reads them, so steps whose allowed ids stay the same (the codes
of a picture) follow one another without the host.

Dimension key: B rows, K ranges, V vocabulary, S steps, D width, N cache length.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from anygen.grammar import Ranges
from anygen.sampling.cache import Cache
from anygen.sampling.cached_attention import causal_mask
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.engine import Engine
from anygen.sampling.race import waits

MAX_RANGES = 16
MAX_STEPS = 8
"""Steps between two looks of the host: a stream tells its events that late."""


class StaticStep:
    """Static buffers of B rows, and the step over them.

    Args:
        engine: that computes.
        num_rows: B.
        length: N.
        filters: with top-k, top-p and min-p, which sort the vocabulary.
    """

    def __init__(self, engine: Engine, num_rows: int, length: int, *, filters: bool) -> None:
        self.engine, self.filters, self.length = engine, filters, length
        self.cache: Cache = engine.new_cache(num_rows, length)
        self.cache.reserve(num_rows, length)

        def buffer(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=engine.device)

        self.ids_B, self.positions_B, self.keys_B, self.places_B = (buffer(num_rows) for _ in range(4))
        self.owners_B, self.twins_B = buffer(num_rows), buffer(num_rows)
        self.is_active_B = buffer(num_rows)
        self.ranges_BK2 = buffer(num_rows, MAX_RANGES, 2)
        self.options_5B = buffer(5, num_rows, dtype=torch.float64)
        self.step_1, self.history_SB = buffer(1), buffer(MAX_STEPS, num_rows)
        self.hidden_BD = buffer(num_rows, engine.norm_D.shape[0], dtype=torch.float32)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._may_capture = engine.device.type == "cuda"
        self._ids_V = torch.arange(len(engine.head_VD), device=engine.device)

    @torch.inference_mode()
    def body(self) -> None:
        """Read the ids, then choose and write the next ones."""
        mask_B1QN = causal_mask(self.positions_B[:, None], self.length, self.cache.layers_2RGNE[0].dtype)
        hidden_BD = self.engine.step_at(self.ids_B, self.positions_B, self.cache, mask_B1QN, self.length)
        self.hidden_BD.copy_(hidden_BD)
        self.positions_B.add_(self.is_active_B)
        self._choose()

    def _choose(self) -> None:
        logits_BV = self.engine.logits(self.hidden_BD, ((0, len(self._ids_V)),))
        temperature, top_k, top_p, min_p, scale = self.options_5B[:, :, None]
        logits_BV = torch.lerp(logits_BV[self.twins_B], logits_BV, scale.float())
        starts_BK1, stops_BK1 = self.ranges_BK2[:, :, 0, None], self.ranges_BK2[:, :, 1, None]
        is_allowed_BV = ((starts_BK1 <= self._ids_V) & (self._ids_V < stops_BK1)).any(1)
        logits_BV = logits_BV.masked_fill(~is_allowed_BV, -torch.inf)
        p_BV = (logits_BV.double() / temperature.clamp(min=1e-9)).softmax(-1)
        if self.filters:
            p_BV = _filtered(p_BV, top_k, top_p, min_p)
        raced_B = (p_BV / waits(self.keys_B, self.places_B, self._ids_V)).argmax(-1)
        chosen_B = torch.where(temperature[:, 0] == 0, logits_BV.argmax(-1), raced_B)
        self.ids_B.copy_(chosen_B[self.owners_B])
        self.history_SB.index_copy_(0, self.step_1, self.ids_B[None])
        self.places_B.add_(self.is_active_B)
        self.step_1.add_(1)

    def set_row(self, row: int, ranges: Ranges, options: SamplingOptions) -> None:
        """What the row may choose from next, and how."""
        padded = [*ranges, *[(0, 0)] * (MAX_RANGES - len(ranges))]
        self.ranges_BK2[row] = torch.tensor(padded, device=self.ids_B.device)
        numbers = (options.temperature, options.top_k, options.top_p, options.min_p, options.guidance_scale)
        self.options_5B[:, row] = torch.tensor(numbers, dtype=torch.float64, device=self.ids_B.device)

    def run(self, num_steps: int) -> list[list[int]]:
        """So many steps; the ids that each row chose in each of them, S x B."""
        assert 1 <= num_steps <= MAX_STEPS, num_steps
        self.step_1.zero_()
        for _ in range(num_steps):
            self._replay()
        return self.history_SB[:num_steps].tolist()

    @torch.inference_mode()
    def choose_first(self, hidden_BD: Tensor, rows: Sequence[int]) -> list[int]:
        """Choices of rows that have read their prompts; the others stay as they are."""
        kept = [buffer.clone() for buffer in (self.ids_B, self.places_B)]
        self.step_1.zero_()
        self.hidden_BD[list(rows)] = hidden_BD
        self._choose()
        others = [row for row in range(len(kept[0])) if row not in set(rows)]
        for buffer, before in zip((self.ids_B, self.places_B), kept, strict=True):
            buffer[others] = before[others]
        chosen = self.history_SB[0].tolist()
        return [chosen[row] for row in rows]

    def _replay(self) -> None:
        if self._graph is None and self._may_capture:
            self._may_capture = False
            try:
                self._capture()
            except RuntimeError as error:  # an operator of this torch that no graph takes: the body is exact
                warnings.warn(f"sampling without a CUDA graph, many times slower: {error}", stacklevel=2)
        if self._graph is None:
            self.body()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        """Warm up on a side stream, put back what that changed, and record."""
        state = (self.ids_B, self.positions_B, self.places_B, self.step_1)
        before = [buffer.clone() for buffer in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.body()
        for buffer, old in zip(state, before, strict=True):
            buffer.copy_(old)
        self._graph = graph


def _filtered(p_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor) -> Tensor:
    """`choose.probabilities` with options that differ from row to row."""
    size = p_BV.shape[-1]
    k_B1 = torch.where(top_k_B1 > 0, top_k_B1, size).clamp(max=size).long()
    kth_B1 = p_BV.sort(dim=-1, descending=True).values.gather(-1, k_B1 - 1)
    p_BV = p_BV * (p_BV >= kth_B1)
    ordered_BV, index_BV = (p_BV / p_BV.sum(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
    is_in_BV = (ordered_BV.cumsum(-1) - ordered_BV < top_p_B1) | (top_p_B1 >= 1)
    p_BV = p_BV * torch.zeros_like(is_in_BV).scatter(-1, index_BV, is_in_BV)
    return p_BV * (p_BV >= min_p_B1 * p_BV.max(-1, keepdim=True).values)
