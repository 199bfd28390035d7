"""The study of codebook orders: its figures against ones computed otherwise, and the whole road on a tiny run."""

from __future__ import annotations

import doctest
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.codebooks import OrderName
from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.data.speech import speak
from anygen.documents import Document, Segment
from anygen.files import write_json
from anygen.grammar import Block, Plan
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.media import Audio
from tokenizers_mm.text import TextTokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # as where the scripts run
import sound_orders
import spoken_names
from spoken_names import Spoken

pytest.importorskip("jiwer", reason="the extra [eval] is not installed")

ORDERS: tuple[OrderName, ...] = ("flat", "sequential", "delay", "coarse")
RATE_HZ = 8000
ARGUMENTS = ["--steps", "3", "--tokens-per-step", "512", "--voices", "v", "w", "--kept", "1", "--limit", "3"]


def spoken(text: str, *, key: str | None = None, frames: int = 5, seed: int = 0) -> Spoken:
    codes_KT = np.random.default_rng(seed).integers(0, 16, (2, frames))
    sound = Audio(np.zeros(160 * frames, np.float32), RATE_HZ)
    return Spoken(key or text, text, "v", sound, Codes(codes_KT, "audio"))


def of_order(model: AnyGen, order: OrderName) -> AnyGen:
    """The untrained model, its sound in another order."""
    layout = replace(model.bundle.layout, audio_order=order, audio_kept=1 if order == "coarse" else 0)
    return AnyGen(replace(model.bundle, layout=layout))


def by_sampler(model: AnyGen, s: Spoken) -> float:
    """Bits of all codes of an utterance, one step of the sampler's engine after the other."""
    sequencer, control = model.sequencer, model.bundle.vocabulary.control
    text = Document((Segment("text", s.text),), "speak").encode(model.bundle.tokenizers)
    prompt = sequencer.prompt(text)
    block = sequencer.block_ids(s.of_books(sequencer.orders["audio"].num_kept))
    walk = model.grammar.start(Plan((Block("audio"),)), budget=2000)
    cache = model.engine.new_cache(1, len(prompt) + len(block) + 1)
    hidden_1D, bits = model.engine.prefill([prompt], cache), 0.0
    for id in [*block.tolist(), control("eos")]:
        logits_1A = model.engine.logits(hidden_1D, walk.allowed)
        place = [i for start, stop in walk.allowed for i in range(start, stop)].index(id)
        if walk.num_codes and id != control("/audio") and walk.modality == "audio":
            bits -= float(logits_1A.log_softmax(-1)[0, place]) / math.log(2)
        walk.push(id)
        hidden_1D = model.engine.step(torch.tensor([id]), cache)
    assert walk.done
    return bits


