"""What nobody meant to ask: 500 random combinations of options, 2,000 malformed calls, and what 1,000 calls leave behind."""

from __future__ import annotations

import dataclasses
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anygen.api import AnyGen
from anygen.errors import CheckpointError, InputError, MissingDependency
from anygen.planning import plan_of
from anygen.request import Request
from anygen.results import RowDone, Sample, SoundChunk
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio, Region

MODALITIES = ("text", "image", "audio", "region")
TYPES = {"text": str, "image": Image.Image, "audio": Audio, "region": Region}
PICTURE = Image.effect_noise((20, 13), 90).convert("RGB")
SOUND = (np.sin(np.arange(1650) / 5).astype(np.float32), 8000)
PATCH_PX, RATE_HZ, HOP = 8, 50, 160


# -- 500 combinations that make sense


def combination(random: np.random.Generator, number: int) -> dict[str, Any]:
    """Arguments drawn over everything that may be asked for."""

    def some(share: float, value: Callable[[], Any]) -> Any:
        return value() if random.random() < share else None

    call: dict[str, Any] = {
        "text": some(0.6, lambda: random.choice(["a cat", ".", "é 🍏 <image>"])),
        "image": some(0.3, lambda: PICTURE),
        "audio": some(0.3, lambda: SOUND),
        "seed": number,
        "num_samples": int(random.integers(1, 3)),
        "temperature": some(0.5, lambda: float(random.choice([0.0, 0.3, 1.5, 100.0]))),
        "top_k": some(0.3, lambda: int(random.choice([0, 1, 5, 1000]))),
        "top_p": some(0.3, lambda: float(random.choice([1e-6, 0.5, 1.0]))),
        "min_p": some(0.3, lambda: float(random.choice([0.0, 0.1, 1.0]))),
        "guidance_scale": some(0.3, lambda: float(random.choice([0.0, 1.0, 4.0]))),
        "speculative_window": some(0.3, lambda: int(random.integers(1, 9))),
    }
    kind = random.choice(["mask", "span", "any", "outputs"], p=[0.15, 0.15, 0.1, 0.6])
    if kind == "mask":
        mask = random.random((int(random.integers(1, 30)), int(random.integers(1, 30)))) < 0.7
        mask[0, :] = mask[:, 0] = mask[len(mask) // 2] = True
        return call | {"image": PICTURE, "mask": mask, "keep_original": bool(random.random() < 0.5)}
    if kind == "span":
        start, end = np.sort(random.uniform(0, 0.206, 2))
        return call | {"audio": SOUND, "span": (start, end), "keep_original": bool(random.random() < 0.5)}
    if kind == "any":
        outputs: Any = "any"
        call["max_new_tokens"] = int(random.integers(10, 60))
    else:
        outputs = tuple(str(name) for name in random.choice(MODALITIES, size=random.integers(1, 4)))
    shapes = {
        "image": {"size": some(0.5, lambda: tuple(int(n) * PATCH_PX for n in random.integers(1, 5, 2)))},
        "audio": {"duration_s": some(0.5, lambda: float(random.integers(1, 20) / RATE_HZ))},
    }
    for name, shape in shapes.items():
        call |= shape if {name, "any"} & ({outputs} if outputs == "any" else set(outputs)) else {}
    return call | {"output": outputs}


def budget_of(model: AnyGen, call: dict[str, Any], random: np.random.Generator) -> int | None:
    """A budget from the smallest on; None leaves it to the model where that cannot be long."""
    if "output" not in call or call["output"] == "any":
        return call.get("max_new_tokens")
    request = Request(**call)
    plan = plan_of(request, model.bundle.layout, MODALITIES, patch_px=PATCH_PX, frame_rate_hz=RATE_HZ)
    return model.grammar.smallest_budget(plan) + int(random.choice([0, 1, 3, 10, 40]))


def check(model: AnyGen, call: dict[str, Any], sample: Sample) -> None:
    """A sample holds what was asked for, in the shapes that were asked for, within its budget."""
    kinds = tuple(segment.modality for segment in sample.segments)
    asked = call.get("output", "image" if "mask" in call else "audio")
    if asked == "any":
        assert kinds and set(kinds) <= set(MODALITIES)
    else:
        assert kinds == ((asked,) if isinstance(asked, str) else tuple(asked))
    if call.get("max_new_tokens"):
        assert len(sample.ids) <= call["max_new_tokens"]
    control = model.bundle.vocabulary.control
    codes = [s.codes for s in model.sequencer.parse(np.array([control("target"), *sample.ids])).document.segments]
    for segment, coded in zip(sample.segments, codes, strict=True):
        content = segment.content
        assert isinstance(content, TYPES[segment.modality])
        if isinstance(content, Image.Image):
            assert coded.grid_hw is not None
            assert (content.height, content.width) == (coded.grid_hw[0] * PATCH_PX, coded.grid_hw[1] * PATCH_PX)
            assert call.get("size") in (None, (content.height, content.width)) or "mask" in call
        elif isinstance(content, Audio):
            assert np.isfinite(content.samples_T).all() and coded.num_codebooks == 2
            length = coded.num_steps * HOP if "span" not in call else 1650
            assert len(content.samples_T) == length
            if call.get("duration_s") and "span" not in call:
                assert coded.num_steps == round(call["duration_s"] * RATE_HZ)
        elif isinstance(content, Region):
            assert len(content.values) in (2, 4)


def test_500_random_combinations_of_options(model: AnyGen) -> None:
    random = np.random.default_rng(0)
    calls = []
    for number in range(500):
        call = combination(random, number)
        calls.append(call | {"max_new_tokens": budget_of(model, call, random)})
    done = 0
    for start in range(0, len(calls), 25):
        batch = calls[start : start + 25]
        requests = [Request(**call) for call in batch]
        for call, output in zip(batch, model.generate_batch(requests), strict=True):
            for sample in output.samples:
                check(model, call, sample)
            done += 1
    assert done == 500
    for call in calls[:: len(calls) // 12]:  # alone, and as a stream
        request = Request(**call)
        alone = model.generate_batch([request])[0]
        streamed = list(model.stream_request(request))[-1].output  # type: ignore[union-attr]
        assert [s.ids for s in alone.samples] == [s.ids for s in streamed.samples]


# -- 2,000 that do not


class Hostile:
    """An object that is nothing of what is expected."""

    def __bool__(self) -> bool:
        return True


LOOP: list[Any] = []
LOOP.append(LOOP)
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**70, -(2**70), 0.0, -0.5, 1e308, float("nan"), float("inf"), -float("inf"), 1j,
    "", "a", "\ud800", "\x00", "image", "/nowhere.png", "../..", "é" * 300, b"", b"abc", b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    (), (1,), (0, 1), (1, 0), (0.05, 0.1), (-1, 2), (None, None), ("a", "b"), (1, 2, 3), [], [[]], [None], LOOP, {}, {"type": "image"},
    {"type": "text", "text": 3}, [{"type": "text"}], [{"type": "region", "region": (2, 3)}], [{"role": "user", "content": LOOP}],
    set(), frozenset([1]), range(3), Hostile(), Hostile, len, Path("/nowhere"), Path("."), np.int64(-3), np.float32("nan"), np.bool_(True),
    np.zeros(0), np.zeros((3, 3)), np.zeros((0, 3, 3), np.uint8), np.zeros((2, 2, 7), np.uint8), np.zeros((4, 4), bool), np.ones((1, 1), bool),
    np.array(["a"]), np.array([None]), np.array(3), np.full((4, 4), np.nan, np.float32), np.full(8000, 9.0, np.float32),
    torch.zeros(3), torch.Generator(), [torch.Generator()], PICTURE, Image.new("F", (3, 3)), Image.new("1", (40, 2)), SOUND,
    (np.zeros(0, np.float32), 8000), (np.array([np.nan], np.float32), 8000), (SOUND[0], 0), (SOUND[0], "8000"), (SOUND[0], 2**40), (1, 2),
    Region((0.1, 0.2)), Codes(np.array([[1]]), "image", (1, 1)), Audio(np.zeros(10, np.float32), 3), "infill", "depict", ("text",), "any",
    iter([1]), (n for n in range(2)), 10**9, "1", "0.5", object(), NotImplemented, ..., slice(1), Exception("x"),
]  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(Request)]
BASES: list[dict[str, Any]] = [
    {"text": "a", "output": "text", "max_new_tokens": 6},
    {"text": "a", "output": "image", "size": 8},
    {"output": "audio", "duration_s": 0.04},
    {"image": PICTURE, "mask": Image.new("L", (4, 4), "white"), "text": "a"},
    {"audio": SOUND, "span": (0.0, 0.1)},
    {"content": [{"type": "text", "text": "a"}], "output": ("region",)},
]


