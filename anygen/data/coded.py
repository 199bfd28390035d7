"""Coded records: what `tokenize` makes of data shards and `pretrain` reads.

One folder a shard: `codes.bin` holds every code as uint16 (memory-mapped), `records.jsonl` says where each picture's
and utterance's codes lie and keeps the text, `manifest.json` the checksums. Which task a record serves, and in which
words, is decided in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anygen.errors import DataError
from anygen.files import publishing, verify
from tokenizers_mm.codes import Codes, Modality
from tokenizers_mm.media import Region

_LIMIT = 2**16


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


def write_coded_shard(folder: Path, records: Iterable[CodedRecord], *, facts: dict[str, Any]) -> int:
    """Publish one shard atomically; returns the number of records.

    Args:
        folder: of the shard.
        records: its content.
        facts: JSON-able, for instance the tokenizers' fingerprints; checked on reading.
    """
    count = 0
    with publishing(folder) as temporary:
        with (
            (temporary / "codes.bin").open("wb") as codes_file,
            (temporary / "records.jsonl").open("w", encoding="utf-8") as records_file,
        ):
            at = 0

            def put(codes: Codes) -> list[int]:
                nonlocal at
                if codes.codes_KT.size and int(codes.codes_KT.max()) >= _LIMIT:
                    raise DataError(f"codes of {_LIMIT} and more do not fit a shard (uint16)")
                codes_file.write(codes.codes_KT.astype("<u2").tobytes())
                place = [at, *codes.codes_KT.shape, *(codes.grid_hw or ())]
                at += codes.codes_KT.size
                return place

            for record in records:
                row = {
                    "key": record.key,
                    "kind": record.kind,
                    "captions": record.captions,
                    "picture": None if record.picture is None else put(record.picture),
                    "utterances": [[u.text, u.voice, put(u.codes)] for u in record.utterances],
                    "objects": [[name, region.values] for name, region in record.objects],
                    "questions": record.questions,
                }
                records_file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        (temporary / "facts.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
    return count


class CodedStore:
    """Coded records of several shards, by index.

    Args:
        folders: shards.
        facts: what every shard's facts must be.

    Raises:
        DataError: no shards, or one made with other tokenizers.
        CheckpointError: a damaged shard.
    """

    def __init__(self, folders: Iterable[Path], *, facts: dict[str, Any]) -> None:
        self._shards = [_Shard(folder, facts) for folder in sorted(folders)]
        if not self._shards:
            raise DataError("no coded shards were found: run the stage tokenize first")
        self._starts = np.cumsum([0, *(len(shard.rows) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> CodedRecord:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].record(index - int(self._starts[shard]))

    def __iter__(self) -> Iterator[CodedRecord]:
        return (self[index] for index in range(len(self)))


class _Shard:
    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        verify(folder)
        found = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        if found != facts:
            raise DataError(f"{folder} was made with other tokenizers (or settings) than this run's: tokenize again")
        self.folder = folder
        self.rows = [
            json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").split("\n") if line
        ]

    @cached_property
    def _codes(self) -> Any:
        path = self.folder / "codes.bin"
        return np.memmap(path, dtype="<u2", mode="r") if path.stat().st_size else np.zeros(0, "<u2")

    def _get(self, place: list[int], modality: Modality) -> Codes:
        start, num_books, num_steps, *grid = place
        flat = self._codes[start : start + num_books * num_steps]
        if len(flat) != num_books * num_steps:
            raise DataError(f"{self.folder} is inconsistent: codes at {place} are not there")
        return Codes(
            flat.reshape(num_books, num_steps).astype(np.int64), modality, (grid[0], grid[1]) if grid else None
        )

    def record(self, index: int) -> CodedRecord:
        row = self.rows[index]
        return CodedRecord(
            row["key"],
            row["kind"],
            tuple(row["captions"]),
            None if row["picture"] is None else self._get(row["picture"], "image"),
            tuple(CodedUtterance(text, voice, self._get(place, "audio")) for text, voice, place in row["utterances"]),
            tuple((name, Region(tuple(values))) for name, values in row["objects"]),
            tuple((question, answer) for question, answer in row["questions"]),
        )
