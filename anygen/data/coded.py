"""Coded records: what `tokenize` makes of data shards and `pretrain` reads.

One folder a shard: `codes.bin` holds every code as uint16, `records.jsonl` says where each picture's and utterance's
codes lie and keeps the text, `index.bin` where each line begins and what it has, `manifest.json` the checksums. Which
task a record serves, and in which words, is decided in training.

Opening a store reads the indices, not the records: the two large files of a shard are memory-mapped when a record of
it is first asked for, and their checksums taken then, once a process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anygen.data.shard_index import ENTRY, INDEX, KINDS, Has, ShardIndex
from anygen.errors import DataError
from anygen.files import publishing, read_json, verify
from tokenizers_mm.codes import Codes, Modality
from tokenizers_mm.media import Region

CODES, RECORDS, FACTS = "codes.bin", "records.jsonl", "facts.json"
LARGE = (CODES, RECORDS)
HEAD = (FACTS, INDEX, KINDS)
"""What opening a store reads of a shard."""
_LIMIT = 2**16
_OPEN_SHARDS = 64
"""An open shard holds three file descriptors, of which a process may have 1,024."""


@dataclass(frozen=True)
class CodedUtterance:
    """One spoken text as codes."""

    text: str
    voice: str
    codes: Codes


@dataclass(frozen=True)
class CodedRecord:
    """A record with its media as codes; text stays text, it costs nothing to tokenize."""

    key: str
    kind: str
    captions: tuple[str, ...] = ()
    picture: Codes | None = None
    utterances: tuple[CodedUtterance, ...] = ()
    objects: tuple[tuple[str, Region], ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    spoken_questions: tuple[tuple[CodedUtterance, CodedUtterance], ...] = ()
    story: tuple[str | Codes, ...] = ()
    """Texts and pictures that follow one another."""


def write_coded_shard(folder: Path, records: Iterable[CodedRecord], *, facts: dict[str, Any]) -> int:
    """Publish one shard atomically; returns the number of records.

    Args:
        folder: of the shard.
        records: its content.
        facts: JSON-able, for instance the tokenizers' fingerprints; checked on reading.
    """
    with publishing(folder) as temporary:
        with (temporary / CODES).open("wb") as codes_file, (temporary / RECORDS).open("wb") as records_file:
            at = 0

            def put(codes: Codes) -> list[int]:
                nonlocal at
                if codes.codes_KT.size and int(codes.codes_KT.max()) >= _LIMIT:
                    raise DataError(f"codes of {_LIMIT} and more do not fit a shard (uint16)")
                codes_file.write(codes.codes_KT.astype("<u2").tobytes())
                place = [at, *codes.codes_KT.shape, *(codes.grid_hw or ())]
                at += codes.codes_KT.size
                return place

            def rows() -> Iterator[tuple[int, dict[str, Any]]]:
                start = 0
                for record in records:
                    row = _row(record, put)
                    yield start, row
                    start += records_file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

            index = ShardIndex.of(rows())
        index.write(temporary)
        (temporary / FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
    return len(index.entries_N)


def _row(record: CodedRecord, put: Callable[[Codes], list[int]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": record.key,
        "kind": record.kind,
        "captions": record.captions,
        "picture": None if record.picture is None else put(record.picture),
        "utterances": [[u.text, u.voice, put(u.codes)] for u in record.utterances],
        "objects": [[name, region.values] for name, region in record.objects],
        "questions": record.questions,
    }
    if record.spoken_questions:  # rows without them stay byte for byte what they were
        row["spoken_questions"] = [[[u.text, u.voice, put(u.codes)] for u in pair] for pair in record.spoken_questions]
    if record.story:
        row["story"] = [part if isinstance(part, str) else put(part) for part in record.story]
    return row


class ShardPlace(Protocol):
    """Where a shard is: in a folder here, or somewhere from where it is fetched."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def head(self) -> Path:
        """A folder that holds at least the files of `HEAD` and is as it was written; large files may be unread."""
        ...

    def take(self) -> Path:
        """The whole shard, as it was written; it stays where it is until `give_back`."""
        ...

    def give_back(self) -> None:
        """The shard is no longer read."""
        ...

    def prefetch(self) -> None:
        """The shard will be taken soon."""
        ...


