"""Editing: what is known comes back as it was, in pictures and sounds, with and without the task `infill`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anygen.api import AnyGen
from anygen.documents import Holed
from anygen.editing import edit_of, infills
from anygen.errors import InputError
from anygen.request import Request
from anygen.results import Finished, SoundChunk
from anygen.sampling.sampler import SampleState, sample
from anygen.vocabulary import CONTROL
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio

PICTURE = Image.effect_noise((16, 16), 90).convert("RGB")
SOUND = (np.sin(np.arange(1650) / 5).astype(np.float32), 8000)
"""1,650 samples: ten frames of 160 and a part."""


def codes_of(model: AnyGen, ids: tuple[int, ...]) -> Codes:
    control = model.bundle.vocabulary.control
    return model.sequencer.parse(np.array([control("target"), *ids])).document.segments[0].codes


@pytest.fixture
def older(model: AnyGen) -> AnyGen:
    """A model whose vocabulary was made before there were holes."""
    names = CONTROL[: CONTROL.index("infill")]
    vocabulary = dataclasses.replace(model.bundle.vocabulary, control_names=names)
    return AnyGen(dataclasses.replace(model.bundle, vocabulary=vocabulary))


@pytest.mark.parametrize("task", ["infill", None, "depict"])
def test_codes_outside_the_mask_come_back_and_those_inside_change(model: AnyGen, task: str | None) -> None:
    mask = np.zeros((16, 16), bool)
    mask[2:5, 9:12] = True  # inside the second of four patches
    before = model.bundle.tokenizers["image"].encode(PICTURE).codes_KT[0]
    out = model.generate(text="a cat", image=PICTURE, mask=mask, task=task, num_samples=12, temperature=5.0)
    after = np.array([codes_of(model, s.ids).codes_KT[0] for s in out.samples])
    assert (after[:, [0, 2, 3]] == before[[0, 2, 3]]).all()
    assert len(set(after[:, 1].tolist())) > 6
    assert all(picture.size == (16, 16) for picture in out.images) and out.samples[0].finish_reason == "eos"


def test_frames_outside_the_span_come_back_in_every_book_and_the_length_is_exact(model: AnyGen) -> None:
    before = model.bundle.tokenizers["audio"].encode(SOUND).codes_KT
    out = model.generate(text="a cat", audio=SOUND, span=(0.061, 0.1), num_samples=12, temperature=5.0)
    after = np.array([codes_of(model, s.ids).codes_KT for s in out.samples])
    assert before.shape == (2, 11) and after.shape == (12, 2, 11)
    redrawn = [3, 4]  # 50 frames a second: 0.061 s lies in the fourth, the fifth ends at 0.1
    kept = [t for t in range(11) if t not in redrawn]
    assert (after[:, :, kept] == before[:, kept]).all()
    assert all(len(set(after[:, k, t].tolist())) > 4 for k in (0, 1) for t in redrawn)
    assert all(sound.rate_hz == 8000 and len(sound.samples_T) == 1650 for sound in out.audios)


@pytest.mark.parametrize("asked", [{"image": PICTURE, "mask": Image.new("L", (16, 16), "white")}, {"audio": SOUND, "span": (0, 0.2)}])  # fmt: skip
def test_prompts_hold_the_known_part_first_where_the_model_knows_how(
    model: AnyGen, older: AnyGen, asked: dict[str, Any]
) -> None:
    request = Request(text="a cat", **asked)
    assert infills(model.bundle) and not infills(older.bundle)
    read = model.sequencer.parse(np.array([*model._states(request)[0].prompt, model.bundle.vocabulary.control("eos")]))
    holed, text = (segment.content for segment in read.document.segments)
    edit = edit_of(request, model.bundle)
    assert edit is not None and read.document.task == "infill"
    assert isinstance(holed, Holed) and holed == Holed(edit.codes, edit.known_KT) and isinstance(text, Codes)
    old = older.sequencer.parse(np.array([*older._states(request)[0].prompt, older.bundle.vocabulary.control("eos")]))
    assert [segment.modality for segment in old.document.segments] == ["text"]
    assert old.document.task == ("depict" if "image" in asked else "speak")
    assert older.generate(text="a cat", **asked).samples[0].finish_reason == "eos"
    with pytest.raises(InputError, match="made before task 'infill'"):
        older.generate(text="a cat", task="infill", **asked)


def test_a_bundle_that_never_trained_it_does_not_infill(model: AnyGen) -> None:
    def told(mixture: dict[str, float]) -> Any:
        return dataclasses.replace(model.bundle, provenance={"recipes": {"pretrain": {"mixture": mixture}, "data": {}}})

    assert not infills(told({"text>image": 1}))
    assert infills(told({"text>image": 1, "emoji:infill_image": 1}))


def test_known_codes_cost_no_choice_and_no_step_of_their_own(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(request: Request) -> tuple[SampleState, int]:
        count = 0

        def counting(name: str) -> Any:
            method = getattr(type(model.engine), name)

            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                return method(model.engine, *arguments, **options)

            return counted

        for name in ("step", "extend"):
            monkeypatch.setattr(model.engine, name, counting(name))
        (state,) = model._states(request)
        generator = state.generator.get_state()
        for _ in sample(model.engine, [state]):
            pass
        monkeypatch.undo()
        assert (state.generator.get_state() != generator).any() == (request.span is None or request.span[1] > 0.01)
        return state, count

    _, whole = run(Request(text="a cat", audio=SOUND, output="audio", duration_s=0.22))
    _, edited = run(Request(text="a cat", audio=SOUND, span=(0.0, 0.02)))
    assert edited <= whole - 15, "of 22 codes two were chosen"


def test_known_codes_read_in_one_pass_give_the_answer_of_one_by_one(model: AnyGen) -> None:
    request = Request(text="a cat", audio=SOUND, span=(0.1, 0.16), temperature=0.0, seed=3)
    (state,) = model._states(request)
    walk, engine = state.walk.again(), model.engine
    cache = engine.new_cache(1, 500)
    hidden = engine.prefill([state.prompt], cache)
    ids: list[int] = []
    while not walk.done:
        allowed = np.concatenate([np.arange(a, b) for a, b in walk.allowed])
        ids.append(int(allowed[int(engine.logits(hidden, walk.allowed).argmax())]))
        walk.push(ids[-1])
        hidden = engine.step(torch.tensor(ids[-1:]), cache)
    assert tuple(ids) == model.generate_batch([request])[0].samples[0].ids


def test_an_edit_is_the_same_alone_and_in_a_batch(model: AnyGen) -> None:
    mask = np.zeros((2, 2), bool)
    mask[1, 0] = True
    requests = [
        Request(text="a cat", image=PICTURE, mask=mask, seed=1, guidance_scale=3.0),
        Request(text="a cat", output=("text", "image"), seed=2, max_new_tokens=60),
        Request(audio=SOUND, span=(0.05, 0.15), seed=3),
        Request(text="two", output="audio", seed=4, duration_s=0.3),
    ]
    together = [output.samples[0].ids for output in model.generate_batch(requests)]
    assert together == [model.generate_batch([request])[0].samples[0].ids for request in requests]


@pytest.mark.parametrize("size", [(16, 16), (16, 8), (5, 30), (160, 80)])
def test_masks_are_brought_to_the_grid_of_the_square_that_the_tokenizer_sees(
    model: AnyGen, size: tuple[int, int]
) -> None:
    picture = PICTURE.resize(size)
    for mask_size in (size, (size[0] * 3, size[1] * 3)):
        mask = Image.new("L", mask_size, "black")
        mask.paste("white", (0, 0, mask_size[0] // 2, mask_size[1]))  # the left half
        edit = edit_of(Request(image=picture, mask=mask, keep_original=True), model.bundle)
        assert edit is not None
        assert edit.known_KT[0].reshape(2, 2).tolist() == [[False, True], [False, True]]


def test_pixels_and_samples_outside_can_stay_as_they_were(model: AnyGen) -> None:
    mask = np.zeros((16, 16), bool)
    mask[2:5, 9:12] = True
    kept = model.generate(image=PICTURE, mask=mask, keep_original=True, temperature=3.0).image
    drawn = model.generate(image=PICTURE, mask=mask, temperature=3.0).image
    assert np.array_equal(np.asarray(kept)[~mask], np.asarray(PICTURE)[~mask])
    assert np.array_equal(np.asarray(kept)[mask], np.asarray(drawn)[mask])
    assert not np.array_equal(np.asarray(drawn)[~mask], np.asarray(PICTURE)[~mask])
    spoken = model.generate(audio=SOUND, span=(0.06, 0.1), keep_original=True).audio.samples_T
    free = model.generate(audio=SOUND, span=(0.06, 0.1)).audio.samples_T
    inside = slice(round(0.066 * 8000), round(0.094 * 8000))
    assert np.array_equal(spoken[:480], SOUND[0][:480]) and np.array_equal(spoken[800:], SOUND[0][800:])
    assert np.array_equal(spoken[inside], free[inside]) and not np.array_equal(free[:480], SOUND[0][:480])


@pytest.mark.parametrize("keep_original", [False, True])
def test_a_streamed_edit_is_its_chunks(model: AnyGen, keep_original: bool) -> None:
    sound = (np.sin(np.arange(7250) / 5).astype(np.float32), 8000)
    call: dict[str, Any] = {"audio": sound, "span": (0.5, 0.7), "keep_original": keep_original}
    events = list(model.stream(**call))
    finished = events[-1]
    assert isinstance(finished, Finished)
    chunks = [event.audio.samples_T for event in events if isinstance(event, SoundChunk)]
    assert len(chunks) > 2 and np.array_equal(np.concatenate(chunks), finished.output.audio.samples_T)
    assert np.array_equal(finished.output.audio.samples_T[6000:], sound[0][6000:]) == keep_original
    assert np.allclose(finished.output.audio.samples_T, model.generate(**call).audio.samples_T, atol=1e-5)


def test_other_rates_are_edited_at_the_codecs(model: AnyGen) -> None:
    sound = Audio(np.sin(np.arange(4410) / 9).astype(np.float32), 22050)
    edited = model.generate(audio=sound, span=(0.1, 0.2), keep_original=True).audio
    assert edited.rate_hz == 8000 and len(edited.samples_T) == 1600
    assert np.array_equal(edited.samples_T[:800], sound.resampled(8000).samples_T[:800])


def test_the_request_is_told_with_its_mask_and_span(model: AnyGen) -> None:
    mask = np.ones((4, 4), bool)
    facts = model.generate(image=PICTURE, mask=mask, keep_original=True).samples[0].provenance["request"]
    assert facts["mask"]["type"] == "image" and facts["keep_original"] is True and facts["output"] == ["image"]
    assert model.generate(audio=SOUND, span=[0, 0.1]).samples[0].provenance["request"]["span"] == (0.0, 0.1)


WHITE = Image.new("L", (4, 4), "white")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mask": WHITE}, "needs one image to edit; got 0"),
        ({"mask": WHITE, "text": "a", "output": "image"}, "needs one image to edit; got 0"),
        ({"mask": WHITE, "content": [{"type": "image", "image": PICTURE}] * 2}, "got 2"),
        ({"span": (0, 0.1)}, "needs one audio to edit"),
        ({"image": PICTURE, "mask": WHITE, "audio": SOUND, "span": (0, 0.1)}, "not both"),
        ({"image": PICTURE, "mask": WHITE, "output": "text"}, "the only output: output='image'"),
        ({"image": PICTURE, "mask": WHITE, "output": ("image", "text")}, "the only output"),
        ({"image": PICTURE, "mask": WHITE, "output": "any"}, "the only output"),
        ({"image": PICTURE, "mask": WHITE, "size": 16}, "keeps its size"),
        ({"image": PICTURE, "mask": WHITE, "decoder": "voken"}, "drawn from codes"),
        ({"audio": SOUND, "span": (0, 0.1), "duration_s": 1.0}, "keeps its size or duration"),
        ({"image": PICTURE, "mask": np.zeros((16, 16), bool)}, "leaves nothing to draw anew"),
        ({"image": PICTURE, "mask": np.zeros((16, 16), float)}, "a picture array is uint8"),
        ({"image": PICTURE, "mask": "/nowhere.png"}, "cannot read"),
        ({"image": PICTURE, "mask": 3}, "cannot use int as a picture"),
        ({"audio": SOUND, "span": (0.1, 0.3)}, "at most 0.206 s"),
        ({"audio": SOUND, "span": (0.1, 0.1)}, "0 <= start < end"),
        ({"audio": SOUND, "span": (-0.1, 0.1)}, "0 <= start < end"),
        ({"audio": SOUND, "span": (0, float("nan"))}, "0 <= start < end"),
        ({"audio": SOUND, "span": 0.1}, "span must be"),
        ({"audio": SOUND, "span": "01"}, "span must be"),
        ({"audio": SOUND, "span": (False, 1)}, "span must be"),
        ({"audio": SOUND, "span": (0, 0.1), "max_new_tokens": 20}, "max_new_tokens=20 is too small"),
        ({"text": "a", "output": "image", "keep_original": True}, "keep_original is of edits"),
        ({"image": PICTURE, "mask": WHITE, "keep_original": 1}, "must be True or False"),
        ({"image": PICTURE, "output": "image", "task": "infill"}, "task 'infill' is of edits"),
        ({"audio": (np.zeros(8000 * 7, np.float32), 8000), "span": (0, 0.1)}, "cannot give audio output"),
    ],
)  # fmt: skip
def test_impossible_edits_are_typed_errors(model: AnyGen, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        model.generate(**arguments)
