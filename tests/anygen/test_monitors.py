"""Monitors of a training: the alarm on the output norm, MFU, trackers; exact FLOPs."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from anygen.errors import MissingDependency
from anygen.model.causal import ModelConfig, create_model, qwen3_config
from anygen.model.cost import TrainingCost
from anygen.training.loop import LoopConfig, train
from anygen.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from anygen.training.monitors import Monitors
from anygen.training.schedule import OptimizerConfig
from anygen.training.trackers import NAME_FILE, Trackers
from anygen.vocabulary import Vocabulary

WARMUP = 40


def norms(num_lines: int, growth: float) -> list[dict[str, Any]]:
    """Lines every 10 steps whose norm doubles again and again after a quiet third of the run."""
    generator = random.Random(0)
    rows = []
    for line in range(num_lines):
        norm = 1.5 * growth ** max(0, line - num_lines // 3) * generator.uniform(0.97, 1.03)
        rows.append({"step": 10 * line + 9, "hidden_norm": norm})
    return rows


def told(rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, float]]:
    monitors = Monitors(warmup_steps=WARMUP, **settings)
    return [monitors.update(row["step"], row) for row in rows]


def test_the_alarm_counts_doublings_and_warns_once_at_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="anygen"):
        found = told(norms(60, 1.12))
    assert all("norm_growth" not in row for row in found if row["step"] < WARMUP), "there is no level during warm-up"
    counts = [row.get("norm_alarms", 0) for row in found]
    assert counts == sorted(counts) and counts[19] == 0
    grown = found[-1]["norm_growth"]
    assert 6 <= grown < 3 * 2 ** counts[-1] and grown >= 3 * 2 ** (counts[-1] - 1)
    assert len(caplog.records) == counts[-1] >= 2
    assert "times its level after warm-up" in caplog.text


def test_steady_or_briefly_odd_norms_raise_no_alarm() -> None:
    rows = norms(60, 1.0)
    rows[50]["hidden_norm"] *= 5  # one odd line: the mean of five grows by 1.8
    assert all(row.get("norm_alarms", 0) == 0 for row in told(rows))


def test_the_alarm_stays_counted_when_the_norm_comes_back() -> None:
    rows = norms(60, 1.12)
    rows += [{"step": row["step"] + 600, "hidden_norm": 1.5} for row in rows[:20]]
    assert told(rows)[-1]["norm_alarms"] == told(rows)[59]["norm_alarms"] > 0


@pytest.mark.parametrize("stopped", [0, 3, 7, 31, 45, 59])
def test_a_resumed_run_warns_as_one_that_was_never_stopped(
    tmp_path: Path, stopped: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = norms(60, 1.1234567)
    whole, parts = told(rows), []
    warned = len(caplog.records)
    log, monitors = MetricsLog(tmp_path), Monitors(warmup_steps=WARMUP)
    for line, row in enumerate(rows):
        if line == stopped:
            log = MetricsLog(tmp_path, resume_step=row["step"])
            monitors = Monitors(read_metrics(log.path), warmup_steps=WARMUP)
        parts.append(monitors.update(row["step"], row))
        log.write(row["step"], parts[-1])
    assert parts == whole
    assert len(caplog.records) == 2 * warned, "what is replayed is not told again"


def test_mfu_is_needed_flops_over_possible_ones() -> None:
    line = {"flops": 2e9, "tokens": 1000.0, "tokens_per_s": 5e4}
    found = Monitors(warmup_steps=0, peak_tflops=0.5, num_devices=4).update(9, line)
    assert found["mfu"] == pytest.approx(2e6 * 5e4 / (4 * 0.5e12))
    assert "mfu" not in Monitors(warmup_steps=0).update(9, line), "no peak is known of a CPU"
    assert "mfu" not in Monitors(warmup_steps=0, peak_tflops=1).update(9, {"loss": 1.0})


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    vocabulary = Vocabulary.create(text=37)
    config = ModelConfig(
        width=24, num_layers=3, num_heads=4, num_kv_heads=2, head_width=10, mlp_width=36, tie_embeddings=tied
    )
    model = create_model(config, vocabulary, seed=0)
    model.set_attn_implementation("eager")  # its scores are plain products, which the counter knows
    for length in (1, 7, 16):
        ids_BT = torch.arange(length)[None]
        with FlopCounterMode(display=False) as counter:
            logits = model(input_ids=ids_BT).logits
            F.cross_entropy(logits[0], ids_BT[0]).backward()
        counted = counter.get_total_flops()
        rope = counted - TrainingCost.of_config(qwen3_config(config, vocabulary)).of((length,))
        assert 0 <= rope <= 2 * 10 * length, "the angles of RoPE are an outer product, forward only"


def test_a_missing_tracker_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install wandb"):
        Trackers(["wandb"], tmp_path, config={})
    Trackers([], tmp_path, config={}).close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from accelerate import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    for part in (range(3), range(2, 5)):  # stopped, and gone on
        trackers = Trackers(["tensorboard"], tmp_path, config={"steps": 5, "optimizer": {"lr": 0.1}})
        for step in part:
            trackers.log(step, {"loss": 1.0 / (step + 1)})
        trackers.close()
    PartialState._reset_state()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(
        {step: 1.0 / (step + 1) for step in range(5)}
    )


def test_the_name_of_a_tracked_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Tracker:
        def __init__(self, project: str, **settings: Any) -> None:
            calls.append({"project": project, **settings})

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls[-1]["config"] = values

    monkeypatch.setattr("accelerate.tracking.WandBTracker", Tracker)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    folder = tmp_path / "nano" / "pretrain"
    folder.mkdir(parents=True)
    for _ in range(2):
        Trackers(["wandb"], folder, config={"optimizer": {"lr": 0.1}})
    assert calls[0] == calls[1] and calls[0]["id"].startswith("nano-pretrain-")
    assert calls[0]["config"] == {"optimizer.lr": 0.1}
    assert json.loads((folder / NAME_FILE).read_text())["run"] == calls[0]["id"]


class Growing(torch.nn.Module):
    """Reports what a language model does; its output norm doubles with every step after the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.steps = torch.nn.Linear(2, 1), 0

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.steps += 1
        loss = self.linear(batch).square().mean()
        facts = {"flops": 6e6, "tokens": 100.0, "utilisation": 0.98, "hidden_norm": 2.0 ** max(0, self.steps - 5)}
        return loss, {name: torch.tensor(value) for name, value in facts.items()}


