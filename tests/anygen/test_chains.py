"""`via="in_writing"` and `"one_by_one"`: chains of calls, each of them as it would be alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from anygen.api import AnyGen
from anygen.bundle import checked_via
from anygen.cli.app import app
from anygen.errors import InputError
from anygen.judging import BestOf
from anygen.plan import Way
from anygen.request import Request
from anygen.results import Finished, Sample, SegmentFinished, SegmentStarted
from tokenizers_mm.media import Audio, Region

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
SOUND = Audio(np.sin(np.arange(1600) / 9).astype(np.float32) / 2, 16_000)
OTHER = Audio(np.sin(np.arange(2400) / 5).astype(np.float32) / 2, 16_000)
BOX = Region((0.1, 0.2, 0.5, 0.6))
PLAIN: dict[str, Any] = {"temperature": 1.5, "seed": 3}
ASKED: dict[str, Any] = {**PLAIN, "image": PICTURE, "audio": SOUND, "via": "in_writing"}


def texts(sample: Sample) -> list[Any]:
    return [segment.content for segment in sample.via]


def by_hand(model: AnyGen, seed: int = 3) -> tuple[Sample, Sample, Sample]:
    options = PLAIN | {"seed": seed}
    heard = model.generate(**options, audio=SOUND, output="text").samples[0]
    written = model.generate(**options, image=PICTURE, text=heard.of("text")[0], output="text").samples[0]
    said = model.generate(**options, text=written.of("text")[0], output="audio", duration_s=0.1).samples[0]
    return heard, written, said


def test_it_is_the_chain_of_calls_that_one_would_make(model: AnyGen) -> None:
    heard, written, said = by_hand(model)
    chained = model.generate(**ASKED, output="audio", duration_s=0.1).samples[0]
    assert texts(chained) == [heard.of("text")[0], written.of("text")[0]] and all(texts(chained))
    assert chained.ids == (*heard.ids, *written.ids, *said.ids) and chained.seed == 3
    assert np.array_equal(chained.of("audio")[0].samples_T, said.of("audio")[0].samples_T)
    facts = chained.provenance["request"]
    assert facts["via"] == "in_writing" and [given["type"] for given in facts["inputs"]] == ["image", "audio"]
    answered = model.generate(**ASKED, output="text").samples[0]
    assert (texts(answered), answered.of("text")) == ([heard.of("text")[0]], written.of("text"))


def test_each_sound_and_each_sample_has_its_own(model: AnyGen) -> None:
    first, second = by_hand(model)[0], by_hand(model, seed=4)[0]
    samples = model.generate(**ASKED, output="text", num_samples=2).samples
    assert [texts(sample) for sample in samples] == [[first.of("text")[0]], [second.of("text")[0]]]
    content = [
        {"type": "audio", "audio": SOUND},
        {"type": "region", "region": BOX},
        {"type": "audio", "audio": OTHER},
    ]
    both = model.generate(**PLAIN, content=content, output="text", via="in_writing").samples[0]
    other = model.generate(**PLAIN, audio=OTHER, output="text").text
    assert texts(both) == [first.of("text")[0], other]
    words = ({"type": "text", "text": first.of("text")[0]}, {"type": "text", "text": other})
    alone = model.generate(**PLAIN, content=[words[0], content[1], words[1]], output="text").samples[0]
    assert both.segments == alone.segments


def test_others_in_the_batch_are_left_alone(model: AnyGen) -> None:
    plain = Request(**PLAIN, image=PICTURE, output="text")
    together = model.generate_batch([plain, Request(**ASKED, output="text"), plain])
    alone = model.generate_batch([plain])[0].samples[0]
    assert together[0].samples[0].ids == together[2].samples[0].ids == alone.ids
    assert together[1].samples[0].ids == model.generate(**ASKED, output="text").samples[0].ids


@pytest.mark.parametrize(
    ("changes", "is_chained"),
    [({}, True), ({"via": "nothing"}, False), ({"task": "answer"}, True), ({"task": "continue"}, False)],
)
def test_the_bundle_says_where_it_helps(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_chained: bool
) -> None:
    ways: dict[str, Way] = {"image,audio>text": "in_writing", "image,text>text": "text"}
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, via=ways))
    call = {**ASKED, "output": "text", "via": None} | changes
    sample = model.generate(**call).samples[0]
    assert len(sample.via) == (2 if is_chained else 0), "what was heard, and what the answer's own way writes"


def test_what_is_streamed_is_the_answer(model: AnyGen) -> None:
    call = {**ASKED, "output": "audio", "duration_s": 0.1, "num_samples": 2}
    whole = model.generate(**call).samples
    events = list(model.stream(**call))
    finished = events[-1]
    assert isinstance(finished, Finished)
    ended = [event for event in events if isinstance(event, SegmentFinished)]
    assert sorted((event.sample, event.segment.modality) for event in ended) == [(0, "audio"), (1, "audio")]
    assert [s.ids for s in finished.output.samples] == [s.ids for s in whole]
    assert [texts(s) for s in finished.output.samples] == [texts(s) for s in whole]
    stopped = model.generate(**call, on_event=lambda _: False).samples[0]
    assert stopped.finish_reason == "stopped" and texts(stopped) == texts(whole[0])


@pytest.mark.parametrize("silence", ["", " \n"])
def test_where_nothing_is_heard_the_chain_goes_on(model: AnyGen, monkeypatch: pytest.MonkeyPatch, silence: str) -> None:
    asked: list[Request] = []
    generated = model._generated

    def deaf(requests: Any) -> Any:
        if not requests:
            return []
        asked.extend(requests)
        (output,) = generated(requests)
        empty = [dataclasses.replace(segment, content=silence) for segment in output.samples[0].segments]
        return [dataclasses.replace(output, samples=(dataclasses.replace(output.samples[0], segments=tuple(empty)),))]

    monkeypatch.setattr(model, "_generated", deaf)
    model.generate(**ASKED, output="audio")
    assert [request.kinds for request in asked] == [("audio",), ("image", "text"), ("text",)]
    assert [request.inputs[-1].content for request in asked[1:]] == ["?", "?"]


def test_a_cut_text_is_told(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = model._generated

    def cut(requests: Any) -> Any:
        if not requests:
            return []
        (output,) = generated(requests)
        reason = "length" if requests[0].kinds == ("audio",) else "eos"
        return [dataclasses.replace(output, samples=(dataclasses.replace(output.samples[0], finish_reason=reason),))]

    monkeypatch.setattr(model, "_generated", cut)
    assert model.generate(**ASKED, output="text").samples[0].finish_reason == "length"


def test_a_generator_serves_all_of_its_calls(model: AnyGen) -> None:
    def drawn(seed: int) -> Sample:
        call = ASKED | {"generator": torch.Generator().manual_seed(seed)}
        return model.generate(**call, output="text").samples[0]

    one = torch.Generator().manual_seed(1)
    options = PLAIN | {"generator": one}
    heard = model.generate(**options, audio=SOUND, output="text").samples[0]
    written = model.generate(**options, image=PICTURE, text=heard.of("text")[0], output="text").samples[0]
    assert drawn(1).ids == (*heard.ids, *written.ids) != drawn(2).ids and drawn(1).seed is None


def calls_of(model: AnyGen, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> list[Request]:
    calls: list[Request] = []
    generated = model._generated

    def listening(requests: Any) -> Any:
        calls.extend(requests)
        return generated(requests)

    monkeypatch.setattr(model, "_generated", listening)
    model.generate(**arguments)
    return calls


def test_what_is_about_the_answer_is_for_the_answer(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model,
        "bundle",
        dataclasses.replace(model.bundle, best_of={"audio>text": BestOf(number=3), "text>audio": BestOf(number=2)}),
    )
    call = {**ASKED, "output": "audio", "max_new_tokens": 40, "duration_s": 0.1, "top_k": 7}
    heard, written, said = calls_of(model, monkeypatch, call)
    for on_the_way in (heard, written):
        assert (on_the_way.output, on_the_way.max_new_tokens, on_the_way.duration_s) == ("text", None, None)
    assert (said.max_new_tokens, said.duration_s) == (40, 0.1)
    assert {request.top_k for request in (heard, written, said)} == {7}


@pytest.mark.parametrize(
    ("task", "output", "asked"),
    [
        ("answer", "audio", None),
        ("continue", "audio", "continue"),
        ("speak", "audio", None),
        ("continue", "text", "continue"),
    ],
)
def test_a_task_is_that_of_the_question(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch, task: str, output: str, asked: str | None
) -> None:
    calls = calls_of(model, monkeypatch, {**ASKED, "output": output, "task": task})
    assert [call.task for call in calls] == [None, asked, *([None] if output == "audio" else [])]


def test_answers_share_no_draw(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of={"text>image": BestOf(number=4)}))
    call = {**PLAIN, "text": "a cat", "output": ("image", "audio"), "via": "one_by_one", "duration_s": 0.1}
    first, second = model.generate(**call, num_samples=2).samples
    assert (first.seed, second.seed) == (3, 7)
    (drawn, said), (other, _) = first.provenance["calls"], second.provenance["calls"]
    assert drawn["best_of"] == 4 and drawn["seed"] in range(3, 7) and other["seed"] in range(7, 11)
    assert said == {"output": ["audio"], "seed": 3, "best_of": 1}
    alone = model.generate(text="a cat", output="image", **PLAIN | {"seed": drawn["seed"]}, best_of=1).samples[0]
    assert first.ids[: len(alone.ids)] == alone.ids
    one = model.generate(**call, num_samples=2, best_of=1).samples
    assert [sample.seed for sample in one] == [3, 4]
    streamed = list(model.stream(**call, num_samples=2))[-1]
    assert isinstance(streamed, Finished) and [s.ids for s in streamed.output.samples] == [s.ids for s in one]
    assert streamed.output.samples[0].provenance["request"]["best_of"] == 1
    call |= {"output": ("image", "text"), "duration_s": None, "num_samples": 300, "max_new_tokens": 20}
    many = calls_of(model, monkeypatch, call)
    assert {request.best_of for request in many} == {1}, "no more than 1024 at once"


def test_several_outputs_one_by_one_are_calls_of_their_own(model: AnyGen) -> None:
    call: dict[str, Any] = {**PLAIN, "text": "a cat", "duration_s": 0.1, "size": 16}
    both = model.generate(**call, output=("image", "audio"), via="one_by_one").samples[0]
    unfit = {"image": "duration_s", "audio": "size"}
    drawn, said = (model.generate(**call | {unfit[kind]: None}, output=kind).samples[0] for kind in unfit)
    assert both.ids == (*drawn.ids, *said.ids) and [s.modality for s in both.segments] == ["image", "audio"]
    assert both.via == () and both.provenance["request"]["output"] == ["image", "audio"]
    assert both.ids != model.generate(**call, output=("image", "audio")).samples[0].ids


def test_after_a_text_the_others_come_of_it(model: AnyGen) -> None:
    call: dict[str, Any] = {**PLAIN, "duration_s": 0.1}
    both = model.generate(**call, image=PICTURE, output=("text", "audio"), via="one_by_one").samples[0]
    named = model.generate(**PLAIN, image=PICTURE, output="text").samples[0]
    said = model.generate(**call, text=named.of("text")[0], output="audio").samples[0]
    assert both.ids == (*named.ids, *said.ids) and both.of("text") == named.of("text")


def test_one_by_one_is_streamed_one_by_one(model: AnyGen) -> None:
    call = {**PLAIN, "text": "a cat", "output": ("image", "audio"), "duration_s": 0.1, "size": 16, "via": "one_by_one"}
    whole = model.generate(**call, num_samples=2).samples
    events = list(model.stream(**call, num_samples=2))
    ended = [(e.segment.modality, e.sample) for e in events if isinstance(e, SegmentFinished)]
    assert sorted(ended[:2]) == [("image", 0), ("image", 1)] and sorted(ended[2:]) == [("audio", 0), ("audio", 1)]
    assert isinstance(events[-1], Finished) and [s.ids for s in events[-1].output.samples] == [s.ids for s in whole]

    def until_drawn(event: Any) -> bool:
        return not isinstance(event, SegmentStarted) or event.modality != "audio"

    stopped = model.generate(**call, on_event=until_drawn).samples[0]
    assert stopped.finish_reason == "stopped" and [s.modality for s in stopped.segments] == ["image"]


def test_an_answer_that_lacks_an_output_was_stopped(model: AnyGen) -> None:
    texts_first = {**PLAIN, "temperature": 2.0, "image": PICTURE, "output": ("text", "audio"), "via": "one_by_one"}
    ended: list[int] = []

    def until_the_fourth(event: Any) -> bool:
        ended.extend([event.sample] if isinstance(event, SegmentFinished) else [])
        return len(ended) < 4

    samples = model.generate(**texts_first, num_samples=6, on_event=until_the_fourth).samples
    assert len(ended) == 4 and {sample.finish_reason for sample in samples} == {"stopped"}


def test_a_budget_is_one_for_all_outputs_unless_the_way_is_asked_for(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: dict[str, Way] = {"text>image,audio": "one_by_one"}
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, via=ways))
    call = {**PLAIN, "text": "a cat", "output": ("image", "audio")}
    assert model.generate(**call).samples[0].ids == model.generate(**call, via="one_by_one").samples[0].ids
    assert len(model.generate(**call, max_new_tokens=50).samples[0].ids) <= 50
    each = model.generate(**call, max_new_tokens=50, via="one_by_one").samples[0]
    ends = each.ids.count(model.bundle.vocabulary.control("eos"))
    assert ends == 2 and len(each.ids) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"via": "in_writing", "audio": SOUND, "output": "image"}, "got audio -> image"),
        ({"via": "in_writing", "image": PICTURE, "text": "what?", "output": "text"}, "got image, text -> text"),
        ({"via": "in_writing", "output": "text"}, "got no input -> text"),
        ({**ASKED, "output": ("text", "audio")}, "got image, audio -> text, audio"),
        ({**ASKED, "output": "text", "best_of": 2}, "best_of reads an answer backwards"),
        ({**ASKED, "output": "audio", "duration_s": 500.0}, "duration_s must be above 0"),
        ({"via": "one_by_one", "text": "a", "output": ("image", "audio"), "duration_s": 500.0}, "duration_s must be"),
        ({"via": "one_by_one", "text": "a", "output": ("text", "image"), "size": 15}, "sides in multiples of"),
        ({"via": "one_by_one", "text": "a", "output": ("text", "image"), "max_new_tokens": 3}, "max_new_tokens"),
        ({"via": "one_by_one", "text": "a", "output": "image"}, "makes several of text, image and audio"),
        ({**ASKED, "via": "one_by_one", "output": ("text", "audio")}, "got image, audio -> text, audio"),
        ({"via": "one_by_one", "image": PICTURE, "output": ("text", "region")}, "got image -> text, region"),
        ({"via": "one_by_one", "text": "a", "output": ("image", "image")}, "no two of a kind"),
        ({"via": "one_by_one", "image": PICTURE, "output": ("audio", "text")}, "got image -> audio, text"),
        ({"via": "one_by_one", "output": ("text", "image")}, "got no input -> text, image"),
    ],
)
def test_what_it_is_not_for_is_refused(
    model: AnyGen, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(model, "_generated", lambda requests: pytest.fail("it is told before any work"))
    with pytest.raises(InputError, match=message):
        model.generate(**arguments)
    if "best_of" not in arguments:
        with pytest.raises(InputError, match=message):
            model.stream(**arguments)


@pytest.mark.parametrize(
    ("way", "fitting", "others"),
    [
        ("in_writing", "image,audio>audio", ("audio>audio", "image,text>text", "image,audio>text,audio")),
        (
            "one_by_one",
            "text>image,audio",
            ("text>image", "image>audio,text", "text>image,image", ">text,image", "image>text,region"),
        ),
    ],
)
def test_a_bundle_may_say_so_where_it_can_be(way: Way, fitting: str, others: tuple[str, ...]) -> None:
    assert checked_via({fitting: way}) == {fitting: way}
    for direction in others:
        with pytest.raises(ValueError, match=f"it cannot be that of '{direction}'"):
            checked_via({direction: way})


def test_from_the_command_line() -> None:
    done = CliRunner().invoke(app, ["generate", "--text", "a", "--output", "image", "--via", "in_writing"])
    assert isinstance(done.exception, InputError) and "got text -> image" in str(done.exception)
