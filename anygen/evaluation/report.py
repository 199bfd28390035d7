"""What evaluations of tokenizers share: figures, how they are shown, and the folder that they are written to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from anygen._version import __version__
from anygen.errors import InputError
from anygen.evaluation.scores import Score
from anygen.files import MANIFEST, publishing, write_json

REPORT, PAGE = "report.json", "index.html"

Explained = Mapping[str, tuple[str, str]]
"""Name of a figure -> its unit (% stands for a share, stored as 0 to 1) and what it is."""


@dataclass(frozen=True)
class Figure:
    """One number of the report."""

    name: str
    group: str
    """What it was measured on."""
    value: float
    low: float | None
    high: float | None
    """95 % interval: Wilson for shares, normal for means, bootstrap for ratios; None where there is none."""
    count: int
    """Pictures or sounds; 0 where nothing was measured but computed."""


def figure_of(name: str, group: str, score: Score) -> Figure:
    """A figure with its interval."""
    return Figure(name, group, score.value, score.low, score.high, score.count)


def rows_of(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """JSON-able: numbers that are not finite are null."""
    return [{key: _finite(value) for key, value in dataclasses.asdict(figure).items()} for figure in figures]


def lines_of(report: Mapping[str, Any], explained: Explained) -> list[str]:
    """A report as lines of text."""
    figures = [Figure(**row) for row in report["figures"]]
    widths = [max(len(getattr(figure, key)) for figure in figures) for key in ("name", "group")]
    lines = [
        f"{figure.name:{widths[0]}}  {figure.group:{widths[1]}}  {shown_value(figure, explained):>20}  "
        f"{shown_interval(figure, explained):18}  {f'n={figure.count}' if figure.count else ''}".rstrip()
        for figure in figures
    ]
    lines += [f"skipped: {what}: {why}" for what, why in report["skipped"].items()]
    return lines + [f"warning: {text}" for text in report["warnings"]]


def shown_value(figure: Figure, explained: Explained) -> str:
    """A value with its unit.

    >>> shown_value(Figure("codes used", "held out", 0.5, None, None, 3), {"codes used": ("%", "")})
    '50.0 %'
    """
    unit = explained[figure.name][0]
    return f"{_short(figure.value, unit)} {unit}".strip()


def shown_interval(figure: Figure, explained: Explained) -> str:
    """The 95 % interval, empty where there is none."""
    if figure.low is None or figure.high is None or math.isnan(figure.low):
        return ""
    unit = explained[figure.name][0]
    return f"[{_short(figure.low, unit)}, {_short(figure.high, unit)}]"


def check_out(out: Path) -> Path:
    """The folder of a report, absolute: new, or an older report, which will be replaced whole.

    Raises:
        InputError: it holds something else.
    """
    out = out.resolve()
    if out.exists() and (out.is_file() or {path.name for path in out.iterdir()} - {REPORT, PAGE, MANIFEST}):
        raise InputError(f"{out} exists and holds more than an evaluation: choose a new folder")
    return out


def data_of(tokenizer: Path, data: Path | None) -> Path:
    """Where the shards are: as named, or beside the stage that trained the tokenizer.

    Raises:
        InputError: there are none.
    """
    data = data or tokenizer.resolve().parent.parent / "data"
    if not any(data.glob("*.tar")):
        raise InputError(f"there are no record shards (*.tar) in {data}: name the folder of stage data with --data")
    return data


def write_report(
    out: Path, report: dict[str, Any], figures: Iterable[Figure], *, template: str, explained: Explained, **shown: Any
) -> None:
    """Write `report.json` and `index.html`; everything that is not markup of ours is escaped.

    Args:
        out: as `check_out` gave it.
        report: JSON-able.
        figures: what its figures were made of.
        template: beside this file.
        explained: every figure.
        shown: what the template shows besides.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("anygen.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    rows: dict[str, list[Figure]] = {}
    for figure in figures:
        rows.setdefault(figure.name, []).append(figure)
    page = environment.get_template(template).render(
        report=report,
        rows=rows,
        explained=explained,
        shown_value=lambda figure: shown_value(figure, explained),
        shown_interval=lambda figure: shown_interval(figure, explained),
        version=__version__,
        **shown,
    )
    with publishing(out) as temporary:
        write_json(temporary / REPORT, report)
        (temporary / PAGE).write_text(page, encoding="utf-8")


def _short(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return "none"
    if unit == "%":
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if unit == "dB" else f"{value:.4g}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
