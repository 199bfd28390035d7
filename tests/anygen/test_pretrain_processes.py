"""Stage `pretrain` by `accelerate launch` with the shipped configurations, in two processes: all is as from one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.data.coded import CodedRecord, write_coded_shard
from anygen.files import read_json, verify
from anygen.stages.pretrain import load_pretrained
from anygen.stages.run import load_recipe, run_stage
from anygen.stages.tokenize import coded_facts
from anygen.training.checkpoint import checkpoints
from anygen.training.loop import CHECKPOINTS
from anygen.training.metrics import METRICS_FILE, read_metrics
from tokenizers_mm.text import TextTokenizer

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def recipe_in(folder: Path, text_tokenizer: TextTokenizer) -> Path:
    """A recipe, and a run up to its stage `tokenize` for each way to train it."""
    for name in ("alone", "replicated", "sharded"):
        for split in ("train", "validation"):
            captions = ("a red apple", "two cats left of a dog", "one", "a smiling face with heart eyes")
            records = [CodedRecord(f"{split}{n}", "emoji", captions[n % 3 : n % 3 + 2]) for n in range(12)]
            write_coded_shard(folder / name / "tokenize" / f"{split}-00000", records, facts=coded_facts(None, None))
        text_tokenizer.save(folder / name / "text_tokenizer")
        for stage in ("text_tokenizer", "tokenize"):
            (folder / name / stage / "stage.json").write_text(json.dumps({"identity": stage}))
    loop = {"steps": 5, "log_every": 1, "save_every": 2, "device": "cpu", "precision": "fp32"}
    loop["optimizer"] = {"lr": 3e-3, "warmup_steps": 0}
    facts = {"stage": "pretrain", "model": {"size": "smoke", "max_positions": 128}, "mixture": {"text>text": 1}}
    facts |= {"row_length": 96, "rows_per_batch": 4, "pool_size": 8, "input_weight": 0.5, "loop": loop}
    path = folder / "pretrain.yaml"
    path.write_text(json.dumps(facts))  # JSON is YAML
    return path


def launched(config: str, recipe: Path, name: str, *overrides: str) -> str:
    """What two processes said."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"recipes/base/accelerate/{config}.yaml"]
    command = [sys.executable, *launch, "--num_processes=2", "--main_process_port=0", "-m", "anygen", "train"]
    done = subprocess.run(
        [*command, str(recipe), "--root", str(recipe.parent / name), *overrides],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_tokenizer: TextTokenizer) -> tuple[Path, Path]:
    recipe = recipe_in(tmp_path_factory.mktemp("launched"), text_tokenizer)
    run_stage(load_recipe(recipe, root=recipe.parent / "alone"))
    launched("ddp", recipe, "replicated", "num_workers=1")
    launched("fsdp2", recipe, "sharded")
    return recipe.parent, recipe


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_the_run_is_that_of_one_process(runs: tuple[Path, Path], name: str) -> None:
    folder, _ = runs
    one, two = ([r["loss"] for r in read_metrics(folder / n / "pretrain" / METRICS_FILE)] for n in ("alone", name))
    assert len(one) == 5 and two == pytest.approx(one, rel=2e-5), "the log has five digits"
    facts: list[Any] = [read_json(folder / n / "pretrain" / "stage.json") for n in ("alone", name)]
    assert facts[0]["identity"] == facts[1]["identity"]
    assert facts[0]["metrics"]["validation_loss"] == pytest.approx(facts[1]["metrics"]["validation_loss"], rel=1e-4)
    verify(folder / name / "pretrain" / "model")
    left, right = (load_pretrained(folder / n / "pretrain" / "model")[0].state_dict() for n in ("alone", name))
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-5)
    newest = checkpoints(folder / name / "pretrain" / CHECKPOINTS)[-1]
    assert len(list(newest.glob("*.safetensors"))) == (2 if name == "sharded" else 1)
    lanes = read_json(newest / "state.json")["extra"]["lanes"]
    alone = read_json(checkpoints(folder / "alone" / "pretrain" / CHECKPOINTS)[-1] / "state.json")["extra"]["lanes"]
    assert lanes == alone and len(lanes) == 4, "where every lane of the data stands"
    tokens = [facts[n]["metrics"]["tokens"] for n in range(2)]
    assert tokens == [4 * 96, 2 * 96], "of a process"


def test_a_finished_run_is_not_trained_again_by_any_number(runs: tuple[Path, Path]) -> None:
    folder, recipe = runs
    model = folder / "replicated" / "pretrain" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    assert "done and unchanged" in launched("ddp", recipe, "replicated")
    assert model.stat().st_mtime_ns == before
    assert run_stage(load_recipe(recipe, root=folder / "sharded")).metrics["parameters"] > 0
