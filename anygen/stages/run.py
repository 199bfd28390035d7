"""Running stages: one recipe, or a folder of them in order, skipping what is done and unchanged.

A stage is identified by its config and the identities of the stages it reads. `stage.json`, written last, says what
was done; a stage whose identity changed is moved aside (nothing is deleted) and done anew.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from anygen.config import Config, build, override, read_yaml
from anygen.errors import ConfigError, TrainingError
from anygen.files import read_json, remove_leftovers, write_json
from anygen.stages.base import StageConfig, StageResult
from anygen.stages.catalogue import ALTERNATIVES, OPTIONAL, STAGES
from anygen.stages.earlier_run import take_over
from anygen.stages.locks import locked, require_no_shares, share_locked
from anygen.training import processes
from anygen.training.checkpoint import checkpoints
from anygen.training.loop import CHECKPOINTS, LoopConfig
from tokenizers_mm.codes import fingerprint_of

logger = logging.getLogger("anygen")
STAGE_JSON, STARTED_JSON = "stage.json", "started.json"
_PATIENCE_S = 60.0
"""How long the shares of a stage wait for one another to look after the run's folder."""


def load_recipe(path: Path, overrides: Iterable[str] = (), *, root: Path | None = None) -> StageConfig:
    """The config in a recipe, with overrides.

    Args:
        path: of the recipe.
        overrides: `key.sub=value`.
        root: folder of the run, whatever the recipe says; where nothing says one, in `runs`, named as the recipe's.

    Raises:
        ConfigError: unreadable, no such stage, or a key or value that does not fit, by name.
    """
    values = override(read_yaml(path), overrides)
    values.setdefault("root", Path("runs") / path.resolve().parent.name)
    if root is not None:
        values["root"] = root
    name = values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        raise ConfigError(f"{path}: stage is {name!r}; expected one of {', '.join(STAGES)}")
    # a key that nearly is it is a misspelling, and the other kind's error says so
    keys = [key for key in values if isinstance(key, str)]
    kinds = [p for (of, key), p in ALTERNATIVES.items() if of == name and get_close_matches(key, keys, cutoff=0.8)]
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
        ConfigError: a stage that it reads has not been run, or several processes for a stage that runs in one.
        TrainingError: (in all processes but the first) the first could not begin.
    """
    if processes.started_as_several():
        if not config.several_processes:
            raise ConfigError(f"stage {config.stage} runs in one process: start it without accelerate launch")
        processes.join(cpu=config.on_cpu)
        if processes.rank() > 0:
            return _follow(config)
    if config.share():
        return _run_share(config)
    with contextlib.ExitStack() as locks:
        what = "failed"
        try:
            locks.enter_context(locked(config.root))
            require_no_shares(config.root)
            identity, done = _begun(config, sweeps=True)
            what = "work" if done is None else "done"
        finally:
            _tell(what)
        return _lead(config, identity) if done is None else done


def _tell(what: str) -> None:
    """Tell the other processes, which wait in `_follow`, what the first one found."""
    gone = contextlib.suppress(RuntimeError) if what == "failed" else contextlib.nullcontext()  # why it failed counts
    with gone:
        processes.told(what)


def _run_share(config: StageConfig) -> StageResult:
    """Run a share of a stage beside other shares: the run's lock is held only while its folder is looked after."""
    with contextlib.ExitStack() as mine:
        with locked(config.root, wait_s=_PATIENCE_S):
            identity, done = _begun(config, sweeps=False)  # other shares are at work on what looks like leftovers
            if done is not None:
                return done
            mine.enter_context(share_locked(config.root, config.stage, config.share()))
        started = time.monotonic()
        result: StageResult = importlib.import_module(type(config).__module__).main(config)
    if result.unfinished:
        logger.info("%s: share %s is done; %s", config.stage, config.share(), result.unfinished)
        return result
    with locked(config.root, wait_s=_PATIENCE_S):
        _finish(config, identity, result, started)
    return result


