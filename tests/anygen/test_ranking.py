"""`best_of`: the answer that is kept is the one from which transformers, too, would best guess the input."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_bundle import edit, resealed
from typer.testing import CliRunner

from anygen import ranking
from anygen.api import AnyGen
from anygen.bundle import load_bundle, save_bundle
from anygen.cli.app import app
from anygen.config import build
from anygen.errors import CheckpointError, ConfigError, InputError
from anygen.judging import BestOf, best_of_to_json
from anygen.ranking import options_of, with_usual_best_of
from anygen.request import Request
from anygen.results import Finished, Sample
from anygen.sampling.choose import SamplingOptions
from anygen.stages.bundle import BundleConfig
from tokenizers_mm.media import Audio

PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
SOUND = Audio(np.sin(np.arange(1600) / 9).astype(np.float32) / 2, 16_000)
INPUTS: dict[str, dict[str, Any]] = {
    "text": {"text": "two cats left of a dog"},
    "image": {"image": PICTURE},
    "audio": {"audio": SOUND},
}
TASKS = {  # backwards: from the answer to the input
    ("image", "text"): "depict",
    ("text", "image"): "caption",
    ("audio", "image"): "caption",
    ("image", "audio"): "depict",
    ("text", "audio"): "transcribe",
    ("audio", "text"): "speak",
}


def block(model: AnyGen, kind: str, content: Any) -> list[int]:
    return model.sequencer.block_ids(model.bundle.tokenizers[kind].encode(content)).tolist()  # type: ignore[index]


def nats_of(model: AnyGen, plain: Any, given: str, wanted: str, sample: Sample, judge: str) -> float:
    """-ln p of input or answer given the other, written out: one sequence, no packing, codes by their own codebook."""
    control = model.bundle.vocabulary.control
    asked, answer = block(model, given, INPUTS[given][given]), list(sample.ids[:-1])  # without <eos>
    known, told, task = (
        (answer, asked, TASKS[given, wanted]) if judge == "backward" else (asked, answer, TASKS[wanted, given])
    )
    read = [control("bos"), control(task), *known, control("target")]
    told = [*told, control("eos")]
    logits_SV = plain(input_ids=torch.tensor([read + told]), use_cache=False).logits[0].double()
    nats = 0.0
    for place, label in enumerate(told, len(read)):
        kind = next(r for r in model.bundle.vocabulary.ranges if r.start <= label < r.start + r.size)
        span = slice(kind.start, kind.start + kind.size) if kind.group in ("image", "audio") else slice(None)
        row = logits_SV[place - 1]
        nats += float(torch.logsumexp(row[span], 0) - row[label])
    return nats


@pytest.fixture(scope="module")
def plain(model: AnyGen) -> Any:
    plain = copy.deepcopy(model.bundle.model)
    plain.set_attn_implementation("eager")
    return plain


@pytest.mark.parametrize("judge", ["backward", "forward", "both"])
@pytest.mark.parametrize(("given", "wanted"), TASKS)
def test_the_best_answer_is_kept(
    model: AnyGen, plain: Any, monkeypatch: pytest.MonkeyPatch, given: str, wanted: str, judge: Any
) -> None:
    options = {**INPUTS[given], "output": wanted, "temperature": 3.0, "max_new_tokens": 60, "seed": 5}
    drawn = model.generate(**options, num_samples=6).samples
    nats = [nats_of(model, plain, given, wanted, sample, "backward" if judge == "both" else judge) for sample in drawn]
    if judge == "both":  # and forward as if it were 15 ids
        forward = [nats_of(model, plain, given, wanted, sample, "forward") / len(sample.ids) for sample in drawn]
        nats = [back + 15 * mean for back, mean in zip(nats, forward, strict=True)]
    assert len({sample.ids for sample in drawn}) > 1 and np.ptp(nats) > 1e-3, "else anything could be kept"
    if judge != "backward":
        usual = {f"{given}>{wanted}": BestOf(number=1, judge=judge)}
        monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of=usual))
    kept = model.generate(**options, num_samples=2, best_of=3).samples
    expected = [min(range(3), key=lambda i: nats[i]), min(range(3, 6), key=lambda i: nats[i])]
    assert [sample.seed for sample in kept] == [5 + i for i in expected]
    assert [sample.ids for sample in kept] == [drawn[i].ids for i in expected]
    again = model.generate(**{**options, "seed": kept[1].seed}).samples[0]
    assert again.ids == kept[1].ids, "its own seed gives a kept answer again"


def test_others_in_the_batch_are_left_alone(model: AnyGen) -> None:
    request = Request(text="one", output="image", seed=3, temperature=2.0)
    ranked = Request(text="a cat", output="image", seed=3, temperature=2.0, best_of=4)
    together = model.generate_batch([request, ranked, request])
    assert together[0].samples[0].ids == together[2].samples[0].ids == model.generate_batch([request])[0].samples[0].ids
    assert together[1].samples[0].ids == model.generate_batch([ranked])[0].samples[0].ids
    assert together[1].samples[0].provenance["request"]["best_of"] == 4
    assert "best_of" not in together[0].samples[0].provenance["request"]


def test_one_generator_draws_different_answers(model: AnyGen) -> None:
    options = {"text": "a cat", "output": "image", "temperature": 3.0}
    alone = model.generate(**options, generator=torch.Generator().manual_seed(1)).samples[0]
    seen = {
        model.generate(**options, generator=torch.Generator().manual_seed(1), best_of=n).samples[0].ids
        for n in (2, 4, 8)
    }
    assert seen - {alone.ids}, "of eight answers another one than the first is kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "a", "image": PICTURE, "output": "text"}, "image, text -> text"),
        ({"text": "a", "output": ("text", "image")}, "text -> text, image"),
        ({"text": "a", "output": "text"}, "text -> text"),
        ({"image": PICTURE, "output": "region"}, "image -> region"),
        ({"content": [{"type": "region", "region": [0.1, 0.1, 0.5, 0.5]}], "output": "text"}, "region -> text"),
        ({"text": "a", "output": "any"}, "text -> any"),
        ({"output": "image"}, "no input -> image"),
        ({"image": PICTURE, "mask": np.eye(16, dtype=bool), "output": "image"}, "image -> image"),
    ],
)
def test_what_cannot_be_read_backwards_is_refused(model: AnyGen, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(**arguments, best_of=2)


@pytest.mark.parametrize("best_of", [0, True, 1.5, 1025])
def test_its_number_is_checked(best_of: Any) -> None:
    with pytest.raises(InputError, match="best_of must be an integer from 1 to 1024"):
        Request(text="a", output="image", best_of=best_of)
    with pytest.raises(InputError, match="best_of must be an integer from 1 to 2"):
        Request(text="a", output="image", num_samples=400, best_of=3)


@pytest.fixture
def choosy(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> AnyGen:
    """The tiny model, whose bundle draws four pictures of a text and keeps one."""
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of={"text>image": BestOf(number=4)}))
    return model


DRAWN: dict[str, Any] = {"text": "a cat", "output": "image", "temperature": 3.0, "seed": 5}


def test_the_bundle_says_where_it_helps_and_the_caller_has_the_last_word(choosy: AnyGen) -> None:
    kept = choosy.generate(**DRAWN).samples[0]
    asked = choosy.generate(**DRAWN, best_of=4).samples[0]
    first = choosy.generate(**DRAWN, best_of=1).samples[0]
    assert (kept.ids, kept.seed) == (asked.ids, asked.seed) != (first.ids, first.seed)
    assert kept.provenance["request"]["best_of"] == 4 and first.provenance["request"]["best_of"] == 1
    assert choosy.generate(**DRAWN, num_samples=2).samples[1].seed in range(9, 13)
    finished = list(choosy.stream(**DRAWN))[-1]
    assert isinstance(finished, Finished) and finished.output.samples[0].ids == first.ids, "a stream cannot wait"


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 4),
        ({"task": "depict"}, 4),
        ({"task": "answer"}, None),
        ({"temperature": 0.0}, None),
        ({"top_k": 1}, None),
        ({"output": "audio"}, None),
        ({"output": ("image", "audio")}, None),
        ({"decoder": "voken"}, None),
        ({"num_samples": 300}, 3),
        ({"num_samples": 600}, None),
        ({"best_of": 2}, 2),
    ],
)
def test_what_is_usual_is_drawn_where_it_can_be(choosy: AnyGen, changes: dict[str, Any], number: int | None) -> None:
    request = Request(**DRAWN | changes)
    assert with_usual_best_of(request, choosy.bundle).best_of == number
    assert request.best_of == changes.get("best_of"), "the caller's request is as it was"


def test_a_model_that_draws_the_same_every_time_draws_once(choosy: AnyGen) -> None:
    request, greedy = Request(text="a cat", output="image"), SamplingOptions(temperature=0.0)

    def drawn(temperature: float | None = None, **defaults: SamplingOptions) -> int:
        best_of = BestOf(number=4, temperature=temperature)
        bundle = dataclasses.replace(choosy.bundle, best_of={"text>image": best_of}, defaults=defaults)
        return with_usual_best_of(request, bundle).num_drawn

    assert drawn(image=greedy, control=greedy) == 1
    assert drawn(image=greedy) == 4, "sizes are still drawn"
    assert drawn(0.5, image=greedy, control=greedy) == 4


def test_several_answers_have_temperatures_of_their_own(model: AnyGen) -> None:
    best_of = {"image>text": BestOf(number=4, temperature=0.7), "text>audio": BestOf(number=2, temperature=0.3)}
    bundle = dataclasses.replace(model.bundle, best_of=best_of, via={"image>audio": "text_only"})

    def temperatures(**arguments: Any) -> dict[str, float]:
        request = with_usual_best_of(Request(**arguments), bundle)
        changed = {name: options.temperature for name, options in options_of(request, bundle).items()}
        return {name: temperature for name, temperature in changed.items() if temperature != 1.0}

    assert temperatures(image=PICTURE, output="text") == {"text": 0.7}
    assert temperatures(image=PICTURE, output="text", best_of=1) == {}
    assert temperatures(image=PICTURE, output="text", temperature=0.4)["text"] == 0.4, "the caller has the last word"
    assert temperatures(image=PICTURE, output="audio") == {}, "no number is usual: one answer"
    assert temperatures(image=PICTURE, output="audio", best_of=3) == {"text": 0.7, "audio": 0.3}
    assert temperatures(image=PICTURE, output="audio", best_of=3, via="nothing") == {}
    assert temperatures(image=PICTURE, output="text", task="answer", best_of=3) == {}, "another task"


def test_they_are_drawn_at_these(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = dataclasses.replace(model.bundle, defaults={"text": SamplingOptions(temperature=0.01)})
    monkeypatch.setattr(model, "bundle", cold)
    call: dict[str, Any] = {"image": PICTURE, "output": "text", "max_new_tokens": 40, "seed": 3}
    usual = {"image>text": BestOf(number=4, temperature=3.0)}
    one, several = model.generate(**call).samples[0], dataclasses.replace(cold, best_of=usual)
    monkeypatch.setattr(model, "bundle", several)
    kept = model.generate(**call).samples[0]
    options = {**options_of(Request(**call), several)}
    options["text"] = options["text"].override(temperature=3.0)
    monkeypatch.setattr(model, "bundle", dataclasses.replace(cold, defaults=options))
    again = model.generate(**{**call, "seed": kept.seed}).samples[0]
    assert again.ids == kept.ids != one.ids


def test_what_is_written_on_the_way_counts_as_drawn(model: AnyGen) -> None:
    greedy = SamplingOptions(temperature=0.0)
    facts: dict[str, Any] = {"best_of": {"audio>image": BestOf(number=4)}, "via": {"audio>image": "text_only"}}
    bundle = dataclasses.replace(model.bundle, defaults={"image": greedy, "control": greedy}, **facts)
    request = Request(audio=SOUND, output="image")
    assert with_usual_best_of(request, bundle).num_drawn == 4, "texts differ"
    assert with_usual_best_of(dataclasses.replace(request, via="nothing"), bundle) == dataclasses.replace(
        request, via="nothing"
    )


def test_the_answer_to_another_task_is_judged_backward(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    call: dict[str, Any] = {"image": PICTURE, "output": "text", "task": "answer", "best_of": 8, "temperature": 3.0}
    before = model.generate(**call, max_new_tokens=40).samples[0]
    usual = {"image>text": BestOf(number=1, judge="forward")}
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, best_of=usual))
    assert model.generate(**call, max_new_tokens=40).samples[0].ids == before.ids
    call["task"] = "caption"
    assert model.generate(**call, max_new_tokens=40).samples[0].ids != before.ids, "else the judge changes nothing"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"text>text": 2}, "best_of holds directions from one of text, image, audio to another"),
        ({"text>image,text": 2}, "best_of holds directions"),
        ({"image": 2}, "best_of holds directions"),
        ({"text>image": 0}, "best_of.text>image.number.*greater than or equal to 1"),
        ({"text>image": True}, "best_of.text>image.number.*valid integer"),
        ({"text>image": {"judge": "forward"}}, "best_of.text>image.number.*(required|missing)"),
        ({"text>image": {"number": 2, "judge": "sideways"}}, "best_of.*'backward', 'forward' or 'both'"),
        ({"text>image": {"number": 2, "temperature": -1}}, "best_of.*greater than or equal to 0"),
        ({"text>image": {"number": 2, "temperature": True}}, "best_of.text>image.temperature.*valid number"),
        ({"text>image": {"number": 2, "temprature": 1}}, "best_of.text>image.temprature"),
    ],
)
def test_a_bundle_that_could_not_do_it_is_refused(
    bundle_folder: Path, tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(BundleConfig, {"name": "a", "best_of": facts}, source="test")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_bundle(saying(facts, bundle_folder, tmp_path))
    assert "\n" not in str(caught.value)


def saying(facts: dict[str, Any], bundle_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    edit(folder / "anygen.json", lambda written: written.update(best_of=facts))
    resealed(folder)
    return folder


def test_a_bundle_holds_it(bundle_folder: Path, tmp_path: Path) -> None:
    facts = {"text>image": 8, "audio>text": {"number": 4, "judge": "forward", "temperature": 0.7}}
    held = load_bundle(saying(facts, bundle_folder, tmp_path)).best_of
    assert held == {
        "text>image": BestOf(number=8),
        "audio>text": BestOf(number=4, judge="forward", temperature=0.7),
    }
    assert best_of_to_json(held) == facts, "written as it was read"
    bundle = load_bundle(bundle_folder)
    named = ("model", "vocabulary", "layout", "tokenizers", "defaults", "provenance")
    save_bundle(tmp_path / "s", **{name: getattr(bundle, name) for name in named}, card="", best_of=held)
    assert load_bundle(tmp_path / "s").best_of == held
    assert load_bundle(bundle_folder).best_of == {}
    assert "best_of" not in BundleConfig(name="a").model_dump(), "recipes of before stay what they were"
    assert build(BundleConfig, {"name": "a", "best_of": facts}, source="test").model_dump()["best_of"] == facts


def test_it_is_not_streamed(model: AnyGen) -> None:
    with pytest.raises(InputError, match="cannot be streamed"):
        model.stream(text="a", output="image", best_of=2)
    with pytest.raises(InputError, match="watched by on_event"):
        model.generate(text="a", output="image", best_of=2, on_event=print)


def test_from_the_command_line(bundle_folder: Path, tmp_path: Path) -> None:
    command = [
        "generate",
        "--text",
        "a cat",
        "--output",
        "image",
        "--model",
        str(bundle_folder),
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, [*command, "--best-of", "3", "--num-samples", "2"])
    assert done.exit_code == 0, done.output
    seeds = [json.loads((tmp_path / f"0{i}.json").read_text())["seed"] for i in range(2)]
    assert seeds[0] in (0, 1, 2) and seeds[1] in (3, 4, 5)


def test_what_is_alike_is_judged_once(model: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    nats = ranking.answer_nats

    def counted(model: Any, vocabulary: Any, sequences: list[Any]) -> Any:
        judged.append(len(sequences))
        return nats(model, vocabulary, sequences)

    monkeypatch.setattr(ranking, "answer_nats", counted)
    kept = model.generate(image=PICTURE, output="text", best_of=64, temperature=0.01, seed=7).samples[0]
    assert judged[0] < 64 and kept.seed is not None
    same = model.generate(image=PICTURE, output="text", num_samples=64, temperature=0.01, seed=7).samples
    assert kept.seed == next(sample.seed for sample in same if sample.ids == kept.ids), "the first of those alike"
