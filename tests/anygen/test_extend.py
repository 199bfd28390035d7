"""`Engine.extend`: a window of ids in one pass is as many steps, at every row's own position, and can be taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anygen.sampling.engine import Cache, Engine
from anygen.vocabulary import Vocabulary

LENGTHS = (3, 17, 1, 40)


@pytest.fixture(scope="module")
def engine(tiny_model: Any) -> Engine:
    return Engine(tiny_model)


def ids_of(vocabulary: Vocabulary, num_rows: int, num_ids: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary.used, (num_rows, num_ids)))


def prefilled(engine: Engine, vocabulary: Vocabulary) -> Cache:
    """Four rows that stand at different positions."""
    random = np.random.default_rng(1)
    cache = engine.new_cache(len(LENGTHS), 64)
    engine.prefill([random.integers(0, vocabulary.used, length) for length in LENGTHS], cache)
    return cache


def stepped(engine: Engine, cache: Cache, ids_BW: Tensor) -> Tensor:
    """What `extend` is to give: one step after another."""
    return torch.stack([engine.step(ids_B, cache) for ids_B in ids_BW.T], 1)


@pytest.mark.parametrize("width", [1, 2, 7, 20])
def test_a_window_is_as_many_steps(engine: Engine, vocabulary: Vocabulary, width: int) -> None:
    ids_BW = ids_of(vocabulary, len(LENGTHS), width)
    one, other = prefilled(engine, vocabulary), prefilled(engine, vocabulary)
    assert (engine.extend(ids_BW, one) - stepped(engine, other, ids_BW)).abs().max() < 1e-5
    assert one.lengths_B.tolist() == other.lengths_B.tolist()
    after_B = torch.tensor([1, 2, 3, 4])  # keys and values are the same too: the next step cannot tell
    assert (engine.step(after_B, one) - engine.step(after_B, other)).abs().max() < 1e-5


def test_what_is_taken_back_was_never_there(engine: Engine, vocabulary: Vocabulary) -> None:
    draft_BW = ids_of(vocabulary, len(LENGTHS), 8)
    kept_B = torch.tensor([0, 3, 8, 5])
    cache = prefilled(engine, vocabulary)
    before_B = cache.lengths_B.clone()
    engine.extend(draft_BW, cache)
    cache.lengths_B = before_B + kept_B
    next_BW = ids_of(vocabulary, len(LENGTHS), 4, seed=4)
    first = engine.extend(next_BW, cache)
    second = engine.step(next_BW[:, 0], cache)
    for row, kept in enumerate(kept_B.tolist()):
        alone = prefilled(engine, vocabulary)
        alone.select(torch.tensor([row]))
        if kept:
            stepped(engine, alone, draft_BW[row : row + 1, :kept])
        assert (first[row] - stepped(engine, alone, next_BW[row : row + 1])[0]).abs().max() < 1e-5
        assert (second[row] - engine.step(next_BW[row, :1], alone)[0]).abs().max() < 1e-5


def test_rows_may_have_fewer_ids(engine: Engine, vocabulary: Vocabulary) -> None:
    counts_B = torch.tensor([2, 6, 0, 1])
    ids_BW = ids_of(vocabulary, len(LENGTHS), 6)
    cache = prefilled(engine, vocabulary)
    hidden = engine.extend(ids_BW, cache, counts_B)
    assert cache.lengths_B.tolist() == [
        length + count for length, count in zip(LENGTHS, counts_B.tolist(), strict=True)
    ]
    after_B = torch.tensor([1, 2, 3, 4])
    after = engine.step(after_B, cache)
    for row, count in enumerate(counts_B.tolist()):
        alone = prefilled(engine, vocabulary)
        alone.select(torch.tensor([row]))
        if count:
            expected = stepped(engine, alone, ids_BW[row : row + 1, :count])
            assert (hidden[row, :count] - expected[0]).abs().max() < 1e-5
        assert not hidden[row, count:].any()
        assert (after[row] - engine.step(after_B[row : row + 1], alone)[0]).abs().max() < 1e-5


def test_a_short_row_may_stand_at_the_end_of_the_cache(tiny_model: Any, vocabulary: Vocabulary) -> None:
    engine = Engine(tiny_model)
    cache = engine.new_cache(2, 5)
    engine.prefill([np.array([1, 2, 3, 4]), np.array([5])], cache)
    hidden = engine.extend(torch.tensor([[7, 0, 0], [7, 8, 9]]), cache, torch.tensor([1, 3]))
    whole = engine.prefill([np.array([1, 2, 3, 4, 7])], engine.new_cache(1, 5))
    assert (hidden[0, 0] - whole[0]).abs().max() < 1e-5