def malformed(random: np.random.Generator) -> dict[str, Any]:
    """A good call with one to three fields replaced by something odd."""
    call = dict(BASES[random.integers(len(BASES))])
    for name in random.choice(FIELDS, size=random.choice([1, 1, 1, 2, 3]), replace=False):
        call[str(name)] = ODD[random.integers(len(ODD))]
    return call


def is_huge(call: dict[str, Any]) -> bool:
    """Good, but long: many samples or ids are not what is tested here."""
    count = call.get("num_samples", 1)
    return isinstance(count, int) and not isinstance(count, bool) and count > 4


def test_2000_malformed_calls_give_typed_errors(model: AnyGen) -> None:
    random = np.random.default_rng(1)
    refused = answered = 0
    while refused < 2000:
        call = malformed(random)
        if is_huge(call):
            continue
        try:
            output = model.generate(**call, **({} if "max_new_tokens" in call else {"max_new_tokens": 60}))
        except InputError as error:
            assert str(error) and len(str(error)) < 2000
            refused += 1
        except (MissingDependency, CheckpointError):
            raise AssertionError(f"not the caller's fault? {call}") from None
        else:
            assert output.samples and answered < 1000, call
            answered += 1
    assert answered > 20, "some of what looks odd is good"


def test_every_field_is_refused_by_name_or_reason(model: AnyGen) -> None:
    for name in FIELDS:
        found = 0
        for odd in ODD:
            for base in BASES:
                try:
                    request = Request(**{**base, name: odd})
                    request.inputs, request.mask_picture, request.generators()
                except InputError:
                    found += 1
        assert found >= 20, f"{name} takes nearly anything"


