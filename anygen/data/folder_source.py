"""A folder of pictures and sounds as a source: with a `metadata.jsonl`, or a plain tree of them.

Both are ImageFolder layouts. `metadata.jsonl` decides alone where there is one. Without it every picture and sound
below the folder is an item, and the class folder it lies in is its caption:

    birds/great_tit/0001.jpg     "great tit"
    birds/great_tit/nest/2.png   "great tit"
    birds/great_tit/song.ogg     "great tit"
    birds/3.webp                 no caption
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anygen.data.records import PICTURE_TYPES, SOUND_TYPES, Record, Utterance
from anygen.data.source import Items, Source, SourceConfig, flac_of, png_of, split_by_key
from anygen.errors import DataError, InputError
from anygen.files import sha256_of
from tokenizers_mm.codes import fingerprint_of
from tokenizers_mm.media import load_picture, load_sound

logger = logging.getLogger("anygen")
METADATA = "metadata.jsonl"
PICTURE_ENDINGS = (*PICTURE_TYPES, "gif", "bmp")
_ENDINGS = (*PICTURE_ENDINGS, *SOUND_TYPES)
Row = Mapping[str, Any]
"""`file_name`, `text` and `line` (0 without a `metadata.jsonl`), and whatever else the user wrote."""


class FolderSource(SourceConfig):
    """A folder of pictures and sounds: with `metadata.jsonl` (`file_name`, `text`), or a plain tree of them."""

    kind: Literal["folder"] = "folder"
    path: Path
    picture_side_px: int | None = Field(None, ge=8)
    """Shrink pictures whose longer side is above this; None keeps them."""
    record_kind: str = Field("pair", pattern=r"^[a-z_]+$", exclude_if=lambda kind: kind == "pair")
    """What a mixture calls its records (`answers:text>audio`)."""
    held_out_field: str | None = None
    """A metadata field, such as `speaker`, whose `held_out_value` goes to the split `unheard`."""
    held_out_value: str | None = None

    def listing(self) -> str | None:
        """Names and sizes of the files, and the hash of `metadata.jsonl` where there is one."""
        path = self.path / METADATA
        if not path.is_file() and not self.path.is_dir():
            return None
        names = {row["file_name"] for row in (_metadata_rows(path) if path.is_file() else _tree_rows(self.path))}
        sizes = {name: file.stat().st_size if (file := self.path / name).is_file() else None for name in names}
        return fingerprint_of({"metadata": sha256_of(path) if path.is_file() else None, "sizes": sizes})

    def open(self) -> Source:
        """The source itself."""
        return _Folder(self)


class _Folder:
    def __init__(self, config: FolderSource) -> None:
        self.config = config
        if not config.path.is_dir():
            raise DataError(f"{config.path} is not a folder; expected one with pictures or a {METADATA}")
        path = config.path / METADATA
        self.rows = _metadata_rows(path) if path.exists() else _tree_rows(config.path, warn=True)
        told = {row["file_name"] for row in self.rows if row["text"]}
        if bare := sorted({row["file_name"] for row in self.rows} - told):
            remedy = (
                f"Write it as text in {METADATA}" if path.exists() else "Put it in a class folder, such as red_apple/"
            )
            logger.warning(
                "%s: %d of %d files have no caption, so they teach nothing that takes or gives a text; first: %r. %s",
                *(config.path, len(bare), len(bare) + len(told), bare[0], remedy),
            )

    def items(self) -> Items:
        items: Items = {"train": [], "validation": [], "test": [], "unheard": []}
        field, value = self.config.held_out_field, self.config.held_out_value
        for row in self.rows:
            unheard = field is not None and str(row.get(field)) == value
            items["unheard" if unheard else split_by_key(row["file_name"])].append(row)
        return items

    def record(self, item: Row) -> Record:
        root = self.config.path.resolve()
        try:
            path = (root / item["file_name"]).resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise DataError(f"{item['file_name']}: it cannot be resolved: {error}") from error
        if not path.is_relative_to(root):
            raise DataError(f"{item['file_name']}: it leads outside its folder")
        try:
            return self._record(item, path)
        except InputError as error:  # the name comes first, so that reasons can be counted
            reason = str(error).replace(f" {str(path)!r}", "").replace(str(path), "it")
            raise InputError(f"{item['file_name']}: {reason}") from error

    def _record(self, item: Row, path: Path) -> Record:
        text = item["text"]
        key = hashlib.sha256(json.dumps([item["file_name"], item["line"]]).encode()).hexdigest()[:20]
        captions = (text,) if text else ()
        ending = path.suffix.lower().lstrip(".")
        if ending in SOUND_TYPES:
            voice = "".join(c for c in str(item.get("speaker", "voice")) if c.isalnum()) or "voice"
            return Record(
                key, self.config.record_kind, captions, None, (Utterance(text, voice, flac_of(load_sound(path))),)
            )
        if ending not in PICTURE_ENDINGS:
            raise InputError(f"only pictures and {', '.join(SOUND_TYPES)} sounds are read")
        return Record(key, self.config.record_kind, captions, shrunk_png(path, self.config.picture_side_px))


def _metadata_rows(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() also splits at U+2028
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
        text = row.get("text", row.get("caption"))
        assert isinstance(row["file_name"], str) and (text is None or isinstance(text, str))
        assert "\0" not in row["file_name"] + (text or "")
        (row["file_name"] + (text or "")).encode()  # JSON can spell half a character
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number}: expected a JSON object with the texts file_name and, if there is one, text"
        ) from error
    # one file may stand in several lines, with a caption each
    return {**row, "text": (text or "").strip(), "line": number}


def _tree_rows(root: Path, *, warn: bool = False) -> list[Row]:
    """Every picture and sound of a plain tree, by name; what is hidden is skipped, what is neither is counted."""
    names: list[str] = []
    ignored: list[str] = []
    for folder, folders, files in os.walk(root):  # links to folders are listed, not followed: they may lead anywhere
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (name for name in (*files, *links) if not name.startswith(".")):
            path = (Path(folder) / name).relative_to(root).as_posix()
            is_read = name in files and _is_utf8(path) and name.lower().rpartition(".")[2] in _ENDINGS
            (names if is_read else ignored).append(path)
    if not names:
        raise DataError(
            f"{root} holds no pictures or sounds ({', '.join(_ENDINGS)}) and no {METADATA}; "
            "put them there, in one folder for each class where they have classes"
        )
    if ignored and warn:
        logger.warning(
            "%s: ignored %d files that are no pictures and no sounds; first: %r", root, len(ignored), min(ignored)
        )
    return [{"file_name": name, "text": _class_of(name), "line": 0} for name in sorted(names)]


def _class_of(name: str) -> str:
    """The class folder as a caption.

    >>> _class_of("great_tit/nest/2.png"), _class_of("3.webp")
    ('great tit', '')
    """
    folder, slash, _ = name.partition("/")
    return folder.replace("_", " ").strip() if slash else ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shrunk_png(path: Path, side_px: int | None) -> bytes:
    """A picture as PNG, its longer side at most `side_px`; raises InputError where it cannot be read."""
    if side_px is None:
        return png_of(load_picture(path))
    picture = load_picture(path, max_side_px=2 * side_px)  # twice, so that the last, exact step is a clean one
    if max(picture.size) > side_px:
        picture.thumbnail((side_px, side_px))
    return png_of(picture)
