"""Own voices: a model speaks in a few voices and hears all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anygen.config import build
from anygen.data.coded import CodedRecord, CodedStore, CodedUtterance, write_coded_shard
from anygen.data.tasks import DocumentStream
from anygen.stages import pretrain
from anygen.stages.pretrain import PretrainConfig
from tokenizers_mm.codes import Codes
from tokenizers_mm.text import TextTokenizer

VOICES = ("awb", "slt", "kal")


def said(voice: str, number: int = 0) -> CodedUtterance:
    """What a voice says; its place in VOICES is its first code."""
    return CodedUtterance("a cat", voice, Codes(np.array([[VOICES.index(voice), number]]), "audio"))


PICTURE = Codes(np.zeros((1, 4), int), "image", (2, 2))
ALL = CodedRecord(
    "all", "emoji", ("a cat",), PICTURE, tuple(said(v) for v in VOICES), (), (),
    tuple((said(v, 1), said(w, 2)) for v in VOICES for w in VOICES),
)  # fmt: skip
OTHERS = replace(ALL, key="others", utterances=(said("awb"), said("kal")), spoken_questions=())


def voices_of(
    direction: str, record: CodedRecord, tmp_path: Path, text_tokenizer: TextTokenizer, own: tuple[str, ...]
) -> tuple[set[str], set[str]]:
    """In which voices 60 documents give sound, and in which they ask for it."""
    write_coded_shard(tmp_path / "s0", [record], facts={})
    store = CodedStore([tmp_path / "s0"], facts={})
    stream = DocumentStream(
        store, {direction: 1}, {"text": text_tokenizer}, drop_share=0, free_share=0, seed=0, own_voices=own
    )
    sounds = [s for number in range(60) for s in stream(number)[0].segments if s.modality == "audio"]
    voices = [(VOICES[s.content.codes_KT[0, 0]], s.target) for s in sounds]  # type: ignore[union-attr]
    return {v for v, target in voices if not target}, {v for v, target in voices if target}


@pytest.mark.parametrize(
    ("direction", "given", "asked"),
    [
        ("text>audio", set(), {"slt"}),
        ("image>audio", set(), {"slt"}),
        ("image>text,audio", set(), {"slt"}),
        ("audio>text", set(VOICES), set()),
        ("audio>image", set(VOICES), set()),
        ("audio>audio", set(VOICES), set(VOICES)),
        ("ask_aloud", set(VOICES), {"slt"}),
    ],
)
def test_it_speaks_in_its_own_voice_and_hears_all(
    direction: str, given: set[str], asked: set[str], tmp_path: Path, text_tokenizer: TextTokenizer
) -> None:
    assert voices_of(direction, ALL, tmp_path, text_tokenizer, ("slt",)) == (given, asked)


def test_what_none_of_its_voices_says_is_said_by_the_others(tmp_path: Path, text_tokenizer: TextTokenizer) -> None:
    assert voices_of("text>audio", OTHERS, tmp_path, text_tokenizer, ("slt",)) == (set(), {"awb", "kal"})


def test_the_recipe_passes_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(pretrain, "CodedStore", lambda *_, **__: None)
    monkeypatch.setattr(pretrain, "DocumentStream", lambda *_, own_voices, **__: asked.append(own_voices))
    values = {"mixture": {"text>text": 1}, "loop": {"steps": 1}, "own_voices": ["slt"]}
    for split in ("train", "validation"):
        pretrain._Pretraining._open(build(PretrainConfig, values, source="test"), {}, {}, split)
    assert asked == [("slt",), ("slt",)]


def test_without_own_voices_it_speaks_in_all(tmp_path: Path, text_tokenizer: TextTokenizer) -> None:
    assert voices_of("text>audio", ALL, tmp_path, text_tokenizer, ()) == (set(), set(VOICES))
    values = {"mixture": {"text>text": 1}, "loop": {"steps": 1}}
    assert "own_voices" not in build(PretrainConfig, values, source="test").model_dump(), "recipes of before stay"
    assert build(PretrainConfig, values | {"own_voices": ["slt"]}, source="test").own_voices == ("slt",)
