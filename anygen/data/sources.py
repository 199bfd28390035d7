"""Where records come from: the emoji world, a folder of pictures and sounds, stories, or WebDataset tars."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from anygen.data.emoji_source import EmojiSource
from anygen.data.folder_source import FolderSource
from anygen.data.records import Record, RecordStore
from anygen.data.source import Items, Source, SourceConfig, SplitName, flac_of, png_of, split_by_key
from anygen.data.stories_source import StoriesSource
from anygen.errors import DataError, InputError
from tokenizers_mm.codes import fingerprint_of
from tokenizers_mm.media import load_picture, load_sound

__all__ = [
    "AnySource",
    "EmojiSource",
    "FolderSource",
    "Items",
    "Source",
    "SourceConfig",
    "SplitName",
    "StoriesSource",
    "WebDatasetSource",
    "flac_of",
    "png_of",
    "split_by_key",
]


class WebDatasetSource(SourceConfig):
    """WebDataset tar shards: `{key}.jpg` or `{key}.wav` beside `{key}.txt`."""

    kind: Literal["webdataset"] = "webdataset"
    path: Path
    """A folder of *.tar files, or one file."""

    def listing(self) -> str | None:
        """Names and sizes of the shards."""
        return fingerprint_of({path.name: path.stat().st_size for path in self.shards()})

    def shards(self) -> list[Path]:
        """The tar files, in order."""
        return [self.path] if self.path.is_file() else sorted(self.path.glob("*.tar"))

    def open(self) -> Source:
        """The source itself."""
        return _WebDataset(self)


AnySource = Annotated[EmojiSource | FolderSource | StoriesSource | WebDatasetSource, Field(discriminator="kind")]


class _WebDataset:
    def __init__(self, config: WebDatasetSource) -> None:
        paths = config.shards()
        if not paths:
            raise DataError(f"{config.path} is not a .tar file and holds none")
        self._paths = paths

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(self._paths)

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        for index, key in enumerate(self.store.keys()):
            items[split_by_key(key)].append(index)
        return items

    def record(self, item: int) -> Record:
        record = self.store[item]
        try:
            for picture in (record.picture, *record.story):
                if isinstance(picture, bytes):
                    load_picture(picture)
            for utterance in (*record.utterances, *(u for pair in record.spoken_questions for u in pair)):
                load_sound(utterance.sound)
        except InputError as error:
            raise InputError(f"{record.key}: {error}") from error
        return record
