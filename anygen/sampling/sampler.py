"""The sampler: grammar, guidance and choice around the engine, for samples in different modality states.

Samples join while there are rows for them and leave when they are done (continuous batching inside one call). Each step
computes logits only for the ids that a sample's grammar allows; rows that may choose from the same ids share one
product. With guidance a sample has a second row that read the prompt with its condition dropped and then follows the
same ids. With a window, samples guess at their next codes and keep what turns out right
(`anygen.sampling.speculative`).

An id that is the only one allowed is not chosen: a run of them is read together with the id before it, at the start
together with the prompt, at the end not at all. So it is with begin and end tokens, shapes that are given, known codes
of a picture or sound that is edited, and vokens, whose hidden states are kept (MiniGPT-5, arXiv 2310.02239).

Dimension key: B rows of one group, A allowed ids, W ids of a pass, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anygen.errors import InputError
from anygen.grammar import Ranges, Walk
from anygen.sampling.choose import SamplingOptions, choose, penalise
from anygen.sampling.engine import Engine
from anygen.sampling.race import draw_key, waits
from anygen.sampling.rows import Owner, Rows
from anygen.sampling.speculative import Draft, usual_window
from anygen.sampling.static_sampler import fits, sample_static
from tokenizers_mm.codes import IntArray

MAX_ROWS = 64
"""Rows at once: a bound on the memory of the cache."""


@dataclass
class SampleState:
    """One sample on its way."""

    prompt: IntArray
    unconditional: IntArray | None
    """The prompt with its condition dropped; needed where any modality has guidance."""
    walk: Walk
    options: Mapping[str, SamplingOptions]
    """By modality; `control` for ids between blocks."""
    generator: torch.Generator
    """Gives the sample its key, once."""
    ids: list[int] = field(default_factory=list)
    seed: int | None = None
    """What `generator` was seeded with; reported only."""
    noise_seed: int = 0
    """Of the noise from which a diffusion decoder draws this sample's pictures."""
    window: int | None = None
    """How many codes of a picture or sound one pass may add, 1 being plain sampling; None is what was measured to be
    fastest. The ids are the same."""
    edit: Any = None
    """What is edited, for whoever decodes the answer (`anygen.editing`)."""
    earlier: SampleState | None = None
    """The finished sample whose text this one answers (`Request.via`)."""
    vokens: list[Tensor] = field(default_factory=list)
    """Hidden states at the vokens of each voken block, N x width, in order."""

    @property
    def is_guided(self) -> bool:
        """True where the sample needs its unconditional row."""
        return self.unconditional is not None and any(o.guidance_scale != 1 for o in self.options.values())

    @property
    def current_options(self) -> SamplingOptions:
        """Options for the next id."""
        return self.options[self.walk.modality or "control"]

    @property
    def prompts(self) -> list[IntArray]:
        """What its rows read before the answer."""
        return [self.prompt] if not self.is_guided or self.unconditional is None else [self.prompt, self.unconditional]


def sample(
    engine: Engine, states: Sequence[SampleState], *, max_rows: int = MAX_ROWS, plain: bool = False
) -> Iterator[list[tuple[int, int]]]:
    """Run all samples to their end; yields the (sample, id) pairs that were added, at most one of each sample at once.

    Args:
        engine: that computes.
        states: the samples; their order and their number change none of them.
        max_rows: how many rows (two for a sample with guidance) may be read at once; the others wait.
        plain: True launches every operator by itself where a GPU would replay a graph.

    Raises:
        InputError: a prompt with its budget is longer than the model's positions.
    """
    _check_lengths(engine, states)
    if engine.device.type == "cuda" and not plain and states and fits(states):
        yield from sample_static(engine, states, max_rows=max_rows)
        return
    sampler = _Sampler(engine, states, max_rows)
    yield from sampler.force()
    sampler.begin()
    while sampler.admit():
        yield from sampler.choose()
        yield from sampler.force()
        sampler.advance()


def _check_lengths(engine: Engine, states: Sequence[SampleState]) -> None:
    length = max((max(map(len, s.prompts)) + s.walk.budget for s in states), default=0)
    if length > engine.max_positions:
        raise InputError(
            f"prompt and answer may need {length} ids, this model has {engine.max_positions} positions: "
            "shorten the input or lower max_new_tokens"
        )


