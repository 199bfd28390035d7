"""Packing: nothing lost, nothing split that must not be, nothing leaked, exactly resumable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anygen.errors import ConfigError, DataError
from anygen.packing import Packer, collate, split_long, unpack
from anygen.sequence import Sequence


def sequence_of(length: int, number: int = 0, spans: tuple[tuple[int, int], ...] = ()) -> Sequence:
    ids = np.arange(length) + 1000 * (number + 1)
    return Sequence(ids, np.arange(length) % 2 == 0, spans)


def packer_of(lengths: list[int], **options: int) -> Packer:
    settings = {"row_length": 50, "num_rows": 2, "pool_size": 8, "pad_id": 0, **options}
    return Packer(lambda n: sequence_of(lengths[n % len(lengths)], n), **settings)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 20), st.integers(1, 4))
def test_every_sequence_appears_once_whole_and_in_its_place(lengths: list[int], pool: int, rows: int) -> None:
    packer = packer_of(lengths, pool_size=pool, num_rows=rows)
    seen: dict[int, list[int]] = {}
    for _ in range(20):
        batch = packer.next_batch()
        assert len(batch.ids_T) == 50 * rows == sum(batch.lengths)
        for ids, positions in zip(unpack(batch, batch.ids_T), unpack(batch, batch.positions_T), strict=True):
            assert positions.tolist() == list(range(len(ids)))
            if ids[0] != 0:
                number = int(ids[0]) // 1000 - 1
                assert number not in seen
                seen[number] = ids.tolist()
    for number, ids in seen.items():
        assert ids == sequence_of(lengths[number % len(lengths)], number).ids_S.tolist()
    waiting = {number for number, _ in packer.state()["waiting"]}
    assert sorted(seen.keys() | waiting) == list(range(packer.state()["next_example"]))


def test_labels_are_the_next_id_of_the_same_sequence_only() -> None:
    batch = collate([[sequence_of(3, 0), sequence_of(1, 1)]], 6, pad_id=7)
    assert batch.ids_T.tolist() == [1000, 1001, 1002, 2000, 7, 7]
    assert batch.labels_T.tolist()[:2] == [1001, 1002]
    assert batch.predicts_T.tolist() == [True, True, False, False, False, False]
    assert batch.target_T.tolist() == [False, True, False, False, False, False]
    assert batch.lengths == (3, 1, 2) and batch.num_padding == 2
    assert batch.utilisation == pytest.approx(4 / 6)


def test_utilisation_on_lengths_of_the_emoji_mix() -> None:
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(74, 90, 500), random.integers(60, 220, 500)])
    random.shuffle(lengths)
    packer = Packer(
        lambda n: sequence_of(int(lengths[n % 1000]), n), row_length=2048, num_rows=2, pool_size=256, pad_id=0
    )
    assert np.mean([packer.next_batch().utilisation for _ in range(20)]) > 0.995


def test_no_sequence_starves() -> None:
    # Example 0 never fits beside the others; it must still leave within one pool's worth of rows.
    packer = packer_of([49, 25], pool_size=6, num_rows=1)
    first = [int(packer.next_batch().ids_T[0]) // 1000 - 1 for _ in range(6)]
    assert first == sorted(first) and first[0] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 25), st.lists(st.integers(1, 120), min_size=1, max_size=9))
def test_resumed_stream_equals_one_that_was_never_stopped(stop: int, lengths: list[int]) -> None:
    straight, stopped = packer_of(lengths), packer_of(lengths)
    for _ in range(stop):
        straight.next_batch()
        stopped.next_batch()
    resumed = packer_of(lengths)
    resumed.load_state(stopped.state())
    for _ in range(5):
        left, right = straight.next_batch(), resumed.next_batch()
        assert left.ids_T.tolist() == right.ids_T.tolist() and left.lengths == right.lengths


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.data())
def test_long_sequences_are_cut_outside_media_blocks(length: int, data: st.DataObject) -> None:
    spans, at = [], 0
    while at < length:
        start = data.draw(st.integers(at, length))
        stop = data.draw(st.integers(start, min(length, start + 40)))
        if stop > start:
            spans.append((start, stop))
        at = stop + 1
    pieces = split_long(sequence_of(length, 0, tuple(spans)), 50)
    assert np.concatenate([p.ids_S for p in pieces]).tolist() == sequence_of(length).ids_S.tolist()
    assert all(1 <= len(p) <= 50 for p in pieces)
    assert sum(len(p.media_spans) for p in pieces) == len(spans)  # a split block would be missing
    for piece in pieces:
        assert all(0 <= a < b <= len(piece) for a, b in piece.media_spans)


def test_a_media_block_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(DataError, match="does not fit a row of 50"):
        split_long(sequence_of(80, 0, ((5, 75),)), 50)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError):
        packer_of([3], pool_size=0)
