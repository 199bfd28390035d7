"""Static steps, which a GPU replays as one graph, give on a CPU the ids of the sampler."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rows import run, states_of
from test_sampling import mixed_requests
from test_vokens import states_of as voken_states

from anygen.api import AnyGen
from anygen.grammar import Block
from anygen.request import Request
from anygen.sampling import static
from anygen.sampling.choose import SamplingOptions, probabilities
from anygen.sampling.sampler import SampleState
from anygen.sampling.static import _filtered
from anygen.sampling.static_sampler import fits, sample_static


def run_static(model: AnyGen, states: list[SampleState], max_rows: int) -> list[tuple[int, ...]]:
    for pairs in sample_static(model.engine, states, max_rows=max_rows):
        assert len({index for index, _ in pairs}) == len(pairs)
    return [tuple(state.ids) for state in states]


@pytest.mark.parametrize("max_rows", [2, 5, 64])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.01}], ids=str)
def test_static_steps_give_the_ids_of_the_sampler(model: AnyGen, max_rows: int, options: dict[str, Any]) -> None:
    requests = [dataclasses.replace(request, **options) for request in mixed_requests()]
    expected = run(model.engine, states_of(model, requests))
    assert run_static(model, states_of(model, requests), max_rows) == expected


def test_steps_are_kept_and_leave_nothing_to_the_next_call(model: AnyGen) -> None:
    model.engine.static_steps.clear()
    requests = [Request(text="a red apple", output="image", seed=seed, guidance_scale=2.0) for seed in range(3)]
    first = [run_static(model, states_of(model, [request]), 8) for request in requests]
    assert len(model.engine.static_steps) == 1
    again = [run_static(model, states_of(model, [request]), 8) for request in requests[::-1]][::-1]
    assert first == again == [run(model.engine, states_of(model, [request])) for request in requests]
    stopped = sample_static(model.engine, states_of(model, requests[:1]), max_rows=8)
    next(stopped)
    assert not model.engine.static_steps  # in use: a second call in between makes its own
    assert run_static(model, states_of(model, requests[1:2]), 8) == first[1]
    stopped.close()
    assert len(model.engine.static_steps) == 1


def test_codes_of_one_book_follow_one_another_without_the_host(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = static.StaticStep.run
    monkeypatch.setattr(static.StaticStep, "run", lambda self, n: calls.append(n) or plain(self, n))
    run_static(model, states_of(model, [Request(text="a", output="image", size=48)]), 4)
    assert max(calls) == static.MAX_STEPS and sum(n for n in calls if n > 1) >= 32


def test_filters_of_rows_are_those_of_one_row() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)) * 3
    options = [
        SamplingOptions(),
        SamplingOptions(top_k=4),
        SamplingOptions(top_p=0.6, min_p=0.05),
        SamplingOptions(top_k=9, top_p=0.9),
    ]
    columns = [torch.tensor([[getattr(o, name)] for o in options]).double() for name in ("top_k", "top_p", "min_p")]
    found = _filtered(logits.double().softmax(-1), *columns)
    expected = torch.cat([probabilities(logits[row : row + 1], o) for row, o in enumerate(options)])
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found / found.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))


def test_what_static_steps_cannot_do_is_left_to_the_sampler(model: AnyGen) -> None:
    for options, expected in (({}, True), ({"repetition_penalty": 1.1}, False), ({"speculative_window": 4}, False)):
        assert fits(states_of(model, [Request(text="a", output="image", **options)])) is expected


def test_hidden_states_at_vokens_are_those_of_the_sampler(model: AnyGen) -> None:
    blocks = (Block("text"), Block("image", as_vokens=True), Block("image", as_vokens=True))
    plain, static_ones = (voken_states(model.sequencer, blocks, guidance=2.0) for _ in range(2))
    assert run_static(model, static_ones, 8) == run(model.engine, plain)
    assert max(len(state.vokens) for state in plain) == 2
    for one, other in zip(static_ones, plain, strict=True):
        assert len(one.vokens) == len(other.vokens)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(one.vokens, other.vokens, strict=True))


def test_a_graph_that_cannot_be_captured_is_told_and_done_without(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(text="a", output="image")
    expected = run(model.engine, states_of(model, [request]))

    class Refused(static.StaticStep):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._may_capture = True

        def _capture(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    model.engine.static_steps.clear()
    monkeypatch.setattr("anygen.sampling.static_sampler.StaticStep", Refused)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert run_static(model, states_of(model, [request]), 4) == expected
    model.engine.static_steps.clear()


def test_the_script_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_sampling.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "gpu.json"), "--dry-run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["equal"]["same"] == report["equal"]["samples"] == 3
    for rows in ("1", "3"):
        took = [report["speed"]["smoke"][rows][name] for name in ("ms_per_step", "dynamic", "static")]
        assert all(map(math.isfinite, took)), (
            "of a step the difference of two calls, which another process can turn negative"
        )
