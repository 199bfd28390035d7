"""Samples that share a call: they join, leave and share prompts, and none of it changes their ids."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_sampling import mixed_requests
from transformers import RepetitionPenaltyLogitsProcessor

from anygen.api import AnyGen
from anygen.documents import Document
from anygen.grammar import Block, Plan
from anygen.request import Request
from anygen.sampling.choose import SamplingOptions, penalise, probabilities
from anygen.sampling.engine import Engine
from anygen.sampling.race import draw_key, waits
from anygen.sampling.sampler import SampleState, sample


class RecordingEngine(Engine):
    """Remembers the prompts of each prefill, and the most rows of a pass."""

    prefilled: list[list[tuple[int, ...]]]
    most_rows = 0

    def prefill(self, prompts: Any, cache: Any, rows: Any = None) -> Any:
        self.prefilled.append([tuple(prompt.tolist()) for prompt in prompts])
        return super().prefill(prompts, cache, rows)

    def step(self, ids_B: Any, cache: Any) -> Any:
        self.most_rows = max(self.most_rows, len(ids_B))
        return super().step(ids_B, cache)

    def extend(self, ids_BW: Any, cache: Any, counts_B: Any = None) -> Any:
        self.most_rows = max(self.most_rows, len(ids_BW))
        return super().extend(ids_BW, cache, counts_B)


@pytest.fixture
def engine(tiny_model: Any) -> RecordingEngine:
    engine = RecordingEngine(tiny_model)
    engine.prefilled = []
    return engine


def run(engine: Engine, states: list[SampleState], **options: Any) -> list[tuple[int, ...]]:
    for _ in sample(engine, states, **options):
        pass
    return [tuple(state.ids) for state in states]


def states_of(model: AnyGen, requests: list[Request]) -> list[SampleState]:
    return [state for request in requests for state in model._states(request)]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 8])
def test_joining_late_changes_nothing(model: AnyGen, engine: RecordingEngine, max_rows: int) -> None:
    at_once = run(model.engine, states_of(model, mixed_requests()))
    assert run(engine, states_of(model, mixed_requests()), max_rows=max_rows) == at_once
    assert engine.most_rows <= max(max_rows, 2)  # a sample with guidance has two rows
    backwards = run(engine, states_of(model, mixed_requests())[::-1], max_rows=max_rows)
    assert backwards[::-1] == at_once


def test_streaming_changes_nothing(model: AnyGen) -> None:
    for request in mixed_requests():
        arguments = {name: value for name, value in vars(request).items() if name in Request.__dataclass_fields__}
        *_, finished = model.stream(**arguments)
        assert finished.output.samples[0].ids == model.generate_batch([request])[0].samples[0].ids  # type: ignore[union-attr]


def test_a_prompt_is_read_once_however_many_want_it(model: AnyGen, engine: RecordingEngine) -> None:
    requests = [
        Request(text="a red apple", output="image", num_samples=7, seed=1, guidance_scale=2.0),
        Request(text="two cats", output="image", num_samples=3, seed=101, guidance_scale=2.0),
    ]
    states = states_of(model, requests)
    run(engine, states, max_rows=4)
    read = [prompt for prompts in engine.prefilled for prompt in prompts]
    assert len(read) == len(set(read)) == 3  # two, and the one without input that they share
    assert len({tuple(state.ids) for state in states}) == 10


def test_what_is_forced_at_the_start_is_read_with_the_prompt(model: AnyGen, engine: RecordingEngine) -> None:
    states = states_of(model, [Request(text="a", output="image", size=(16, 32), guidance_scale=1.0)])
    walked = sample(engine, states)
    first = [next(walked)[0][1] for _ in range(3)]  # begin, rows, columns: told before anything is computed
    assert not engine.prefilled
    list(walked)
    assert [list(prompt[-3:]) for prompt in engine.prefilled[0]] == [first]


def test_generating_and_reading_again_give_the_same_probabilities(model: AnyGen, engine: RecordingEngine) -> None:
    """Each id's log-probability while it was drawn, and in one pass of transformers over the whole sequence."""
    seen: list[tuple[float, int]] = []

    class Noted(RecordingEngine):
        def logits(self, hidden: Any, ranges: Any) -> Any:
            scores = super().logits(hidden, ranges)
            seen.append((scores[0].log_softmax(-1), ranges))
            return scores

    noted = Noted(model.bundle.model)
    noted.prefilled = []
    request = Request(text="a red apple", output=("image", "text", "audio"), guidance_scale=1.0, max_new_tokens=90)
    state = model._states(request)[0]
    run(noted, [state])
    ids = torch.tensor([*state.prompt.tolist(), *state.ids])
    reference = model.bundle.model
    attention = reference.config._attn_implementation
    reference.set_attn_implementation("sdpa")
    logits = reference(input_ids=ids[None], use_cache=False).logits[0]
    reference.set_attn_implementation(attention)
    walk = model._states(request)[0].walk
    compared = 0
    for place, id in enumerate(state.ids):
        allowed = np.concatenate([np.arange(*r) for r in walk.allowed])
        if len(allowed) > 1:
            again = logits[len(state.prompt) + place - 1, allowed].log_softmax(-1)
            drawn, ranges = seen[compared]
            assert ranges == walk.allowed and (drawn - again).abs().max() < 1e-4
            compared += 1
        walk.push(id)
    assert compared == len(seen) > 30


