"""Training: resumed equals never stopped, faults stop before the update, checkpoints survive anything."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from anygen.errors import CheckpointError, TrainingError
from anygen.files import is_published, publishing, remove_leftovers, verify
from anygen.seeding import seed_of
from anygen.training import checkpoint
from anygen.training.engine import Engine
from anygen.training.interrupts import Interrupted, StopRequest
from anygen.training.loop import CHECKPOINTS, LoopConfig, train
from anygen.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from anygen.training.parts import Part
from anygen.training.schedule import OptimizerConfig, learning_rate, make_optimizer


class Toy(nn.Module):
    """A regression with dropout (global randomness) and a buffer that learns on its own (as a codebook does)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.tied = self.linear  # shared tensors must survive a checkpoint
        self.unused = nn.Linear(4, 2)  # as must parameters that never have a gradient
        self.register_buffer("average", torch.zeros(3))

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x, y = batch[:, :4], batch[:, 4:]
        out = nn.functional.dropout(self.linear(x), 0.3, self.training)
        if self.training:
            self.average.mul_(0.9).add_(0.1 * out.detach().float().mean(0))
        loss = (out - y).square().mean()
        return loss, {"error": loss.detach(), "absent": torch.tensor(math.nan)}


class ToyTrainee:
    def __init__(self, *, nan_at: int | None = None, kill_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = Toy()
        self.position = 0
        self.nan_at, self.kill_at = nan_at, kill_at
        self.seen: list[int] = []

    def next_batch(self) -> torch.Tensor:
        if self.position == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        random = np.random.default_rng(self.position)
        self.seen.append(self.position)
        batch = torch.from_numpy(random.normal(size=(8, 7)).astype(np.float32))
        if self.position == self.nan_at:
            batch[0, 0] = math.nan
        self.position += 1
        return batch

    def to_device(self, batch: Any, device: torch.device) -> Any:
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        assert not module.training and not torch.is_grad_enabled()
        return {"norm": float(self.module.linear.weight.norm())}  # type: ignore[union-attr]

    def compile(self) -> None:
        self.module.compile(backend="eager")


def config_of(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {"steps": 20, "precision": "fp32", "device": "cpu", "log_every": 1, "save_every": 4}
    return LoopConfig(**{**values, **changes})


def weights(trainee: ToyTrainee) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in trainee.module.state_dict().values()]


@pytest.mark.parametrize(
    ("precision", "compiled", "ema_decay"),
    [("fp32", False, 0.0), ("bf16", False, 0.0), ("bf16", True, 0.0), ("bf16", True, 0.9)],
)
def test_resumed_equals_never_stopped_bit_for_bit(
    tmp_path: Path, precision: str, compiled: bool, ema_decay: float
) -> None:
    config = config_of(precision=precision, compile=compiled, ema_decay=ema_decay, validate_every=3)
    straight = ToyTrainee()
    train(straight, config, tmp_path / "straight", title="toy")
    for stop in (1, 4, 7, 18):
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Interrupted) as caught:
            train(ToyTrainee(kill_at=stop), config, folder, title="toy")
        assert caught.value.exit_code == 143
        resumed = ToyTrainee()
        train(resumed, config, folder, title="toy")
        assert resumed.seen[0] == stop + 1, "the step that was under way was finished and saved"
        for left, right in zip(weights(straight), weights(resumed), strict=True):
            assert torch.equal(left, right)
        rows = [
            [{k: v for k, v in row.items() if k != "step_s"} for row in read_metrics(f / METRICS_FILE)]
            for f in (tmp_path / "straight", folder)
        ]
        assert rows[0] == rows[1], "every step stands once in the metrics, with the same figures"


