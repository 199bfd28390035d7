"""Stories as a source: texts and pictures in turn, in the layouts of VIST and of MiniGPT-5.

VIST (arXiv 1604.03968), with the pictures anywhere below the folder, named by their Flickr ids:

    sis/train.story-in-sequence.json    {"annotations": [[{"story_id", "photo_flickr_id", "text", ...}], ...], ...}
    images/train/695160730.jpg

MiniGPT-5's shorter form of it:

    train_cleaned.json                  {"40470": [{"caption", "image_id", "sequence_index"}, ...], ...}
    train_image_mapping.json            {"695160730": "train_images/000000007.jpg", ...}

The split is the first word of a file's name (`train`, `val` or `validation`, `test`); stories of a file of another name
go by the hash of their key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anygen.data.folder_source import PICTURE_ENDINGS, shrunk_png
from anygen.data.records import Record
from anygen.data.source import Items, Source, SourceConfig, SplitName, split_by_key
from anygen.errors import DataError, InputError
from anygen.files import sha256_of
from tokenizers_mm.codes import fingerprint_of

VIST, CLEANED, MAPPING = ".story-in-sequence.json", "_cleaned.json", "_image_mapping.json"
SPLITS: dict[str, SplitName] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
MAX_STEPS = 64


class StoriesSource(SourceConfig):
    """Stories of texts and pictures, in VIST's layout or MiniGPT-5's."""

    kind: Literal["stories"] = "stories"
    path: Path
    """Folder that holds the annotations (or a folder of them) and, anywhere below it, the pictures."""
    picture_side_px: int | None = Field(None, ge=8)
    """Shrink pictures whose longer side is above this; None keeps them."""
    pairs: bool = True
    """Each picture with its text is a record of its own too: picture tokenizers learn from those."""

    def listing(self) -> str | None:
        """Hashes of the annotations, names and sizes of the pictures."""
        if not self.path.is_dir():
            return None
        hashes = {str(path.relative_to(self.path)): sha256_of(path) for path in _annotations(self.path)}
        return fingerprint_of({"annotations": hashes, "pictures": _pictures(self.path)})

    def open(self) -> Source:
        """The source itself."""
        return _Stories(self)


@dataclass(frozen=True)
class _Story:
    """One story: texts, and names of pictures below the folder (None where there is no such file)."""

    name: str
    """For people: file and id."""
    key: str
    steps: tuple[tuple[str, str | None], ...]
    fault: str = ""
    """Why it cannot be told."""


class _Stories:
    def __init__(self, config: StoriesSource) -> None:
        self.config = config
        if not config.path.is_dir():
            raise DataError(
                f"{config.path} is not a folder; expected one with stories, in VIST's or MiniGPT-5's layout"
            )
        files = _annotations(config.path)
        if not files:
            raise DataError(f"{config.path} holds no SPLIT{VIST} and no SPLIT{CLEANED} with SPLIT{MAPPING}")
        names = {Path(name).stem: name for name in sorted(_pictures(config.path), reverse=True)}
        self._by_file = {path: list(_stories_of(path, config.path, names)) for path in files}

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        for path, stories in self._by_file.items():
            named = SPLITS.get(path.name.split(".")[0].split("_")[0])
            for story in stories:
                group = items[named or split_by_key(story.key)]
                group.append((story, None))
                if self.config.pairs and not story.fault:
                    group.extend((story, step) for step in range(len(story.steps)))
        return items

    def record(self, item: tuple[_Story, int | None]) -> Record:
        story, step = item
        if story.fault:
            raise InputError(f"{story.name}: {story.fault}")
        if step is not None:
            text, picture = story.steps[step]
            return Record(f"{story.key}-{step}", "pair", (text,), self._picture(story, picture))
        parts = [part for text, picture in story.steps for part in (text, self._picture(story, picture))]
        return Record(story.key, "story", story=tuple(parts))

    def _picture(self, story: _Story, name: str | None) -> bytes:
        if name is None:
            raise InputError(f"{story.name}: a picture of it is not in the folder")
        path = (self.config.path / name).resolve()
        if not path.is_relative_to(self.config.path.resolve()):
            raise InputError(f"{story.name}: a picture of it leads outside the folder")
        try:
            return shrunk_png(path, self.config.picture_side_px)
        except InputError as error:
            reason = str(error).replace(f" {str(path)!r}", "").replace(str(path), "it")
            raise InputError(f"{story.name}: {reason}") from error


def _annotations(root: Path) -> list[Path]:
    """Files with stories in the folder or one below it."""
    return sorted(path for end in (VIST, CLEANED) for depth in ("", "*/") for path in root.glob(f"{depth}*{end}"))


def _pictures(root: Path) -> dict[str, int]:
    """Name below the folder -> size of every picture; links to folders are not followed."""
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            if name.lower().rpartition(".")[2] in PICTURE_ENDINGS and (path := Path(folder) / name).is_file():
                found[path.relative_to(root).as_posix()] = path.stat().st_size
    return found


def _stories_of(path: Path, root: Path, names: Mapping[str, str]) -> Iterator[_Story]:
    if path.name.endswith(VIST):
        told = _vist(_json(path), path)
    else:
        mapping = _json(path.with_name(path.name.removesuffix(CLEANED) + MAPPING))
        if not isinstance(mapping, dict):
            raise DataError(f"the mapping beside {path} is not an object of picture ids and names")
        names = {str(id): str(name) for id, name in mapping.items() if (root / str(name)).is_file()}
        told = _cleaned(_json(path), path)
    for id, steps in told:
        yield _story(path, str(id), steps, names)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _vist(content: Any, path: Path) -> Iterable[tuple[str, list[Any]]]:
    """(id, steps) of a file of VIST, whose annotations are one-element lists, a step each, in any order."""
    try:
        rows = [row for group in content["annotations"] for row in group]
        stories: dict[str, list[Any]] = {}
        for row in rows:
            stories.setdefault(str(row["story_id"]), []).append(row)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not VIST's: no list `annotations` of steps with a story_id ({error})") from error
    return stories.items()


def _cleaned(content: Any, path: Path) -> Iterable[tuple[str, list[Any]]]:
    if not isinstance(content, dict):
        raise DataError(f"{path} is not an object of stories by id")
    return ((id, steps if isinstance(steps, list) else [steps]) for id, steps in content.items())


def _story(path: Path, id: str, rows: list[Any], names: Mapping[str, str]) -> _Story:
    key = hashlib.sha256(json.dumps([path.name, id]).encode()).hexdigest()[:20]
    name = f"{path.name} {id}"
    try:
        steps = [_step(row) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _Story(name, key, (), f"a step of it is broken: {type(error).__name__}: {error}")
    if not 2 <= len(steps) <= MAX_STEPS:
        return _Story(name, key, (), f"it has {len(steps)} steps; 2 to {MAX_STEPS} are read")
    return _Story(
        name, key, tuple((text, names.get(picture)) for _, text, picture in sorted(steps, key=lambda s: s[0]))
    )


def _step(row: Any) -> tuple[int, str, str]:
    """Place, text and picture id of a step, whichever layout it is of."""
    place = row["sequence_index"] if "sequence_index" in row else row["worker_arranged_photo_order"]
    picture = row["image_id"] if "image_id" in row else row["photo_flickr_id"]
    text = row["caption"] if "caption" in row else row.get("original_text") or row["text"]
    text = " ".join(text.split())
    if not text or "\0" in text:
        raise ValueError("it says nothing")
    text.encode()  # JSON can spell half a character
    return int(place), text, str(picture)
