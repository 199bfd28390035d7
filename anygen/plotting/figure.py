"""Panels to a picture with matplotlib, which is an extra: faint points as logged, a running mean over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anygen.errors import InputError, MissingDependency
from anygen.plotting.curves import Panel, Series

SUFFIXES = (".png", ".svg", ".pdf")
_INK, _GREY, _RED = "#222222", "#8a8a8a", "#c00000"
_MODALITIES = {
    "text": "#0072b2",
    "image": "#d55e00",
    "audio": "#009e73",
    "region": "#cc79a7",
    "control": _GREY,
    "voken": "#56b4e9",
}
"""Okabe and Ito's colours, which stay apart for every kind of eye; the same for a modality in every figure."""
_OTHERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#6b4e9b")
_DASHES = ("-", (0, (4, 2)))
_RING = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linewidth": 0.8}
_STYLE = {
    "font.size": 9,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "anygen",
}


def require(out: Path) -> None:
    """Refuse what could not be written before anything is read.

    Raises:
        InputError: a suffix other than .png, .svg or .pdf.
        MissingDependency: matplotlib is not installed.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"{out.name} is no picture: write {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency('curves are drawn with matplotlib: pip install "anygen[plot]"') from error


def draw(title: str, runs: Mapping[str, Sequence[Panel]], out: Path) -> Path:
    """One figure of one run, or of two over each other.

    Args:
        title: of the figure.
        runs: panels by the name of the run; panels of equal title share their axes.
        out: where it goes; the suffix says what it is.
    """
    require(out)
    import matplotlib
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(panel.title for panels in runs.values() for panel in panels))
    num_rows, columns = _shape(len(titles))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.0 * columns, 2.5 * num_rows + 0.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
        grid = figure.subplots(num_rows, columns, squeeze=False, sharex=True)
        axes = dict(zip(titles, grid.flat, strict=False))
        for dashes, panels in zip(_DASHES, runs.values(), strict=False):
            for panel in panels:
                _draw_panel(axes[panel.title], panel, dashes)
        for empty in grid.flat[len(titles) :]:
            empty.set_visible(False)
        for place, ax in enumerate(grid.flat[: len(titles)]):
            is_lowest = place + columns >= len(titles)
            ax.tick_params(labelbottom=is_lowest, length=2.5)
            ax.set_xlabel("step" if is_lowest else "")
        for panel_title, ax in axes.items():
            _explain(ax, [panel for panels in runs.values() for panel in panels if panel.title == panel_title])
        if len(runs) > 1:
            lines = [_line(_GREY, name, linestyle=dashes) for dashes, name in zip(_DASHES, runs, strict=False)]
            figure.legend(handles=lines, loc="upper right", ncols=len(lines))
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)
    return out


def _draw_panel(ax: Any, panel: Panel, dashes: Any) -> None:
    ax.set_title(panel.title, color=_INK)
    colours = _colours(panel)
    for series in panel.series:
        _draw_series(ax, series, colours[series.name], dashes)
    for step in panel.alarms:
        ax.axvline(step, color=_RED, linewidth=0.8, linestyle=":")
    _scale(ax, panel)


def _scale(ax: Any, panel: Panel) -> None:
    from matplotlib import ticker

    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    if panel.from_zero:
        ax.set_ylim(bottom=0)
    if panel.is_log:
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(ticker.NullLocator())


def _draw_series(ax: Any, series: Series, colour: str, dashes: Any) -> None:
    if series.held_out:
        ax.plot(series.steps, series.values, color=colour, linestyle=dashes, zorder=3, **_RING)
        return
    smoothed = series.smoothed()
    if smoothed != series.values:
        ax.plot(series.steps, series.values, color=colour, linewidth=0.8, alpha=0.25)
    marker = "." if len(series.steps) == 1 else ""
    ax.plot(series.steps, smoothed, color=colour, linestyle=dashes, linewidth=1.5, marker=marker)


def _colours(panel: Panel) -> dict[str, str]:
    names = list(dict.fromkeys(series.name for series in panel.series))
    if names == [""]:
        return {"": _INK}
    cycle = dict(zip([n for n in names if n not in _MODALITIES], _OTHERS * len(names), strict=False))
    return {name: _MODALITIES.get(name) or cycle[name] for name in names}


def _explain(ax: Any, panels: Sequence[Panel]) -> None:
    """What the colours mean where they vary, and what is held out."""
    colours = {name: colour for panel in panels for name, colour in _colours(panel).items() if name}
    handles = [_line(colour, name) for name, colour in colours.items()]
    if any(series.held_out for panel in panels for series in panel.series):
        handles.append(_line(_GREY, "held out", **_RING))
    if any(panel.alarms for panel in panels):
        handles.append(_line(_RED, "alarm", linestyle=":"))
    if handles:
        ax.legend(handles=handles, ncols=2 if len(handles) > 3 else 1)


def _line(colour: str, label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **style)


def _shape(num_panels: int) -> tuple[int, int]:
    """Rows and columns: three or four to a row, whichever leaves less room empty."""
    columns = min(num_panels, min((3, 4), key=lambda count: -num_panels % count))
    return -(-num_panels // columns), columns
