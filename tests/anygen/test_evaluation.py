"""The measures of the emoji world, on answers whose score is known."""

from __future__ import annotations

import math

import pytest

from anygen.data.emoji_names import captions
from anygen.data.emoji_pictures import FONT_PATHS
from anygen.evaluation.emoji import RealEmoji, num_word_errors, proportion, word_error_rate, words_of

pytest.importorskip("jiwer", reason="the extra [eval] is not installed")


@pytest.mark.parametrize(
    ("truth", "answer", "errors"),
    [
        ("a red apple", "a red apple", 0),
        ("a red apple", "A RED, apple!", 0),
        ("a red apple", "a read apple", 1),
        ("a red apple", "", 3),
        ("", "two words", 2),
        ("man, dark skin tone", "man medium-dark skin tone", 1),
    ],
)
def test_word_errors(truth: str, answer: str, errors: int) -> None:
    assert num_word_errors(truth, answer) == errors


def test_rates_and_intervals() -> None:
    score = word_error_rate(["a b", "c d"] * 50, ["a b", "c x"] * 50)
    assert score.value == 0.25 and score.low < 0.25 < score.high and score.count == 100
    assert score.examples[0] == ("c d", "c x")
    share = proportion([True, False] * 200, [("t", "a")] * 400)
    assert share.value == 0.5 and 0.44 < share.low < 0.46 and len(share.examples) == 20
    assert math.isnan(proportion([]).value) and math.isnan(word_error_rate([], []).value)
    assert words_of("Mx Claus, T-Rex's") == ["mx", "claus", "t-rex's"]


@pytest.mark.slow
@pytest.mark.skipif(not any(p.is_file() for p in FONT_PATHS), reason="needs fonts-noto-color-emoji")
def test_retrieval_finds_the_real_thing_and_counts_twins_as_one() -> None:
    world = RealEmoji(32)
    for index in range(0, len(world.emoji), 400):
        assert world.nearest(world.pictures[index]) == world.classes[index]
    names = {emoji.name: index for index, emoji in enumerate(world.emoji)}
    norway, bouvet = names["Norway"], names["Bouvet_Island"]
    assert world.classes[norway] == world.classes[bouvet]
    assert set(captions(world.emoji[bouvet].parts)) <= world.captions_of(norway)
    assert world.classes[names["cat"]] != world.classes[names["dog"]]
    assert set(world.spoken_forms_of(norway)) < world.captions_of(norway)
    held_out, twin = world.held_out(), names["snowboarder_light_skin_tone"]
    assert world.emoji[twin].split != "train" and world.classes[twin] == world.classes[names["snowboarder"]]
    assert twin not in held_out and 300 < len(held_out) < 400, "the font draws it like one that was seen"