@pytest.mark.parametrize("order", ORDERS)
def test_bits_are_those_of_the_sampler(model: Any, order: OrderName) -> None:
    ordered = of_order(model, order)
    material = [spoken("a red apple", frames=7, seed=1), spoken("two cats", frames=1, seed=2)]
    bits_nK = sound_orders.bits_by_book(ordered, material)
    assert bits_nK.shape == (2, 1 if order == "coarse" else 2)
    assert bits_nK.sum(1) == pytest.approx([by_sampler(ordered, s) for s in material], rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_ids_of_a_document(model: Any, order: OrderName) -> None:
    sequencer = of_order(model, order).sequencer
    s = spoken("a red apple", frames=7)
    text = model.bundle.tokenizers["text"].encode(s.text)
    document = Document((Segment("text", text), Segment("audio", s.of_books(2), target=True)), "speak")
    settings = sound_orders.Settings(kept=1)
    given = sound_orders.budget(order, settings, num_books=2, pieces=text.num_steps, frames=7)
    assert given.ids == len(sequencer.build(document))


def test_ratio_is_of_sums_and_its_interval_holds_it() -> None:
    top, bottom = np.array([1.0, 10.0, 3.0]), np.array([1.0, 2.0, 3.0])
    found = sound_orders.ratio(top, bottom)
    assert found["value"] == 14 / 6 and found["n"] == 3
    assert 1 <= found["low"] < found["value"] < found["high"] <= 5


def test_only_shared_words_are_kept_until_none_is_rare() -> None:
    names = ["red apple", "red cat", "green cat", "green apple", "green frog", "frog prince"]
    kept = spoken_names.shared_words([spoken(name) for name in names], 2)
    assert [s.text for s in kept] == names[:4]  # prince is rare, then frog
    kept = spoken_names.shared_words([spoken(name) for name in names[:3]], 2)
    assert [s.text for s in kept] == []  # apple and green are rare, then red and cat
    twice = [spoken("red cat", key="1"), spoken("red cat", key="1")]
    assert spoken_names.shared_words(twice, 2) == []  # two voices are one name


def test_held_out_names_have_only_words_of_training() -> None:
    material = [spoken(f"{colour} {thing}") for colour in "abcd" for thing in "stuvwxyz"]
    material += [spoken(s.text) for s in material]  # a second voice
    groups = spoken_names.split_off(material)
    keys = {group: {s.key for s in found} for group, found in groups.items()}
    assert len(keys["held_out"]) == 5 and len(groups["held_out"]) == 10
    assert not keys["train"] & keys["held_out"]
    counts = spoken_names.names_by_word(groups["train"])
    assert all(counts[word] >= 2 for s in material for word in s.text.split())
    assert spoken_names.about(groups)["held_out_texts_in_training"] == 0
    rare = spoken_names.split_off([spoken(text) for text in ("a b", "b a", "c", "d")])
    assert not rare["held_out"]


def test_word_errors_of_known_answers() -> None:
    found = spoken_names.word_errors([("a red apple", "A red apple!"), ("a cat", "cat"), ("a dog", "")])
    assert found["value"] == pytest.approx(3 / 7) and found["exact"] == pytest.approx(1 / 3)
    assert found["low"] <= found["value"] <= found["high"]


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_the_recogniser_hears_names_and_leaves_out_what_it_cannot_spell() -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    texts = ["red apple", "green apple", "a cat", "xzqv apple"]
    recogniser = spoken_names.Recogniser(texts)
    sounds = [speak(text, "slt") for text in texts]
    right = spoken_names.errors_heard(recogniser, [spoken(text) for text in texts], sounds)
    assert right["n"] == 3 and right["value"] == 0
    wrong = spoken_names.errors_heard(recogniser, [spoken("a cat"), spoken("red apple")], [sounds[0], sounds[1]])
    assert wrong["value"] == 3 / 4  # both words of the first, one of the second
    assert recogniser.heard(Audio(np.zeros(160, np.float32), RATE_HZ)) == ""


def test_doctests() -> None:
    for module in (sound_orders, spoken_names):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


@pytest.fixture
def run(tmp_path: Path, audio_tokenizer: AudioTokenizer, text_tokenizer: TextTokenizer) -> Path:
    """A run with 16 names said by two voices, a name with a word of its own, and one that is too long."""
    root = tmp_path / "run"
    (root / "data").mkdir(parents=True)
    names = [
        f"{colour} {thing}" for colour in ("a red", "two", "one", "the") for thing in ("apple", "cats", "dog", "flag")
    ]
    lengths = {name: 0.1 + 0.01 * number for number, name in enumerate([*names, "Norway"])} | {"two red cats": 3.0}
    random = np.random.default_rng(0)
    records = []
    for number, (name, seconds) in enumerate(lengths.items()):
        sounds = [Audio(random.normal(0, 0.1, int(seconds * RATE_HZ)).astype(np.float32), RATE_HZ) for _ in "vwx"]
        said = tuple(Utterance(name, voice, flac_of(sound)) for voice, sound in zip("vwx", sounds, strict=True))
        records.append(Record(f"r{number}", captions=(name,), utterances=said))
    write_shard(root / "data" / "train-00000.tar", records)
    text_tokenizer.save(root / "text_tokenizer")
    write_json(root / "text_tokenizer" / "stage.json", {"identity": "text", "config": {}, "metrics": {}})
    audio_tokenizer.save(root / "audio_tokenizer" / "tokenizer")
    return root


class FirstName:
    """A recogniser that always hears the first name."""

    def __init__(self, groups: spoken_names.Groups) -> None:
        names = [spoken_names.spelled(s.text) for found in groups.values() for s in found]
        self.texts, self.first = frozenset(names), names[0]

    def heard(self, sound: Audio) -> str:
        assert sound.duration_s > 0
        return self.first


@pytest.mark.slow
def test_the_whole_road(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    size = {"size": "smoke", "width": 32, "head_width": 16, "mlp_width": 48, "max_positions": 512}
    monkeypatch.setitem(sound_orders.MODEL, "model", size)
    monkeypatch.setattr(spoken_names, "open_recogniser", FirstName)
    out = tmp_path / "out"
    sound_orders.main([str(run), str(out), *ARGUMENTS, "--orders", "delay", "sequential"])
    first = json.loads((out / "sound_orders.json").read_text())
    assert list(first["runs"]) == ["delay/0", "sequential/0"]

    sound_orders.main([str(run), str(out), *ARGUMENTS])
    assert "delay/0: done before" in capsys.readouterr().out
    results = json.loads((out / "sound_orders.json").read_text())
    assert set(results["runs"]) == {f"{variant}/0" for variant in sound_orders.VARIANTS}
    assert results["runs"]["delay/0"] == first["runs"]["delay/0"]
    assert len(list(out.glob("work-*"))) == 1, "the same codes serve all"
    check(results)
    assert len(list((out / "samples").glob("*.wav"))) == 5 * 2 * 3

    monkeypatch.setattr(sound_orders, "trained", None)  # nothing is left to train
    sound_orders.main([str(run), str(out), *ARGUMENTS])
    assert json.loads((out / "sound_orders.json").read_text()) == results
    with pytest.raises(SystemExit, match="choose another OUT"):
        sound_orders.main([str(run), str(out), *ARGUMENTS, "--max-duration-s", "1.0"])
    with pytest.raises(SystemExit, match="too few names"):
        sound_orders.main([str(run), str(tmp_path / "none"), *ARGUMENTS, "--max-duration-s", "0.05"])


def check(results: dict[str, Any]) -> None:
    """Figures that must agree."""
    data, runs = results["data"], results["runs"]
    assert data["train"]["names"] + data["held_out"]["names"] == 16 and data["held_out"]["utterances"] == 6
    assert set(results["floors"]["held_out"]) == {"original", "codec", "codec, first 1 books"}
    for run in runs.values():
        for group in ("train", "held_out"):
            figures = run[group]
            bits_nK, seconds_n = np.array(figures["bits"]), np.array(figures["seconds"])
            assert bits_nK.shape == (3, run["books"])
            assert figures["bits_per_second"]["value"] == pytest.approx(bits_nK.sum() / seconds_n.sum(), rel=1e-3)
            books = [book["value"] for book in figures["bits_per_second_of_books"]]
            assert sum(books) == pytest.approx(figures["bits_per_second"]["value"])
            for name in ("hearing", "round_trip", "round_trip_own"):
                assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
                assert figures[name]["n"] == 3
            nearly_uniform = run["books"] * 50 * math.log2(16)
            assert figures["bits_per_second"]["value"] == pytest.approx(nearly_uniform, rel=0.25)
    assert runs["sequential/0"]["train"]["more_than_sequential"]["value"] == 0
    difference = [runs[f"{name}/0"]["train"]["bits_per_second"]["value"] for name in ("flat", "sequential")]
    assert runs["flat/0"]["train"]["more_than_sequential"]["value"] == pytest.approx(
        difference[0] - difference[1], abs=0.5
    )
    one_book = runs["sequential/0"]["train"]["bits_per_second_of_books"][0]["value"]
    coarse = runs["coarse/0"]["train"]
    assert coarse["more_than_sequential"]["value"] == pytest.approx(
        coarse["bits_per_second"]["value"] - one_book, abs=0.5
    )
    assert runs["flat/0"]["ids"] == runs["delay/0"]["ids"] > runs["coarse/0"]["ids"]
    assert runs["coarse/0"]["utterances_seen"] > runs["flat/0"]["utterances_seen"]
    assert runs["coarse, equal utterances/0"]["steps"] < runs["coarse/0"]["steps"]
