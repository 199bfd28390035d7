"""`anygen evaluate MODEL --suite emoji`: every direction of a bundle, measured part by part.

A part that is done is kept beside the report's folder until all are: an evaluation that was stopped goes on from there.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anygen._version import __version__
from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.evaluation.report import Figure, check_out, rows_of, shown_interval, shown_value, write_report
from anygen.evaluation.scores import Score
from anygen.evaluation.suite.answers import generated
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.bits import bits_per_id
from anygen.evaluation.suite.cases import Answer, Case, Part
from anygen.evaluation.suite.emoji_parts import emoji_parts
from anygen.evaluation.suite.figures import EXPLAINED
from anygen.evaluation.suite.page import Card, card_of, sections_of
from anygen.evaluation.suite.scene_parts import scene_parts
from anygen.files import read_json, sha256_of, write_json
from anygen.judging import best_of_to_json
from anygen.training.interrupts import StopRequest
from tokenizers_mm.codes import fingerprint_of

logger = logging.getLogger("anygen")
DEFAULT_LIMIT = 120
NUM_SHOWN, NUM_PLAYED = 12, 4
"""Cards of a group, without and with sound."""


@dataclass(frozen=True)
class Row:
    """One figure of one direction."""

    direction: str
    figure: Figure


@dataclass(frozen=True)
class Result:
    """A part, measured."""

    rows: tuple[Row, ...]
    cards: dict[str, list[Card]]
    """By group."""


def part_names() -> list[str]:
    """Every part, in the order in which they are measured."""
    return [part.name for part in (*emoji_parts(), *scene_parts())]


def check_directions(directions: Sequence[str]) -> None:
    """Raise InputError where one is none."""
    if unknown := set(directions) - set(part_names()):
        raise InputError(f"unknown direction {min(unknown)!r}; expected some of {', '.join(part_names())}")


def evaluate_bundle(
    model: AnyGen,
    out: Path,
    *,
    limit: int | None = DEFAULT_LIMIT,
    directions: Sequence[str] = (),
    seed: int = 0,
    best_of: int | None = None,
) -> dict[str, Any]:
    """Measure a bundle; writes `report.json` and `index.html` and returns the report.

    Args:
        model: the bundle, opened.
        out: where to write; an older evaluation there is replaced.
        limit: at most so many cases of a group.
        directions: names of parts; all where there are none.
        seed: of the samples.
        best_of: see `Request`; of directions from one medium to one other. None takes the number that is the model's
            own for each.

    Raises:
        InputError: no such direction, or `out` holds something that is not an evaluation.
        MissingDependency: the emoji world cannot be drawn here.
    """
    out = check_out(out)
    check_directions(directions)
    bench = Bench(model, limit=limit, seed=seed, best_of=best_of)
    parts = _fitting(bench, [p for p in (*emoji_parts(), *scene_parts()) if not directions or p.name in directions])
    kept = _Kept(out, fingerprint_of(_identity(model, limit=limit, seed=seed, best_of=best_of)))
    results: dict[str, Result] = {}
    with StopRequest() as stop:
        for part in parts:
            found = kept.get(part.name, bench)
            logger.info("%d of %d: %s%s", len(results) + 1, len(parts), part.name, ", kept" if found else "")
            results[part.name] = found or kept.put(part.name, _measured(bench, part), bench)
            stop.check(f"{len(results)} of {len(parts)} parts are kept in {kept.folder}")
    report = _report(bench, [row for result in results.values() for row in result.rows])
    sections = sections_of(parts, results)
    write_report(out, report, (), template="suite/page.html.jinja", explained=EXPLAINED, sections=sections)
    kept.forget()
    return report


def open_and_evaluate(
    folder: str | None,
    out: Path,
    *,
    limit: int | None,
    directions: Sequence[str],
    seed: int,
    best_of: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The report of the bundle in a folder (None: the embedded one), also as lines of text."""
    check_directions(directions)
    model = AnyGen.from_pretrained(folder)
    limit = limit or DEFAULT_LIMIT
    report = evaluate_bundle(model, out, limit=limit, directions=directions, seed=seed, best_of=best_of)
    return report, lines_of(report)


def lines_of(report: dict[str, Any]) -> list[str]:
    """A report as lines of text."""
    rows = row_list(report)
    widths = [
        max((len(text) for text in texts), default=0) for texts in zip(*(_labels(row) for row in rows), strict=True)
    ]
    lines = []
    for row in rows:
        labels = "  ".join(f"{label:{width}}" for label, width in zip(_labels(row), widths, strict=True))
        value, interval = shown_value(row.figure, EXPLAINED), shown_interval(row.figure, EXPLAINED)
        lines.append(f"{labels}  {value:>10}  {interval:16}  n={row.figure.count}")
    return lines + [f"skipped: {what}: {why}" for what, why in report["skipped"].items()]


