"""`via`: a text is written before the answer and kept out of it, as asked or where the bundle says so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_bundle import edit, resealed
from typer.testing import CliRunner

from anygen import planning, ranking
from anygen.api import AnyGen
from anygen.bundle import load_bundle
from anygen.cli.app import app
from anygen.config import build
from anygen.documents import Document
from anygen.errors import CheckpointError, ConfigError, InputError
from anygen.judging import BestOf
from anygen.plan import Block, Plan
from anygen.request import Request
from anygen.results import Finished, SegmentFinished, TextDelta
from anygen.stages import bundle as stage
from anygen.stages.bundle import BundleConfig
from tokenizers_mm.media import Audio

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
SOUND = Audio(np.sin(np.arange(1600) / 9).astype(np.float32) / 2, 16_000)
CALL: dict[str, Any] = {"audio": SOUND, "output": "image", "size": 16, "temperature": 2.0, "max_new_tokens": 60}


@pytest.fixture
def chained(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> AnyGen:
    """The tiny model, whose bundle draws what it hears by way of a text."""
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, via={"audio>image": "text"}))
    return model


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """As many ids are for what is written first; an untrained model takes them all."""
    monkeypatch.setattr(planning, "_VIA_IDS", 20)
    return 20


def kinds(sample: Any) -> tuple[str, ...]:
    return tuple(segment.modality for segment in sample.segments)


def test_the_text_is_written_first_and_kept_out(model: AnyGen, short: int) -> None:
    (by_text,) = model.generate(**CALL, via="text").samples
    least = model.grammar.smallest_budget(Plan((Block("image", (2, 2)),)))
    (both,) = model.generate(**CALL | {"output": ("text", "image"), "max_new_tokens": short + least}).samples
    assert by_text.ids == both.ids, "it is the same chain"
    assert kinds(by_text) == ("image",) and kinds(both) == ("text", "image")
    assert [s.content for s in by_text.via] == both.of("text") and both.via == ()
    assert np.array_equal(np.asarray(by_text.of("image")[0]), np.asarray(both.of("image")[0]))
    assert by_text.provenance["request"]["via"] == "text" and "via" not in both.provenance["request"]


@pytest.mark.parametrize(
    ("changes", "is_chained"),
    [
        ({}, True),
        ({"num_samples": 2}, True),
        ({"via": "nothing"}, False),
        ({"task": "depict"}, True),
        ({"task": "answer"}, False),
        ({"text": "a cat"}, False),
        ({"output": "audio", "size": None}, False),
    ],
)
def test_the_bundle_says_where_it_helps_and_the_caller_has_the_last_word(
    chained: AnyGen, changes: dict[str, Any], is_chained: bool
) -> None:
    for sample in chained.generate(**CALL | changes).samples:
        assert [s.modality for s in sample.via] == ["text"] * is_chained
        assert kinds(sample) == (changes.get("output", "image"),)


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({}, "caption"),
        ({"task": "answer"}, "caption"),
        ({"output": "region"}, "caption"),
        ({"task": "transcribe"}, "transcribe"),
    ],
)
def test_a_question_is_answered_by_way_of_a_text(model: AnyGen, short: int, changes: dict[str, Any], task: str) -> None:
    call: dict[str, Any] = {"image": PICTURE, "text": "where?", "output": "text", "max_new_tokens": 20} | changes
    (sample,) = model.generate(**call, via="text").samples
    assert [s.modality for s in sample.via] == ["text"] and kinds(sample) == (call["output"],)
    assert Request(**call).document("text").task == task, "of what is written first, as it is in training"
    stating: dict[str, Any] = {"output": ("text", call["output"]), "task": task, "max_new_tokens": 60}
    (stated,) = model.generate(**call | stating).samples
    assert sample.ids[: short - 1] == stated.ids[: short - 1], "it is the same chain, up to where the first ends"


def test_what_is_written_first_takes_nothing_of_the_budget(model: AnyGen, short: int) -> None:
    call: dict[str, Any] = {"image": PICTURE, "text": "where?", "output": "text", "via": "text", "num_samples": 8}
    samples = model.generate(**call, max_new_tokens=6, temperature=2.0).samples
    texts = [model.sequencer.parse(np.array([model.bundle.vocabulary.control("target"), *s.ids])) for s in samples]
    lengths = [[part.content.codes_KT.shape[1] for part in parsed.document.segments] for parsed in texts]
    assert max(first for first, _ in lengths) == short - 2 and max(answer for _, answer in lengths) == 6 - 3
    with pytest.raises(InputError, match="max_new_tokens=3 is too small for output text: it takes at least 4"):
        model.generate(**call, max_new_tokens=3)


@pytest.mark.parametrize("output", ["image", ("audio", "image")])
def test_text_only_is_two_calls(model: AnyGen, short: int, output: Any) -> None:
    call: dict[str, Any] = {"output": output, "temperature": 2.0, "max_new_tokens": 100, "num_samples": 2, "seed": 5}
    answers = model.generate(**call, audio=SOUND, via="text_only").samples
    heard = model.generate(**call | {"audio": SOUND, "output": "text", "max_new_tokens": short + 1}).samples
    for answer, text in zip(answers, heard, strict=True):
        (alone,) = model.generate(**call | {"text": text.of("text")[0], "seed": text.seed, "num_samples": 1}).samples
        assert answer.ids == (*text.ids, *alone.ids) and answer.seed == text.seed
        assert [s.content for s in answer.via] == text.of("text") and kinds(answer) == kinds(alone)
        assert answer.finish_reason == "length" == text.finish_reason, "the text was cut"
        for mine, other in zip(answer.segments, alone.segments, strict=True):
            same = mine.content.samples_T if mine.modality == "audio" else mine.content
            assert np.array_equal(same, other.content.samples_T if mine.modality == "audio" else other.content)


def test_text_only_in_a_batch_with_others_and_with_a_generator(model: AnyGen) -> None:
    requests = [Request(**CALL, via=via, seed=seed) for seed, via in enumerate(["text_only", "text", "nothing"] * 2)]
    batch = [output.samples[0] for output in model.generate_batch(requests)]
    assert [s.ids for s in batch] == [model.generate_batch([r])[0].samples[0].ids for r in requests]
    assert [len(s.via) for s in batch] == [1, 1, 0] * 2
    drawn = [model.generate(**CALL, via="text_only", generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert drawn[0].samples[0].ids == drawn[1].samples[0].ids and drawn[0].samples[0].seed is None


def test_text_only_takes_the_task_of_the_answer_and_tells_at_once_what_does_not_fit(model: AnyGen) -> None:
    control, prompts = model.bundle.vocabulary.control, {}
    for task in (None, "depict", "answer"):
        request = Request(**CALL, via="text_only", task=task)
        texts = model._states(request)
        (answer,) = model._answering([request], [texts])[0]
        prompts[task] = (texts[0].prompt.tolist(), answer.prompt.tolist())
    assert len({tuple(first) for first, _ in prompts.values()}) == 1, "what is written first is what was heard"
    assert control("transcribe") in prompts[None][0] and control("depict") in prompts[None][1]
    assert prompts["depict"] == prompts[None] and control("answer") in prompts["answer"][1]
    given = {"num_samples": 2, "seed": 4, "speculative_window": 3}
    texts = model._states(request := Request(**CALL, **given, via="text_only"))
    alone = model._states(Request(**CALL | {"audio": None}, **given, text="a"))
    for answer, other in zip(model._answering([request], [texts])[0], alone, strict=True):
        assert (answer.noise_seed, answer.window, answer.seed) == (other.noise_seed, 3, other.seed)
    with pytest.raises(InputError, match="too small"):
        model.stream(**CALL | {"max_new_tokens": 5}, via="text_only")


def test_text_only_needs_no_room_for_both(model: AnyGen, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.generate(**CALL, via="text_only").samples[0]
    heard = len(model._states(Request(audio=SOUND, output="text"))[0].prompt)
    answer = len(whole.ids) - short - 1
    monkeypatch.setattr(model.engine, "max_positions", heard + 4 * (short + 1))
    least = model.grammar.smallest_budget(Plan((Block("image", (2, 2)),)))
    assert model.generate(**CALL, via="text_only").samples[0].ids == whole.ids and answer >= least
    monkeypatch.setattr(model.engine, "max_positions", heard + 4)
    assert kinds(model.generate(**CALL, via="text_only").samples[0]) == ("image",)
    monkeypatch.setattr(model.engine, "max_positions", heard + 3)
    with pytest.raises(InputError, match=f"the input takes {heard} of this model's {heard + 3} positions"):
        model.generate(**CALL, via="text_only")
    monkeypatch.setattr(model.engine, "max_positions", least - 1)
    with pytest.raises(InputError, match="the answer at least"):
        model.stream(**CALL, via="text_only")


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": PICTURE, "text": "how many?", "output": "text"},
        {"image": PICTURE, "text": "a cat", "output": "region"},
        {"image": PICTURE, "output": "text"},
        {"text": "a cat", "output": "image"},
        {"output": "image"},
    ],
)
def test_text_only_is_for_what_a_text_can_stand_for(model: AnyGen, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="in place of a picture or sound, with another medium; got"):
        model.generate(**arguments, via="text_only")


def test_a_task_may_be_that_of_what_is_written_first(model: AnyGen, short: int) -> None:
    (usual,) = model.generate(**CALL, via="text").samples
    (named,) = model.generate(**CALL, via="text", task="transcribe").samples
    assert named.ids == usual.ids
    for way in ("text_only", "nothing"):
        with pytest.raises(InputError, match="task 'transcribe' gives text first"):
            Request(**CALL, via=way, task="transcribe")
    for asked in ({"output": "audio", "task": "answer"}, {"output": "any", "task": "caption"}):
        Request(image=PICTURE, **asked)


@pytest.mark.parametrize("way", ["text", "text_only"])
def test_streams_tell_of_the_answer_alone(chained: AnyGen, way: str) -> None:
    chained.bundle.via["audio>image"] = way  # type: ignore[index]
    events = list(chained.stream(**CALL))
    assert not any(isinstance(event, TextDelta) for event in events)
    assert [e.segment.modality for e in events if isinstance(e, SegmentFinished)] == ["image"]
    finished = events[-1]
    assert isinstance(finished, Finished)
    (streamed,), (plain,) = finished.output.samples, chained.generate(**CALL).samples
    assert (
        len(plain.via) == 1
        and streamed.ids == plain.ids
        and streamed.via == plain.via
        and kinds(streamed) == ("image",)
    )
    told: list[str] = []
    stopped = chained.generate(**CALL, on_event=lambda event: told.append(type(event).__name__))
    assert told[0] == "SegmentStarted" and stopped.samples[0].ids == plain.ids


@pytest.mark.parametrize("way", ["text", "text_only"])
def test_the_best_of_several_is_judged_step_by_step(chained: AnyGen, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    chained.bundle.via["audio>image"] = way  # type: ignore[index]
    chains: list[list[Document]] = []
    judged_by = ranking._judged

    def watched(*arguments: Any) -> Any:
        found = judged_by(*arguments)
        chains.append([told.document for told in found])
        return found

    def judged(model: Any, vocabulary: Any, sequences: list[Any]) -> list[tuple[Any, Any]]:
        assert len(sequences) == 8
        return [(None, np.array(nats)) for nats in ([5], [1], [1, 1], [3], [1], [9], [9], [0])]

    monkeypatch.setattr(ranking, "_judged", watched)
    monkeypatch.setattr(ranking, "answer_nats", judged)
    kept = chained.generate(**CALL, best_of=4).samples[0]
    assert kept.seed == 1 and len(kept.via) == 1, "2 + 3 nats; the last step alone would take the fourth"
    assert [[s.modality for s in document.segments] for document in chains[0]] == [["text", "audio"], ["image", "text"]]
    usual = {"audio>text": BestOf(number=1, judge="forward"), "audio>image": BestOf(number=1, judge="forward")}
    monkeypatch.setattr(chained, "bundle", dataclasses.replace(chained.bundle, best_of=usual))
    chained.generate(**CALL, best_of=4)
    told = [[(s.modality, s.target) for s in document.segments] for document in chains[-1]]
    assert told == [[("audio", False), ("text", True)], [("image", False), ("text", True)]], "each step has its judge"


@pytest.mark.parametrize("way", ["text", "text_only"])
def test_a_way_is_judged_both_ways_where_its_direction_says_so(
    chained: AnyGen, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    chained.bundle.via["audio>image"] = way  # type: ignore[index]
    chains: list[list[list[tuple[str, bool]]]] = []

    def judged(model: Any, vocabulary: Any, sequences: list[Any]) -> list[tuple[Any, Any]]:
        documents = [chained.sequencer.parse(sequence.ids_S).document for sequence in sequences]
        chains.append([[(s.modality, s.target) for s in document.segments] for document in documents])
        return [
            (None, np.array(n)) for n in ([[1], [5, 5], [1], [1]] + [[20], [0] * 9, [20, 10], [1] * 9] + [[99]] * 8)
        ]

    monkeypatch.setattr(ranking, "answer_nats", judged)
    usual = {"audio>text": BestOf(number=1, judge="forward"), "audio>image": BestOf(number=1, judge="both")}
    monkeypatch.setattr(chained, "bundle", dataclasses.replace(chained.bundle, best_of=usual))
    kept = chained.generate(**CALL, best_of=4).samples[0]
    assert len(chains[0]) == 16 and kept.seed == 1, "2 + 15 (5 + 1) nats, then 50 + 15 (0 + 1)"
    heard, drawn = [("text", False), ("audio", True)], [("image", False), ("text", True)]
    forwards = [[("audio", False), ("text", True)], [("text", False), ("image", True)]]
    assert chains[0][:4] == [heard, forwards[0], drawn, forwards[1]], "whatever the steps say by themselves"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"audio": SOUND, "output": "image", "via": "image"},
            "unknown via 'image'; expected one of text, text_only, in_writing, one_by_one, nothing",
        ),
        ({"audio": SOUND, "output": "image", "via": 3}, "unknown via 3"),
        ({"audio": SOUND, "output": "any", "via": "text"}, "neither for edits nor for output 'any'"),
        (
            {"audio": SOUND, "output": "any", "via": "text_only"},
            "via='text_only' is neither for edits",
        ),
        ({"image": PICTURE, "mask": np.eye(16, dtype=bool), "via": "text"}, "neither for edits nor for output 'any'"),
    ],
)
def test_what_it_is_not_for_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(**arguments)


def test_the_command_line_keeps_the_text_beside_the_picture(bundle_folder: Path, tmp_path: Path) -> None:
    SOUND.save(tmp_path / "said.wav")
    command = (
        f"generate --audio {tmp_path}/said.wav --output image --via text --model {bundle_folder} --out {tmp_path}/out"
    )
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00-0-image.png", "00.json"]
    facts = json.loads((tmp_path / "out" / "00.json").read_text())
    assert len(facts["via"]) == 1 and facts["request"]["via"] == "text"


def test_a_bundle_carries_it(bundle_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    edit(folder / "anygen.json", lambda facts: facts.update(via={"audio>image": "text_only"}))
    resealed(folder)
    assert load_bundle(folder).via == {"audio>image": "text_only"} and load_bundle(bundle_folder).via == {}
    for wrong in (
        {"image,text>text": "text_only"},
        {"audio>image": "image"},
        {"audio": "text"},
        {"audio>any": "text"},
        ["audio>image"],
        "text",
    ):
        edit(folder / "anygen.json", lambda facts, wrong=wrong: facts.update(via=wrong))
        resealed(folder)
        with pytest.raises(CheckpointError, match=r"anygen.json is broken"):
            load_bundle(folder)


def test_the_stage_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[Any] = []
    nothing = SimpleNamespace(range=lambda _: SimpleNamespace(size=1))
    monkeypatch.setattr(stage, "load_pretrained", lambda _: (None, nothing, None))
    monkeypatch.setattr(stage, "open_tokenizers", lambda *_, **__: {})
    monkeypatch.setattr(stage, "num_parameters", lambda _: 0)
    monkeypatch.setattr(stage, "_card", lambda _: "")
    monkeypatch.setattr(stage, "save_bundle", lambda *_, via, best_of, **__: written.append((via, best_of)))
    usual = {"text>image": BestOf(number=8)}
    stage.main(BundleConfig(root=tmp_path, name="a", via={"audio>image": "text"}, best_of=usual))
    assert written == [({"audio>image": "text"}, usual)]
    with pytest.raises(ConfigError, match="it cannot be that of 'image,text>text'"):
        build(BundleConfig, {"name": "a", "via": {"image,text>text": "text_only"}}, source="test")


def test_recipes_of_before_stay_what_they_were() -> None:
    assert "via" not in BundleConfig(name="a").model_dump()
    assert BundleConfig(name="a", via={"audio>image": "text"}).model_dump()["via"] == {"audio>image": "text"}