def test_a_steps_time_is_without_validation_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    class Slow(ToyTrainee):
        def next_batch(self) -> torch.Tensor:
            nonlocal clock
            clock += 1
            return super().next_batch()

        def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
            nonlocal clock
            clock += 100
            return super().validate(module, device)

    real = checkpoint.save

    def slow_save(*args: Any, **options: Any) -> Path:
        nonlocal clock
        clock += 1000
        return real(*args, **options)

    monkeypatch.setattr("anygen.training.loop.time.monotonic", lambda: clock)
    monkeypatch.setattr(checkpoint, "save", slow_save)
    train(Slow(), config_of(steps=9, log_every=3, validate_every=2, save_every=4), tmp_path, title="toy")
    assert clock == 9 + 5 * 100 + 3 * 1000
    assert {row["step_s"] for row in read_metrics(tmp_path / METRICS_FILE)} == {1.0}


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = ToyTrainee(), ToyTrainee()
    train(first, config_of(), tmp_path, title="toy")
    figures = train(second, config_of(), tmp_path, title="toy")
    assert second.seen == [] and "validation_norm" in figures
    for left, right in zip(weights(first), weights(second), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_training_may_begin_with_the_weights_of_another(tmp_path: Path, ema_decay: float) -> None:
    first = ToyTrainee()
    train(first, config_of(steps=4, ema_decay=ema_decay), tmp_path / "first", title="toy")
    taken = []

    class Second(ToyTrainee):
        def next_batch(self) -> torch.Tensor:
            taken.append([tensor.clone() for tensor in self.module.state_dict().values()])
            return super().next_batch()

    config = config_of(steps=3, start_from=tmp_path / "first")
    second = Second()
    train(second, config, tmp_path / "second", title="toy")
    assert second.seen == [0, 1, 2], "steps and data are its own"
    for found, expected in zip(taken[0], first.module.state_dict().values(), strict=True):
        assert torch.equal(found, expected), "the averaged ones, which `train` leaves in the module"
    stopped = ToyTrainee()
    with pytest.raises(Interrupted):
        stopped.kill_at = 1
        train(stopped, config, tmp_path / "third", title="toy")
    shutil.rmtree(tmp_path / "first")
    resumed = ToyTrainee()
    train(resumed, config, tmp_path / "third", title="toy")
    for found, expected in zip(weights(resumed), weights(second), strict=True):
        assert torch.equal(found, expected), "its own checkpoint comes before"
    with pytest.raises(CheckpointError, match=r"start_from: expected checkpoints .* found none"):
        train(ToyTrainee(), config, tmp_path / "fourth", title="toy")


class Recorded(ToyTrainee):
    """Notes its weights before every step."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def next_batch(self) -> torch.Tensor:
        self.passed.append(copy.deepcopy(dict(self.module.state_dict())))
        return super().next_batch()

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        self.validated.append(copy.deepcopy(dict(self.module.state_dict())))
        return super().validate(module, device)


def test_averaged_weights_are_validated_and_returned_and_change_nothing_in_training(tmp_path: Path) -> None:
    plain, averaged = Recorded(), Recorded()
    train(plain, config_of(validate_every=7), tmp_path / "plain", title="toy")
    train(averaged, config_of(validate_every=7, ema_decay=0.6), tmp_path / "averaged", title="toy")
    last = dict(plain.module.state_dict())
    for mine, theirs in zip([*plain.passed, last], [*averaged.passed, last], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), "the mean does not touch training"
    means = {name: tensor.double() for name, tensor in plain.passed[0].items()}
    at: dict[int, dict[str, torch.Tensor]] = {}
    for step, weights_after in enumerate([*plain.passed[1:], last]):
        decay = min(0.6, (1 + step) / (10 + step))  # 0.1, 0.18, ..., from step 13 on 0.6
        means = {name: decay * mean + (1 - decay) * weights_after[name].double() for name, mean in means.items()}
        at[step + 1] = means | {"average": weights_after["average"].double()}  # the buffer as it is
    for step, found in zip((7, 14, 20), averaged.validated, strict=True):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), at[step][name], rtol=1e-5, atol=1e-6)
    for name, tensor in averaged.module.state_dict().items():
        assert torch.equal(tensor, averaged.validated[-1][name])
    assert not torch.equal(last["linear.weight"], averaged.module.linear.weight)  # type: ignore[union-attr]

    again = Recorded()
    train(again, config_of(validate_every=7, ema_decay=0.6), tmp_path / "averaged", title="toy")
    assert again.passed == [] and all(map(torch.equal, weights(again), weights(averaged)))


def test_a_run_without_means_cannot_go_on_with_them(tmp_path: Path) -> None:
    train(ToyTrainee(), config_of(steps=4), tmp_path, title="toy")
    with pytest.raises(CheckpointError, match="means of 0 weights that do not fit the 4"):
        train(ToyTrainee(), config_of(ema_decay=0.5), tmp_path, title="toy")


def test_without_a_mean_recorded_configs_and_identities_are_as_before() -> None:
    assert "start_from" not in config_of().model_dump()
    assert "ema_decay" not in config_of().model_dump(mode="json")
    assert LoopConfig(**config_of(ema_decay=0.9).model_dump(mode="json")).ema_decay == 0.9


def test_a_nan_stops_before_the_update(tmp_path: Path) -> None:
    clean = ToyTrainee()
    train(clean, config_of(steps=6, optimizer=OptimizerConfig(decay="none")), tmp_path / "clean", title="toy")
    broken = ToyTrainee(nan_at=6)
    with pytest.raises(TrainingError, match=r"step 6: loss nan.*stopped before the update"):
        train(broken, config_of(optimizer=OptimizerConfig(decay="none")), tmp_path / "broken", title="toy")
    assert torch.equal(clean.module.linear.weight, broken.module.linear.weight)  # type: ignore[union-attr]
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "broken" / CHECKPOINTS)] == ["step-00000004"]


def test_a_gradient_that_is_none_behind_a_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    class Steep(Toy):
        def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, report = super().forward(batch)
            return loss + (self.linear.weight * 0).sum().sqrt(), report  # 0, and its gradient 0 / 0

    trainee = ToyTrainee()
    trainee.module = Steep()
    before = trainee.module.linear.weight.detach().clone()
    with pytest.raises(TrainingError, match=r"step 0: loss \d.*gradient norm nan.*stopped before the update"):
        train(trainee, config_of(), tmp_path, title="toy")
    assert torch.equal(trainee.module.linear.weight, before)


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    trainee = ToyTrainee()
    state = torch.get_rng_state()
    train(trainee, config_of(steps=3), tmp_path, title="toy")
    assert torch.equal(state, torch.get_rng_state())


def test_learning_rate_schedule_shape() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, decay="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[-1] == pytest.approx(0.2, abs=0.01)
    stable = OptimizerConfig(lr=1.0, warmup_steps=0, decay="linear", decay_share=0.2, min_lr_ratio=0)
    rates = [learning_rate(stable, step, 100) for step in range(100)]
    assert rates[:80] == [1.0] * 80 and rates[90] == pytest.approx(0.5)


def test_vectors_are_not_decayed() -> None:
    optimizer = make_optimizer(Toy(), OptimizerConfig(weight_decay=0.3))
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.3, [2, 2]),
        (0.0, [1, 1]),
    ]


class InTwo(nn.Module):
    """Two parts: one with a gradient a thousand times the other's, slower and without decay."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.soft = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (1000 * self.loud + self.soft + self.frozen).sum() * batch.mean(), {}

    def parts(self) -> list[Part]:
        return [Part([self.loud, self.frozen], lr_ratio=0.1, decays=False), Part([self.soft])]


def test_parts_are_clipped_alone_and_have_their_own_rate_and_decay(tmp_path: Path) -> None:
    module = InTwo()
    engine = Engine(module, OptimizerConfig(max_grad_norm=1.0), bf16=False, cpu=True, checkpoints=tmp_path)
    groups = engine.optimizer.param_groups
    assert [(len(g["params"]), g["weight_decay"], g.get("lr_ratio")) for g in groups] == [
        (1, 0.0, 0.1), (0, 0.0, 0.1), (1, 0.1, None), (0, 0.0, None)
    ]  # fmt: skip
    _, norm = engine.step([torch.ones(1)])
    assert norm == pytest.approx(2 * (1000**2 + 1) ** 0.5)
    assert module.loud.grad is not None and module.soft.grad is not None and module.frozen.grad is None
    assert float(module.loud.grad.norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(module.soft.grad.norm()) == pytest.approx(1.0, rel=1e-4), "not drowned by the other part"
    engine.close()


def test_muon_takes_the_matrices_of_blocks_and_resumes_exactly() -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            module(torch.eye(4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](self.embed(x))

    def fresh() -> tuple[Blocks, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = Blocks()
        return module, make_optimizer(module, OptimizerConfig(kind="muon", lr=1e-2, muon_lr_ratio=3.0))

    module, optimizer = fresh()
    muon, decayed, vectors = optimizer.param_groups
    assert [p.shape for p in muon["params"]] == [(4, 4)] and muon["lr_ratio"] == 3.0
    assert len(decayed["params"]) == 1 and len(vectors["params"]) == 2
    before = module.blocks[0].weight.detach().clone()
    module(torch.eye(4)).square().sum().backward()
    gradient = module.blocks[0].weight.grad.clone()
    optimizer.step()
    update = module.blocks[0].weight.detach() - before * (1 - 3e-2 * 0.1)
    optimizer.zero_grad()
    assert torch.linalg.cond(update) < torch.linalg.cond(gradient) / 3, "an update turns all its directions alike"
    assert torch.sum(update * gradient) < 0
    steps(module, optimizer, 1)
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    steps(module, optimizer, 2)
    other, again = fresh()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    steps(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_seeds_depend_on_every_part() -> None:
    assert len({seed_of(0, 1), seed_of(1, 0), seed_of(0, "1"), seed_of(0), seed_of(0, 1, 0)}) == 5


# -- checkpoints


def saved(folder: Path, steps: tuple[int, ...] = (1, 2)) -> tuple[Toy, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Toy()
    optimizer = make_optimizer(module, OptimizerConfig())
    for step in steps:
        module(torch.randn(8, 7))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpoint.save(folder, step, module, optimizer, {"position": step})
    return module, optimizer


def test_bit_rot_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    saved(tmp_path)
    newest = tmp_path / "step-00000002"
    random = np.random.default_rng(0)
    for number in range(200):
        path = [newest / "state.safetensors", newest / "state.json"][number % 2]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(data if number % 3 else whole[: int(random.integers(len(whole)))])
        assert not is_published(newest)
        module = Toy()
        restored = checkpoint.restore(tmp_path, module, make_optimizer(module, OptimizerConfig()))
        assert restored is not None and restored.step == 1
        path.write_bytes(whole)
    assert is_published(newest)


def test_where_every_checkpoint_is_damaged_a_run_does_not_begin_anew(tmp_path: Path) -> None:
    train(ToyTrainee(), config_of(steps=8), tmp_path, title="toy")
    history = (tmp_path / METRICS_FILE).read_bytes()
    found = checkpoint.checkpoints(tmp_path / CHECKPOINTS)
    assert [path.name for path in found] == ["step-00000004", "step-00000008"]
    for path in found:
        (path / "state.json").write_bytes((path / "state.json").read_bytes() + b" ")
    trainee = ToyTrainee()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*damaged \(step-00000008, step-00000004\)"):
        train(trainee, config_of(steps=8), tmp_path, title="toy")
    assert trainee.seen == [] and (tmp_path / METRICS_FILE).read_bytes() == history
    shutil.rmtree(tmp_path / CHECKPOINTS)
    train(trainee, config_of(steps=8), tmp_path, title="toy")
    assert trainee.seen[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 1.0}, {"step": "2"}, {"step": True}, {"step": None}, {"extra": []}, {"extra": None},
        {"step": ...}, {"extra": ...},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_was_altered_and_signed_again_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path)
    newest = tmp_path / "step-00000002"
    state = json.loads((newest / "state.json").read_text()) | change
    (newest / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not ...}))
    with publishing(tmp_path / "signed") as folder:
        for name in ("state.json", "state.safetensors"):
            shutil.copy(newest / name, folder)
    shutil.rmtree(newest)
    (tmp_path / "signed").rename(newest)
    verify(newest)
    module = Toy()
    with pytest.raises(CheckpointError, match=r"was altered|does not fit this run"):
        checkpoint.restore(tmp_path, module, make_optimizer(module, OptimizerConfig()))


def test_every_syscall_of_a_save_may_fail_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise at the k-th write, fsync or rename of a save: the one before stays, and saving again works."""
    module, optimizer = saved(tmp_path, (1,))
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}
    fail_at = 0
    while True:
        fail_at += 1
        calls = 0

        def failing(name: str) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fail_at:
                    raise OSError(28, "No space left on device")
                return real[name](*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                checkpoint.save(tmp_path, 2, module, optimizer, {})
            except CheckpointError as error:
                assert "No space left" in str(error) and "MiB free" in str(error)
        if calls < fail_at:
            break
        assert is_published(tmp_path / "step-00000001")
        other = Toy()
        assert checkpoint.restore(tmp_path, other, make_optimizer(other, OptimizerConfig())) is not None
    assert fail_at > 5, "the save makes several such calls, and each one failed once"
    assert is_published(tmp_path / "step-00000002")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    """On a real file system of 4 MB, on which the second checkpoint finds no room."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        module = nn.Linear(300, 700)
        optimizer = make_optimizer(module, OptimizerConfig())
        module(torch.ones(1, 300)).sum().backward()
        optimizer.step()
        checkpoint.save(tmp_path, 1, module, optimizer, {"position": 1})
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(CheckpointError, match=r"cannot save .*step-00000002.*MiB free.*No space left"):
            checkpoint.save(tmp_path, 2, module, optimizer, {"position": 2})
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        restored = checkpoint.restore(tmp_path, module, optimizer)
        assert restored is not None and restored.step == 1
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # loaded tensors still map it


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    saved(tmp_path, (1, 2, 3, 4))
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_state_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    other = nn.Linear(4, 3)
    with pytest.raises(CheckpointError, match="of another model"):
        checkpoint.restore(tmp_path, other, make_optimizer(other, OptimizerConfig()))

    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.linear = self.tied = nn.Linear(5, 3)

    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path, Wider(), make_optimizer(Wider(), OptimizerConfig()))


def test_what_is_published_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    with publishing(tmp_path / "out") as folder:
        (folder / "plain").write_text("a")
        (folder / "private").write_text("b")
        (folder / "private").chmod(0o600)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["private"] == modes["plain"]


def test_publishing_replaces_whole_folders_and_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publishing(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), publishing(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    with publishing(target) as folder:
        (folder / "b").write_text("3")
    assert sorted(p.name for p in target.iterdir()) == ["b", "manifest.json"]
    verify(target)
    (tmp_path / ".tmp-1-x").mkdir()
    assert remove_leftovers(tmp_path) == 1 and not list(tmp_path.glob(".tmp-*"))
    target.rename(tmp_path / ".old-1-out")  # killed between the two renames
    assert remove_leftovers(tmp_path) == 0
    verify(target)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_manifests_cannot_point_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify(folder)


def test_metrics_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write(step, {"loss": 1 / (step + 1)})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    MetricsLog(tmp_path, resume_step=3).write(3, {"loss": 9.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / METRICS_FILE)] == [
        (0, 1.0), (1, 0.5), (2, 0.33333), (3, 9.0)
    ]  # fmt: skip


def test_stop_requests_are_heard_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(Interrupted, match="SIGTERM; all is saved: run the same command"):
            stop.check("all is saved")
    assert signal.getsignal(signal.SIGTERM) == before
