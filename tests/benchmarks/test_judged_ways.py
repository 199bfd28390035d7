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

RULES: dict[str, Any] = {"backward": "backward", "and forward as 15 ids": "both"}


@pytest.fixture(scope="module")
def model() -> AnyGen:
    return AnyGen.from_pretrained()


def test_a_rule_keeps_what_the_sampler_keeps(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [
        Image.radial_gradient("L").resize((64, 64)).convert("RGB"),
        Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB"),
        Image.linear_gradient("L").resize((64, 64)).convert("RGB"),
    ]
    requests = [Request(image=picture, output="audio", seed=3, best_of=8) for picture in pictures]
    takes = judged_ways.drawn(model, requests)
    kept: dict[str, list[int]] = {}
    for rule, judge in RULES.items():
        usual = {**model.bundle.best_of, "image>audio": BestOf(number=8, judge=judge)}
        monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of=usual))
        kept[rule] = []
        for output, drawn in zip(model.generate_batch(requests), takes, strict=True):
            costs = [judged_ways.rules()[rule](take) for take in drawn]
            best = int(np.argmin(costs))
            kept[rule].append(best)
            assert len(drawn) == 8 and output.samples[0].seed == 3 + best
            assert str(output.samples[0].via[-1].content) == drawn[best].text
            sound = model.bundle.tokenizers["audio"].decode(drawn[best].sound)
            assert np.array_equal(sound.samples_T, output.audio.samples_T)
    assert kept["backward"] != kept["and forward as 15 ids"], "else either could be the other"
