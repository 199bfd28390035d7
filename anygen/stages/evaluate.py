"""Stage `evaluate`: the bundle of a run, measured in every direction of the emoji world."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from anygen.api import AnyGen
from anygen.errors import DataError
from anygen.evaluation.suite.evaluate import DEFAULT_LIMIT, evaluate_bundle, part_names, row_list
from anygen.stages.base import StageConfig, StageResult


class EvaluateConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["evaluate"] = "evaluate"
    limit: int = Field(DEFAULT_LIMIT, ge=1)
    """At most so many cases of a group."""
    directions: list[str] = []
    """Some of the parts that `anygen evaluate` measures; empty for all."""
    seed: int = Field(0, ge=0)
    best_of: int | None = Field(None, ge=1)
    """Answers that are drawn for one that is kept (`Request.best_of`), where they can be read backwards; as many as the
    bundle says by default."""

    @field_validator("directions")
    @classmethod
    def _known(cls, directions: list[str]) -> list[str]:
        if unknown := set(directions) - set(part_names()):
            raise ValueError(f"unknown direction {min(unknown)!r}; expected some of {', '.join(part_names())}")
        return directions


def main(config: EvaluateConfig) -> StageResult:
    """Write the report and its page; the first figure of each direction and group is a metric of the stage."""
    bundles = sorted(path.parent for path in (config.root / "bundle").glob("*/anygen.json"))
    if not bundles:
        raise DataError(f"{config.root / 'bundle'} holds no bundle: run the stage bundle first")
    out = config.folder / "report"
    model = AnyGen.from_pretrained(bundles[0])
    report = evaluate_bundle(
        model, out, limit=config.limit, directions=config.directions, seed=config.seed, best_of=config.best_of
    )
    metrics: dict[tuple[str, str], tuple[str, float]] = {}
    for row in row_list(report):
        metrics.setdefault((row.direction, row.figure.group), (row.figure.name, row.figure.value))
    named = {f"{direction}, {group}: {name}": value for (direction, group), (name, value) in metrics.items()}
    return StageResult(config.folder, (out,), named)