def test_greedy_ids_are_those_of_transformers_over_mixed_prompts(model: AnyGen) -> None:
    """In batches, with samples of every kind, against an argmax over the same ids of transformers' logits."""
    texts = ["a red apple", "two cats", "one", "the flag of Norway", "how many apples are there?"]
    kinds: list[Any] = ["image", "text", "audio", "region", ("text", "image")]
    requests = [
        Request(text=text, output=kind, temperature=0.0, guidance_scale=1.0, max_new_tokens=24, size=None)
        for text in texts
        for kind in kinds
    ]
    reference = model.bundle.model
    attention = reference.config._attn_implementation
    reference.set_attn_implementation("sdpa")
    try:
        for request, output in zip(requests, model.generate_batch(requests), strict=True):
            state = model._states(request)[0]
            ids = torch.tensor([*state.prompt.tolist(), *output.samples[0].ids])
            logits = reference(input_ids=ids[None], use_cache=False).logits[0]
            for place, id in enumerate(output.samples[0].ids):
                allowed = np.concatenate([np.arange(*r) for r in state.walk.allowed])
                scores = logits[len(state.prompt) + place - 1, allowed]
                assert id == allowed[int(scores.argmax())] or scores.max() - scores[allowed == id] < 1e-5
                state.walk.push(id)
    finally:
        reference.set_attn_implementation(attention)


def test_greedy_ids_of_a_thousand_prompts_are_those_of_generate(tiny_model: Any) -> None:
    """Prompts of every length from 1 to 40, mixed in batches of ours, sorted by length for `generate`."""
    reference = copy.deepcopy(tiny_model)
    reference.set_attn_implementation("sdpa")
    engine, random, num_new = Engine(tiny_model), np.random.default_rng(0), 8
    size = len(engine.head_VD)
    prompts = [random.integers(0, size, 1 + number % 40) for number in range(1000)]
    expected: dict[int, list[int]] = {}
    for length in range(1, 41):
        of = [number for number in range(1000) if len(prompts[number]) == length]
        ids = torch.from_numpy(np.stack([prompts[number] for number in of]))
        out = reference.generate(ids, do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=0)
        expected |= dict(zip(of, out[:, length:].tolist(), strict=True))
    for first in range(0, 1000, 100):
        batch = random.permutation(np.arange(first, first + 100))
        cache = engine.new_cache(100, 64)
        hidden = engine.prefill([prompts[number] for number in batch], cache)
        ids_BN = []
        for _ in range(num_new):
            ids_BN.append(engine.logits(hidden, ((0, size),)).argmax(-1))
            hidden = engine.step(ids_BN[-1], cache)
        assert torch.stack(ids_BN, 1).tolist() == [expected[number] for number in batch]


def test_one_generator_for_all_samples_gives_each_its_key(model: AnyGen) -> None:
    def ids(num_samples: int) -> list[tuple[int, ...]]:
        shared = torch.Generator().manual_seed(3)
        request = Request(text="one", output="image", num_samples=num_samples, generator=shared)
        return [s.ids for s in model.generate_batch([request])[0].samples]

    assert ids(4)[:2] == ids(2) and len(set(ids(4))) == 4


