"""Rare things come more often, in exact proportion, and nothing is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anygen.config import build
from anygen.data.coded import CodedRecord, CodedStore, CodedUtterance, write_coded_shard
from anygen.data.rarity import repeats_by_direction, repeats_by_rarity
from anygen.data.tasks import DocumentStream
from anygen.errors import ConfigError
from anygen.stages import pretrain
from anygen.stages.pretrain import PretrainConfig
from tokenizers_mm.codes import Codes
from tokenizers_mm.text import TextTokenizer

TONES = ("light", "medium", "dark")


def named(*captions: str, kind: str = "emoji") -> CodedRecord:
    return CodedRecord(captions[0], kind, captions)


RECORDS = [
    *(named(f"hand, {tone} skin tone", f"a Hand with {tone} skin tone") for tone in TONES),
    named("duck", "a duck", "a picture of a duck"),
    named("Cat"),
    named("weary cat"),
    *(named(f"a scene {n} of hand and cat", kind="scene") for n in range(4)),
]


def test_a_record_is_as_rare_as_its_rarest_word_among_its_kind() -> None:
    assert repeats_by_rarity(RECORDS, 3).tolist() == [3, 3, 3, 3, 2, 3, 3, 3, 3, 3]
    alike = [named(f"hand, {tone} skin tone") for tone in TONES * 6] + [named("duck")]
    assert repeats_by_rarity(alike, 4).tolist() == [2] * 18 + [4], "each tone stands in six: 4 / sqrt(6)"
    assert repeats_by_rarity([named("hand")] * 50, 3).tolist() == [1] * 50, "never less than once"
    assert repeats_by_rarity([CodedRecord("x", "pair")], 3).tolist() == [3], "without words, as one of all"


def test_what_is_only_spoken_counts_too() -> None:
    said = CodedUtterance("Duck!", "v", Codes(np.zeros((1, 3), int), "audio"))
    records = [CodedRecord(str(n), "pair", utterances=(said,)) for n in range(9)] + [named("ape", kind="pair")]
    assert repeats_by_rarity(records, 3).tolist() == [1] * 9 + [3]


@pytest.mark.parametrize("block", [0, 1])
def test_an_epoch_of_the_stream_holds_each_as_often_as_it_is_to_come(
    block: int, tmp_path: Path, text_tokenizer: TextTokenizer
) -> None:
    write_coded_shard(tmp_path / "s0", RECORDS[:5], facts={})
    write_coded_shard(tmp_path / "s1", RECORDS[5:], facts={})
    store = CodedStore([tmp_path / "s0", tmp_path / "s1"], facts={})
    stream = DocumentStream(
        store, {"emoji:text>text": 1}, {"text": text_tokenizer}, drop_share=0, free_share=0, seed=0,
        rare_repeats={"emoji:text>text": 3}, shards_per_block=block,
    )  # fmt: skip
    keys = Counter(store[stream._record_of(stream._mixture(number))].key for number in range(2 * 17))
    assert [keys[record.key] for record in RECORDS[:6]] == [6, 6, 6, 6, 4, 6]
    assert not any(keys[record.key] for record in RECORDS[6:])


def test_each_direction_has_its_own(tmp_path: Path, text_tokenizer: TextTokenizer) -> None:
    write_coded_shard(tmp_path / "s0", RECORDS, facts={})
    store = CodedStore([tmp_path / "s0"], facts={})
    stream = DocumentStream(
        store, {"emoji:text>text": 1, "text>text": 1, "scene:text>text": 1}, {"text": text_tokenizer}, drop_share=0,
        free_share=0, seed=0, rare_repeats={"emoji:text>text": 3, "scene:text>text": 2},
    )  # fmt: skip
    epochs = {text: Counter(numbers.tolist()) for text, numbers in stream._eligible.items()}
    assert [epochs["emoji:text>text"][number] for number in range(10)] == [3, 3, 3, 3, 2, 3, 0, 0, 0, 0]
    assert [epochs["text>text"][number] for number in range(10)] == [1] * 10, "not named: as the store has them"
    assert [epochs["scene:text>text"][number] for number in range(10)] == [0] * 6 + [2] * 4


def test_the_recipe_refuses_what_would_leave_records_out() -> None:
    values = {"mixture": {"text>text": 1}, "loop": {"steps": 1}, "rare_repeats": 0.5}
    with pytest.raises(ConfigError, match="rare_repeats"):
        build(PretrainConfig, values, source="test")
    with pytest.raises(ConfigError, match="rare_repeats"):
        build(PretrainConfig, values | {"rare_repeats": {"text>text": 0.5}}, source="test")
    with pytest.raises(ConfigError, match="text>image is no direction of mixture"):
        build(PretrainConfig, values | {"rare_repeats": {"text>text": 2, "text>image": 2}}, source="test")
    with pytest.raises(ConfigError) as refused:
        build(PretrainConfig, values, source="test")
    assert str(refused.value).count("rare_repeats") == 1, "one mistake, told once"
    with pytest.raises(ConfigError, match="'mixture': 'text>imag' is not a direction"):
        build(PretrainConfig, values | {"rare_repeats": 1, "mixture": {"text>imag": 1}}, source="test")
    assert repeats_by_direction({"a": 2.0}, ["a", "b"]) == {"a": 2}, "the others are as they are"
    recipe = build(PretrainConfig, values | {"rare_repeats": 1}, source="test")
    assert "rare_repeats" not in recipe.model_dump(), "recipes of before stay what they were"


def test_the_recipe_counts_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(pretrain, "CodedStore", lambda *_, **__: None)
    monkeypatch.setattr(pretrain, "DocumentStream", lambda *_, rare_repeats, **__: asked.append(rare_repeats))
    values = {"mixture": {"text>text": 1}, "loop": {"steps": 1}, "rare_repeats": 3}
    for split in ("train", "validation"):
        pretrain._Pretraining._open(build(PretrainConfig, values, source="test"), {}, {}, split)
    assert asked == [{"text>text": 3}, {}]
