"""The recipes that come with anygen: in `recipes/` of a checkout, in the package of an installed wheel."""

from __future__ import annotations

import difflib
import importlib.resources
import shutil
from pathlib import Path, PurePosixPath

from anygen.errors import InputError


def recipes_folder() -> Path:
    """Where they lie."""
    package = Path(str(importlib.resources.files("anygen")))
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[str]:
    """Names such as `nano/pretrain.yaml`, sorted; the launcher's configurations in `accelerate/` are no recipes."""
    folder = recipes_folder()
    recipes = (path for path in folder.rglob("*.yaml") if path.parent.name != "accelerate")
    return sorted(path.relative_to(folder).as_posix() for path in recipes)


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        InputError: there is no such recipe.
    """
    if name in _families():
        first = next(recipe for recipe in list_recipes() if recipe.startswith(f"{name}/"))
        raise InputError(f"{name!r} is a folder of recipes; name one of them, such as {first}")
    if name not in list_recipes():
        near = difflib.get_close_matches(name, [*_families(), *list_recipes()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(list_recipes())}"
        raise InputError(f"there is no recipe {name!r}; {hint}")
    return recipes_folder() / name


def _families() -> list[str]:
    parents = (parent for recipe in list_recipes() for parent in PurePosixPath(recipe).parents)
    return sorted({str(parent) for parent in parents} - {"."})


def copy_recipe(name: str, to: Path) -> Path:
    """Copy one recipe, or a family of them; never over something that is there.

    Raises:
        InputError: no such recipe or family, or `to` exists.
    """
    if name in _families():
        if to.exists():  # a family within another would be left out of `anygen run`
            raise InputError(f"{to} exists already: choose another name")
        shutil.copytree(recipes_folder() / name, to)
        return to
    source = find_recipe(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise InputError(f"{target} exists already: choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
