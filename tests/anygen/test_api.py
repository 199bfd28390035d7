"""`generate` and `stream`: every combination of inputs and outputs, results, events, and bad calls."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import anygen
from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.request import Request
from anygen.results import Finished, SegmentFinished, SegmentProgress, SegmentStarted, TextDelta
from tokenizers_mm.media import Audio, Region, load_sound

INPUTS: dict[str, Any] = {
    "text": "a red apple",
    "image": Image.new("RGB", (16, 16), "red"),
    "audio": (np.sin(np.arange(1600) / 5).astype(np.float32), 8000),
}
MODALITIES = ("text", "image", "audio")
LOOP: list[Any] = []
LOOP.append({"role": "user", "content": LOOP})
"""A content that holds itself."""


@pytest.mark.parametrize("given", [c for n in range(4) for c in itertools.combinations(MODALITIES, n)])
@pytest.mark.parametrize("output", [c for n in (1, 2, 3) for c in itertools.combinations(MODALITIES, n)])
def test_every_mixture_in_and_out(model: AnyGen, given: tuple[str, ...], output: tuple[str, ...]) -> None:
    out = model.generate(**{name: INPUTS[name] for name in given}, output=output, max_new_tokens=120)
    assert tuple(s.modality for s in out.samples[0].segments) == output
    assert len(out.texts) == output.count("text")
    assert all(isinstance(picture, Image.Image) for picture in out.images)
    assert all(isinstance(sound, Audio) for sound in out.audios)


def test_content_lists_are_read_in_order_in_both_forms(model: AnyGen) -> None:
    items = [
        {"type": "text", "text": "look:"},
        {"type": "image", "image": INPUTS["image"]},
        {"type": "audio", "audio": INPUTS["audio"]},
        {"type": "region", "region": (0.1, 0.2)},
        {"type": "text", "text": "what is it?"},
    ]
    plain = model.generate(content=items, output="text", max_new_tokens=20)
    chat = model.generate(content=[{"role": "user", "content": items}], output="text", max_new_tokens=20)
    assert plain.samples[0].ids == chat.samples[0].ids
    words = model.generate(content=[{"role": "user", "content": "hi"}], output="text", max_new_tokens=20)
    assert words.text == model.generate(text="hi", output="text", max_new_tokens=20).text


def test_shapes_can_be_asked_for(model: AnyGen) -> None:
    assert model.generate(output="image", size=(16, 40)).image.size == (40, 16)
    assert model.generate(output="image", size=24).image.size == (24, 24)
    assert model.generate(output="audio", duration_s=0.5).audio.duration_s == 0.5


def test_shapes_hold_for_what_the_model_chooses_to_make(model: AnyGen) -> None:
    call = {"output": "any", "size": (16, 24), "duration_s": 0.1, "num_samples": 40, "max_new_tokens": 60}
    samples = model.generate(**call, temperature=1.5).samples
    pictures = [picture for sample in samples for picture in sample.of("image")]
    sounds = [sound for sample in samples for sound in sample.of("audio")]
    assert pictures and {picture.size for picture in pictures} == {(24, 16)}
    assert sounds and {sound.duration_s for sound in sounds} == {0.1}


def test_task_alone_says_what_to_generate(model: AnyGen) -> None:
    assert model.generate(image=INPUTS["image"], task="caption", max_new_tokens=20).text is not None
    assert model.generate(text="a cat", task="locate").regions


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "say what to generate"),
        ({"output": "smell"}, "unknown output 'smell'"),
        ({"output": ()}, "at least one modality"),
        ({"output": ("any", "text")}, "stands alone"),
        ({"output": 3}, "output is a name or several"),
        ({"output": "text", "generator": 5}, "generator must be"),
        ({"output": "text", "content": [{"type": "region", "region": 0.2}]}, "a region is 2 or 4 fractions"),
        ({"output": "text", "content": [{"type": "image", "url": "https://a.b/c.png"}]}, "never opened"),
        ({"output": "text", "content": LOOP}, "needs a type"),
        ({"output": "text", "max_new_tokens": True}, "max_new_tokens"),
        ({"output": "text", "top_k": 0.5}, "top_k must be an integer"),
        ({"output": "image", "size": 10**6 * 8}, "cannot give image"),
        ({"output": "text", "text": 3}, "text must be a str"),
        ({"output": "text", "text": "\ud800"}, "surrogate"),
        ({"output": "text", "image": "/nowhere.png"}, r"cannot read the picture"),
        ({"output": "text", "audio": b""}, "empty"),
        ({"output": "text", "content": "hello"}, "content is a list"),
        ({"output": "text", "content": [3]}, "content holds a int"),
        ({"output": "text", "content": [{"type": "video", "video": 1}]}, "content item needs a type"),
        ({"output": "text", "content": [{"type": "text"}]}, "needs its value under 'text'"),
        ({"output": "text", "content": [], "text": "a"}, "not both"),
        ({"output": "text", "num_samples": 0}, "num_samples"),
        ({"output": "text", "num_samples": True}, "num_samples"),
        ({"output": "text", "seed": -1}, "seed"),
        ({"output": "text", "seed": 1.5}, "seed"),
        ({"output": "text", "max_new_tokens": 0}, "max_new_tokens"),
        ({"output": "image", "max_new_tokens": 5}, "too small"),
        ({"output": "text", "temperature": -1}, "temperature"),
        ({"output": "text", "task": "sing"}, "unknown task"),
        (
            {"output": ("image", "text"), "task": "caption"},
            "task 'caption' gives text first; got output .'image', 'text'.",
        ),
        ({"output": "image", "size": 15}, "multiples of 8"),
        ({"output": "any", "size": 15}, "multiples of 8"),
        ({"output": "any", "duration_s": 60.0}, "at most 6.0"),
        ({"output": "image", "size": (16,)}, "size must be a side"),
        ({"output": ("text", "audio"), "size": 16}, "size is of output 'image'; got .'text', 'audio'.: leave"),
        ({"output": "image", "duration_s": 1.0}, "duration_s is of output 'audio'; got .'image',.: leave it out"),
        ({"output": "image", "size": 8 * 7}, "cannot give image"),
        ({"output": "audio", "duration_s": 0}, "duration_s"),
        ({"output": "audio", "duration_s": 60.0}, "at most 6.0"),
        ({"output": "image", "decoder": "diffusion"}, "no diffusion decoder that draws pictures from codes"),
        ({"output": "image", "decoder": "magic"}, "unknown decoder 'magic'"),
        ({"output": "text", "generator": "x"}, "generator"),
    ],
)
def test_bad_calls_are_typed_errors(model: AnyGen, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        model.generate(**arguments)


def test_unknown_arguments_name_the_nearest(model: AnyGen) -> None:
    for wrong, right in (("images", "image"), ("num_sample", "num_samples"), ("temprature", "temperature")):
        with pytest.raises(TypeError, match=f"unexpected argument '{wrong}'; did you mean '{right}'"):
            model.generate(**{wrong: 1}, output="text")


def test_signatures_show_the_arguments() -> None:
    parameters = inspect.signature(AnyGen.generate).parameters
    assert {"text", "image", "audio", "output", "seed", "guidance_scale"} <= set(parameters)
    assert parameters["num_samples"].default == 1


def test_numpy_numbers_are_numbers(model: AnyGen) -> None:
    plain = model.generate(text="a", output="image", seed=3, top_k=2, temperature=0.5, size=16, num_samples=2)
    numpy = model.generate(
        text="a",
        output="image",
        seed=np.int64(3),
        top_k=np.int64(2),
        temperature=np.float32(0.5),
        size=[np.int32(16), 16],
        num_samples=np.int8(2),
    )
    assert [s.ids for s in plain.samples] == [s.ids for s in numpy.samples]
    json.dumps(dict(numpy.samples[0].provenance))
    one_side = model.generate(text="a", output="image", size=np.int64(16))
    assert one_side.image.size == (16, 16) and json.dumps(dict(one_side.samples[0].provenance))


def test_batches_of_nothing_and_of_other_things(model: AnyGen) -> None:
    assert model.generate_batch([]) == []
    assert len(model.generate_batch(Request(text="a", output="image") for _ in range(2))) == 2
    with pytest.raises(InputError, match="takes a list of Request; got dict"):
        model.generate_batch([{"text": "a"}])  # type: ignore[list-item]


def test_saving_never_writes_over_earlier_answers(model: AnyGen, tmp_path: Path) -> None:
    first = model.generate(text="a", output=("text", "image"), num_samples=2, max_new_tokens=60).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    second = model.generate(text="b", output="image").save(tmp_path)
    assert [p.name for p in second] == ["02-0-image.png"] and not {*first} & {*second}
    assert before == {path: path.read_bytes() for path in before}
    with pytest.raises(InputError, match="is a file; generated media go to a folder"):
        model.generate(text="b", output="image").save(second[0])


def test_results_say_when_something_is_absent(model: AnyGen) -> None:
    out = model.generate(text="a", output="text", max_new_tokens=10)
    assert isinstance(out.text, str) and out.images == []
    assert out.samples[0].finish_reason == "length", "an untrained model does not stop by itself within ten ids"
    for name in ("image", "audio"):
        with pytest.raises(InputError, match=f"holds no {name}; ask for it with output='{name}'"):
            getattr(out, name)


def test_saved_results_carry_their_provenance(model: AnyGen, tmp_path: Path) -> None:
    out = model.generate(
        text="a red <b>apple</b>",
        output=("image", "text", "audio", "region"),
        num_samples=2,
        seed=7,
        max_new_tokens=200,
    )
    files = out.save(tmp_path)
    assert [f.name for f in files[:4]] == ["00-0-image.png", "00-1-text.txt", "00-2-audio.wav", "00-3-region.txt"]
    with Image.open(files[0]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(out.images[0]))
        facts = json.loads(picture.info["anygen"])
    assert facts["seed"] == 7 and facts["bundle"] == "tiny"
    assert facts["request"]["inputs"] == [{"type": "text", "text": "a red <b>apple</b>"}]
    beside = json.loads((tmp_path / "01.json").read_text())
    assert (
        beside["seed"] == 8
        and tuple(beside["ids"]) == out.samples[1].ids
        and beside["finish_reason"] in ("eos", "length")
    )
    assert load_sound(files[2]).rate_hz == 8000
    assert len(json.loads(files[3].read_text())) in (2, 4)


def test_stream_tells_the_same_story_as_generate(model: AnyGen) -> None:
    call: dict[str, Any] = {"text": "a cat", "output": ("text", "image", "audio"), "num_samples": 2, "seed": 3}
    call["max_new_tokens"] = 150
    events = list(model.stream(**call))
    finished = events[-1]
    assert isinstance(finished, Finished)
    expected = model.generate(**call)
    assert [s.ids for s in finished.output.samples] == [s.ids for s in expected.samples]
    for index, sample in enumerate(expected.samples):
        mine = [e for e in events[:-1] if e.sample == index]  # type: ignore[union-attr]
        started = [e.modality for e in mine if isinstance(e, SegmentStarted)]
        ended = [e.segment for e in mine if isinstance(e, SegmentFinished)]
        assert started == ["text", "image", "audio"]
        assert "".join(e.text for e in mine if isinstance(e, TextDelta)) == sample.segments[0].content
        assert ended[0].content == sample.segments[0].content
        assert np.array_equal(np.asarray(ended[1].content), np.asarray(sample.segments[1].content))
        progress = [e for e in mine if isinstance(e, SegmentProgress)]
        assert progress and all(1 <= e.num_done <= e.num_codes for e in progress)


def test_a_closed_stream_stops(model: AnyGen) -> None:
    stream = model.stream(output="text", max_new_tokens=200)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_regions_are_fractions(model: AnyGen) -> None:
    (region,) = model.generate(image=INPUTS["image"], text="apple", output="region").regions
    assert isinstance(region, Region) and len(region.values) in (2, 4)


def test_the_package_exports_its_doors() -> None:
    assert anygen.AnyGen is AnyGen and callable(anygen.generate) and anygen.__version__
    with pytest.raises(AttributeError):
        anygen.nothing  # noqa: B018