def row_list(report: dict[str, Any]) -> list[Row]:
    """The rows of a report; null becomes NaN."""
    rows = []
    for facts in report["figures"]:
        figure = {key: value for key, value in facts.items() if key != "direction"}
        figure["value"] = float("nan") if figure["value"] is None else figure["value"]
        rows.append(Row(facts["direction"], Figure(**figure)))
    return rows


def _labels(row: Row) -> tuple[str, str, str]:
    return row.direction, row.figure.name, row.figure.group


def _fitting(bench: Bench, parts: Sequence[Part]) -> list[Part]:
    """The parts that can be measured; why the others cannot goes to `skipped`."""
    able, fitting = set(bench.model.bundle.tokenizers), []
    for part in parts:
        if lacking := part.modalities - able:
            bench.skipped[part.name] = f"this model has no {min(lacking)}"
        elif "audio" in part.modalities and not bench.voices:
            bench.skipped[part.name] = "no voice can be spoken here"
        else:
            fitting.append(part)
    return fitting


def _measured(bench: Bench, part: Part) -> Result:
    rows: list[Row] = []
    cards: dict[str, list[Card]] = {}
    for group, cases in part.cases(bench).items():
        if not cases:
            continue
        started = time.perf_counter()
        answers = (part.answer or generated)(bench, part, cases)
        seconds = (time.perf_counter() - started) / len(cases)
        for name, score, of in _scores(bench, part, cases, answers):
            rows.append(Row(part.name, _figure(name, f"{group}: {of}" if of else group, score)))
        if part.answer is None:
            rows.append(Row(part.name, Figure("seconds per sample", group, seconds, None, None, len(cases))))
        shown = NUM_PLAYED if "audio" in part.modalities else NUM_SHOWN
        cards[group] = [card_of(part, case, answer) for case, answer in list(zip(cases, answers, strict=True))[:shown]]
    return Result(tuple(rows), cards)


def _scores(bench: Bench, part: Part, cases: list[Case], answers: list[Answer]) -> list[tuple[str, Score, str]]:
    found = []
    for modality in part.outputs:
        for measured in part.judges[modality](bench, cases, [answer[modality] for answer in answers]):
            found.append((measured.name, measured.score, measured.of))
    if part.answer is None:
        bits = bits_per_id(bench.model, [case.document(part.outputs) for case in cases])
        found += [(f"bits per id, {modality}", score, "") for modality, score in bits.items()]
    return found


def _figure(name: str, group: str, score: Score) -> Figure:
    return Figure(name, group, score.value, score.low, score.high, score.count)


def _identity(model: AnyGen, **choices: Any) -> dict[str, Any]:
    manifest = model.bundle.folder / "manifest.json"
    weights = sha256_of(manifest) if manifest.is_file() else str(model.bundle.folder)
    return {"bundle": weights, "anygen": __version__, **choices}


def _report(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    figures = rows_of([row.figure for row in rows])
    return {
        "suite": "emoji",
        "model": str(bench.model.bundle.folder),
        "name": str(bench.model.bundle.provenance.get("name", "")),
        "anygen": __version__,
        "limit": bench.limit,
        "seed": bench.seed,
        "best_of": bench.best_of or best_of_to_json(bench.model.bundle.best_of),
        "voice": bench.voices[0] if bench.voices else None,
        "threads": torch.get_num_threads(),
        "figures": [{"direction": row.direction, **facts} for row, facts in zip(rows, figures, strict=True)],
        "skipped": bench.skipped,
        "warnings": [],
    }


class _Kept:
    """Parts that are done, one file each, in a folder beside the report."""

    def __init__(self, out: Path, identity: str) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self._identity = identity
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, bench: Bench) -> Result | None:
        """A part that was kept by the same evaluation."""
        path = self._path(name)
        if not path.is_file():
            return None
        facts = read_json(path)
        if facts["identity"] != self._identity:
            return None
        bench.skipped |= facts["skipped"]
        rows = tuple(Row(row["direction"], Figure(**row["figure"])) for row in facts["rows"])
        return Result(rows, {group: [Card.of(card) for card in cards] for group, cards in facts["cards"].items()})

    def put(self, name: str, result: Result, bench: Bench) -> Result:
        """Keep a part."""
        facts = {"identity": self._identity, "skipped": bench.skipped, **asdict(result)}
        write_json(self._path(name), facts)
        return result

    def forget(self) -> None:
        """The report is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{fingerprint_of({'part': name})[:16]}.json"
