"""CPUs without instructions for bf16: training computes in fp32 there, and gives what bf16 gives up to its rounding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anygen.training import engine, muon
from anygen.training.precision import is_bf16_fast
from anygen.training.schedule import OptimizerConfig, make_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "fast"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True}, True),
        ({}, True),
    ],
)
def test_what_a_cpu_says_of_itself(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert is_bf16_fast(CPU) == fast
    assert is_bf16_fast(torch.device("cuda")), "whatever the CPU beside it has"


def test_an_older_torch_that_cannot_say_computes_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert is_bf16_fast(CPU)


class Trainee(nn.Module):
    """Says in which type its matrix product came out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        made = self.layer(batch)
        return made.float().square().mean(), {"bits": torch.tensor(float(made.element_size() * 8))}


@pytest.mark.parametrize(("fast", "asked", "bits"), [(True, True, 16), (False, True, 32), (True, False, 32)])
def test_the_engine_computes_in_fp32_where_bf16_is_slow(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    fast: bool,
    asked: bool,
    bits: int,
) -> None:
    monkeypatch.setattr(engine, "is_bf16_fast", lambda device: fast)
    with caplog.at_level(logging.INFO, "anygen"):
        made = engine.Engine(Trainee(), OptimizerConfig(), bf16=asked, cpu=True, checkpoints=tmp_path)
    reports, _ = made.step([torch.ones(2, 8)])
    assert reports[0]["bits"] == bits
    assert ("no instructions for bf16" in caplog.text) == (asked and not fast)


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_muon_in_fp32_is_torchs_up_to_the_rounding_of_bf16(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    def trained(*, fast: tuple[bool, ...]) -> tuple[torch.Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])})
        weight = module["blocks"][0].weight
        with torch.no_grad():
            weight.copy_(torch.randn(shape, generator=generator))
        optimizer = make_optimizer(module, OptimizerConfig(kind="muon", lr=1e-2))
        start = weight.detach().clone()
        for is_fast in fast:
            monkeypatch.setattr(muon, "is_bf16_fast", lambda device, is_fast=is_fast: is_fast)
            weight.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        return weight.detach() - start, optimizer.state_dict()["state"][0]

    (theirs, kept), (ours, own), (mixed, _) = (
        trained(fast=fast) for fast in ((True,) * 4, (False,) * 4, (True, True, False, False))
    )
    for found in (ours, mixed):
        assert (found - theirs).norm() < 0.02 * theirs.norm(), "on whichever CPU a training goes on"
    assert not torch.equal(ours, theirs)
    assert own.keys() == kept.keys() and torch.equal(own["momentum_buffer"], kept["momentum_buffer"])
