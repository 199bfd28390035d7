"""Commands on the recipes that come with anygen."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(help="Recipes that come with anygen.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def recipes_ls() -> None:
    """List the recipes that come with anygen."""
    from anygen.recipes_index import list_recipes

    for name in list_recipes():
        print(name)


@app.command("show")
def recipes_show(name: str) -> None:
    """Print one recipe (nano/pretrain.yaml)."""
    from anygen.recipes_index import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@app.command("cp")
def recipes_cp(name: str, to: Path) -> None:
    """Copy a recipe or a family (nano, nano/pretrain.yaml) to a new place."""
    from anygen.recipes_index import copy_recipe

    print(copy_recipe(name, to))
