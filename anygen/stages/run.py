"""Running stages: one recipe, or a folder of them in order, skipping what is done and unchanged.

A stage is identified by its config and the identities of the stages it reads. `stage.json`, written last, says what
was done; a stage whose identity changed is moved aside (nothing is deleted) and done anew.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from anygen.config import build, override, read_yaml
from anygen.errors import CheckpointError, ConfigError
from anygen.files import read_json, remove_leftovers, write_json
from anygen.stages.base import StageConfig, StageResult
from tokenizers_mm.codes import fingerprint_of

logger = logging.getLogger("anygen")
STAGE_JSON, STARTED_JSON = "stage.json", "started.json"


@dataclass(frozen=True)
class Stage:
    """Where a stage's code is, and whose work it reads."""

    config_class: str
    needs: tuple[str, ...]


STAGES: dict[str, Stage] = {
    "data": Stage("DataConfig", ()),
    "text_tokenizer": Stage("TextTokenizerConfig", ("data",)),
    "teacher": Stage("TeacherConfig", ("data", "text_tokenizer")),
    "image_tokenizer": Stage("ImageTokenizerConfig", ("data", "teacher")),
    "audio_tokenizer": Stage("AudioTokenizerConfig", ("data",)),
    "tokenize": Stage("TokenizeConfig", ("data", "image_tokenizer", "audio_tokenizer")),
    "pretrain": Stage("PretrainConfig", ("text_tokenizer", "tokenize")),
    "bundle": Stage("BundleConfig", ("pretrain",)),
    "gallery": Stage("GalleryConfig", ("bundle",)),
}
"""Every stage, in the order in which a family runs them."""
ALTERNATIVES = {("audio_tokenizer", "checkpoint"): ("published_codec", "PublishedCodecConfig")}
"""Stage and a key that makes its recipe one of another kind -> where that kind's code is."""
OPTIONAL = ("teacher", "image_tokenizer", "audio_tokenizer")
"""A teacher may come from elsewhere, and a run may do without pictures or without sound."""


def load_recipe(
    path: Path, overrides: Iterable[str] = (), *, root: Path | None = None, default_root: Path | None = None
) -> StageConfig:
    """The config in a recipe, with overrides.

    Args:
        path: of the recipe.
        overrides: `key.sub=value`.
        root: folder of the run, whatever the recipe says.
        default_root: where neither `root` nor the recipe nor an override says one.

    Raises:
        ConfigError: unreadable, no such stage, or a key or value that does not fit, by name.
    """
    values = override(read_yaml(path), overrides)
    if root is not None:
        values["root"] = root
    elif default_root is not None:
        values.setdefault("root", default_root)
    name = values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise ConfigError(f"{path}: stage is {name!r}; expected one of {', '.join(STAGES)}")
    # a key that nearly is it is a misspelling, and the other kind's error says so
    keys = [key for key in values if isinstance(key, str)]
    kinds = [
        p for (stage, key), p in ALTERNATIVES.items() if stage == name and get_close_matches(key, keys, cutoff=0.8)
    ]
    code, config_class = kinds[0] if kinds else (name, STAGES[name].config_class)
    module = importlib.import_module(f"anygen.stages.{code}")
    return cast(StageConfig, build(getattr(module, config_class), values, source=str(path)))


def run_folder(folder: Path, overrides: Iterable[str] = (), *, root: Path | None = None) -> list[StageResult]:
    """Run the recipes of a folder in order; overrides are written `stage.key=value`, or `root=FOLDER` for all.

    Raises:
        ConfigError: no recipes, or two for one stage. All recipes are read before the first one runs.
    """
    recipes = _recipes_in(folder)
    shared, own = _overrides_by_stage(overrides, recipes)
    if root is None and "root" in shared:
        if not shared["root"]:
            raise ConfigError("root= names no folder")
        root = Path(str(shared["root"]))
    root = root or Path("runs") / folder.resolve().name
    configs = [load_recipe(recipes[name], own.get(name, ()), root=root) for name in STAGES if name in recipes]
    return [run_stage(config) for config in configs]


