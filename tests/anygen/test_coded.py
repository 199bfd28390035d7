"""Coded shards: found by index without being read, and every fault named with its shard."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from anygen.data import coded
from anygen.data.coded import CODES, RECORDS, CodedRecord, CodedStore, CodedUtterance, write_coded_shard
from anygen.data.shard_index import INDEX, KINDS, Has, ShardIndex
from anygen.errors import CheckpointError, DataError
from anygen.files import MANIFEST
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Region

ALL = list(Has)


def record_of(number: int) -> CodedRecord:
    """A record that holds what the number's bits say."""
    chooser = random.Random(number)
    codes = Codes(np.array([[chooser.randrange(2**16) for _ in range(4)]]), "image", (2, 2))
    sound = CodedUtterance("é\u2028", "v", Codes(np.array([[number], [7]]), "audio"))
    return CodedRecord(
        f"key {number}",
        ("emoji", "scene", "straße")[number % 3],
        ("ein Bär", "x\u2028y")[: number >> 1 & 1],
        codes if number & 1 else None,
        (sound,) * (number >> 2 & 1),
        (("cat", Region((0.0, 0.0, 0.5, 0.5))),) * (number >> 4 & 1),
        (("how many?", "two"),) * (number >> 3 & 1),
    )


def shards_of(folder: Path, sizes: tuple[int, ...] = (40, 0, 1, 30)) -> list[CodedRecord]:
    records = [record_of(number) for number in range(sum(sizes))]
    for shard, size in enumerate(sizes):
        start = sum(sizes[:shard])
        write_coded_shard(folder / f"train-{shard:02}", records[start : start + size], facts={"image": "x"})
    return records


def store_of(folder: Path, **options: bool) -> CodedStore:
    return CodedStore(folder.glob("train-*"), facts={"image": "x"}, **options)


def as_an_older_version_wrote_it(shard: Path) -> None:
    manifest = json.loads((shard / MANIFEST).read_text())
    for name in (INDEX, KINDS):
        (shard / name).unlink()
        del manifest[name]
    (shard / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("older", [(), (0, 3), (0, 1, 2, 3)])
def test_records_and_what_they_hold_are_found_with_and_without_an_index_file(
    tmp_path: Path, older: tuple[int, ...]
) -> None:
    records = shards_of(tmp_path)
    for shard in older:
        as_an_older_version_wrote_it(tmp_path / f"train-{shard:02}")
    store = store_of(tmp_path)
    assert list(store) == records
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    assert [store[number] for number in order] == [records[number] for number in order]
    held = [
        (r.kind, {Has.PICTURE: r.picture, Has.CAPTIONS: r.captions, Has.UTTERANCES: r.utterances,
                  Has.QUESTIONS: r.questions, Has.OBJECTS: r.objects})
        for r in records
    ]  # fmt: skip
    for needs in range(32):
        for kind in ("", "emoji", "straße", "unknown"):
            expected = [
                number
                for number, (own, content) in enumerate(held)
                if kind in ("", own) and all(content[flag] for flag in ALL if flag & needs)
            ]
            assert store.numbers(kind, Has(needs), Has(0)).tolist() == expected


def test_opening_reads_no_record(tmp_path: Path) -> None:
    shards_of(tmp_path)
    for name in (CODES, RECORDS):
        path = tmp_path / "train-03" / name
        path.write_bytes(bytes(path.stat().st_size))
    store = store_of(tmp_path)
    assert len(store) == 71 and store[39] == record_of(39)
    with pytest.raises(CheckpointError, match="train-03"):
        store[70]


@pytest.mark.parametrize("name", [CODES, RECORDS, INDEX, KINDS, "facts.json"])
def test_a_flipped_bit_and_a_truncation_are_found_and_the_shard_is_named(tmp_path: Path, name: str) -> None:
    shards_of(tmp_path)
    path = tmp_path / "train-03" / name
    whole = path.read_bytes()
    for number in range(12):
        data = bytearray(whole)
        data[random.Random(number).randrange(len(data))] ^= 1 << number % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="train-03"):
            store_of(tmp_path)[70]
        with pytest.raises(CheckpointError, match="train-03"):
            store_of(tmp_path, verify_all=True)
        path.write_bytes(whole[: random.Random(number).randrange(len(whole))])
        with pytest.raises(CheckpointError, match="train-03"):
            store_of(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="train-03"):
        store_of(tmp_path)
    path.write_bytes(whole)
    assert store_of(tmp_path, verify_all=True)[70] == record_of(70)


def test_a_shard_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards_of(tmp_path)
    store = store_of(tmp_path)
    store[0]
    monkeypatch.setattr(coded, "_OPEN_SHARDS", 1)
    path = tmp_path / "train-00" / CODES
    path.write_bytes(bytes(path.stat().st_size))  # a later verification would complain
    store[70]
    assert store[1].picture is not None


def test_a_shard_of_another_tokenizer_is_named(tmp_path: Path) -> None:
    shards_of(tmp_path)
    write_coded_shard(tmp_path / "train-99", [], facts={"image": "y"})
    with pytest.raises(DataError, match=r"train-99 was made with other tokenizers"):
        store_of(tmp_path)


def test_open_files_are_few_however_many_shards_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "_OPEN_SHARDS", 3)
    records = shards_of(tmp_path, (1,) * 40)
    store = store_of(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 30, limits[1]))
    try:
        assert [store[number] for number in range(40)] == records
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_kinds_are_refused() -> None:
    empty = {"picture": None, "captions": [], "utterances": [], "questions": [], "objects": []}
    with pytest.raises(DataError, match="65537 kinds"):
        ShardIndex.of((0, {"kind": str(number), **empty}) for number in range(2**16 + 1))
