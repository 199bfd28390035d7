"""Remote shards: read as local ones are, whole or not at all, within the cache's limit, and every fault typed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from anygen.data import coded
from anygen.data.coded import CODES, RECORDS, CodedRecord, CodedStore, write_coded_shard
from anygen.data.loader import PackedLoader, Packing
from anygen.data.remote import RemoteShard, ShardCache
from anygen.data.shard_index import INDEX, KINDS
from anygen.errors import ConfigError, DataError, MissingDependency
from anygen.files import MANIFEST
from anygen.sequence import Sequence
from anygen.stages.coded_shards import ShardsConfig, places_of
from tokenizers_mm.codes import Codes

URL = "memory://bucket/tokens"
SHARDS = 5


def record_of(number: int) -> CodedRecord:
    return CodedRecord(f"k{number}", "pair", ("a cat",), Codes(np.array([[number, 2, 3, 4]]), "image", (2, 2)))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for shard in range(SHARDS):
        records = [record_of(10 * shard + n) for n in range(10)]
        write_coded_shard(tmp_path / "local" / f"train-{shard}", records, facts={"a": 1})
    return tmp_path / "local"


@pytest.fixture
def system(local: Path) -> Iterator[Any]:
    """A file system in memory that holds the shards."""
    memory = fsspec.filesystem("memory")
    upload(memory, local)
    yield memory
    memory.rm("/bucket", recursive=True)


def upload(memory: Any, local: Path) -> None:
    for path in local.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/tokens/{path.relative_to(local)}", path.read_bytes())


def cache_of(tmp_path: Path, limit_bytes: float = 1e9) -> ShardCache:
    return ShardCache(URL, tmp_path / "cache", limit_bytes=limit_bytes)


def store_of(cache: ShardCache) -> CodedStore:
    return CodedStore(cache.shards("train-*"), facts={"a": 1})


def fetched(cache: ShardCache) -> set[str]:
    return {path.name for path in (cache.folder / "shards").iterdir()}


class Unreliable:
    """A file system whose n-th download goes wrong."""

    def __init__(self, system: Any, wrong: Callable[[str, Path], None], *, times: int, of: str) -> None:
        self.glob, self._system, self._wrong, self._times, self._of = system.glob, system, wrong, times, of

    def get_file(self, remote: str, place: str) -> None:
        self._system.get_file(remote, place)
        if remote.endswith(self._of) and self._times > 0:
            self._times -= 1
            self._wrong(remote, Path(place))


def cut(remote: str, place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-3])


def flipped(remote: str, place: Path) -> None:
    place.write_bytes(b"\0" * place.stat().st_size)


def broken_off(remote: str, place: Path) -> None:
    raise ConnectionResetError("connection reset by peer")


class ForeignError(Exception):
    """What a storage library may raise."""


def foreign(remote: str, place: Path) -> None:
    raise ForeignError("token expired")


def test_remote_records_are_the_local_ones_and_come_when_they_are_asked_for(
    tmp_path: Path, local: Path, system: Any
) -> None:
    cache = cache_of(tmp_path)
    store = store_of(cache)
    assert len(store) == 50 and fetched(cache) == set()
    assert store[23] == record_of(23)
    assert fetched(cache) == {"train-2"}
    assert list(store) == list(CodedStore(local.glob("train-*"), facts={"a": 1}))
    for name in (CODES, RECORDS):
        for shard in range(SHARDS):
            system.rm(f"/bucket/tokens/train-{shard}/{name}")
    assert list(store_of(cache_of(tmp_path))) == list(store), "from the cache alone"


@pytest.mark.parametrize("wrong", [cut, flipped, broken_off, foreign])
@pytest.mark.parametrize("of", [CODES, INDEX, MANIFEST])
def test_a_download_that_fails_is_tried_again_and_then_an_error(
    tmp_path: Path, system: Any, monkeypatch: pytest.MonkeyPatch, wrong: Any, of: str
) -> None:
    for times in (1, 2):
        cache = ShardCache(URL, tmp_path / f"cache{times}", limit_bytes=1e9)
        path = cache.filesystem()[1]
        unreliable = Unreliable(system, wrong, times=times, of=f"train-2/{of}")
        monkeypatch.setattr(cache, "filesystem", lambda found=(unreliable, path): found)
        if times == 1:
            assert store_of(cache)[23] == record_of(23)
        else:
            with pytest.raises(DataError, match=r"tokens/train-2 did not arrive whole, twice"):
                store_of(cache)[23]
            assert not list(cache.folder.glob("*/train-2/" + of)), "nothing half"
        assert not list(cache.folder.rglob(".tmp-*"))


def test_a_shard_that_is_missing_or_incomplete_is_named(tmp_path: Path, system: Any) -> None:
    store = store_of(cache_of(tmp_path))
    system.rm(f"/bucket/tokens/train-3/{CODES}")
    with pytest.raises(DataError, match=r"tokens/train-3 is not there or not complete"):
        store[30]
    with pytest.raises(DataError, match="no coded shards"):
        CodedStore(cache_of(tmp_path).shards("validation-*"), facts={})


def test_urls_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nowhere://x is not a URL"):
        ShardCache("nowhere://x", tmp_path, limit_bytes=1).shards("*")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingDependency, match=r"s3://bucket needs a package.*s3fs"):
        ShardCache("s3://bucket", tmp_path, limit_bytes=1).shards("*")


def test_names_that_lead_out_of_a_shard_are_refused(tmp_path: Path, system: Any) -> None:
    manifest = json.loads(system.cat_file(f"/bucket/tokens/train-1/{MANIFEST}"))
    manifest["../../evil"] = manifest[CODES]
    system.pipe_file(f"/bucket/tokens/train-1/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=r"train-1 did not arrive whole.*not one of a shard"):
        store_of(cache_of(tmp_path))
    assert not list(tmp_path.rglob("evil"))


def test_those_go_that_were_used_longest_ago_and_not_those_in_use(
    tmp_path: Path, local: Path, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coded, "_OPEN_SHARDS", 1)
    size = max(sum(p.stat().st_size for p in shard.iterdir()) for shard in local.iterdir())
    cache = cache_of(tmp_path, limit_bytes=3.5 * size)
    held = next(shard for shard in cache.shards("*") if shard.name.endswith("train-1"))
    held.take()
    store = store_of(cache)
    for shard in (0, 2, 0, 3):
        assert store[10 * shard] == record_of(10 * shard)
        time.sleep(0.02)
    assert fetched(cache) == {"train-1", "train-0", "train-3"}, "2 was used longest ago of those that may go"
    assert store[40] == record_of(40)
    assert fetched(cache) == {"train-1", "train-3", "train-4"}
    held.give_back()
    assert store[0] == record_of(0)
    assert fetched(cache) == {"train-0", "train-3", "train-4"}


def _hold(shard: RemoteShard, taken: Any, done: Any) -> None:
    shard.take()
    taken.set()
    done.wait(20)


def test_a_shard_that_another_process_reads_stays_and_the_limit_gives_way_with_a_warning(
    tmp_path: Path, system: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path, limit_bytes=10)
    first, second, *_ = cache.shards("*")
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(first, taken, done), daemon=True)
    process.start()
    assert taken.wait(20)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "anygen"):
        second.take()
    assert fetched(cache) == {"train-0", "train-1"} and "exceed the cache's limit" in caplog.text
    done.set()
    process.join()
    third = cache.shards("*")[2]
    third.take()
    assert fetched(cache) == {"train-1", "train-2"}


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, system: Any) -> None:
    cache = cache_of(tmp_path)
    reader = store_of(cache)  # no one waits for it to be done
    assert reader[23] == record_of(23)
    for name in (CODES, RECORDS):
        path = cache.folder / "shards" / "train-2" / name
        path.write_bytes(bytes(path.stat().st_size))
    (cache.folder / "heads" / "train-4" / INDEX).write_bytes(b"")
    store = store_of(cache_of(tmp_path))
    assert [store[23], store[49]] == [record_of(23), record_of(49)]


def test_a_shard_that_changed_under_its_index_is_refused(tmp_path: Path, local: Path, system: Any) -> None:
    store = store_of(cache_of(tmp_path))
    write_coded_shard(local / "train-2", [record_of(1)], facts={"a": 1})
    upload(system, local)
    for _ in range(2):
        with pytest.raises(DataError, match="train-2 is another shard than when its index was read"):
            store[23]
    with pytest.raises(DataError, match="train-2 is another shard than when its index was read"):
        store_of(cache_of(tmp_path))[23]


def test_older_shards_without_an_index_are_read(tmp_path: Path, local: Path, system: Any) -> None:
    manifest = json.loads((local / "train-2" / MANIFEST).read_text())
    for name in (INDEX, KINDS):
        system.rm(f"/bucket/tokens/train-2/{name}")
        del manifest[name]
    system.pipe_file(f"/bucket/tokens/train-2/{MANIFEST}", json.dumps(manifest).encode())
    store = store_of(cache_of(tmp_path))
    assert [store[number] for number in range(50)] == [record_of(number) for number in range(50)]


def test_prefetching_fetches_in_the_background_and_leaves_errors_to_who_needs_the_shard(
    tmp_path: Path, system: Any
) -> None:
    cache = cache_of(tmp_path)
    store = store_of(cache)
    system.rm(f"/bucket/tokens/train-1/{CODES}")
    store.prefetch(10)
    store.prefetch(20)
    deadline = time.monotonic() + 10
    while fetched(cache) != {"train-2"} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetched(cache) == {"train-2"}
    with pytest.raises(DataError, match="train-1"):
        store[10]


def test_workers_share_a_cache_that_is_smaller_than_the_set(tmp_path: Path, local: Path, system: Any) -> None:
    def loader(store: CodedStore, num_workers: int) -> PackedLoader:
        def example(number: int) -> Sequence:
            store.prefetch((number + 3) * 7 % 50)
            picture = store[number * 7 % 50].picture
            assert picture is not None
            return Sequence(picture.codes_KT[0] + 1, np.ones(4, bool), ())

        return PackedLoader(example, packing=Packing(12, 4, 0), num_lanes=3, num_workers=num_workers)

    here = loader(CodedStore(local.glob("*"), facts={"a": 1}), 0)
    there = loader(store_of(cache_of(tmp_path, limit_bytes=3000)), 2)
    for _ in range(40):
        assert here.next_batch().ids_T.tolist() == there.next_batch().ids_T.tolist()
    there.close()


def test_recipes_name_a_folder_or_a_url(tmp_path: Path, local: Path, system: Any) -> None:
    def records(shards: ShardsConfig | None) -> list[CodedRecord]:
        return list(CodedStore(places_of(shards, tmp_path / "run", "train"), facts={"a": 1}))

    (tmp_path / "run").mkdir()
    local.rename(tmp_path / "run" / "tokenize")
    expected = records(None)
    assert len(expected) == 50
    assert records(ShardsConfig(url=str(tmp_path / "run" / "tokenize"))) == expected
    remote = ShardsConfig(url=URL, cache=tmp_path / "cache", cache_gib=0.5)
    assert records(remote) == expected
    assert remote.model_dump(mode="json") == {"url": URL}, "where copies lie is no part of what a run is"
