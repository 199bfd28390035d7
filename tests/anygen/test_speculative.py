"""Speculative decoding: the ids of plain sampling in fewer passes, and the distribution of the model."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.grammar import Block, Grammar, Plan
from anygen.request import Request
from anygen.results import Finished
from anygen.sampling.choose import SamplingOptions, probabilities
from anygen.sampling.engine import Engine
from anygen.sampling.sampler import SampleState, sample
from anygen.sampling.speculative import usual_window
from anygen.sequence import Sequencer


class CountingEngine(Engine):
    """Counts passes after the prompt."""

    num_passes = 0

    def step(self, *arguments: Any) -> Any:
        self.num_passes += 1
        return super().step(*arguments)

    def extend(self, *arguments: Any) -> Any:
        self.num_passes += 1
        return super().extend(*arguments)


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> CountingEngine:
    return CountingEngine(tiny_model)


def requests(**options: Any) -> list[Request]:
    """Pictures, sounds of two books in delay order, texts and mixtures, in different states at any time."""
    return [
        Request(text="a red apple", output="image", size=48, seed=1, **options),
        Request(text="two cats", output=("text", "image", "audio"), max_new_tokens=120, seed=2, **options),
        Request(text="one", output="audio", seed=3, num_samples=2, **options),
        Request(output="any", max_new_tokens=90, seed=4, **options),
        Request(text="two", output=("image", "region", "image"), seed=5, **options),
    ]


def ids_of(model: AnyGen, requests: list[Request]) -> list[tuple[int, ...]]:
    return [sample.ids for output in model.generate_batch(requests) for sample in output.samples]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.05, "top_k": 5, "guidance_scale": 3.0},
        {"top_p": 0.7, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [2, 3, 9, 200])
def test_a_window_changes_no_id(model: AnyGen, window: int, options: dict[str, Any]) -> None:
    plain = ids_of(model, requests(**options, speculative_window=1))
    assert ids_of(model, requests(**options, speculative_window=window)) == plain
    alone = [ids for request in requests(**options, speculative_window=window) for ids in ids_of(model, [request])]
    assert alone == plain


def test_samples_of_a_batch_may_have_different_windows(model: AnyGen) -> None:
    plain = ids_of(model, requests(temperature=0.05, speculative_window=1))
    mixed = [
        dataclasses.replace(request, speculative_window=window)
        for request, window in zip(requests(temperature=0.05), (4, 1, 8, 2, 30), strict=True)
    ]
    assert ids_of(model, mixed) == plain


def test_known_codes_are_kept_and_the_others_are_those_of_plain_sampling(model: AnyGen) -> None:
    codes = model.bundle.vocabulary.range("image.0")
    known = tuple(-1 if place % 7 < 4 else codes.start + place % codes.size for place in range(36))
    answers = []
    for window in (1, 3, 8, 40):
        state = picture_states(model, window, temperature=0.3)[0]
        state.walk = model.grammar.start(Plan((Block("image", (6, 6), known=known), Block("audio"))), 150)
        run(model.engine, [state])
        answers.append(state.ids)
        assert all(k in (-1, id) for k, id in zip(known, state.ids[3:39], strict=True))
    assert answers[1:] == answers[:1] * 3


def picture_states(model: AnyGen, window: int | None, *, seed: int = 7, **options: Any) -> list[SampleState]:
    request = Request(text="a red apple", output="image", size=48, seed=seed, speculative_window=window, **options)
    return model._states(request)


def run(engine: Engine, states: list[SampleState]) -> None:
    for _ in sample(engine, states):
        pass


@pytest.mark.parametrize("temperature", [0.0, 0.02, 1.0])
def test_right_guesses_save_passes(model: AnyGen, engine: CountingEngine, temperature: float) -> None:
    passes = {}
    for window in (1, 12):
        engine.num_passes = 0
        run(engine, picture_states(model, window, temperature=temperature))
        passes[window] = engine.num_passes
    assert passes[1] == 36 - 1  # a step for every code but the last: what is forced is read with a neighbour
    assert passes[12] < (0.5 if temperature < 0.1 else 1) * passes[1]


def test_every_wait_is_drawn_once_and_in_order(model: AnyGen) -> None:
    states = [picture_states(model, window)[0] for window in (1, 12)]
    run(model.engine, states)
    assert states[0].ids == states[1].ids
    assert torch.equal(states[0].generator.get_state(), states[1].generator.get_state())


def test_samples_that_share_a_generator_take_turns_as_without_a_window(model: AnyGen) -> None:
    answers = []
    for window in (1, 8):
        shared = torch.Generator().manual_seed(3)
        request = Request(text="one", output="image", num_samples=3, generator=shared, speculative_window=window)
        answers.append(ids_of(model, [request]))
    assert answers[0] == answers[1]


def test_events_are_those_of_plain_sampling(model: AnyGen) -> None:
    def events(window: int) -> Iterator[str]:
        arguments = {"text": "two", "output": ("image", "text", "audio"), "max_new_tokens": 150, "temperature": 0.05}
        for event in model.stream(**arguments, speculative_window=window):
            yield "Finished" if isinstance(event, Finished) else re.sub(" at 0x[0-9A-F]+", "", repr(event))

    assert list(events(1)) == list(events(10))


def test_what_is_ahead_comes(sequencer: Sequencer) -> None:
    random = np.random.default_rng(0)
    plan = Plan((Block("image"), Block("text"), Block("audio"), Block("region")))
    for _ in range(20):
        walk = Grammar(sequencer).start(plan, 150)
        expected: dict[int, Any] = {}
        for num_pushed in itertools.count():
            assert expected.get(num_pushed, walk.allowed) == walk.allowed
            if walk.done:
                break
            ahead = walk.ahead(int(random.integers(1, 9)))
            assert ahead[0] == walk.allowed
            expected |= {num_pushed + offset: ranges for offset, ranges in enumerate(ahead)}
            start, stop = walk.allowed[random.integers(len(walk.allowed))]
            walk.push(int(random.integers(start, stop)))


@pytest.mark.parametrize("window", [0, -1, 2.5, True, 10**6])
def test_impossible_windows_are_refused(window: Any) -> None:
    with pytest.raises(InputError, match="speculative_window"):
        Request(output="image", speculative_window=window)


@pytest.mark.parametrize(("num_samples", "is_fewer"), [(1, True), (2, False)])
def test_one_picture_is_drawn_with_a_window_unless_told_otherwise(
    model: AnyGen, engine: CountingEngine, num_samples: int, is_fewer: bool
) -> None:
    passes, ids = {}, {}
    for window in (None, 1):
        states = picture_states(model, window, num_samples=num_samples, temperature=0.02)
        assert states[0].is_guided
        engine.num_passes = 0
        run(engine, states)
        passes[window], ids[window] = engine.num_passes, [state.ids for state in states]
    assert ids[None] == ids[1] and (passes[None] < 0.7 * passes[1]) == is_fewer


def test_sounds_and_other_devices_are_sampled_plainly() -> None:
    cpu = torch.device("cpu")
    assert [usual_window(m, 2, cpu) for m in ("image", "audio", "text", None)] == [8, 1, 1, 1]
    assert usual_window("image", 2, torch.device("cuda")) == 1


# -- the distribution


OPTIONS = SamplingOptions(temperature=0.1, top_k=3, guidance_scale=1.5)
NUM_SAMPLES = 4000


def enumerated(model: AnyGen, states: list[SampleState]) -> dict[tuple[int, ...], float]:
    """Probability of every 1 x 4 picture, by the definition: one prompt after another, no cache."""
    state, codes = states[0], model.bundle.vocabulary.range("image.0")
    assert state.unconditional is not None
    head = np.array(state.ids[:3])
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        prefixes = list(found)
        prompts = [
            np.concatenate([prompt, head, np.array(prefix, dtype=np.int64)])
            for prompt in (state.prompt, state.unconditional)
            for prefix in prefixes
        ]
        hidden = model.engine.prefill(prompts, model.engine.new_cache(len(prompts), 64))
        given, dropped = model.engine.logits(hidden, ((codes.start, codes.stop),)).chunk(2)
        p_BA = probabilities(dropped + OPTIONS.guidance_scale * (given - dropped), OPTIONS)
        p_BA = p_BA / p_BA.sum(-1, keepdim=True)
        found = {
            (*prefix, codes.start + int(code)): found[prefix] * float(p_A[code])
            for prefix, p_A in zip(prefixes, p_BA, strict=True)
            for code in p_A.nonzero()
        }
    return found


def test_pictures_follow_the_distribution_of_the_model(model: AnyGen) -> None:
    side = model.bundle.tokenizers["image"].config.patch_px
    request = Request(text="a red apple", output="image", size=(side, 4 * side), num_samples=1000)
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, NUM_SAMPLES, 1000):
        states = model._states(dataclasses.replace(request, seed=first, speculative_window=4))
        for state in states:
            state.options = {**state.options, "image": OPTIONS}
        run(model.engine, states)
        counts.update(tuple(state.ids[3:7]) for state in states)
    expected = enumerated(model, states)
    assert set(counts) <= set(expected) and len(expected) == 81
    assert max(expected.values()) > 3 * min(expected.values())  # there is something to get wrong
    squares = [(counts[key] - NUM_SAMPLES * p) ** 2 / (NUM_SAMPLES * p) for key, p in expected.items()]
    assert sum(squares) < 80 + 4 * np.sqrt(2 * 80)  # chi-square of 80 degrees: mean 80, variance 160
