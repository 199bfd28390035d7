"""The sampler: grammar, guidance and choice around the engine, for a batch of samples in different modality states.

Each step computes logits only for the ids that a sample's grammar allows; rows that may choose from the same ids
share one product. With guidance a sample has a second row that read the prompt with its condition dropped and then
follows the same ids. With a window, samples guess at their next codes and keep what turns out right
(`anygen.sampling.speculative`).

Vokens are not chosen: where a voken block is begun, its begin token and all vokens are read in one pass, and the hidden
states at the vokens are kept (MiniGPT-5, arXiv 2310.02239). Nor are known codes of a picture or sound that is edited: a
run of them is read together with the id before it.

Dimension key: B rows of one group, A allowed ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anygen.errors import InputError
from anygen.grammar import Ranges, Walk
from anygen.sampling.choose import SamplingOptions, choose
from anygen.sampling.engine import Cache, Engine
from anygen.sampling.speculative import Draft
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
    window: int = 1
    """How many codes of a picture or sound one pass may add; 1 is plain sampling. The ids are the same."""
    edit: Any = None
    """What is edited, for whoever decodes the answer (`anygen.editing`)."""
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
        yield from batch.choose()
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
        self._drafts = [Draft(state.generator) for state in states]
        owners = Counter(id(state.generator) for state in states)  # who shares one cannot draw ahead
        self._windows = [state.window if owners[id(state.generator)] == 1 else 1 for state in states]
        length = max((len(s.prompt) + s.walk.budget for s in states), default=0)
        if length > engine.max_positions:
            raise InputError(
                f"prompt and answer may need {length} ids, this model has {engine.max_positions} positions: "
                "shorten the input or lower max_new_tokens"
            )
        if self.active:
            self.cache, hidden_BD = self._prefill(length)
            self.hidden = hidden_BD[:, None]

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

    def choose(self) -> Iterator[list[tuple[int, int]]]:
        """Choose the next id of every active sample, and more where its guesses were right; at most one a yield."""
        chosen = self._choices()
        places, offset = list(range(len(self.active))), 0
        while places:
            pairs = [(self.active[place], chosen[place][offset]) for place in places]
            for index, id in pairs:
                self.states[index].ids.append(id)
                self.states[index].walk.push(id)
            yield pairs
            confirmed = []
            for place, (index, id) in zip(places, pairs, strict=True):
                if self._drafts[index].confirms(offset, id):
                    confirmed.append(place)
                    self._num_read[index] += 1
            places, offset = confirmed, offset + 1

    def _choices(self) -> list[list[int]]:
        """Of every active sample, the choice after its last id and after each guess as if all were right."""
        groups: dict[tuple[Ranges, SamplingOptions], list[tuple[int, int]]] = {}
        waits: dict[tuple[int, int], Tensor] = {}
        chosen: list[list[int]] = []
        for place, index in enumerate(self.active):
            state, draft = self.states[index], self._drafts[index]
            ahead = state.walk.ahead(len(draft.guesses) + 1)
            chosen.append([0] * len(ahead))
            for offset, (ranges, waits_A) in enumerate(zip(ahead, draft.waits(len(state.ids), ahead), strict=True)):
                groups.setdefault((ranges, state.current_options), []).append((place, offset))
                waits[place, offset] = waits_A
        for (ranges, options), spots in groups.items():
            ids = self._choose_group(ranges, options, spots, [waits[spot] for spot in spots])
            for (place, offset), id in zip(spots, ids.tolist(), strict=True):
                chosen[place][offset] = id
        for place, index in enumerate(self.active):
            self._drafts[index].remember(len(self.states[index].ids), chosen[place])
        return chosen

    def push_forced(self) -> list[tuple[int, int]]:
        """Add the next id of every sample where it is a voken or a known code."""
        pairs = [(index, forced[0]) for index in self.active if (forced := self.states[index].walk.forced)]
        for index, id in pairs:
            self.states[index].ids.append(id)
            self.states[index].walk.push(id)
        return pairs

    def _choose_group(
        self, ranges: Ranges, options: SamplingOptions, spots: list[tuple[int, int]], waits: list[Tensor]
    ) -> IntArray:
        """Choices at (place, offset) spots that may take the same ids."""
        allowed_A = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        if len(allowed_A) == 1:
            return np.repeat(allowed_A, len(spots))
        places, offsets = (list(numbers) for numbers in zip(*spots, strict=True))
        logits_BA = self.engine.logits(self.hidden[places, offsets], ranges)
        if options.guidance_scale != 1:
            twins = [self._twin(place) for place in places]
            twins_BA = self.engine.logits(self.hidden[twins, offsets], ranges)
            logits_BA = twins_BA + options.guidance_scale * (logits_BA - twins_BA)
        return allowed_A[choose(logits_BA, options, torch.stack(waits)).cpu().numpy()]

    def _twin(self, place: int) -> int:
        """The row of a sample's unconditional twin; its own row (guidance then changes nothing) where it has none."""
        return (
            len(self.active) + self._guided_place[self.active[place]]
            if self.active[place] in self._guided_place
            else place
        )

    def advance(self) -> None:
        """Read the chosen ids and new guesses; finished samples leave first."""
        still = [place for place, index in enumerate(self.active) if not self.states[index].walk.done]
        guided = [place for place, index in enumerate(self.guided) if not self.states[index].walk.done]
        if len(still) < len(self.active):
            rows = [*still, *(len(self.active) + place for place in guided)]
            self.cache.select(torch.tensor(rows, dtype=torch.long, device=self.engine.device))
            self.active = [self.active[place] for place in still]
            self.guided = [self.guided[place] for place in guided]
            self._guided_place = {index: place for place, index in enumerate(self.guided)}
        if self.active:
            if self.hidden.shape[1] > 1:
                self._take_back_guesses()
            for index in self.active:
                state, count = self.states[index], self._windows[index] - 1
                self._drafts[index].renew(state.walk, state.ids, count)
            self.hidden = self._read()
            for index in self.active:
                self._num_read[index] = len(self.states[index].ids)

    def _take_back_guesses(self) -> None:
        """Let the cache hold of each row its prompt and the ids that were read and stand."""
        prompts = [len(self.states[index].prompt) for index in self.active]
        prompts += [len(u) for index in self.guided if (u := self.states[index].unconditional) is not None]
        read = [self._num_read[index] for index in (*self.active, *self.guided)]
        lengths = [length + num for length, num in zip(prompts, read, strict=True)]
        self.cache.lengths_B = torch.tensor(lengths, device=self.engine.device)

    def _read(self) -> Tensor:
        """Hidden states after each row's last id and after its guesses, B x (1 + guesses) x D.

        Where the new ids are a begin token and vokens, the vokens' are kept.
        """
        samples = (*self.active, *self.guided)
        new = [self.states[index].ids[self._num_read[index] :] for index in samples]
        windows = [ids + self._drafts[index].guesses for ids, index in zip(new, samples, strict=True)]
        width = max(len(window) for window in windows)
        if width == 1:
            return self.engine.step(torch.tensor(windows)[:, 0], self.cache)[:, None]
        counts_B = torch.tensor([len(window) for window in windows])
        ids_BW = torch.tensor([window + window[-1:] * (width - len(window)) for window in windows])
        hidden_BWD = self.engine.extend(ids_BW, self.cache, counts_B)
        for place, index in enumerate(self.active):
            if len(new[place]) > 1 and self.states[index].walk.writes_vokens:
                self.states[index].vokens.append(hidden_BWD[place, 1 : len(new[place])].clone())
        first_B1 = torch.tensor([[len(ids) - 1] for ids in new])
        offsets_BW = (first_B1 + torch.arange(width)).clamp(max=width - 1)
        return hidden_BWD[torch.arange(len(windows))[:, None], offsets_BW]