def test_unknown_arguments_are_type_errors_in_every_door(model: AnyGen) -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        name = "".join(random.choice(list("abcdefghijklmnop_"), size=random.integers(1, 12)))
        for door in (model.generate, model.stream):
            with pytest.raises(TypeError, match="unexpected argument"):
                door(**{"text": "a", "output": "text", f"z{name}": ODD[random.integers(len(ODD))]})


# -- what is left behind


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process from /proc")
def test_memory_does_not_grow_over_a_thousand_calls(model: AnyGen) -> None:
    mask = np.ones((4, 4), bool)

    def call(number: int) -> None:
        if number % 4 == 0:
            model.generate(text="a cat", output="image", size=16, seed=number)
        elif number % 4 == 1:
            model.generate(image=PICTURE, mask=mask, seed=number)
        elif number % 4 == 2:
            stream = model.stream(
                text="a cat", output=("audio", "text"), duration_s=0.3, max_new_tokens=40, seed=number
            )
            for event in stream:
                if isinstance(event, SoundChunk):
                    break  # and it is thrown away as it is
        else:
            model.generate(output="image", size=24, seed=number, on_event=lambda e: not isinstance(e, RowDone))

    for number in range(200):
        call(number)
    gc.collect()
    before, objects = resident_kb(), len(gc.get_objects())
    for number in range(1000):
        call(number)
    gc.collect()
    grown, more = resident_kb() - before, len(gc.get_objects()) - objects
    print(f"1,000 calls: {grown} KB, {more} objects")
    assert grown < 20_000, "KB; a sample of this model takes some 100: kept, a thousand would be 100,000"
    assert more < 300, "fewer is no leak: what earlier tests of the run left may be freed meanwhile"
