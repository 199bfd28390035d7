"""Coded shards that lie elsewhere: `s3://`, `gs://`, `hf://` or any URL that fsspec knows, through a cache folder here.

What opening a store reads of a shard (its index, a few bytes a record) stays in the cache. The whole shard is fetched
when a record of it is first asked for, or a little before by `prefetch`; it appears in the cache complete and checked,
or not at all. When the cache is full, the shards go that were used longest ago and that no process reads.

A shard never changes: another one needs another URL. Any number of processes may share a cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import fsspec
from filelock import FileLock

from anygen.data.coded import HEAD
from anygen.errors import AnyGenError, CheckpointError, ConfigError, DataError, MissingDependency
from anygen.files import MANIFEST, TEMPORARY, is_published, publishing, read_json, verify, write_json
from tokenizers_mm.codes import fingerprint_of

logger = logging.getLogger("anygen")
_ATTEMPTS = 2


class ShardCache:
    """The shards below a URL, and the folder where copies of them lie.

    Args:
        url: of the folder that holds the shards' folders.
        folder: for the copies; one cache may serve several URLs.
        limit_bytes: room for whole shards of this URL. Shards in use may exceed it; then a warning says so.
    """

    def __init__(self, url: str, folder: Path, *, limit_bytes: float) -> None:
        self.url, self.limit_bytes = url.rstrip("/"), limit_bytes
        self.folder = folder.expanduser() / fingerprint_of({"url": self.url})[:16]
        for name in ("heads", "shards", "locks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._jobs: tuple[int, SimpleQueue[Callable[[], None]]] | None = None

    def shards(self, pattern: str) -> list[RemoteShard]:
        """The published shards whose names match a glob.

        Raises:
            ConfigError: not a URL that fsspec knows.
            MissingDependency: the package for such URLs is absent.
            DataError: the URL cannot be listed.
        """
        system, path = self.filesystem()
        try:
            found = _ask(system.glob, f"{path}/{pattern}/{MANIFEST}")
        except OSError as error:
            raise DataError(f"cannot list {self.url}: {error}") from error
        return [RemoteShard(self, str(name).split("/")[-2]) for name in sorted(found)]

    def filesystem(self) -> tuple[Any, str]:
        """What reads the URL, and the path in it; fsspec keeps one for each process and thread."""
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependency(f"{self.url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url} is not a URL that can be read: {error}") from error
        return system, str(path).rstrip("/")

    def fetch(self, name: str, place: Path, *, only: Container[str] | None = None) -> None:
        """Publish a shard at `place`, or only some of its files.

        Raises:
            DataError: it is not there, or came damaged or not at all, twice.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._fetch_once(name, place, only)
                return
            except FileNotFoundError as error:
                raise DataError(f"the shard {self.url}/{name} is not there or not complete: {error}") from error
            except (CheckpointError, OSError) as error:
                if attempt == _ATTEMPTS:
                    raise DataError(f"the shard {self.url}/{name} did not arrive whole, twice: {error}") from error
                logger.warning("fetching %s/%s again: %s", self.url, name, error)

    def _fetch_once(self, name: str, place: Path, only: Container[str] | None) -> None:
        system, path = self.filesystem()
        with publishing(place) as temporary:
            _ask(system.get_file, f"{path}/{name}/{MANIFEST}", str(temporary / MANIFEST))
            manifest = read_json(temporary / MANIFEST)
            if not isinstance(manifest, dict) or any(Path(file).name != file for file in manifest):
                raise CheckpointError(f"{MANIFEST} is not one of a shard")
            if only is None:
                self.make_room(sum(facts["bytes"] for facts in manifest.values()))
            else:
                manifest = {file: facts for file, facts in manifest.items() if file in only}
            for file in manifest:
                _ask(system.get_file, f"{path}/{name}/{file}", str(temporary / file))
            write_json(temporary / MANIFEST, manifest)
            verify(temporary)

    def make_room(self, num_bytes: int) -> None:
        """Let shards go that nobody reads, those first that were used longest ago, until so much more fits."""
        with FileLock(self.folder / "locks" / ".room"):
            sizes = {f: _num_bytes(f) for f in (self.folder / "shards").iterdir() if not f.name.startswith(".")}
            excess = sum(sizes.values()) + num_bytes - self.limit_bytes
            for place in sorted(sizes, key=lambda f: _used_at(self.lock_of(f.name))):
                if excess <= 0:
                    return
                with _held_if_free(self.lock_of(place.name)) as is_mine:
                    if is_mine:
                        gone = place.with_name(f"{TEMPORARY}{os.getpid()}-{place.name}")
                        place.rename(gone)  # so that no half-deleted shard is ever found
                        shutil.rmtree(gone)
                        excess -= sizes[place]
            if excess > 0:
                logger.warning(
                    "shards in use exceed the cache's limit by %.1f MiB: raise cache_gib or lower shards_per_block",
                    excess / 2**20,
                )

    def lock_of(self, name: str) -> Path:
        """The lock file of a shard: held shared by its readers; its time is that of the last use."""
        return self.folder / "locks" / name

    def prefetch(self, job: Callable[[], None]) -> None:
        """Do a job in the background, one after another."""
        if self._jobs is None or self._jobs[0] != os.getpid():  # threads do not survive a fork
            self._jobs = os.getpid(), SimpleQueue()
            threading.Thread(target=_work_off, args=(self._jobs[1],), daemon=True, name="prefetch").start()
        self._jobs[1].put(job)


