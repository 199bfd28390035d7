"""The launcher's configurations beside the recipes: accelerate reads them, and they ask for what their headers say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from anygen.recipes_index import list_recipes, recipes_folder
from anygen.stages.run import load_recipe
from anygen.training import sharding
from tokenizers_mm import compat  # noqa: F401  before accelerate and transformers

FOLDER = recipes_folder() / "base" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def launched(command: str) -> tuple[Any, dict[str, str]]:
    """Arguments as `accelerate launch` completes them from the configuration, and what its processes see."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = shlex.split(command.replace("RANK", "1").replace("FIRST_MACHINE", "10.0.0.1"))
    assert words[:2] == ["accelerate", "launch"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    return arguments, prepare_multi_gpu_env(arguments)


def commands_in(path: Path) -> list[str]:
    """The launches in a header, those over two lines joined."""
    lines = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    joined = "\n".join(lines).replace("\n-m anygen", " -m anygen")
    return re.findall(r"^accelerate launch .*$", joined, re.MULTILINE)


def test_they_are_no_recipes() -> None:
    assert len(CONFIGS) == 3 and not [name for name in list_recipes() if "accelerate/" in name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_the_header_starts_the_processes_it_promises(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipes_folder().parent)
    (command,) = commands_in(path)
    arguments, environment = launched(command)
    assert Path(arguments.config_file).samefile(path)
    assert arguments.module and arguments.training_script == "anygen" and arguments.training_script_args[0] == "train"
    machines = 2 if path.stem.endswith("nodes") else 1
    assert (arguments.num_machines, arguments.num_processes) == (machines, 8 * machines)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == "NO", (
        "the recipe compiles; twice would be slower than not at all"
    )
    if machines == 2:
        assert (arguments.node_rank, arguments.nproc_per_node) == (1, "8")
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    recipe = load_recipe(Path(arguments.training_script_args[1]))
    assert recipe.loop.compile and recipe.rows_per_batch % arguments.num_processes == 0  # type: ignore[attr-defined]
    assert not (environment.get("ACCELERATE_USE_FSDP") and recipe.model.tie_embeddings)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stem", ["fsdp2", "fsdp2_nodes"])
def test_sharding_is_asked_for_and_nothing_that_is_not_done(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    monkeypatch.chdir(recipes_folder().parent)
    assert not sharding.is_asked_for()
    _, environment = launched(commands_in(FOLDER / f"{stem}.yaml")[0])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding.is_asked_for() and sharding.reshards()
    assert not any(environment.get(name, "false").lower() == "true" for name in sharding.UNUSED)
    assert FullyShardedDataParallelPlugin().fsdp_version == 2


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("base/") and "pretrain" in name])
def test_recipes_launch_with_a_configuration_that_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes_folder().parent)
    (command,) = commands_in(recipes_folder() / name)
    arguments, _ = launched(command)
    assert arguments.training_script_args == ["train", f"recipes/{name}"]
