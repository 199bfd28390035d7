"""Recipes: one complete YAML file per stage, strict about its keys.

    defaults of the config class <- YAML <- `key.sub=value` on the command line

Unknown keys fail and name the nearest valid one. The merged config is what a stage is identified by.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from anygen.errors import ConfigError
from tokenizers_mm.config import Config as Config

SomeConfig = TypeVar("SomeConfig", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder of recipes: anygen run {path}, or name one of its files")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2024-13-45
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} is not a recipe: expected `key: value` lines")
    return content


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`values` with `a.b=1` and the like applied in order; a mapping as a value replaces the one that was there.

    >>> recipe = {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "mixture": {"text>image": 1}}
    >>> override(recipe, ["optimizer.lr=1e-4", "mixture={image>text: 2}", "steps=10"])
    {'optimizer': {'lr': '1e-4', 'betas': [0.9, 0.99]}, 'mixture': {'image>text': 2}, 'steps': 10}

    Raises:
        ConfigError: no `=`, an empty key, a key inside something that is no mapping, or a value that is not YAML.
    """
    changed = copy.deepcopy(dict(values))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {text!r} is not of the form key=value or key.sub=value")
        *parents, last = key.split(".")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {parent!r} holds {node!r}, which has no keys")
        try:
            node[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {text!r}: the value is not valid YAML") from error
    return changed


def build(config_class: type[SomeConfig], values: Mapping[str, Any], *, source: str) -> SomeConfig:
    """Check `values` against a config class.

    Raises:
        ConfigError: names `source`, the dotted key and, for an unknown one, the nearest valid key; all faults at once.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(f"{source}: {_explain(config_class, fault)}" for fault in error.errors())
        ) from error


def _explain(config_class: type[BaseModel], fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        valid = _keys_at(config_class, location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"unknown key {key!r}; {hint}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing"
    said = fault["msg"].removeprefix("Value error, ")
    if not location:  # keys that do not fit each other; the message names them and what was got
        return said
    return f"key {key!r}: {said[:1].lower()}{said[1:]}, got {fault['input']!r}"


def _keys_at(config_class: Any, location: list[str]) -> list[str]:
    """Valid keys of the (possibly nested, possibly tagged-union) config at `location`."""
    candidates = [config_class]
    for part in location:
        found: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel) and part in candidate.model_fields:
                found += _models_in(candidate.model_fields[part].annotation)
        candidates = found or candidates  # a union's tag is part of pydantic's location: it names no key
    return sorted(
        {name for c in candidates if isinstance(c, type) and issubclass(c, BaseModel) for name in c.model_fields}
    )


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
