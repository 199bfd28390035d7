"""Several processes are one: replicated or sharded, their losses, weights and checkpoints are those of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_processes import STEPS, Trainee, run

from anygen.errors import CheckpointError, ConfigError
from anygen.files import write_json
from anygen.training import checkpoint, sharding
from anygen.training.loop import CHECKPOINTS, LoopConfig, train
from anygen.training.schedule import OptimizerConfig, make_optimizer
from anygen.vocabulary import Vocabulary

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Path:
    """Every scenario, run in two processes and then alone."""
    folder = tmp_path_factory.mktemp("processes")
    write_json(folder / "vocabulary.json", vocabulary.manifest())
    run(folder, "grown", ema_decay=0.5, stop_at=2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = subprocess.run(
        [sys.executable, *command, str(Path(__file__).with_name("several_processes.py")), str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert worker.returncode == 0, worker.stderr[-4000:]
    run(folder, "alone")
    run(folder, "alone-averaged", ema_decay=0.5)
    run(folder, "alone-accumulated", parts=4)
    run(folder, "alone-muon", optimizer={"kind": "muon"})
    run(folder, "alone-stopped", stop_at=1)
    run(folder, "resharded", ema_decay=0.5)  # begun by two
    return folder


def facts(folder: Path, name: str, rank: int = 0, count: int = 1) -> dict[str, Any]:
    return json.loads((folder / f"{name}-{rank}-of-{count}.json").read_text())


def losses(folder: Path, name: str, count: int = 1, parts: int = 1) -> torch.Tensor:
    """The loss of each global batch: the mean over processes and over the parts of a step."""
    ranks = [torch.tensor(facts(folder, name, rank, count)["losses"], dtype=torch.float64) for rank in range(count)]
    return torch.stack(ranks).mean(0).reshape(-1, parts).mean(1)


def weights(folder: Path, name: str, count: int = 1) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-0-of-{count}.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *, exact: bool = False) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        if exact:
            assert torch.equal(left[name], right[name]), name
        else:
            torch.testing.assert_close(left[name], right[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_losses_of_two_processes_are_those_of_one(folder: Path) -> None:
    alone = losses(folder, "alone")
    assert len(alone) == STEPS and alone[-1] < alone[0]
    for name in ("replicated", "sharded"):
        torch.testing.assert_close(losses(folder, name, 2), alone, rtol=1e-6, atol=0)
        assert not torch.equal(*(torch.tensor(facts(folder, name, r, 2)["losses"]) for r in range(2))), "parts differ"
    torch.testing.assert_close(losses(folder, "replicated-compiled", 2)[:1], alone[:1], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses(folder, "sharded-compiled", 2), alone[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses(folder, "sharded-bf16", 2), alone[:2], rtol=2e-2, atol=0)


def test_muon_in_two_processes_is_muon_in_one_and_is_refused_where_matrices_are_sliced(folder: Path) -> None:
    alone = losses(folder, "alone-muon")
    torch.testing.assert_close(losses(folder, "replicated-muon", 2), alone, rtol=2e-4, atol=0)  # bf16 inside
    assert not torch.allclose(alone, losses(folder, "alone"), rtol=2e-3), "another optimizer"
    for rank in range(2):
        figures = facts(folder, "sharded-muon", rank, 2)["figures"]
        assert figures == {"error": "ConfigError: optimizer.kind: muon needs whole matrices; with FSDP use adamw"}


@pytest.mark.parametrize("name", ["replicated-nan", "sharded-nan"])
def test_a_nan_in_one_process_stops_all_before_the_update(folder: Path, name: str) -> None:
    for rank in range(2):
        figures = facts(folder, name, rank, 2)["figures"]
        assert figures["error"].startswith("TrainingError: step 2: loss") and "before the update" in figures["error"]
    assert_equal(weights(folder, name, 2), weights(folder, "alone-stopped"))


def test_parts_of_a_step_add_up_to_one_large_batch(folder: Path) -> None:
    alone = losses(folder, "alone")
    torch.testing.assert_close(losses(folder, "alone-accumulated", parts=4), alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses(folder, "sharded-accumulated", 2, parts=2), alone, rtol=1e-6, atol=0)


def test_weights_and_figures_are_those_of_one_process(folder: Path) -> None:
    assert_equal(weights(folder, "replicated", 2), weights(folder, "alone"))
    assert_equal(weights(folder, "sharded", 2), weights(folder, "alone-averaged"))
    for name, other in (("replicated", "alone"), ("sharded", "alone-averaged")):
        mine, theirs = facts(folder, name, 0, 2)["figures"], facts(folder, other)["figures"]
        for key in ("loss", "grad_norm", "validation_loss", "tokens", "hidden_norm"):
            share = 2 if key == "tokens" else 1  # of a process
            assert mine[key] * share == pytest.approx(theirs[key], rel=1e-3), key
    rows = (folder / "replicated" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == STEPS // 2, "one process writes the log"


def test_one_process_told_to_stop_stops_all_after_a_save(folder: Path) -> None:
    left, right = (facts(folder, "resharded", rank, 2) for rank in range(2))
    assert left["figures"] == right["figures"] == {"exit_code": 143.0}
    assert left["position"] == right["position"] == 3


def test_sharded_training_resumes_exactly_on_as_many_processes(folder: Path) -> None:
    assert_equal(weights(folder, "resumed", 2), weights(folder, "sharded", 2), exact=True)


def test_sharded_checkpoints_go_on_in_one_process(folder: Path) -> None:
    assert len(facts(folder, "resharded")["losses"]) == STEPS - 3, "it went on, not began anew"
    assert_equal(weights(folder, "resharded"), weights(folder, "alone-averaged"))


def test_a_sharded_checkpoint_opens_whole_with_the_same_bits(folder: Path) -> None:
    """The last checkpoint holds what the run ended with; without a mean the two are the same weights."""
    path = checkpoint.checkpoints(folder / "sharded-accumulated" / CHECKPOINTS)[-1]
    module = Trainee(folder, parts=1).module
    optimizer = make_optimizer(module, OptimizerConfig())
    restored = checkpoint.restore(path.parent, module, optimizer)
    assert restored is not None and restored.step == STEPS
    assert_equal(dict(module.named_parameters()), weights(folder, "sharded-accumulated", 2), exact=True)
    assert len(optimizer.state) == len(list(module.parameters()))


def test_what_one_process_saved_goes_on_sharded(folder: Path) -> None:
    assert facts(folder, "grown")["figures"] == {"exit_code": 143.0}
    assert len(facts(folder, "grown", 1, 2)["losses"]) == STEPS - 3, "it went on, not began anew"
    assert_equal(weights(folder, "grown", 2), weights(folder, "alone-averaged"))


def test_sharded_checkpoints_are_safetensors_and_json_and_hold_every_tensor_once(folder: Path) -> None:
    path = checkpoint.checkpoints(folder / "sharded" / CHECKPOINTS)[-1]
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    shards = [load_file(shard) for shard in sorted(path.glob("*.safetensors"))]
    assert len(shards) == 2
    sizes = [sum(t.numel() for t in shard.values()) for shard in shards]
    whole = checkpoint.checkpoints(folder / "alone-averaged" / CHECKPOINTS)[-1] / sharding.ONE_FILE
    expected = {name: tensor.numel() for name, tensor in load_file(whole).items()}
    assert sum(sizes) == sum(expected.values()) and max(sizes) < 0.7 * sum(sizes)
    found = sharding.shapes_in(path)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("shard", [0, 1])
def test_a_damaged_shard_is_found(folder: Path, shard: int) -> None:
    folder = folder / "sharded" / CHECKPOINTS
    file = sorted(checkpoint.checkpoints(folder)[-1].glob("*.safetensors"))[shard]
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            checkpoint.restore(folder, torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]))
    finally:
        file.write_bytes(data)


def test_a_sharded_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    module = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoint.restore(folder / "sharded" / CHECKPOINTS, module, torch.optim.AdamW(module.parameters()))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        path = checkpoint.checkpoints(folder / "sharded" / CHECKPOINTS)[-1]
        sharding.read({"module.module.model.lm_head.weight": torch.zeros(2, 2)}, path)


def test_a_trainee_that_does_not_divide_its_batches_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Undivided:
        module = torch.nn.Linear(1, 1)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="pixel head is trained in one process"):
        train(Undivided(), LoopConfig(steps=1), tmp_path, title="pixel head")  # type: ignore[arg-type]