def run_stage(config: StageConfig) -> StageResult:
    """Run one stage, or return what it made where it is done and unchanged.

    Raises:
        CheckpointError: another process is at work in the same run.
        ConfigError: a stage that it reads has not been run.
    """
    config.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.root / ".lock")
    try:
        with lock.acquire(timeout=0):
            return _run_locked(config)
    except Timeout as error:
        raise CheckpointError(
            f"another anygen process is at work in {config.root}: wait for it, or use another root"
        ) from error


def _run_locked(config: StageConfig) -> StageResult:
    identity = _identity(config)
    done = _done(config, identity)
    if done is not None:
        logger.info("%s: done and unchanged", config.stage)
        return done
    config.check()
    _move_aside_if_other(config, identity)
    config.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(config.folder)
    write_json(config.folder / STARTED_JSON, {"identity": identity})
    logger.info("%s: running in %s", config.stage, config.folder)
    started = time.monotonic()
    result: StageResult = importlib.import_module(type(config).__module__).main(config)
    figures = {name: value for name, value in result.metrics.items() if name not in ("step_s", "tokens_per_s")}
    facts = {
        "identity": identity,
        "config": config.model_dump(mode="json", exclude={"root"}),
        "metrics": figures,
        "outputs": {str(p.relative_to(config.folder)): _num_bytes(p) for p in result.outputs},
    }
    write_json(config.folder / STAGE_JSON, facts)
    logger.info("%s: done in %.0f s", config.stage, time.monotonic() - started)
    return result


def _identity(config: StageConfig) -> str:
    inputs = {}
    for need in STAGES[config.stage].needs:
        path = config.root / need / STAGE_JSON
        if path.exists():
            inputs[need] = read_json(path)["identity"]
        elif (config.root / need / STARTED_JSON).exists():
            raise ConfigError(
                f"stage {config.stage} reads stage {need}, which was begun in {config.root} and is not finished: "
                f"run it again, or remove {config.root / need}"
            )
        elif need not in OPTIONAL:
            raise ConfigError(f"stage {config.stage} reads stage {need}, which has not been run in {config.root}")
    facts = {"config": config.model_dump(mode="json", exclude={"root"}), "inputs": inputs}
    outside = config.outside_inputs()
    return fingerprint_of(facts | ({"outside": outside} if outside else {}))


def _done(config: StageConfig, identity: str) -> StageResult | None:
    path = config.folder / STAGE_JSON
    if not path.exists():
        return None
    facts = read_json(path)
    outputs = {config.folder / name: size for name, size in facts["outputs"].items()}
    if facts["identity"] != identity or any(not p.exists() or _num_bytes(p) != size for p, size in outputs.items()):
        return None
    return StageResult(config.folder, tuple(outputs), facts["metrics"])


def _move_aside_if_other(config: StageConfig, identity: str) -> None:
    path = config.folder / STARTED_JSON
    if not path.exists() or read_json(path).get("identity") == identity:
        return
    number = 1
    while (aside := config.root / "old" / f"{config.stage}-{number}").exists():
        number += 1
    aside.parent.mkdir(exist_ok=True)
    config.folder.rename(aside)
    logger.warning("%s: the recipe or its inputs changed; the earlier work is in %s", config.stage, aside)


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _recipes_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of recipes; `anygen recipes ls` lists those that come with anygen")
    recipes: dict[str, Path] = {}
    for path in sorted(folder.glob("*.yaml")):
        name = read_yaml(path).get("stage")
        if not isinstance(name, str) or name not in STAGES:
            raise ConfigError(f"{path}: stage is {name!r}; expected one of {', '.join(STAGES)}")
        if name in recipes:
            raise ConfigError(f"{path} and {recipes[name]} are both for stage {name!r}")
        recipes[name] = path
    if not recipes:
        raise ConfigError(f"{folder} holds no recipes (*.yaml)")
    return recipes


def _overrides_by_stage(
    overrides: Iterable[str], recipes: Mapping[str, Path]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    shared: dict[str, Any] = {}
    own: dict[str, list[str]] = {}
    for text in overrides:
        stage, dot, rest = text.partition(".")
        if text.startswith("root="):
            shared = override(shared, [text])
        elif dot and stage in recipes and "=" in rest:
            own.setdefault(stage, []).append(rest)
        else:
            raise ConfigError(
                f"override {text!r}: write stage.key=value (stages here: {', '.join(recipes)}) or root=FOLDER"
            )
    return shared, own
