"""The index of a coded shard: where each record's line begins, and what it has, without reading it.

`index.bin` holds one entry of 12 bytes a record, `kinds.json` the names of the kinds that entries count. So a store of
millions of records opens by reading arrays, and what a direction can be made from is a comparison of arrays.

Dimension key: N records of one shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anygen.errors import DataError
from anygen.files import read_json

INDEX, KINDS = "index.bin", "kinds.json"
ENTRY = np.dtype([("start", "<u8"), ("kind", "<u2"), ("has", "<u2")])
_LIMIT = 2**16


class Has(IntFlag):
    """What a record holds; a row of `records.jsonl` has a key of this name in lower case."""

    PICTURE = 1
    CAPTIONS = 2
    UTTERANCES = 4
    QUESTIONS = 8
    OBJECTS = 16
    SPOKEN_QUESTIONS = 32
    STORY = 64
    WORDLESS = 128
    """Utterances, and no text of any of them. Indices written before there was this flag do not tell."""


def has_of(row: Mapping[str, Any]) -> Has:
    """What a row of `records.jsonl` holds.

    >>> has_of({"picture": [0, 1, 4, 2, 2], "captions": ["a cat"], "utterances": [], "questions": [], "objects": []})
    <Has.PICTURE|CAPTIONS: 3>
    """
    found = Has(0)
    for flag in Has:
        if row.get(str(flag.name).lower()):  # older rows lack the last ones
            found |= flag
    if Has.UTTERANCES in found and not any(str(text).strip() for text, *_ in row["utterances"]):
        found |= Has.WORDLESS
    return found


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The entries of a shard, and the kinds that they count."""

    entries_N: npt.NDArray[np.void]
    kinds: tuple[str, ...]
    was_scanned: bool = False
    """True where there is no file of it."""

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Mapping[str, Any]]], *, was_scanned: bool = False) -> ShardIndex:
        """The index of (byte where the line begins, row) pairs.

        Raises:
            DataError: more kinds than entries can count.
        """
        kinds: dict[str, int] = {}
        entries = [(start, kinds.setdefault(row["kind"], len(kinds)), int(has_of(row))) for start, row in rows]
        if len(kinds) > _LIMIT:
            raise DataError(f"records of one shard are of {len(kinds)} kinds, more than {_LIMIT}: a kind is a group")
        return cls(np.array(entries, ENTRY), tuple(kinds), was_scanned)

    @classmethod
    def read(cls, folder: Path) -> ShardIndex:
        """What `write` wrote."""
        return cls(np.fromfile(folder / INDEX, ENTRY), tuple(read_json(folder / KINDS)))

    @classmethod
    def scan(cls, records: Path) -> ShardIndex:
        """The index of a shard that was written before shards had one: every line is read."""

        def rows() -> Iterable[tuple[int, Mapping[str, Any]]]:
            start = 0
            with records.open("rb") as file:
                for line in file:
                    yield start, json.loads(line)
                    start += len(line)

        return cls.of(rows(), was_scanned=True)

    def write(self, folder: Path) -> None:
        """Write `index.bin` and `kinds.json`."""
        (folder / INDEX).write_bytes(self.entries_N.tobytes())
        (folder / KINDS).write_text(json.dumps(self.kinds, ensure_ascii=False), encoding="utf-8")
