"""1,000 generations of an untrained model, over all output combinations and tight budgets: every one parses and decodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from anygen.api import AnyGen
from anygen.documents import Segment
from anygen.grammar import Block, Plan
from anygen.request import Request
from tokenizers_mm.media import Audio, Region

MODALITIES = ("text", "image", "audio", "region")
TYPES = {"text": str, "image": Image.Image, "audio": Audio, "region": Region}
COMBINATIONS = [c for length in (1, 2, 3) for c in itertools.product(MODALITIES, repeat=length)] + [("any",)]


def check(segment: Segment, model: AnyGen) -> None:
    content = segment.content
    assert isinstance(content, TYPES[segment.modality])
    if isinstance(content, Image.Image):
        patch = model.bundle.tokenizers["image"].config.patch_px  # type: ignore[attr-defined]
        assert content.width % patch == 0 and content.height % patch == 0 and content.mode == "RGB"
    elif isinstance(content, Audio):
        assert len(content.samples_T) > 0 and np.isfinite(content.samples_T).all()


@pytest.mark.slow
def test_a_thousand_generations_parse_and_decode(model: AnyGen) -> None:
    random = np.random.default_rng(0)
    requests = []
    for number in range(1000):
        output = COMBINATIONS[number % len(COMBINATIONS)]
        if output == ("any",):
            smallest = 4
        else:
            smallest = model.grammar.smallest_budget(Plan(tuple(Block(m) for m in output)))  # type: ignore[arg-type]
        slack = int(random.choice([0, 1, 2, 5, 17, 60]))
        requests.append(
            Request(
                text="a cat" if number % 3 else None,
                output=output,  # type: ignore[arg-type]
                seed=number,
                max_new_tokens=smallest + slack,
                temperature=float(random.choice([0.0, 0.7, 1.5])),
                guidance_scale=float(random.choice([1.0, 3.0])),
            )
        )
    count = 0
    for start in range(0, len(requests), 50):
        batch = requests[start : start + 50]
        for request, output in zip(batch, model.generate_batch(batch), strict=True):
            (sample,) = output.samples
            assert request.max_new_tokens is not None and len(sample.ids) <= request.max_new_tokens
            kinds = tuple(segment.modality for segment in sample.segments)
            assert kinds == request.outputs or (request.outputs == ("any",) and kinds)
            for segment in sample.segments:
                check(segment, model)
            count += 1
    assert count == 1000