class LocalShard:
    """A shard in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self._is_verified = folder, str(folder), False

    def head(self) -> Path:
        """The folder, small files verified and sizes compared."""
        verify(self.folder, sizes_only=LARGE)
        return self.folder

    def take(self) -> Path:
        """The folder, verified the first time."""
        if not self._is_verified:
            verify(self.folder)
            self._is_verified = True
        return self.folder

    def give_back(self) -> None:
        """Nothing to do."""

    def prefetch(self) -> None:
        """Nothing to do."""


class CodedStore:
    """Coded records of several shards, by number.

    Args:
        shards: their folders, or places.
        facts: what every shard's facts must be.
        verify_all: take the checksums of all shards now and not each at its first use.

    Raises:
        DataError: no shards, or one made with other tokenizers.
        CheckpointError: a damaged shard, by name; here where its size tells, else when it is first read.
    """

    def __init__(self, shards: Iterable[Path | ShardPlace], *, facts: dict[str, Any], verify_all: bool = False) -> None:
        self._places = sorted((LocalShard(s) if isinstance(s, Path) else s for s in shards), key=lambda s: s.name)
        if not self._places:
            raise DataError("no coded shards were found: run the stage tokenize first")
        with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for files, or for a network
            indices = list(pool.map(lambda place: _open_head(place, facts), self._places))
        self._starts = np.cumsum([0, *(len(index.entries_N) for index in indices)])
        kinds = {kind: number for number, kind in enumerate(sorted({k for index in indices for k in index.kinds}))}
        self._kinds = kinds
        self._kind_N = np.concatenate(
            [np.array([kinds[k] for k in i.kinds], np.int32)[i.entries_N["kind"]] for i in indices]
        )
        self._has_N = np.concatenate([index.entries_N["has"].astype(np.uint8) for index in indices])
        self._scanned = {n: i.entries_N["start"] for n, i in enumerate(indices) if i.was_scanned}
        self._open: dict[int, _OpenShard] = {}  # oldest use first
        if verify_all:
            for place in self._places:
                place.take()
                place.give_back()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> CodedRecord:
        shard = self.shard_of(number)
        return self._opened(shard).record(number - int(self._starts[shard]))

    def __iter__(self) -> Iterator[CodedRecord]:
        return (self[number] for number in range(len(self)))

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Number of each shard's first record, and of all."""
        return self._starts

    def shard_of(self, number: int) -> int:
        """Which shard a record is in."""
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def numbers(self, kind: str, needs: Has, lacks: Has) -> npt.NDArray[np.integer[Any]]:
        """Numbers of the records of a kind (all where it is empty) that hold all of `needs` and none of `lacks`."""
        fits_N = (self._has_N & int(needs | lacks)) == int(needs)
        if kind:
            fits_N &= self._kind_N == self._kinds.get(kind, -1)
        return np.flatnonzero(fits_N).astype(np.uint32 if len(self) < 2**32 else np.int64)

    def prefetch(self, number: int) -> None:
        """The record will be asked for soon."""
        shard = self.shard_of(number)
        if shard not in self._open:
            self._places[shard].prefetch()

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                self._places[oldest].give_back()
            self._open[shard] = _OpenShard(self._places[shard].take(), self._scanned.get(shard))
        found = self._open.pop(shard)
        self._open[shard] = found
        return found


def _open_head(place: ShardPlace, facts: dict[str, Any]) -> ShardIndex:
    folder = place.head()
    if read_json(folder / FACTS) != facts:
        raise DataError(f"{place.name} was made with other tokenizers (or settings) than this run's: tokenize again")
    if (folder / INDEX).exists():
        return ShardIndex.read(folder)
    index = ShardIndex.scan(place.take() / RECORDS)
    place.give_back()
    return index


class _OpenShard:
    def __init__(self, folder: Path, scanned: Any) -> None:
        self._folder = folder
        self._codes, self._records = _mapped(folder / CODES, "<u2"), _mapped(folder / RECORDS, "u1")
        self._starts = _mapped(folder / INDEX, ENTRY)["start"] if scanned is None else scanned

    def record(self, index: int) -> CodedRecord:
        stop = int(self._starts[index + 1]) if index + 1 < len(self._starts) else len(self._records)
        row = json.loads(self._records[int(self._starts[index]) : stop].tobytes())
        return CodedRecord(
            row["key"],
            row["kind"],
            tuple(row["captions"]),
            None if row["picture"] is None else self._get(row["picture"], "image"),
            tuple(self._utterance(*facts) for facts in row["utterances"]),
            tuple((name, Region(tuple(values))) for name, values in row["objects"]),
            tuple((question, answer) for question, answer in row["questions"]),
            tuple((self._utterance(*asked), self._utterance(*told)) for asked, told in row.get("spoken_questions", ())),
            tuple(part if isinstance(part, str) else self._get(part, "image") for part in row.get("story", ())),
        )

    def _utterance(self, text: str, voice: str, place: list[int]) -> CodedUtterance:
        return CodedUtterance(text, voice, self._get(place, "audio"))

    def _get(self, place: list[int], modality: Modality) -> Codes:
        start, num_books, num_steps, *grid = place
        flat = self._codes[start : start + num_books * num_steps]
        if len(flat) != num_books * num_steps:
            raise DataError(f"{self._folder} is inconsistent: codes at {place} are not there")
        return Codes(
            flat.reshape(num_books, num_steps).astype(np.int64), modality, (grid[0], grid[1]) if grid else None
        )


def _mapped(path: Path, kind: npt.DTypeLike) -> Any:
    return np.asarray(np.memmap(path, dtype=kind, mode="r")) if path.stat().st_size else np.zeros(0, kind)
