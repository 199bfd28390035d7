"""The engine against transformers; choice; samples that depend on nothing but their seed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.request import Request
from anygen.sampling.choose import SamplingOptions, choose, probabilities
from anygen.sampling.engine import Engine
from anygen.sampling.race import draw_key, waits
from anygen.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Any:
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("sdpa")
    return model


def prompts_of(vocabulary: Vocabulary, lengths: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocabulary.used, length) for length in lengths]


def test_prefill_and_steps_give_transformers_logits(reference: Any, tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    prompts = prompts_of(vocabulary, (3, 17, 1, 40))
    continuation = np.random.default_rng(2).integers(0, vocabulary.used, (10, len(prompts)))
    cache = engine.new_cache(len(prompts), 64)
    hidden = engine.prefill(prompts, cache)
    for step in range(11):
        logits = engine.logits(hidden, ((0, vocabulary.size),))
        for row, prompt in enumerate(prompts):
            ids = torch.from_numpy(np.concatenate([prompt, continuation[:step, row]]))[None]
            expected = reference(input_ids=ids, use_cache=False).logits[0, -1]
            assert (logits[row] - expected).abs().max() < 1e-5
        if step < 10:
            hidden = engine.step(torch.from_numpy(continuation[step]), cache)


def test_rows_of_the_output_matrix_are_those_of_the_ranges(tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    hidden = engine.prefill(prompts_of(vocabulary, (5, 6)), engine.new_cache(2, 8))
    full = engine.logits(hidden, ((0, vocabulary.size),))
    part = engine.logits(hidden, ((3, 9), (20, 21)))
    assert torch.allclose(part, torch.cat([full[:, 3:9], full[:, 20:21]], 1), atol=1e-6)


def test_greedy_ids_equal_transformers_generate(reference: Any, tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    for prompt in prompts_of(vocabulary, (1, 4, 9, 30)):
        expected = reference.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        cache = engine.new_cache(1, 128)
        hidden, ids = engine.prefill([prompt], cache), []
        for _ in range(40):
            ids.append(int(engine.logits(hidden, ((0, vocabulary.size),)).argmax()))
            hidden = engine.step(torch.tensor(ids[-1:]), cache)
        assert ids == expected


def test_cache_rows_can_be_dropped_and_repeated(tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    prompts = prompts_of(vocabulary, (4, 9, 2))
    cache = engine.new_cache(3, 20)
    engine.prefill(prompts, cache)
    cache.select(torch.tensor([2, 0, 2]))
    hidden = engine.step(torch.tensor([5, 6, 5]), cache)
    for row, (prompt, id) in enumerate([(prompts[2], 5), (prompts[0], 6), (prompts[2], 5)]):
        alone = engine.prefill([np.append(prompt, id)], engine.new_cache(1, 20))
        assert (hidden[row] - alone[0]).abs().max() < 1e-5


# -- choice


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.floats(0.1, 3.0),
    st.integers(0, 12),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)
def test_filters_are_those_of_transformers(
    size: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, size, generator=generator, dtype=torch.float64) * 3
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warped = logits
    for warper in warpers:
        warped = warper(torch.zeros(1, 1, dtype=torch.long), warped)
    ours = probabilities(logits, options)
    assert torch.allclose(ours / ours.sum(), warped.softmax(-1), atol=1e-9)
    times = torch.empty(50, size, dtype=torch.float64).exponential_(generator=generator)
    chosen = choose(logits.expand(50, size), options, times.__getitem__)
    assert torch.isfinite(warped[0, chosen]).all()


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    times = waits(torch.arange(20_000), torch.zeros(1, dtype=torch.long), torch.arange(4))
    counts = torch.bincount(choose(logits, SamplingOptions(), times.__getitem__), minlength=4) / 20_000
    assert (counts - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.012


def test_rounding_of_logits_hardly_ever_changes_a_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 2048, generator=generator)
    noise = torch.randn(500, 2048, generator=generator) * 1e-5
    times = waits(torch.arange(500), torch.zeros(1, dtype=torch.long), torch.arange(2048))
    chosen = [choose(x, SamplingOptions(), times.__getitem__) for x in (logits, logits + noise)]
    assert torch.equal(*chosen)


def test_greedy_and_extremes() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 3.0, 3.0]])
    times = torch.tensor([[1.0, 1e-9, 9.0, 1.0]]).double()
    assert int(choose(logits, SamplingOptions(temperature=0), times.__getitem__)) == 2
    assert int(choose(logits, SamplingOptions(), times.__getitem__)) == 3
    assert int(choose(torch.tensor([[-torch.inf, 0.0]]), SamplingOptions(), times[:, :2].__getitem__)) == 1, (
        "impossible ids lose"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1),
     ("min_p", 2), ("guidance_scale", -0.1), ("temperature", "hot"), ("top_k", True)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        SamplingOptions(**{name: value})


# -- samples


def mixed_requests() -> list[Request]:
    return [
        Request(text="a red apple", output="image", seed=1, guidance_scale=3.0),
        Request(text="a cat", output="audio", seed=2, duration_s=0.3),
        Request(output="text", seed=3, max_new_tokens=30),
        Request(text="two", output=("text", "image", "audio"), seed=4, max_new_tokens=120),
        Request(text="one", output="any", seed=5, max_new_tokens=80),
        Request(text="a dog", output="region", seed=6),
        Request(text="a red apple", output="image", seed=7, temperature=0.0),
        Request(text="the flag", output=("image", "image"), seed=8, size=(16, 32), top_k=5),
    ]


def test_a_sample_is_the_same_alone_in_any_batch_and_in_any_order(model: AnyGen) -> None:
    requests = mixed_requests()
    alone = [model.generate_batch([request])[0].samples[0].ids for request in requests]
    together = [output.samples[0].ids for output in model.generate_batch(requests)]
    backwards = [output.samples[0].ids for output in model.generate_batch(requests[::-1])][::-1]
    assert alone == together == backwards


def test_sample_i_of_a_call_has_seed_plus_i(model: AnyGen) -> None:
    several = model.generate(text="a cat", output="image", num_samples=4, seed=10).samples
    for index, one in enumerate(several):
        assert one.seed == 10 + index
        assert one.ids == model.generate(text="a cat", output="image", seed=10 + index).samples[0].ids
    assert len({one.ids for one in several}) == 4


def test_the_global_random_state_is_untouched(model: AnyGen) -> None:
    state = torch.get_rng_state()
    model.generate(text="a cat", output=("image", "audio"), num_samples=2)
    assert torch.equal(state, torch.get_rng_state())


def test_generators_instead_of_seeds(model: AnyGen) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (10, 11)]
    out = model.generate(text="a cat", output="image", num_samples=2, generator=generators)
    assert [s.ids for s in out.samples] == [
        s.ids for s in model.generate(text="a cat", output="image", num_samples=2, seed=10).samples
    ]
    assert out.samples[0].seed is None
    with pytest.raises(InputError, match="generator"):
        model.generate(text="a", output="image", num_samples=3, generator=generators)


@pytest.mark.parametrize("scale", [1.0, 0.0, 30.0])
def test_guidance_is_the_formula_on_logits_of_both_prompts(model: AnyGen, scale: float) -> None:
    engine = model.engine
    request = Request(text="a cat", output="image", guidance_scale=scale)
    state = model._states(request)[0]
    assert state.unconditional is not None
    prompts, walk, key = [state.prompt, state.unconditional], state.walk, draw_key(torch.Generator().manual_seed(0))
    cache = engine.new_cache(2, 200)
    hidden = engine.prefill(prompts, cache)
    ids: list[int] = []
    while not walk.done:
        allowed = np.concatenate([np.arange(a, b) for a, b in walk.allowed])
        index = 0
        if len(allowed) > 1:
            with_text, without = engine.logits(hidden, walk.allowed).double()
            guided = without + scale * (with_text - without)
            times = waits(torch.tensor([key]), torch.tensor([len(ids)]), torch.from_numpy(allowed))
            index = int(choose(guided[None], SamplingOptions(), times.__getitem__))
        ids.append(int(allowed[index]))
        walk.push(ids[-1])
        if not walk.done:
            hidden = engine.step(torch.tensor([ids[-1]] * 2), cache)
    assert tuple(ids) == model.generate_batch([request])[0].samples[0].ids


def test_guidance_changes_the_answer_and_zero_forgets_the_input(model: AnyGen) -> None:
    def ids(text: str, scale: float) -> list[tuple[int, ...]]:
        out = model.generate(text=text, output="image", guidance_scale=scale, num_samples=8)
        return [sample.ids for sample in out.samples]

    assert ids("a cat", 30.0) != ids("a cat", 1.0)
    assert ids("a cat", 30.0) != ids("two dogs", 30.0)
    assert ids("a cat", 0.0) == ids("two dogs", 0.0)


def test_too_long_prompts_are_refused(model: AnyGen) -> None:
    with pytest.raises(InputError, match="shorten the input"):
        model.generate(text="a " * 2000, output="image")
    with pytest.raises(InputError, match="lower max_new_tokens"):
        model.generate(text="a", output="text", max_new_tokens=5000)
