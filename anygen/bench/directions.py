"""The embedded bundle in the benchmark: seconds a picture, real-time factor of sound, first event, each direction."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from anygen.api import AnyGen
from anygen.bench.machine import timed
from anygen.request import Request

TEXT = "a red apple"
BATCH = 8
_MOST_TEXT = 64


def measure_bundle(rounds: int, clock: str) -> dict[str, Any]:
    """Medians of a few calls after loading, whole calls: encoding, sampling and decoding."""
    model = AnyGen.from_pretrained(device="cpu")

    def seconds(work: Callable[[], object]) -> float:
        work()
        return statistics.median(timed(work, torch.device("cpu")).seconds(clock) for _ in range(rounds))

    picture = model.generate(text=TEXT, output="image").images[0]
    sound = model.generate(text=TEXT, output="audio", duration_s=1.0).audios[0]
    figures = {
        "seconds of a picture of 64 codes": seconds(lambda: model.generate(text=TEXT, output="image", best_of=1)),
        "seconds of a second of speech": seconds(
            lambda: model.generate(text=TEXT, output="audio", duration_s=1.0, best_of=1)
        ),
        "seconds of a picture, as many drawn as is usual": seconds(lambda: model.generate(text=TEXT, output="image")),
        "seconds of a second of speech, as many drawn as is usual": seconds(
            lambda: model.generate(text=TEXT, output="audio", duration_s=1.0)
        ),
        "seconds to the first event of a stream": seconds(lambda: _first_event(model)),
        "seconds to the second event of a stream": seconds(lambda: _first_event(model, skip=1)),
    }
    inputs: dict[str, Any] = {"text": TEXT, "image": picture, "audio": (sound.samples_T, sound.rate_hz)}
    per_minute = {}
    for given, value in inputs.items():
        for wanted in ("text", "image", "audio"):
            if given != wanted:
                budget = {"max_new_tokens": _MOST_TEXT} if wanted == "text" else {}
                request = Request.of({given: value, "output": wanted, "num_samples": BATCH, "best_of": 1, **budget})
                taken = seconds(lambda request=request: model.generate_batch([request]))  # type: ignore[misc]
                per_minute[f"{given} -> {wanted}, {BATCH} at once"] = 60 * BATCH / taken
    return {"figures": figures, "per_minute": per_minute}


def _first_event(model: AnyGen, skip: int = 0) -> None:
    stream = model.stream(text=TEXT, output="image")
    for _ in range(1 + skip):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
