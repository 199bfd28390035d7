"""What there is to draw of a run: its metrics files, and the panels that their lines make.

A panel holds what is read together on one scale. Which panel a figure belongs to follows from its name, so a new figure
of a stage is drawn without a change here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anygen.errors import DataError, InputError
from anygen.training.metrics import METRICS_FILE, read_metrics

HELD_OUT = "validation_"
_UNDRAWN = ("step", "tokens", "flops", "norm_growth", "norm_alarms")
_OTHERS = "Parts of the loss, other figures"


@dataclass(frozen=True)
class Series:
    """One figure over the steps."""

    name: str
    """As it is told: `text`, `mel`; nothing for the only figure of a panel."""
    steps: tuple[int, ...]
    values: tuple[float, ...]
    held_out: bool = False
    exact: bool = False
    """Not measured: nothing to smooth."""

    def smoothed(self) -> tuple[float, ...]:
        """Centred running mean over about a thirtieth of the run, narrower at both ends.

        >>> Series("", (0, 1, 2), (1.0, 2.0, 6.0)).smoothed()  # too short a run to smooth
        (1.0, 2.0, 6.0)
        """
        half, count = 0 if self.exact else len(self.values) // 60, len(self.values)
        windows = ((i, min(half, i, count - 1 - i)) for i in range(count))
        return tuple(math.fsum(self.values[i - h : i + h + 1]) / (2 * h + 1) for i, h in windows)


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]
    is_log: bool = False
    from_zero: bool = False
    alarms: tuple[int, ...] = ()
    """Steps at which the run warned."""


def find_metrics(path: Path) -> dict[str, Path]:
    """Metrics files by the stage that wrote them: of a run, of one stage, or the file itself.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return {path.resolve().parent.name: path}
    found = {file.parent.relative_to(path).as_posix(): file for file in sorted(path.rglob(METRICS_FILE))}
    found = {name: file for name, file in found.items() if not name.startswith("old/")}  # work of earlier recipes
    if not found:
        raise InputError(
            f"there is no {METRICS_FILE} in {path}: expected a run, the folder of a training stage, or a file"
        )
    return {path.resolve().name if name == "." else name: file for name, file in found.items()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that is being written is left out.

    Raises:
        DataError: it has no whole line, or holds something else.
    """
    rows = read_metrics(path)
    if not rows:
        raise DataError(f"{path} has no whole line yet")
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise DataError(f'{path} holds no metrics: expected lines such as {{"step": 49, "loss": 8.1}}')
    return rows


def panels_of(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels of a metrics file, in the order in which they are read; figures that are not finite are left out.

    >>> rows = [{"step": 9, "text_nats": 1.0, "validation_text_nats": 1.5, "lr": 0.1}]
    >>> [(panel.title, [(s.name, s.held_out) for s in panel.series]) for panel in panels_of(rows)]
    [('Loss by modality, nats an id', [('text', False), ('text', True)]), ('Learning rate', [('', False)])]
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    trained = {name for name in names if not name.startswith(HELD_OUT)}
    by_title: dict[str, list[Series]] = {}
    for name in names:
        plain = name.removeprefix(HELD_OUT)
        if plain in _UNDRAWN or (plain == "step_s" and "tokens_per_s" in trained):
            continue
        title, label, scale = _place(plain, in_training=plain in trained, one_book="usage1" not in trained)
        points = [(row["step"], scale * row[name]) for row in rows if _is_finite(row.get(name))]
        if points:
            steps, values = zip(*points, strict=True)
            by_title.setdefault(title, []).append(Series(label, steps, values, name != plain, exact=plain == "lr"))
    order = [*_TITLES, *(title for title in by_title if title not in _TITLES)]
    return [
        Panel(
            title,
            tuple(by_title[title]),
            is_log=_is_log(title, by_title[title]),
            from_zero=title in _FROM_ZERO,
            alarms=_alarms(rows) if title == _NORM else (),
        )
        for title in order
        if title in by_title
    ]


_NORM = "Output norm"
_PLACES = {
    "loss": ("Loss", 1.0),
    "grad_norm": ("Gradient norm", 1.0),
    "hidden_norm": (_NORM, 1.0),
    "lr": ("Learning rate", 1.0),
    "tokens_per_s": ("Ids a second", 1.0),
    "step_s": ("Seconds a step", 1.0),
    "mfu": ("Peak of the device in use, %", 100.0),
    "utilisation": ("Rows filled, %", 100.0),
}
_FROM_ZERO = ("Ids a second", "Seconds a step", "Peak of the device in use, %")
_BY_MODALITY, _USAGE, _PERPLEXITY = "Loss by modality, nats an id", "Codes in use, %", "Perplexity of codes"
_TITLES = [
    "Loss", _BY_MODALITY, _OTHERS, _USAGE, _PERPLEXITY, "Gradient norm", _NORM, "Learning rate", "Ids a second",
    "Seconds a step", "Peak of the device in use, %", "Rows filled, %",
]  # fmt: skip


def _place(name: str, *, in_training: bool, one_book: bool) -> tuple[str, str, float]:
    """Title of the panel, label in it, and factor of the values."""
    if name in _PLACES:
        title, scale = _PLACES[name]
        return title, "", scale
    if name.endswith("_nats"):
        return _BY_MODALITY, name.removesuffix("_nats"), 1.0
    for start, title, scale in (("usage", _USAGE, 100.0), ("perplexity", _PERPLEXITY, 1.0)):
        if name.startswith(start):
            book = "" if one_book else f"book {name.removeprefix(start) or 0}"
            return title, "in a batch" if name == "usage_batch" else book, scale
    if in_training:
        return _OTHERS, name.replace("_", " "), 1.0
    return name.replace("_", " ").capitalize(), "", 1.0  # measured on held-out data only, each on its own scale


def _is_log(title: str, series: list[Series]) -> bool:
    """What spans decades, of the figures whose factors matter."""
    values = [value for one in series for value in one.values if value > 0]
    return title in ("Loss", "Gradient norm", _OTHERS) and bool(values) and max(values) > 30 * min(values)


def _alarms(rows: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    counts = [(row["step"], row.get("norm_alarms", 0)) for row in rows]
    return tuple(step for (_, before), (step, now) in zip([(0, 0), *counts], counts, strict=False) if now > before)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
