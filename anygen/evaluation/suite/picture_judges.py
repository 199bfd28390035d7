"""Judges of pictures of one emoji: which real one they show, and how alike they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from anygen.evaluation.fidelity import mean_of, ssim
from anygen.evaluation.frechet import frechet_distance, kernel_distance
from anygen.evaluation.scores import Score, proportion, ratio
from anygen.evaluation.suite.bench import Bench
from anygen.evaluation.suite.cases import Case, Measured


def judge_pictures(bench: Bench, cases: Sequence[Case], pictures: list[Image.Image]) -> Iterator[Measured]:
    """Retrieval in two spaces, agreement of codes, SSIM, and distances between the sets."""
    world = bench.world
    indices = [case.emoji for case in cases if case.emoji is not None]
    assert len(indices) == len(cases), "these cases are not about emoji"
    real, drawn = [world.pictures[i] for i in indices], [world.fitted(picture) for picture in pictures]

    def share(found: Sequence[int]) -> Score:
        names = [(world.emoji[i].name, world.emoji[f].name) for i, f in zip(indices, found, strict=True)]
        return proportion([int(world.classes[i]) == f for i, f in zip(indices, found, strict=True)], names)

    yield Measured("nearest by pixels", share(world.nearest_by_pixels(drawn)))
    if bench.has("skimage"):
        yield Measured("nearest by edges and colours", share(world.nearest_by_edges(drawn)))
        real_NHWC, drawn_NHWC = (np.stack([np.asarray(picture) for picture in side]) for side in (real, drawn))
        yield Measured("SSIM", mean_of(ssim(real_NHWC, drawn_NHWC)))
        left_NP, right_NP = world.edges.components(drawn), world.edges.components(real)
        if len(cases) > 1:
            distance = frechet_distance(left_NP, right_NP)
            yield Measured("FID, edges and colours", Score(distance, math.nan, math.nan, len(cases)))
            yield Measured("KID, edges and colours", kernel_distance(left_NP, right_NP))
    shares = [_agreement(bench, *pair) for pair in zip(real, drawn, strict=True)]
    yield Measured("code agreement", ratio(shares, [1.0] * len(shares)))


def _agreement(bench: Bench, real: Image.Image, drawn: Image.Image) -> float:
    tokenizer = bench.model.bundle.tokenizers["image"]
    return float((tokenizer.encode(real).codes_KT == tokenizer.encode(drawn).codes_KT).mean())
