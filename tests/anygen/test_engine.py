"""Packed products, the cache's rows, and an engine that gives the same with and without torch's private operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anygen.sampling import linear
from anygen.sampling.cache import Cache, bucket
from anygen.sampling.cached_attention import Window, attend_cached, causal_mask, few_queries
from anygen.sampling.engine import Engine
from anygen.sampling.linear import Linear, can_pack
from anygen.vocabulary import Vocabulary


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("shape", [(48, 40), (1, 3), (130, 17)])
def test_packed_products_are_those_of_torch(num_rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(num_rows, shape[1], generator=generator)
    to = torch.randn(num_rows, shape[0], generator=generator)
    for packed in (True, False):
        product = Linear(weight, torch.float32, packed=packed)
        assert torch.allclose(product(x), F.linear(x, weight), atol=1e-5)
        assert torch.allclose(product.add(x, to), to + F.linear(x, weight), atol=1e-5)
    rough = Linear(weight, torch.bfloat16)
    assert rough(x).dtype == torch.bfloat16 and rough.add(x, to).dtype == torch.float32
    assert (rough(x).float() - F.linear(x, weight)).abs().max() < 0.02 * shape[1] ** 0.5


def test_operators_that_are_absent_or_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        _reorder_linear_weight = staticmethod(lambda weight, rows: weight)

        class _linear_pointwise:
            def __new__(cls, x: Any, weight: Any, *rest: Any) -> Any:
                return F.linear(x, weight) + 1

            binary = staticmethod(lambda x, to, weight, *rest: to + F.linear(x, weight))

    def packs_with(operators: Any) -> bool:
        monkeypatch.setattr(linear.torch.ops, "mkldnn", operators)
        can_pack.cache_clear()
        return can_pack(torch.float32)

    try:
        assert not packs_with(Wrong) and not packs_with(object())
        assert not Linear(torch.ones(3, 3), torch.float32).is_packed
    finally:
        monkeypatch.undo()
        can_pack.cache_clear()
    assert not can_pack(torch.float64)


def test_public_operators_give_the_same_logits(tiny_model: Any, vocabulary: Vocabulary) -> None:
    prompts = [np.random.default_rng(0).integers(0, vocabulary.used, n) for n in (3, 8)]
    logits = []
    for packed in (True, False):
        engine = Engine(tiny_model, packed=packed)
        cache = engine.new_cache(2, 16)
        engine.prefill(prompts, cache)
        logits.append(engine.logits(engine.step(torch.tensor([1, 2]), cache), ((0, vocabulary.size),)))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_bf16_weights_stay_near_fp32(tiny_model: Any, vocabulary: Vocabulary) -> None:
    prompts = [np.random.default_rng(0).integers(0, vocabulary.used, n) for n in (3, 8)]
    hidden = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(tiny_model, dtype=dtype)
        cache = engine.new_cache(2, 16)
        engine.prefill(prompts, cache)
        hidden.append(engine.step(torch.tensor([1, 2]), cache))
    assert hidden[1].dtype == torch.float32
    assert 0 < (hidden[0] - hidden[1]).norm() < 0.02 * hidden[0].norm()


def test_prefill_into_some_rows_leaves_the_others(tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    prompts = [np.random.default_rng(0).integers(0, vocabulary.used, n) for n in (3, 8, 5, 2)]
    at_once, in_turns = engine.new_cache(4, 16), engine.new_cache(4, 16)
    engine.prefill(prompts, at_once)
    engine.prefill([prompts[3], prompts[1]], in_turns, [3, 1])
    engine.prefill([prompts[0], prompts[2]], in_turns, [0, 2])
    assert in_turns.lengths_B.tolist() == [3, 8, 5, 2]
    ids = torch.tensor([1, 2, 3, 4])
    assert (engine.step(ids, at_once) - engine.step(ids, in_turns)).abs().max() < 1e-5


# -- the cache


def filled(lengths: tuple[int, ...], *, num_rows: int, length: int = 8) -> Cache:
    """Row r holds r + position / 100, up to its length."""
    cache = Cache(2, num_rows, length, (2, 3), torch.zeros(0))
    cache.lengths_B = torch.tensor(lengths)
    for layer in cache.layers_2RGNE:
        for row, count in enumerate(lengths):
            layer[:, row, :, :count] = row + torch.arange(count)[:, None] / 100
    return cache


def content(cache: Cache) -> list[list[float]]:
    """First number of every position in use, the same in all layers."""
    first, last = cache.layers_2RGNE[0][0, :, 0, :, 0], cache.layers_2RGNE[1][1, :, 1, :, 2]
    rows, again = (
        [[round(float(x), 2) for x in memory_RN[row, :n]] for row, n in enumerate(cache.lengths_B)]
        for memory_RN in (first, last)
    )
    assert rows == again
    return rows


def test_rows_leave_join_and_are_copied() -> None:
    cache = filled((2, 1, 3, 2), num_rows=4)
    two, three = [2.0, 2.01, 2.02], [3.0, 3.01]
    cache.rearrange([3, 2])
    assert content(cache) == [three, two]
    cache.reserve(6, 20)
    assert cache.capacity == (6, 20) and content(cache) == [three, two]
    prompt = cache.take_out(1)
    assert cache.append(3) == [2, 3, 4]
    cache.put(prompt, [2, 4])
    cache.copy(0, [3])
    assert content(cache) == [three, two, two, three, two]
    keys, values = [[0, 20], [40, 60], [80, 100], [120, 140], [160, 180], [200, 220]], 240
    assert cache.first_slots_RP.tolist() == [[*row, *(values + slot for slot in row)] for row in keys]


def test_rows_that_trade_places_do_not_overwrite_one_another() -> None:
    cache = filled((1, 2, 3), num_rows=3)
    cache.rearrange([1, 2, 0])
    assert content(cache) == [[1.0, 1.01], [2.0, 2.01, 2.02], [0.0]]


def test_rows_grow_in_the_memory_taken_ahead() -> None:
    cache = Cache(2, 3, 8, (2, 3), torch.zeros(0), ahead=64)
    cache.lengths_B = torch.tensor([2, 1, 3])
    for layer in cache.layers_2RGNE:
        layer.fill_(7.0)  # stale, as after another layout
        for row, count in enumerate(cache.lengths_B.tolist()):
            layer[:, row, :, :count] = row + torch.arange(count)[:, None] / 100
    before, num_bytes = content(cache), cache.num_bytes
    for length in (9, 20, 33, 64):
        cache.reserve(3, length)
        assert cache.capacity == (3, length) and content(cache) == before
    assert cache.num_bytes == num_bytes
    views = cache.heads(2, 64)
    cache.reserve(3, 65)
    assert content(cache) == before and cache.num_bytes >= 65 * num_bytes // 64
    (k_bNE, v_bNE), layer = cache.heads(2, 64)[1], cache.layers_2RGNE[1]
    assert k_bNE is not views[1][0] and k_bNE.data_ptr() == layer.data_ptr()
    assert torch.equal(v_bNE, layer[1, :2, :, :64].flatten(0, 1))


@pytest.mark.parametrize("seed", range(20))
def test_room_is_made_in_any_order_of_lengths_and_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    cache = filled((3, 1, 2), num_rows=3)
    before = content(cache)
    for _ in range(12):
        rows, length = cache.capacity
        cache.reserve(rows + int(random.integers(0, 2)), length + int(random.integers(0, 9)))
        assert content(cache) == before
    needed = math.prod(cache.layers_2RGNE[0].shape) * 4 * len(cache.layers_2RGNE)
    assert cache.num_bytes <= 2 * needed, "each layer has as much as the others"


def test_a_cache_is_given_room_and_what_is_stale_is_not_seen(tiny_model: Any, vocabulary: Vocabulary) -> None:
    """Lengths across several layouts, in memory full of what other rows left."""
    engine, random = Engine(tiny_model), np.random.default_rng(0)
    prompts = [random.integers(0, vocabulary.used, n) for n in (3, 30, 17)]
    ids_BN = torch.from_numpy(random.integers(0, vocabulary.used, (3, 80)))
    cache = engine.new_cache(3, 40)
    for memory in cache._memory:
        memory.fill_(50.0)
    engine.prefill(prompts, cache)
    for ids_B in ids_BN[:, :45].T:
        engine.step(ids_B, cache)
    hidden = engine.extend(ids_BN[:, 45:], cache)[:, -1]
    whole = [np.concatenate([prompt, ids]) for prompt, ids in zip(prompts, ids_BN.numpy(), strict=True)]
    assert (hidden - engine.prefill(whole, engine.new_cache(3, 120))).abs().max() < 1e-4
    assert cache.capacity[1] == engine.room(110)


@pytest.mark.parametrize("width", [1, 3, 4, 5])
@pytest.mark.parametrize("num_heads", [2, 4])
def test_few_queries_take_another_way_to_the_same(width: int, num_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q_MHE = torch.randn(3 * width, num_heads, 4, generator=generator)
    k_bNE, v_bNE = torch.randn(2, 3 * 2, 9, 4, generator=generator)
    positions_BQ = (torch.tensor([[0], [4], [3]]) + torch.arange(width)).repeat(1, num_heads // 2)
    mask_B1QN = causal_mask(positions_BQ, 9, torch.float32)
    mask_bNQ = few_queries(mask_B1QN, 9, 3, 2, positions_BQ.shape[1])
    assert (mask_bNQ is None) == (positions_BQ.shape[1] >= 8)
    if mask_bNQ is not None:
        ways = [Window(torch.empty(0), mask_B1QN, 9, (3, width), mask) for mask in (None, mask_bNQ)]
        plain, few = (attend_cached(q_MHE, (k_bNE, v_bNE), window) for window in ways)
        assert plain.shape == few.shape == (3 * width, 4 * num_heads) and torch.allclose(plain, few, atol=1e-6)


@pytest.mark.parametrize(("length", "longest", "expected"), [(1, 4096, 128), (128, 4096, 128), (200, 150, 200)])
def test_lengths_come_in_buckets(length: int, longest: int, expected: int) -> None:
    assert bucket(length, longest) == expected
