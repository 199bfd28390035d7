"""Where the lines of a run's log go beside `metrics.jsonl`: tensorboard, wandb or trackio, by accelerate's trackers."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from anygen.errors import MissingDependency
from anygen.files import read_json, write_json
from tokenizers_mm import compat  # noqa: F401  before accelerate

TrackerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "anygen"
NAME_FILE = "trackers.json"


class Trackers:
    """The trackers that a recipe asks for; with none it does nothing.

    Made in the main process only, after the `Accelerator`, whose state accelerate's trackers ask.

    tensorboard writes into `folder/tensorboard`; the other two know the run by a name that is kept in `folder`, so that
    a resumed run goes on where it was.

    Args:
        names: of the trackers.
        folder: of the metrics.
        config: of the run; its nested fields are told as `optimizer.lr`.

    Raises:
        MissingDependency: one is not installed.
    """

    def __init__(self, names: Sequence[TrackerName], folder: Path, *, config: Mapping[str, Any]) -> None:
        require(names)
        self._trackers = [_open(name, folder) for name in names]
        for tracker in self._trackers:
            tracker.store_init_configuration(flat(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of the log."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is held back."""
        for tracker in self._trackers:
            tracker.finish()


def require(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that are not installed, before anything is trained.

    Raises:
        MissingDependency: by name, with the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(f"the recipe asks for tracker {name}, which is not installed: pip install {name}")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested fields under dotted names, as trackers want them.

    >>> flat({"steps": 2, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}})
    {'steps': 2, 'optimizer.lr': 0.1, 'optimizer.betas': '[0.9, 0.95]'}
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _open(name: TrackerName, folder: Path) -> Any:
    from accelerate import tracking

    run = _run_name(folder)
    tracker: Any
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", folder)
    elif name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, name=run, dir=str(folder), id=run, resume="allow")
    else:
        tracker = tracking.TrackioTracker(PROJECT, name=run, resume="allow")
    tracker.start()
    return tracker


def _run_name(folder: Path) -> str:
    """`nano-pretrain-1f0c3a9e`: drawn once, for a folder may be trained in anew."""
    path = folder / NAME_FILE
    if not path.is_file():
        write_json(path, {"run": f"{'-'.join(folder.resolve().parts[-2:])}-{secrets.token_hex(4)}"})
    return str(read_json(path)["run"])
