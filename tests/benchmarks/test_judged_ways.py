"""`benchmarks/judged_ways.py` weighs takes as the sampler does."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anygen.api import AnyGen
from anygen.judging import BestOf
from anygen.request import Request

pytest.importorskip("pystoi", reason="the extra [eval] is not installed")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # as where the scripts run
import judged_ways


@pytest.fixture(scope="module")
def model() -> AnyGen:
    return AnyGen.from_pretrained()


@pytest.mark.parametrize(("rule", "judge"), [("backward", "backward"), ("and forward as 15 ids", "both")])
def test_a_rule_keeps_what_the_sampler_keeps(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch, rule: str, judge: Any
) -> None:
    usual = {**model.bundle.best_of, "image>audio": BestOf(number=8, judge=judge)}
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of=usual))
    pictures = [
        Image.radial_gradient("L").resize((64, 64)).convert("RGB"),
        Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50),
    ]
    requests = [Request(image=picture.convert("RGB"), output="audio", seed=3, best_of=5) for picture in pictures]
    kept = model.generate_batch(requests)
    takes = judged_ways.drawn(model, requests)
    cost = judged_ways.rules()[rule]
    for output, drawn in zip(kept, takes, strict=True):
        costs = [cost(take) for take in drawn]
        assert len(drawn) == 5 and np.ptp(costs) > 0.1
        best = drawn[int(np.argmin(costs))]
        assert output.samples[0].seed == 3 + int(np.argmin(costs))
        assert str(output.samples[0].via[-1].content) == best.text
        assert len(model.bundle.tokenizers["audio"].decode(best.sound).samples_T) == len(output.audio.samples_T)
