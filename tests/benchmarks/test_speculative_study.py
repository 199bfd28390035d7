"""The study of speculative decoding: its couplings are couplings, and all its schemes draw from the same distribution."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from anygen.api import AnyGen

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speculative.py"
P = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.1, 0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speculative_study", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    module.SIDE = 3
    return module


def test_a_coupled_draw_follows_its_distribution_and_keeps_the_guess_as_often_as_can_be(study: ModuleType) -> None:
    draws, count = study.Draws(0), 20_000
    guesses = [draws.anew(0, Q) for _ in range(count)]
    drawn = [draws.coupled(0, P, study.Guess(guess, Q)) for guess in guesses]
    shares = np.bincount(drawn, minlength=4) / count
    assert np.abs(shares - P.numpy()).max() < 0.015
    agreement = float(torch.minimum(P, Q).sum())  # 1 - total variation
    assert abs(np.mean(np.equal(guesses, drawn)) - agreement) < 0.015


def test_a_guess_that_was_not_drawn_is_kept_with_its_probability(study: ModuleType) -> None:
    draws = study.Draws(1)
    drawn = np.bincount([draws.coupled(0, P, study.Guess(1)) for _ in range(20_000)], minlength=4) / 20_000
    assert np.abs(drawn - P.numpy()).max() < 0.015


@pytest.mark.parametrize("start", ["above", "random", "race"])
def test_all_schemes_draw_the_same_pictures_in_the_long_run(study: ModuleType, model: AnyGen, start: str) -> None:
    options = study.SamplingOptions(temperature=0.05, guidance_scale=1.5, top_k=2)
    picture = study.Picture(model, "a red apple", options)
    counts: dict[str, Counter[int]] = {}
    for scheme in study.SCHEMES:
        pictures = [study.draw(picture, scheme, start, 4, seed) for seed in range(150)]
        assert all(len(codes) == 9 and 3 <= passes <= 9 for codes, passes in pictures)
        counts[scheme] = Counter(codes[4] for codes, _ in pictures)
    for scheme, found in counts.items():
        common = sum((found & counts["fixed point"]).values()) / 150
        assert common > 0.8, scheme


def test_the_fixed_point_does_not_depend_on_window_or_start(study: ModuleType, model: AnyGen) -> None:
    picture = study.Picture(model, "a red apple", study.SamplingOptions(temperature=0.1, guidance_scale=1.5))
    plain, passes = study.draw(picture, "fixed point", "above", 1, 5)
    assert passes == 9
    for start in study.STARTS:
        assert all(study.draw(picture, "fixed point", start, window, 5)[0] == plain for window in (2, 5, 30))


def test_times_are_taken_of_every_case(study: ModuleType, model: AnyGen) -> None:
    watch = study.Stopwatch(model)
    for name in study.cases(model, "", 0):
        rows = study.compare_times(watch, name, ["a red apple"], 1)
        assert [row["window"] for row in rows] == [1, 4, 8, 16] and all(row["passes"] > 0 for row in rows)
        assert rows[0]["times_faster"]["median"] == 1
