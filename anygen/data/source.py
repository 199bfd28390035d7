"""What a source of records is: it lists its items for each split, and turns one item into one record.

Both are pure, so shards can be made in any order, by any number of workers, and again. Splits follow from names and
keys, never from chance.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any, Literal, Protocol

import numpy as np
import soundfile
from pydantic import Field

from anygen.config import Config
from anygen.data.records import Record
from tokenizers_mm.media import Audio

SplitName = Literal["train", "validation", "test", "unheard"]
"""`unheard` holds every name spoken by the voices that are never in training."""
Items = dict[SplitName, list[Any]]


class SourceConfig(Config):
    """What every source's config can do."""

    repeat: int = Field(1, ge=1, exclude_if=lambda times: times == 1)
    """How often each item of the training split is in the data: weight for a source that is small beside the others."""

    def listing(self) -> str | None:
        """Fingerprint of the files the source lists; None where the config alone says what it holds."""
        return None


class Source(Protocol):
    """Lists items and turns one into a record."""

    def items(self) -> Items:
        """The items of each split, in order."""
        ...

    def record(self, item: Any) -> Record:
        """One item as a record; raises DataError or InputError where it is unusable."""
        ...


def split_by_key(key: str) -> SplitName:
    """The split of a record of a user's data: 5 % validation, 5 % test, by the hash of its key.

    >>> [split_by_key(k) for k in ("a", "b", "c")]
    ['train', 'train', 'train']
    """
    bucket = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20
    splits: dict[int, SplitName] = {0: "test", 1: "validation"}
    return splits.get(bucket, "train")


def flac_of(audio: Audio) -> bytes:
    """A sound as 16-bit FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio.samples_T, -1.0, 1.0), audio.rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def png_of(picture: Any) -> bytes:
    """A PIL picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