class GrowingTrainee:
    def __init__(self) -> None:
        self.module: torch.nn.Module = Growing()

    def next_batch(self) -> torch.Tensor:
        return torch.ones(3, 2)

    def to_device(self, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def validate(self, module: torch.nn.Module, device: torch.device) -> dict[str, float]:
        return {"loss": 0.5}

    def compile(self) -> None: ...


def test_a_training_tells_its_health_in_the_log_and_to_its_trackers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = OptimizerConfig(warmup_steps=0)
    config = LoopConfig(
        steps=12, log_every=1, save_every=100, device="cpu", precision="fp32", optimizer=optimizer,
        peak_tflops=1e-6, trackers=("tensorboard",),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="anygen"):
        train(GrowingTrainee(), config, tmp_path, title="toy")
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert len(rows) == 12 and rows[-1]["validation_loss"] == 0.5
    for row in rows:
        assert row["mfu"] == pytest.approx(6e6 / 100 * row["tokens_per_s"] / 1e6, rel=1e-3)
        assert row["utilisation"] == 0.98 and row["grad_norm"] > 0 and row["tokens_per_s"] > 0
    alarms = [row.get("norm_alarms", 0) for row in rows]
    assert alarms[4] == 0 and alarms[-1] >= 3 and caplog.text.count("the output norm is") == alarms[-1]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "mfu", "tokens_per_s", "norm_growth"):
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == pytest.approx({row["step"]: row[name] for row in rows if name in row}, rel=1e-4), name