def test_memory_does_not_grow(model: AnyGen) -> None:
    def live() -> int:
        gc.collect()
        # by exact type: tensors without memory, which other tests leave behind, cannot say how large they are
        return sum(x.nbytes for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))

    def call(seed: int) -> None:
        model.generate(text="a cat", output=("image", "text"), seed=seed, max_new_tokens=30)
        stream: Iterator[Any] = model.stream(text="a", output="audio", seed=seed)
        next(stream)
        stream.close()  # type: ignore[attr-defined]

    for seed in range(5):
        call(seed)
    before = live()
    for seed in range(60):
        call(seed)
    assert live() == before


# -- repetition penalty


def test_the_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([[3, 7, 7, 9]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(before, logits.clone())
    ours = logits.clone()
    penalise(ours[0], before[0].unique(), 1.7)
    assert torch.equal(ours, expected)


def test_the_penalty_is_of_text_and_lets_nothing_repeat_where_it_is_large(model: AnyGen) -> None:
    plain, penalised = (
        model.generate(text="a", output=("text", "image"), temperature=0.0, max_new_tokens=40, **options).samples[0]
        for options in ({}, {"repetition_penalty": 100.0})
    )
    texts = [s.ids[1 : s.ids.index(model.bundle.vocabulary.control("/text"))] for s in (plain, penalised)]
    assert len(set(texts[1])) == len(texts[1]) > len(set(texts[0]))
    options = Request(output="text", repetition_penalty=2.0).options({"image": SamplingOptions(repetition_penalty=1.5)})
    assert {name: o.repetition_penalty for name, o in options.items()} == {
        "text": 2.0, "image": 1.5, "audio": 1.0, "region": 1.0, "control": 1.0
    }  # fmt: skip


# -- the race's waiting times


def test_waits_are_exponential_and_independent() -> None:
    times = waits(torch.arange(1000), torch.arange(1000) % 7, torch.arange(500, 1500))
    u = torch.exp(-times)
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 99 + 5 * (2 * 99) ** 0.5
    for neighbours in ((u[:, 1:], u[:, :-1]), (u[:, 64:], u[:, :-64]), (u[1:], u[:-1])):
        pairs = torch.stack([x.flatten() for x in neighbours], 1)
        table = torch.histogramdd(pairs, bins=[16, 16], range=[0.0, 1.0, 0.0, 1.0])[0]
        expected = len(pairs) / 256
        assert ((table - expected).square() / expected).sum() < 255 + 5 * (2 * 255) ** 0.5


def test_waits_belong_to_key_place_and_id() -> None:
    keys, places, ids = torch.tensor([5, 2**62]), torch.tensor([0, 3]), torch.arange(100)
    all_times = waits(keys, places, ids)
    assert torch.equal(waits(keys[1:], places[1:], ids[40:60]), all_times[1:, 40:60])
    others = [waits(keys + 1, places, ids), waits(keys, places + 1, ids), waits(keys, places, ids + 1)]
    assert all(not torch.isclose(all_times, other).any() for other in others)
    generator = torch.Generator().manual_seed(0)
    assert draw_key(generator) != draw_key(generator)


def test_races_draw_from_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])
    p_A = probabilities(logits, SamplingOptions(temperature=0.7))[0]
    times = waits(torch.full((20_000,), 11), torch.arange(20_000), torch.arange(70, 75))
    counts = torch.bincount((p_A / times).argmax(-1), minlength=5)
    assert ((counts - 20_000 * p_A).square() / (20_000 * p_A)).sum() < 4 + 5 * 8**0.5


def test_a_fully_known_answer_needs_no_pass(model: AnyGen, engine: RecordingEngine) -> None:
    first = model.bundle.vocabulary.range("image.0").start
    state = states_of(model, [Request(text="a", output="image")])[0]
    state.walk = model.grammar.start(Plan((Block("image", (1, 2), known=(first, first + 1)),)), 20)
    ids = run(engine, [state])[0]
    assert not engine.prefilled and state.walk.done and ids[3:5] == (first, first + 1)
    assert isinstance(
        model.sequencer.parse(np.array([model.bundle.vocabulary.control("target"), *ids])).document, Document
    )