class _Sampler:
    """Who waits and who is active, what each has yet to read, and the choices."""

    def __init__(self, engine: Engine, states: Sequence[SampleState], max_rows: int) -> None:
        self.engine, self.states, self.max_rows = engine, states, max_rows
        self.active: list[int] = [index for index, state in enumerate(states) if not state.walk.done]
        self._keys = [draw_key(state.generator) for state in states]
        self._num_read = [len(state.ids) for state in states]
        self._vokens: dict[int, list[int]] = {}  # places of vokens among the new ids
        self._drafts = [Draft() for _ in states]
        self._allowed: dict[Ranges, Tensor] = {}
        self.rows = Rows(engine)

    def begin(self) -> None:
        """All samples wait for rows; the ids that they have belong to their prompts."""
        self.waiting = deque(index for index in self.active if not self.states[index].walk.done)
        self.active = []
        self._prompts = {
            (index, is_twin): np.concatenate([prompt, np.array(self.states[index].ids, dtype=np.int64)])
            for index in self.waiting
            for is_twin, prompt in zip((False, True), self.states[index].prompts, strict=False)
        }
        self._num_read = [len(state.ids) for state in self.states]
        self.rows.expect(self._prompts.values(), min(self.max_rows, len(self._prompts)))

    def admit(self) -> bool:
        """Let waiting samples join where enough rows are free; False where nothing is left to do."""
        free = self.max_rows - len(self.rows.owners)
        if self.waiting and (4 * free >= self.max_rows or not self.active):
            joining: list[int] = []
            prompts: dict[Owner, IntArray] = {}
            while self.waiting and (free >= len(self.states[self.waiting[0]].prompts) or not (self.active or joining)):
                index = self.waiting.popleft()
                joining.append(index)
                free -= len(self.states[index].prompts)
                prompts |= {o: self._prompts.pop(o) for o in ((index, False), (index, True)) if o in self._prompts}
            if joining:
                self.rows.join(prompts)
                self.active += joining
        return bool(self.active)

    # -- ids that are not chosen

    def force(self) -> Iterator[list[tuple[int, int]]]:
        """Add ids that are the only ones allowed, one of each sample at a time."""
        candidates = self.active
        while pairs := [
            (index, self.states[index].walk.allowed[0][0]) for index in candidates if self._is_forced(index)
        ]:
            for index, id in pairs:
                state = self.states[index]
                if state.walk.writes_vokens and state.walk.forced:
                    self._vokens.setdefault(index, []).append(len(state.ids) - self._num_read[index])
                self._push(index, id)
            yield pairs
            candidates = [index for index, _ in pairs]

    def _is_forced(self, index: int) -> bool:
        walk = self.states[index].walk
        is_voken = walk.writes_vokens and bool(walk.forced)
        if is_voken and (index, False) not in self.rows.row:  # a voken's hidden state comes from a pass over new ids
            return False
        if index in self._vokens and not is_voken:  # and has to be read before the sample ends
            return False
        return _is_single(walk.allowed)

    def _push(self, index: int, id: int) -> None:
        self.states[index].ids.append(id)
        self.states[index].walk.push(id)

    # -- choices

    def choose(self) -> Iterator[list[tuple[int, int]]]:
        """Choose the next id of every active sample, and more where its guesses were right; at most one a yield."""
        choosing = [index for index in self.active if not _is_single(self.states[index].walk.allowed)]
        chosen, offset = self._choices(choosing), 0
        while choosing:
            pairs = [(index, chosen[index][offset]) for index in choosing]
            for index, id in pairs:
                self._push(index, id)
            yield pairs
            choosing = [index for index, id in pairs if self._drafts[index].confirms(offset, id)]
            for index in choosing:
                self._num_read[index] += 1
                self.rows.confirm(index)
            offset += 1

    def _choices(self, choosing: Sequence[int]) -> dict[int, list[int]]:
        """Of every sample, the choice after its last id and after each guess as if all were right."""
        groups: dict[tuple[Ranges, SamplingOptions], list[tuple[int, int]]] = {}
        chosen: dict[int, list[int]] = {}
        for index in choosing:
            state = self.states[index]
            ahead = state.walk.ahead(len(self._drafts[index].guesses) + 1)
            chosen[index] = [0] * len(ahead)
            for offset, ranges in enumerate(ahead):
                groups.setdefault((ranges, state.current_options), []).append((index, offset))
        for (ranges, options), spots in groups.items():
            for (index, offset), id in zip(spots, self._choose_group(ranges, options, spots), strict=True):
                chosen[index][offset] = id
        for index, ids in chosen.items():
            self._drafts[index].remember(len(self.states[index].ids), ids)
        return chosen

    @torch.inference_mode()
    def _choose_group(self, ranges: Ranges, options: SamplingOptions, spots: list[tuple[int, int]]) -> list[int]:
        """Choices at (sample, offset) spots that may take the same ids."""
        if _is_single(ranges):
            return [ranges[0][0]] * len(spots)
        logits_BA = self._logits(ranges, options, spots)
        if options.repetition_penalty != 1:
            self._penalise(logits_BA, ranges, options.repetition_penalty, spots)
        ids_A = self._ids(ranges)
        keys_B = torch.tensor([self._keys[index] for index, _ in spots], device=self.engine.device)
        places = [len(self.states[index].ids) + offset for index, offset in spots]
        places_B = torch.tensor(places, device=self.engine.device)
        chosen_B = choose(logits_BA, options, lambda rows: waits(keys_B[rows], places_B[rows], ids_A))
        return ids_A[chosen_B].tolist()

    def _logits(self, ranges: Ranges, options: SamplingOptions, spots: list[tuple[int, int]]) -> Tensor:
        """Scores of the allowed ids, guidance applied."""
        width = self.rows.hidden_BWD.shape[1]
        flat = [self.rows.row[index, False] * width + offset for index, offset in spots]
        if options.guidance_scale != 1:  # a sample without a twin is its own: guidance then changes nothing
            twins = [self.rows.row.get((index, True), self.rows.row[index, False]) for index, _ in spots]
            flat += [row * width + offset for row, (_, offset) in zip(twins, spots, strict=True)]
        hidden = self.rows.hidden_BWD.flatten(0, 1)
        if flat != list(range(len(hidden))):
            hidden = hidden.index_select(0, torch.tensor(flat, device=hidden.device))
        logits_BA = self.engine.logits(hidden, ranges)
        if options.guidance_scale == 1:
            return logits_BA
        given_BA, dropped_BA = logits_BA.chunk(2)
        return torch.lerp(dropped_BA, given_BA, options.guidance_scale)

    def _penalise(self, logits_BA: Tensor, ranges: Ranges, penalty: float, spots: list[tuple[int, int]]) -> None:
        """Repetition penalty on every id before a spot, guesses included; the end token of a text is spared."""
        allowed = self._ids(ranges).cpu().numpy()
        spared = ranges[-1][0] if len(ranges) > 1 and _is_single(ranges[-1:]) else -1
        for row, (index, offset) in enumerate(spots):
            state = self.states[index]
            before = np.concatenate([state.prompt, state.ids, self._drafts[index].guesses[:offset]])
            seen_K = np.flatnonzero(np.isin(allowed, before) & (allowed != spared))
            penalise(logits_BA[row], torch.from_numpy(seen_K).to(logits_BA.device), penalty)

    def _ids(self, ranges: Ranges) -> Tensor:
        if ranges not in self._allowed:
            parts = [torch.arange(start, stop, device=self.engine.device) for start, stop in ranges]
            self._allowed[ranges] = torch.cat(parts)
        return self._allowed[ranges]

    # -- passes

    def advance(self) -> None:
        """Finished samples leave; the others read their new ids and guesses."""
        done = [index for index in self.active if self.states[index].walk.done]
        if done:
            self.rows.leave(done)
            self.active = [index for index in self.active if not self.states[index].walk.done]
        if not self.active:
            return
        for index in self.active:
            state = self.states[index]
            window = state.window or usual_window(state.walk.modality, len(self.rows.owners), self.engine.device)
            self._drafts[index].renew(state.walk, state.ids, window - 1)
        new = {index: self.states[index].ids[self._num_read[index] :] for index in self.active}
        hidden_BWD = self.rows.read(new, {index: self._drafts[index].guesses for index in self.active})
        for index, places in self._vokens.items():
            self.states[index].vokens.append(hidden_BWD[self.rows.row[index, False], places].clone())
        self._vokens.clear()
        for index in self.active:
            self._num_read[index] = len(self.states[index].ids)


def _is_single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1
