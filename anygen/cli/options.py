"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="Bundle folder; the embedded one by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RootOption = Annotated[Path | None, typer.Option("--root", help="Folder of the run; runs/NAME by default.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")]


def print_facts(facts: dict[str, Any]) -> None:
    """One line a fact."""
    for name, value in facts.items():
        print(f"{name}: {value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)}")


def print_json(content: Any) -> None:
    """One JSON object on one line."""
    print(json.dumps(content, ensure_ascii=False))
