"""Files that appear whole or not at all, and the checksums that prove it.

A folder is written under a temporary name beside its place, every file flushed to disk, its manifest of sha256 sums
written last, and then renamed: whoever finds a folder with a valid manifest finds it complete, also after a crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from anygen.errors import CheckpointError

MANIFEST = "manifest.json"
_UNLISTED = (MANIFEST, "README.md")
"""Not in the manifest; a card is for people, who may edit it."""
TEMPORARY, _REPLACED = ".tmp-", ".old-"
"""What names begin with while their content is not whole; `remove_leftovers` sweeps them up."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically; keys sorted, so equal contents give equal bytes."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder`, with a manifest, when the block ends well.

    An older `folder` is replaced; on an error it stays as it was and the temporary folder is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        write_json(temporary / MANIFEST, _sums(temporary))
        mode = (temporary / MANIFEST).stat().st_mode  # safetensors writes files that only their owner may read
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            _fsync(path)
        _fsync(temporary)
        old = folder.with_name(f"{_REPLACED}{os.getpid()}-{folder.name}")
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(parent: Path) -> int:
    """Delete temporary folders and files that a killed process left in `parent`; returns how many.

    A folder that `publishing` had just moved aside when it was killed goes back to its place.
    """
    for old in sorted(parent.glob(f"{_REPLACED}*")):
        place = parent / old.name.removeprefix(_REPLACED).partition("-")[2]
        if not place.exists():
            old.rename(place)
    leftovers = [*parent.glob(f"{TEMPORARY}*"), *parent.glob(f"{_REPLACED}*")]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


def verify(folder: Path, *, sizes_only: Container[str] = ()) -> None:
    """Check every file of a published folder against its manifest, sizes first.

    Args:
        folder: what `publishing` made.
        sizes_only: names of files that are not read now, for they are large.

    Raises:
        CheckpointError: no manifest, or a file that is missing, was changed or (weights) was added, by name.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not manifest:
        raise CheckpointError(f"{folder / MANIFEST} lists no files")
    for name, facts in manifest.items():
        path = folder / name
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
            good = path.stat().st_size == facts["bytes"] and (name in sizes_only or sha256_of(path) == facts["sha256"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is missing or its entry is broken: {error}") from error
        if not good:
            raise CheckpointError(f"{path} was changed or damaged after it was written (its checksum differs)")
    for path in folder.rglob("*.safetensors"):
        if path.relative_to(folder).as_posix() not in manifest:
            raise CheckpointError(f"{path} is not in {MANIFEST}: nothing says that it is what was written")


def is_published(folder: Path, *, sizes_only: Container[str] = ()) -> bool:
    """True where `folder` is complete and undamaged, as far as `verify` was asked to look."""
    try:
        verify(folder, sizes_only=sizes_only)
    except CheckpointError:
        return False
    return True


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _UNLISTED
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
