"""`anygen evaluate --compare A B`: what changed from one report to another, and whether chance explains it.

The interval of a difference is made from those of its two figures (Zou and Donner 2008; for shares with Wilson's
intervals it is Newcombe's): d - sqrt((a - low_a)^2 + (high_b - b)^2) and its mirror image.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from anygen.errors import CheckpointError, InputError
from anygen.evaluation.report import REPORT, Figure, shown_interval, shown_value
from anygen.evaluation.suite.evaluate import Row, row_list
from anygen.evaluation.suite.figures import EXPLAINED
from anygen.files import read_json


def compare_reports(left: Path, right: Path) -> list[dict[str, Any]]:
    """Every figure that both reports have: its values, the difference right - left and its 95 % interval; JSON-able.

    Args:
        left: a report.json, or the folder of one.
        right: another.

    Raises:
        InputError: not a report of `anygen evaluate` of a bundle, or they share nothing.
    """
    a, b = (_figures(path) for path in (left, right))
    rows = [_difference(row, b[key]) for key, row in a.items() if key in b]
    if not rows:
        raise InputError(f"{left} and {right} share no figure: evaluate the same directions")
    return rows


def lines_of_comparison(rows: list[dict[str, Any]]) -> list[str]:
    """A comparison as lines of text; a star marks differences whose interval leaves out 0."""
    labels = [(row["direction"], row["name"], row["group"]) for row in rows]
    widths = [max(len(text) for text in texts) for texts in zip(*labels, strict=True)]
    lines = []
    for row, texts in zip(rows, labels, strict=True):
        values = [_shown(row, row[key]) for key in ("left", "right", "difference")]
        figure = Figure(row["name"], row["group"], 0.0, row["low"], row["high"], 0)
        mark = "*" if row["is_apart"] else " "
        label = "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True))
        lines.append(
            f"{label}  {values[0]:>10} {values[1]:>10} {values[2]:>10} {mark} {shown_interval(figure, EXPLAINED)}"
        )
    return lines


def _figures(path: Path) -> dict[tuple[str, str, str], Row]:
    path = path / REPORT if path.is_dir() else path
    try:
        report = read_json(path)
        rows = row_list(report) if report["suite"] == "emoji" else []
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a report of anygen evaluate MODEL: {error}") from error
    unknown = [row.figure.name for row in rows if row.figure.name not in EXPLAINED]
    if unknown:
        raise InputError(f"{path} has a figure {unknown[0]!r} that this version of anygen does not know")
    return {(row.direction, row.figure.name, row.figure.group): row for row in rows}


def _difference(left: Row, right: Row) -> dict[str, Any]:
    a, b = left.figure, right.figure
    value = b.value - a.value
    low = high = None
    if None not in (a.low, a.high, b.low, b.high):
        assert a.low is not None and a.high is not None and b.low is not None and b.high is not None
        low = value - math.hypot(b.value - b.low, a.high - a.value)
        high = value + math.hypot(b.high - b.value, a.value - a.low)
    is_apart = low is not None and high is not None and (low > 0 or high < 0)
    facts = {"left": a.value, "right": b.value, "difference": value, "low": low, "high": high}
    finite = {key: v if v is None or math.isfinite(v) else None for key, v in facts.items()}
    return {"direction": left.direction, "name": a.name, "group": a.group, **finite, "is_apart": is_apart}


def _shown(row: dict[str, Any], value: float | None) -> str:
    return shown_value(Figure(row["name"], "", math.nan if value is None else value, None, None, 0), EXPLAINED)
