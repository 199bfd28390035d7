"""Sampling by static steps: the sampler of a GPU, where launching kernels one by one takes longer than they do.

The ids are those of `anygen.sampling.sampler.sample`: the same waits, the same grammar. A row that is done is given to
the next waiting sample. Steps are kept by the engine for later calls, taken out while they are in use.

Dimension key: S steps, B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from anygen.sampling.cache import bucket
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.engine import Engine
from anygen.sampling.race import draw_key
from anygen.sampling.static import MAX_RANGES, MAX_STEPS, StaticStep
from tokenizers_mm.codes import IntArray

if TYPE_CHECKING:
    from anygen.sampling.sampler import SampleState

_IDLE = SamplingOptions(temperature=0.0)
Pairs = list[tuple[int, int]]


def fits(states: Sequence[SampleState]) -> bool:
    """True where static steps can do it: without repetition penalties and windows of guesses."""
    return all(s.window in (None, 1) and all(o.repetition_penalty == 1 for o in s.options.values()) for s in states)


def sample_static(engine: Engine, states: Sequence[SampleState], *, max_rows: int) -> Iterator[Pairs]:
    """As `sample`, with steps of fixed shapes; yields at most one id of each sample at once."""
    rows = sum(len(state.prompts) for state in states)
    num_rows = 1 << (max(2, min(max_rows, rows)) - 1).bit_length()
    filters = any(o.top_k or o.top_p < 1 or o.min_p for s in states for o in s.options.values())
    length = bucket(max(max(map(len, s.prompts)) + s.walk.budget for s in states), engine.max_positions)
    pool = engine.static_steps
    step = pool.pop((num_rows, length, filters), None) or StaticStep(engine, num_rows, length, filters=filters)
    try:
        yield from _Slots(step, states).run()
    finally:
        pool[num_rows, length, filters] = step


class _Slots:
    """Which samples have which rows, and what each of them waits for."""

    def __init__(self, step: StaticStep, states: Sequence[SampleState]) -> None:
        self.step, self.states = step, states
        self._keys = [draw_key(state.generator) for state in states]
        self.waiting = deque(index for index, state in enumerate(states) if not state.walk.done)
        self.rows: dict[int, list[int]] = {}
        self.free = list(range(len(step.ids_B)))[::-1]
        self._vokens: dict[int, list[torch.Tensor]] = {}

    def run(self) -> Iterator[Pairs]:
        for row in self.free:
            self._rest(row)
        while self.waiting or self.rows:
            if joined := self._join():
                yield self._push(joined)
            if self.rows:
                self._set_rows()
                yield from self._steps()

    def _rest(self, row: int) -> None:
        """An idle row reads id 0 at place 0 again and again, for nobody."""
        step = self.step
        step.is_active_B[row], step.positions_B[row] = 0, 0
        step.ids_B[row], step.owners_B[row], step.twins_B[row] = 0, row, row
        step.set_row(row, ((0, 1),), _IDLE)

    def _join(self) -> list[tuple[int, int]]:
        """Waiting samples take free rows, read their prompts, and choose their first ids."""
        joining: list[int] = []
        prompts: dict[int, IntArray] = {}
        while self.waiting and len(self.states[self.waiting[0]].prompts) <= len(self.free):
            index = self.waiting.popleft()
            state = self.states[index]
            rows = [self.free.pop() for _ in state.prompts]
            self.rows[index] = rows
            prompts |= dict(zip(rows, state.prompts, strict=True))
            self._take(index, rows)
            joining.append(index)
        if not joining:
            return []
        hidden_BD = self._prefill(prompts)
        self._set_rows()
        chosen = self.step.choose_first(hidden_BD, list(prompts))
        of_row = dict(zip(prompts, chosen, strict=True))
        return [(index, of_row[self.rows[index][0]]) for index in joining]

    def _take(self, index: int, rows: list[int]) -> None:
        step, state = self.step, self.states[index]
        for row, prompt in zip(rows, state.prompts, strict=True):
            step.keys_B[row], step.places_B[row] = self._keys[index], len(state.ids)
            step.owners_B[row], step.twins_B[row] = rows[0], rows[-1]
            step.positions_B[row], step.is_active_B[row] = len(prompt), 1

    def _prefill(self, prompts: dict[int, IntArray]) -> torch.Tensor:
        """Each different prompt once; hidden states in the order of the rows."""
        of: dict[bytes, list[int]] = {}
        for row, prompt in prompts.items():
            of.setdefault(prompt.tobytes(), []).append(row)
        first = [rows[0] for rows in of.values()]
        read_BD = self.step.engine.prefill([prompts[row] for row in first], self.step.cache, first)
        with torch.inference_mode():
            for rows in of.values():
                if rows[1:]:
                    self.step.cache.copy(rows[0], rows[1:])
        order = {row: place for place, rows in enumerate(of.values()) for row in rows}
        return read_BD[[order[row] for row in prompts]]

    @torch.inference_mode()
    def _set_rows(self) -> None:
        for index, rows in self.rows.items():
            state = self.states[index]
            assert len(state.walk.allowed) <= MAX_RANGES, state.walk.allowed
            for row in rows:
                self.step.set_row(row, state.walk.allowed, state.current_options)

    def _steps(self) -> Iterator[Pairs]:
        """As many steps as need nothing from the host, then what they chose."""
        vokens = [index for index in self.rows if self._reads_voken(index)]
        for ids_B in self.step.run(1 if vokens else self._steps_alike()):
            for index in vokens:
                self._vokens.setdefault(index, []).append(self.step.hidden_BD[self.rows[index][0]].clone())
            yield self._push([(index, ids_B[rows[0]]) for index, rows in self.rows.items()])

    def _steps_alike(self) -> int:
        """For how many steps every sample may choose from the same ids as now."""
        fewest = MAX_STEPS
        for index in self.rows:
            ahead = self.states[index].walk.ahead(MAX_STEPS)
            alike = next((n for n, ranges in enumerate(ahead) if ranges != ahead[0]), len(ahead))
            fewest = min(fewest, alike)
        return fewest

    def _reads_voken(self, index: int) -> bool:
        state = self.states[index]
        return state.walk.writes_vokens and state.walk.num_written > 0

    def _push(self, pairs: list[tuple[int, int]]) -> Pairs:
        for index, id in pairs:
            state = self.states[index]
            state.ids.append(id)
            state.walk.push(id)
            if index in self._vokens and not state.walk.writes_vokens:
                state.vokens.append(torch.stack(self._vokens.pop(index)))
            if state.walk.done:
                for row in self.rows.pop(index):
                    self._rest(row)
                    self.free.append(row)
        return pairs