def _begin(config: StageConfig, identity: str, *, sweeps: bool) -> None:
    config.check()
    if config.folder.is_symlink():  # the work of an earlier run, which stays as it is
        config.folder.unlink()
    _check_starts(config, config.folder)
    _move_aside_if_other(config, identity)
    config.folder.mkdir(parents=True, exist_ok=True)
    if sweeps:
        remove_leftovers(config.folder)
    write_json(config.folder / STARTED_JSON, {"identity": identity})
    logger.info("%s: running in %s", config.stage, config.folder)


def _check_starts(config: Config, folder: Path) -> None:
    """Tell of weights to begin with that are not there before earlier work is moved aside."""
    for value in vars(config).values():
        start = value.start_from if isinstance(value, LoopConfig) else None
        if start is not None and start.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"start_from={start} lies in this stage's own folder: name another root for this run")
        if start is not None and not checkpoints(start / CHECKPOINTS):
            raise ConfigError(
                f"start_from={start} has no {CHECKPOINTS}/step-*: expected the folder of an earlier training of this "
                "stage, such as runs/first/audio_tokenizer"
            )
        if isinstance(value, Config):
            _check_starts(value, folder)


def _begun(config: StageConfig, *, sweeps: bool) -> tuple[str, StageResult | None]:
    """The stage's identity, and what it made where it is done and unchanged; else its folder is ready for the work."""
    take_over(config)
    identity = _identity(config)
    done = _done(config, identity)
    if done is None:
        _begin(config, identity, sweeps=sweeps)
    else:
        logger.info("%s: done and unchanged", config.stage)
    return identity, done


def _lead(config: StageConfig, identity: str) -> StageResult:
    """The part of the first process, which alone looks after the run's folder."""
    started = time.monotonic()
    result: StageResult = importlib.import_module(type(config).__module__).main(config)
    _finish(config, identity, result, started)
    processes.wait()
    return result


def _finish(config: StageConfig, identity: str, result: StageResult, started: float) -> None:
    figures = {name: value for name, value in result.metrics.items() if name not in ("step_s", "tokens_per_s", "mfu")}
    facts = {
        "identity": identity,
        "config": config.model_dump(mode="json", exclude={"root"}),
        "metrics": figures,
        "outputs": {str(p.relative_to(config.folder)): _num_bytes(p) for p in result.outputs},
    }
    write_json(config.folder / STAGE_JSON, facts)
    logger.info("%s: done in %.0f s", config.stage, time.monotonic() - started)


def _follow(config: StageConfig) -> StageResult:
    """The part of every other process."""
    what = processes.told(None)
    if what == "failed":
        raise TrainingError(f"stage {config.stage} was not begun: the first process says why")
    if what == "work":
        importlib.import_module(type(config).__module__).main(config)
        processes.wait()
    done = _done(config, _identity(config))
    assert done is not None, f"stage {config.stage} is not done in {config.root}: do all processes see the same folder?"
    return done


def _identity(config: StageConfig) -> str:
    inputs = {}
    for need in STAGES[config.stage].needs:
        if need in config.elsewhere():
            continue
        path = config.root / need / STAGE_JSON
        if path.exists():
            inputs[need] = read_json(path)["identity"]
        elif (config.root / need / STARTED_JSON).exists():
            raise ConfigError(
                f"stage {config.stage} reads stage {need}, which was begun in {config.root} and is not finished: "
                f"run it again, or remove {config.root / need}"
            )
        elif need not in OPTIONAL:
            where = " or ".join(str(run) for run in (config.root, config.earlier_run) if run is not None)
            raise ConfigError(f"stage {config.stage} reads stage {need}, which has not been run in {where}")
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
    require_no_shares(config.root)
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
        raise ConfigError(
            f"{folder} is not a folder of recipes here: copy one that comes with anygen, "
            "anygen recipes cp FAMILY MINE (anygen recipes ls lists them)"
        )
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
            raise ConfigError(f"override {text!r}: write stage.key=value ({', '.join(recipes)}) or root=FOLDER")
    return shared, own
