"""Who is at work in the folder of a run: one process, or the shares of one stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from anygen.errors import CheckpointError


@contextlib.contextmanager
def locked(root: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a run's folder, made where it is not there, after waiting for it so long at most.

    Raises:
        CheckpointError: another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock").acquire(timeout=wait_s):
            yield
    except Timeout as error:
        raise CheckpointError(
            f"another anygen process is at work in {root}: wait for it, or use another root"
        ) from error


def require_no_shares(root: Path) -> None:
    """Raise filelock's Timeout where a share of a stage is at work there; inside `locked` that is a CheckpointError."""
    for path in root.glob(".share-*"):
        with FileLock(path).acquire(timeout=0):
            pass