class RemoteShard:
    """A shard of a `ShardCache`; see `anygen.data.coded.ShardPlace`."""

    def __init__(self, cache: ShardCache, shard: str) -> None:
        self.name = f"{cache.url}/{shard}"
        self._cache, self._shard = cache, shard
        self._folder = cache.folder / "shards" / shard
        self._is_verified = self._is_awaited = False
        self._leases: list[IO[bytes]] = []
        self._head_facts: dict[str, Any] = {}  # what its index was read from

    def head(self) -> Path:
        """The small files alone."""
        head = self._cache.folder / "heads" / self._shard
        if not is_published(head):
            with FileLock(self._cache.lock_of(f".head-{self._shard}")):
                if not is_published(head):
                    self._cache.fetch(self._shard, head, only=HEAD)
        self._head_facts = read_json(head / MANIFEST)
        return head

    def take(self) -> Path:
        """The whole shard, fetched where it is not here or damaged."""
        self._leases.append(self._lease())
        return self._folder

    def give_back(self) -> None:
        """It may go when there is no room."""
        self._leases.pop().close()

    def prefetch(self) -> None:
        """Fetch it in the background, where it is not here."""
        if not self._is_awaited and not self._folder.exists():
            self._is_awaited = True
            self._cache.prefetch(self._fetch_early)

    def _fetch_early(self) -> None:
        try:
            self._lease().close()
        except (AnyGenError, OSError) as error:  # whoever takes it will be told
            logger.debug("could not fetch %s early: %s", self.name, error)
        finally:
            self._is_awaited = False

    def _lease(self) -> IO[bytes]:
        """An open file whose shared lock keeps the shard here until it is closed. No one ever waits for a reader."""
        import fcntl

        lock = self._cache.lock_of(self._shard).open("ab")
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not self._is_here():
            with FileLock(self._cache.lock_of(f".fetch-{self._shard}")):
                if not self._is_here():  # another process may have fetched it meanwhile
                    self._fetch()
        os.utime(lock.fileno())
        return lock

    def _is_here(self) -> bool:
        if self._is_verified or not self._folder.exists():
            return self._folder.exists()
        if is_published(self._folder):
            self._require_as_indexed()
            self._is_verified = True
        return self._is_verified

    def _fetch(self) -> None:
        for left in self._folder.parent.glob(f"{TEMPORARY}*-{self._shard}"):  # by a process that was killed
            shutil.rmtree(left)
        self._cache.fetch(self._shard, self._folder)
        self._require_as_indexed()
        self._is_verified = True

    def _require_as_indexed(self) -> None:
        whole = read_json(self._folder / MANIFEST)
        if any(whole.get(name) != facts for name, facts in self._head_facts.items()):
            raise DataError(f"{self.name} is another shard than when its index was read: remove {self._cache.folder}")


def _ask(call: Callable[..., Any], *arguments: str) -> Any:
    """What a storage library returns; whatever it raises is an OSError."""
    try:
        return call(*arguments)
    except OSError:
        raise
    except Exception as error:  # each library has its own, and its HTTP client's
        raise OSError(f"{type(error).__name__}: {error}") from error


def _work_off(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()


@contextlib.contextmanager
def _held_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file exclusively, if no one holds it at all; gives whether it is held."""
    import fcntl

    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _used_at(lock: Path) -> float:
    return lock.stat().st_mtime if lock.exists() else 0.0
