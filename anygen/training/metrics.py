"""Metrics of a run: one JSON object a line, always, and a progress bar where somebody watches."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from anygen.files import TEMPORARY

logger = logging.getLogger("anygen")
METRICS_FILE = "metrics.jsonl"
_LOG_EVERY_S = 30.0


class MetricsLog:
    """Appends lines to `metrics.jsonl`; a resumed run first drops the lines at or after its step."""

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = [row for row in read_metrics(self.path) if row["step"] < resume_step]
        temporary = folder / f"{TEMPORARY}{METRICS_FILE}"  # a kill in between must not cost the history
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line for `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **{k: rounded(v) for k, v in values.items()}}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """A bar on a terminal; elsewhere a line in the log every half minute."""

    def __init__(self, title: str, total: int, *, start: int = 0, shown: bool = True) -> None:
        self._title, self._total, self._done, self._shown = title, total, start, shown
        hidden = not (shown and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=start, desc=title, disable=hidden, dynamic_ncols=True)
        self._last_line = time.monotonic()

    def advance(self, values: Mapping[str, float] | None = None, *, count: int = 1) -> None:
        """Count work as done, with figures to show."""
        self._done += count
        self._bar.update(count)
        if values:
            self._bar.set_postfix({key: rounded(value) for key, value in values.items()})
        if self._shown and self._bar.disable and time.monotonic() - self._last_line > _LOG_EVERY_S:
            self._last_line = time.monotonic()
            shown = " ".join(f"{key}={rounded(value)}" for key, value in (values or {}).items())
            logger.info("%s %d/%d %s", self._title, self._done, self._total, shown)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def rounded(value: float) -> float:
    """Five digits, as lines and bars show a figure."""
    return float(f"{value:.5g}")
