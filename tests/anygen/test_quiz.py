"""Quizzes and listings: every answer is taught by its question, and by what stands where."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from test_data import CODED

from anygen.data.quiz import asked_about, listing
from anygen.data.tasks import Direction
from anygen.sequence import Sequencer
from tokenizers_mm.media import Region


def test_a_quiz_asks_several_things_of_one_picture(tokenizers: dict[str, Any], sequencer: Sequencer) -> None:
    questions = (("how many?", "two"), ("what is left?", "a cat"), ("what is right?", "a dog"))
    record = dataclasses.replace(CODED[1], questions=questions)
    firsts, asked = set(), set()
    for seed in range(100):
        document = Direction.parse("quiz").document(record, random.Random(seed))
        assert [s.target for s in document.segments] == [False, *(False, True) * 5], "a picture and five turns"
        turns = [(a.content, b.content) for a, b in zip(document.segments[1::2], document.segments[2::2], strict=True)]
        assert set(turns[:-1]) == set(record.objects) | (set(turns) & set(questions)), "every name, and two questions"
        assert turns[-1] in [(box, name) for name, box in record.objects], "a box last"
        assert document.task == ("locate" if turns[0] in record.objects else "answer"), "as it would be asked alone"
        firsts.add(turns[0])
        asked |= set(turns) & set(questions)
        encoded = document.encode(tokenizers)
        assert sequencer.parse(sequencer.build(encoded).ids_S).document == encoded
    assert firsts == set(record.objects) | set(questions) and asked == set(questions)


def test_a_listed_quiz_says_what_stands_where_before_every_answer() -> None:
    left, right = Region((0.0, 0.1, 0.5, 0.5)), Region((0.6, 0.0, 1.0, 0.4))
    questions = (("how many cats are there?", "one"), ("why?", "who knows"))
    record = dataclasses.replace(CODED[1], objects=(("dog", right), ("cat", left)), questions=questions)
    about_cats, about_dogs = (
        "a cat? above left cat one, above right dog",
        "a dog? above left cat, above right dog one",
    )
    expected = {
        ("cat", about_cats, left),
        ("dog", about_dogs, right),
        ("how many cats are there?", about_cats, "one"),
        ("why?", "above left cat, above right dog", "who knows"),
    }
    for seed in range(20):
        document = Direction.parse("quiz_listed").document(record, random.Random(seed))
        assert document.task == "caption" and document.segments[0].content == record.picture
        turns = document.segments[1:]
        assert [s.target for s in turns] == [False, True, True] * 4
        assert {tuple(s.content for s in turns[i : i + 3]) for i in range(0, 12, 3)} == expected


@pytest.mark.parametrize("name", ["quiz", "quiz_listed"])
def test_a_quiz_asks_for_two_boxes_of_a_picture_of_many_things(name: str) -> None:
    many = tuple((f"thing {n}", Region((n / 40, 0.5))) for n in range(40))
    record, asked = dataclasses.replace(CODED[1], objects=many), set()
    for seed in range(100):
        segments = Direction.parse(name).document(record, random.Random(seed)).segments
        regions = [i for i, s in enumerate(segments) if s.modality == "region" and s.target]
        assert len(regions) == 2
        asked |= {segments[i].content for i in regions}
    assert len(asked) > 30, "any two"


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("how many black cats are there?", "black cat"),
        ("how many cats are there?", "cat"),
        ("what is left of the mice?", "mouse"),
        ("mouse", "mouse"),
        ("what does a catfish eat?", ""),
        ("", ""),
    ],
)
def test_a_listing_counts_what_the_question_names(question: str, name: str) -> None:
    assert asked_about(question, ["cat", "black cat", "mouse"]) == name


def test_a_listing_counts_on_in_digits() -> None:
    many = [("ant", Region((i / 6, 0.0))) for i in range(6)]
    assert listing(many, "ant").startswith("an ant? above left ant one, above left ant two, above ant three")
    assert listing(many, "ant").endswith("above right ant 5, above right ant 6")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((0.1, 0.2), "above left"),
        ((0.5, 0.1), "above"),
        ((0.9, 0.5), "right"),
        ((0.5, 0.5), "middle"),
        ((1.0, 1.0), "below right"),
        ((0.0, 0.7, 0.6, 1.0), "below left"),
    ],
)
def test_a_listing_names_thirds(place: tuple[float, ...], words: str) -> None:
    assert listing([("owl", Region(place))]) == f"{words} owl"
