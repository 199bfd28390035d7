"""Commands that train: `train` one stage, `run` a family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anygen.cli.options import OverridesArgument, RootOption, print_facts


def train(
    recipe: Path,
    overrides: OverridesArgument = None,
    root: RootOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would do and cost.")] = False,
) -> None:
    """Run one stage: anygen train RECIPE.yaml key.sub=value ..."""
    from anygen.stages.run import load_recipe, run_stage
    from anygen.training import processes

    config = load_recipe(recipe, overrides or (), root=root)
    if dry_run:
        from anygen.stages.dry_run import weigh

        print_facts(weigh(config, recipe))
        return
    result = run_stage(config)
    if processes.rank() == 0:
        _print_result(result)
    processes.leave()


def run(folder: Path, overrides: OverridesArgument = None, root: RootOption = None) -> None:
    """Run a family's stages in order, skipping what is done: anygen run recipes/nano [stage.key=value ...]"""
    from anygen.stages.run import run_folder

    for result in run_folder(folder, overrides or (), root=root):
        _print_result(result)


def _print_result(result: Any) -> None:
    figures = " ".join(f"{name}={value:.4g}" for name, value in sorted(result.metrics.items()))
    print(f"{result.folder}: {figures}")
