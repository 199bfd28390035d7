"""The figures of a run: one for each of its metrics files, with another run drawn over it on request."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from anygen.errors import DataError, InputError
from anygen.plotting.curves import find_metrics, panels_of, read_rows
from anygen.plotting.figure import draw, require

logger = logging.getLogger("anygen")


def plot_run(run: Path, out: Path, *, compare: Path | None = None) -> list[Path]:
    """Draw a run, a stage or a metrics file.

    Args:
        run: its folder or file.
        out: the picture; with several metrics files each has the name of its stage behind: `curves-pretrain.png`.
        compare: a second one, drawn dashed where it has the same stage.

    Returns:
        The pictures.

    Raises:
        InputError: no metrics there, no stage in common, or a suffix that is no picture's.
        DataError: what is there has no whole line, or is something else.
        MissingDependency: matplotlib is not installed.
    """
    require(out)
    files = find_metrics(run)
    others = find_metrics(compare) if compare else {}
    if len(files) == len(others) == 1:  # two stages or files are meant to be compared, whatever their folders' names
        others = dict(zip(files, others.values(), strict=True))
    if compare and not (files := {name: file for name, file in files.items() if name in others}):
        raise InputError(f"{run} and {compare} have no stage in common: the second has {', '.join(others)}")
    several = len(files) > 1
    pictures = []
    for name, file in files.items():
        paths = [file, *([others[name]] if compare else [])]
        try:
            runs = dict(zip(_labels(run, compare), [panels_of(read_rows(path)) for path in paths], strict=True))
        except DataError as error:
            if not several:
                raise
            logger.warning("left out: %s", error)
            continue
        target = out.with_name(f"{out.stem}-{name.replace('/', '-')}{out.suffix}") if several else out
        pictures.append(draw(_title(run, name), runs, target))
    if not pictures:
        raise DataError(f"no metrics file in {run} has a whole line yet")
    return pictures


def _title(run: Path, name: str) -> str:
    folder = run.resolve().parent if run.is_file() else run.resolve()
    return f"{folder.parent.name}/{name}" if folder.name == name else f"{folder.name}/{name}"


def _labels(run: Path, compare: Path | None) -> list[str]:
    """Names that tell two runs apart: their paths from where they part."""
    if compare is None:
        return [run.name]
    paths = [run.resolve(), compare.resolve()]
    common = Path(os.path.commonpath(paths))
    return [str(path) if path == common else path.relative_to(common).as_posix() for path in paths]
