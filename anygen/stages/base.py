"""What every stage shares: where it works, what it returns, and how it finds the work of the stages before it.

A stage works in `root/<stage>/` and reads `root/<other stage>/`. It may be killed at any moment: run again, it goes on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from anygen.config import Config
from anygen.data.order import Permutation
from anygen.data.records import RecordStore
from anygen.errors import ConfigError, DataError
from tokenizers_mm.llm_text import SomeTextTokenizer, load_text_tokenizer


class StageConfig(Config):
    """Fields that every recipe has."""

    several_processes: ClassVar[bool] = False
    """True where `accelerate launch` may start the stage as several processes."""
    stage: str
    root: Path = Path("runs/default")
    """Folder of the run; the stage works in `root/<stage>`."""
    earlier_run: Path | None = Field(None, exclude_if=lambda folder: folder is None)
    """Folder of another run, whose stages before this one are taken where this run has made none of its own; or a
    bundle (`nano`: the embedded one), whose tokenizers and decoder are. See `anygen.stages.earlier_run`."""

    @property
    def folder(self) -> Path:
        """Where this stage works."""
        return self.root / self.stage

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return False

    def check(self) -> None:
        """Raise where the stage cannot run: it is asked before earlier work of another recipe is moved aside."""

    def elsewhere(self) -> tuple[str, ...]:
        """Stages before this one whose work it reads from outside the run: they need not have been run here."""
        return ()

    def share(self) -> str:
        """Which share of the stage this process does, where others do the rest in the same run; "" for all of it."""
        return ""

    def outside_inputs(self) -> Mapping[str, str]:
        """Fingerprints of what the stage reads from outside the run; the stage is done anew when they change."""
        return {}


def check_elsewhere(key: str, path: Path, folder: Path) -> None:
    """Raise ConfigError where what a recipe names by `key` lies in the stage's own folder, which is moved aside."""
    if path.resolve().is_relative_to(folder.resolve()) or path.absolute().is_relative_to(folder.absolute()):
        raise ConfigError(f"{key}={path} lies in this stage's own folder: name another root for this run")


@dataclass(frozen=True)
class StageResult:
    """What a stage made."""

    folder: Path
    outputs: tuple[Path, ...]
    """Files and folders that later stages or users read."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    unfinished: str = ""
    """What is still to be done before the stage is; "" where nothing is."""


def open_records(root: Path, *splits: str) -> RecordStore:
    """The records that stage `data` wrote for these splits."""
    paths = [path for split in splits for path in (root / "data").glob(f"{split}-*.tar")]
    if not paths:
        raise DataError(f"{root / 'data'} has no shards of split {' or '.join(splits)}: run the stage data first")
    return RecordStore(paths)


def open_text_tokenizer(root: Path) -> SomeTextTokenizer:
    """What stage `text_tokenizer` made."""
    return load_text_tokenizer(root / "text_tokenizer")


class Shuffled:
    """Endless batches of item numbers, every item once an epoch; its state is one integer."""

    def __init__(self, num_items: int, batch_size: int, *, seed: int) -> None:
        self._num_items, self._batch_size, self._seed = num_items, batch_size, seed
        self.position = 0

    def next(self) -> list[int]:
        """The next batch."""
        items = [self._item(self.position + i) for i in range(self._batch_size)]
        self.position += self._batch_size
        return items

    def generator(self) -> random.Random:
        """A generator for choices about the batch that `next` gave last."""
        return random.Random(f"{self._seed}|{self.position}")

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, self._num_items)
        return Permutation(self._num_items, self._seed * 1_000_003 + epoch)(place)
