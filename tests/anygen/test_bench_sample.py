"""`anygen bench sample`: the gate refuses, figures add up, and ours is not slower than transformers' own loop."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from anygen.api import AnyGen
from anygen.bench import samplers
from anygen.bench.machine import Window
from anygen.bench.profile import PARTS, profiled
from anygen.bench.sample import SampleBenchConfig, _figures, bench_sample, lines
from anygen.bench.samplers import Contestant, GateError, contestants, gate
from anygen.cli import main
from anygen.errors import InputError
from anygen.request import Request


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return bench_sample(
        SampleBenchConfig(size="smoke", batch_sizes=(1, 3), new_ids=12, rounds=3, threads=1, bundle=False)
    )


def test_ours_is_not_slower_and_all_agree(report: dict[str, Any]) -> None:
    assert report["gate"]["logits_difference"] < 1e-5 and all(report["gate"]["same_greedy_ids"].values())
    assert set(report["batches"]) == {"1", "3"}
    for figures in report["batches"].values():
        assert figures["ours fp32"]["ratio_to_generate fp32"]["median"] > 0.9
        assert figures["generate fp32"]["ratio_to_generate fp32"] == {"median": 1, "min": 1, "max": 1, "rounds": 3}
    assert min(report["limits"]["packed_stream_gb_s"].values()) > 0
    json.dumps(report)
    table = lines(report)
    assert sum(line.startswith("ours bf16 slice") for line in table) == 2


def test_an_engine_that_computes_something_else_is_not_timed(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(0))
    gate(tiny_model, contestants(tiny_model, continuous=False), prompts, 4)

    class Off(samplers.Engine):
        def logits(self, *arguments: Any) -> Any:
            return super().logits(*arguments) + 1e-3

    monkeypatch.setattr(samplers, "Engine", Off)
    with pytest.raises(GateError, match="logits differ"):
        gate(tiny_model, contestants(tiny_model, continuous=False), prompts, 4)
    monkeypatch.undo()
    wrong = [c for c in contestants(tiny_model, continuous=False) if c.name == "generate fp32"]
    wrong.append(Contestant("off by one", lambda ids, n: wrong[0].generate(ids, n) + 1, True, 1))
    with pytest.raises(GateError, match="off by one"):
        gate(tiny_model, wrong, prompts, 4)


def test_figures_are_what_the_windows_say() -> None:
    def window(ms: float) -> Window:
        return Window(ms / 1e3, ms / 1e3, 0.0)

    names = {"ours fp32": (1, 1000), "generate fp32": (2, 1000), "generate bf16": (2, 1000)}
    made = [Contestant(name, lambda ids, n: ids, exact, num) for name, (exact, num) in names.items()]  # type: ignore[arg-type]
    rounds = [
        {"ours fp32": (window(10), window(110)), "generate fp32": (window(30), window(330)), "generate bf16": (window(20), window(220))}
    ]  # fmt: skip
    config = SampleBenchConfig(new_ids=11)
    ours = _figures(config, made, rounds, {"float32": 1e-3, "bfloat16": 1e-3}, 2, "wall")["ours fp32"]
    assert ours["ms_per_step"] == pytest.approx(10) and ours["first_id_ms"] == pytest.approx(10)
    assert ours["ids_per_s"] == pytest.approx(200)
    assert ours["share_of_stream"] == pytest.approx(1000 / 0.010 / 1e9 / 1e-3)
    assert ours["ratio_to_generate fp32"]["median"] == pytest.approx(3)
    assert ours["ratio_to_generate bf16"]["median"] == pytest.approx(2)


def test_the_command_ends_with_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "sample", "--size", "smoke", "--batch-size", "2", "--new-ids", "3", "--rounds", "1", "--no-bundle", "--threads", "1"])  # fmt: skip
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["config"]["batch_sizes"] == [2] and found["bundle"] is None


def test_a_profile_adds_up_and_changes_nothing(
    model: AnyGen, bundle_folder: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    request = Request(text="a red apple", output=("image", "text"), max_new_tokens=30)
    expected = model.generate_batch([request])[0].samples[0].ids
    plain = vars(AnyGen)["generate_batch"]
    with profiled() as profile:
        start = time.perf_counter()
        assert model.generate_batch([request])[0].samples[0].ids == expected
        taken = time.perf_counter() - start
    assert sum(profile.seconds.values()) == pytest.approx(taken, rel=0.05)
    assert all(profile.calls[part] and profile.seconds[part] > 0 for part in PARTS)
    assert vars(AnyGen)["generate_batch"] is plain
    arguments = ["--text", "a", "--output", "image", "--model", str(bundle_folder), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        main(["generate", *arguments, "--profile"])
    assert left.value.code == 0
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("load", "prefill", "steps: attention", "decode", "together"))


def test_weights_may_be_bf16(bundle_folder: Any) -> None:
    rough = AnyGen.from_pretrained(bundle_folder, device="cpu", dtype=torch.bfloat16)
    assert rough.engine.dtype == torch.bfloat16
    assert rough.generate(text="a red apple", output="image", seed=3).image.size
    with pytest.raises(InputError, match="dtype"):
        AnyGen.from_pretrained(bundle_folder, dtype=torch.float64)
