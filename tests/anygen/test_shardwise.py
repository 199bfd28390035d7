"""Orders that visit few shards at a time: every item once an epoch, pure, and local."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from anygen.data.coded import CodedRecord, CodedStore, write_coded_shard
from anygen.data.order import Mixture, ShardwiseOrder
from anygen.data.tasks import DocumentStream


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 14), st.integers(0, 2**40))
def test_every_item_comes_once_and_from_few_shards_at_a_time(counts: list[int], block: int, seed: int) -> None:
    order = ShardwiseOrder(counts, block=block, seed=seed)
    items = [order(place) for place in range(sum(counts))]
    assert sorted(items) == list(range(sum(counts)))
    ends = np.cumsum(counts)
    shards = [int(np.searchsorted(ends, item, side="right")) for item in items]
    firsts = {shard: shards.index(shard) for shard in shards}
    lasts = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in shards}
    for place in range(len(shards)):
        assert sum(firsts[s] <= place <= lasts[s] for s in firsts) <= block


def test_orders_shuffle_within_blocks_and_depend_on_the_seed() -> None:
    orders = [ShardwiseOrder([100] * 10, block=3, seed=seed) for seed in range(8)]
    items = [[order(place) for place in range(1000)] for order in orders]
    assert len({tuple(i) for i in items}) == 8
    for found in items:
        assert len({item // 100 for item in found[:30]}) == 3, "the shards of a block are mixed"
        assert abs(np.corrcoef(found[:300], np.arange(300))[0, 1]) < 0.3


def test_shards_of_one_size_are_not_shuffled_alike() -> None:
    order = ShardwiseOrder([50] * 4, block=1, seed=0)
    items = [order(place) % 50 for place in range(200)]
    assert len({tuple(items[start : start + 50]) for start in range(0, 200, 50)}) == 4


def test_a_mixture_keeps_its_proportions_and_epochs() -> None:
    counts = {"a": [10, 0, 30], "b": [3, 4, 0]}
    items = {kind: sum(found) for kind, found in counts.items()}
    mixture = Mixture({"a": 3, "b": 1}, items, seed=1, shard_counts=counts, block=1)
    draws = [mixture(number) for number in range(4000)]
    assert Counter(draw.kind for draw in draws) == {"a": 3000, "b": 1000}
    of_a = [draw.item for draw in draws if draw.kind == "a"]
    for epoch in range(10):
        assert sorted(of_a[40 * epoch : 40 * epoch + 40]) == list(range(40))
    assert of_a[:40] != of_a[40:80]
    numbers = list(range(4000))
    random.Random(0).shuffle(numbers)
    assert [mixture(number) for number in numbers] == [draws[number] for number in numbers], "no hidden state"


def test_a_stream_opens_the_shards_block_by_block(tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: Any) -> None:
    for shard in range(6):
        records = [CodedRecord(f"{shard}-{n}", "pair", (f"a {n}", f"the {n}")) for n in range(shard + 1)]
        write_coded_shard(tmp_path / f"s{shard}", records, facts={})
    store = CodedStore(tmp_path.glob("s*"), facts={})
    asked: list[int] = []
    early: list[int] = []
    real = CodedStore.__getitem__
    monkeypatch.setattr(CodedStore, "__getitem__", lambda self, n: asked.append(n) or real(self, n))  # type: ignore[func-returns-value]
    monkeypatch.setattr(CodedStore, "prefetch", lambda self, n: early.append(n))
    stream = DocumentStream(
        store, {"text>text": 1}, tokenizers, drop_share=0, free_share=0, seed=0, shards_per_block=1, lookahead=5
    )
    for number in range(42):
        stream(number)
    assert sorted(asked[:21]) == sorted(asked[21:]) == list(range(21))
    for epoch in (asked[:21], asked[21:]):
        shards = [store.shard_of(number) for number in epoch]
        assert len([1 for a, b in zip(shards, shards[1:], strict=False) if a != b]) == 5, "one after another"
    assert early[:-5] == asked[5:], "told five examples before"
