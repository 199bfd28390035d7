"""The sampler: grammar, guidance and choice around the engine, for a batch of samples in different modality states.

Each step computes logits only for the ids that a sample's grammar allows; rows that may choose from the same ids
share one product. With guidance a sample has a second row that read the prompt with its condition dropped and then
follows the same ids.

Vokens are not chosen: where a voken block is begun, its begin token and all vokens are read in one pass, and the hidden
states at the vokens are kept (MiniGPT-5, arXiv 2310.02239). Nor are known codes of a picture or sound that is edited: a
run of them is read together with the id before it.

Dimension key: B rows of one group, A allowed ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from anygen.errors import InputError
from anygen.grammar import Ranges, Walk
from anygen.sampling.choose import SamplingOptions, choose
from anygen.sampling.engine import Cache, Engine
from tokenizers_mm.codes import IntArray


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
    ids: list[int] = field(default_factory=list)
    seed: int | None = None
    """What `generator` was seeded with; reported only."""
    noise_seed: int = 0
    """Of the noise from which a diffusion decoder draws this sample's pictures."""
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


def sample(engine: Engine, states: Sequence[SampleState]) -> Iterator[list[tuple[int, int]]]:
    """Run all samples to their end; yields, after every step, the (sample, id) pairs that were added.

    Raises:
        InputError: a prompt with its budget is longer than the model's positions.
    """
    batch = _Batch(engine, states)
    while batch.active:
        chosen = batch.choose()
        yield chosen
        while forced := batch.push_forced():
            yield forced
        batch.advance()


class _Batch:
    """Active samples and their rows in the cache: conditional rows first, then the unconditional ones."""

    def __init__(self, engine: Engine, states: Sequence[SampleState]) -> None:
        self.engine, self.states = engine, states
        self.active = [index for index, state in enumerate(states) if not state.walk.done]
        self.guided = [index for index in self.active if states[index].is_guided]
        self._guided_place = {index: place for place, index in enumerate(self.guided)}
        self._num_read = [0] * len(states)
        length = max((len(s.prompt) + s.walk.budget for s in states), default=0)
        if length > engine.max_positions:
            raise InputError(
                f"prompt and answer may need {length} ids, this model has {engine.max_positions} positions: "
                "shorten the input or lower max_new_tokens"
            )
        if self.active:
            self.cache, self.hidden = self._prefill(length)

    def _prefill(self, length: int) -> tuple[Cache, Tensor]:
        """Read each different prompt once, then give every row its copy."""
        prompts = [self.states[i].prompt for i in self.active]
        prompts += [u for i in self.guided if (u := self.states[i].unconditional) is not None]
        different = {prompt.tobytes(): prompt for prompt in prompts}
        order = {key: row for row, key in enumerate(different)}
        cache = self.engine.new_cache(len(different), length)
        hidden = self.engine.prefill(list(different.values()), cache)
        rows = torch.tensor([order[prompt.tobytes()] for prompt in prompts], device=self.engine.device)
        cache.select(rows)
        return cache, hidden.index_select(0, rows)

    def choose(self) -> list[tuple[int, int]]:
        """Choose the next id of every active sample."""
        groups: dict[tuple[Ranges, SamplingOptions], list[int]] = {}
        for place, index in enumerate(self.active):
            state = self.states[index]
            groups.setdefault((state.walk.allowed, state.current_options), []).append(place)
        chosen = np.zeros(len(self.active), dtype=np.int64)
        for (ranges, options), places in groups.items():
            chosen[places] = self._choose_group(ranges, options, places)
        pairs = [(index, int(id)) for index, id in zip(self.active, chosen, strict=True)]
        for index, id in pairs:
            self.states[index].ids.append(id)
            self.states[index].walk.push(id)
        return pairs

    def push_forced(self) -> list[tuple[int, int]]:
        """Add the next id of every sample where it is a voken or a known code."""
        pairs = [(index, forced[0]) for index in self.active if (forced := self.states[index].walk.forced)]
        for index, id in pairs:
            self.states[index].ids.append(id)
            self.states[index].walk.push(id)
        return pairs

    def _choose_group(self, ranges: Ranges, options: SamplingOptions, places: list[int]) -> IntArray:
        allowed_A = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        if len(allowed_A) == 1:
            return np.repeat(allowed_A, len(places))
        logits_BA = self.engine.logits(self.hidden[places], ranges)
        if options.guidance_scale != 1:
            twins_BA = self.engine.logits(self.hidden[[self._twin(place) for place in places]], ranges)
            logits_BA = twins_BA + options.guidance_scale * (logits_BA - twins_BA)
        waits_BA = torch.empty(logits_BA.shape, dtype=torch.float64)
        for row, place in enumerate(places):
            waits_BA[row].exponential_(generator=self.states[self.active[place]].generator)
        return allowed_A[choose(logits_BA, options, waits_BA).cpu().numpy()]

    def _twin(self, place: int) -> int:
        """The row of a sample's unconditional twin; its own row (guidance then changes nothing) where it has none."""
        return (
            len(self.active) + self._guided_place[self.active[place]]
            if self.active[place] in self._guided_place
            else place
        )

    def advance(self) -> None:
        """Read the chosen ids; finished samples leave first."""
        still = [place for place, index in enumerate(self.active) if not self.states[index].walk.done]
        guided = [place for place, index in enumerate(self.guided) if not self.states[index].walk.done]
        if len(still) < len(self.active):
            rows = [*still, *(len(self.active) + place for place in guided)]
            self.cache.select(torch.tensor(rows, dtype=torch.long, device=self.engine.device))
            self.active = [self.active[place] for place in still]
            self.guided = [self.guided[place] for place in guided]
            self._guided_place = {index: place for place, index in enumerate(self.guided)}
        if self.active:
            windows = [self.states[index].ids[self._num_read[index] :] for index in (*self.active, *self.guided)]
            self.hidden = self._read(windows)
            for index in self.active:
                self._num_read[index] = len(self.states[index].ids)

    def _read(self, windows: list[list[int]]) -> Tensor:
        """Hidden state after each row's new ids; where they are a begin token and vokens, the vokens' are kept."""
        counts_B = torch.tensor([len(window) for window in windows])
        width = int(counts_B.max())
        if width == 1:
            return self.engine.step(torch.tensor(windows)[:, 0], self.cache)
        ids_BW = torch.tensor([window + window[-1:] * (width - len(window)) for window in windows])
        hidden_BWD = self.engine.extend(ids_BW, self.cache, counts_B)
        for place, index in enumerate(self.active):
            if counts_B[place] > 1 and self.states[index].walk.writes_vokens:
                self.states[index].vokens.append(hidden_BWD[place, 1 : int(counts_B[place])].clone())
        return hidden_BWD[torch.arange(len(windows)), counts_B - 1]
