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
    with _held(root / ".lock", wait_s):
        yield


@contextlib.contextmanager
def share_locked(root: Path, stage: str, share: str) -> Iterator[None]:
    """Hold a share (`2/16`) of a stage.

    Raises:
        CheckpointError: another process holds it.
    """
    with _held(root / f".share-{stage}-{share.replace('/', '-of-')}"):
        yield


def require_no_shares(root: Path) -> None:
    """Raise CheckpointError where a share of any stage is at work in a run's folder."""
    for path in root.glob(".share-*"):
        with _held(path):
            pass


@contextlib.contextmanager
def _held(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise CheckpointError(
            f"another anygen process is at work in {path.parent}: wait for it, or use another root"
        ) from error
    try:
        yield
    finally:
        lock.release()
