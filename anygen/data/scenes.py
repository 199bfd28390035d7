"""Scenes: 1 to 4 emoji on a canvas, with exact truth (positions, counts, captions, questions).

A scene holds one kind of thing one to four times, or two kinds side by side or one above the other. Everything is
drawn from one generator, so a seed gives the same scenes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from anygen.data.emoji_names import pluralised, with_article
from anygen.data.emoji_pictures import Emoji, EmojiFont, on_white
from tokenizers_mm.media import Region

NUMBER_WORDS = ("no", "one", "two", "three", "four")
Relation = Literal["left of", "above"]
_OPPOSITE = {"left of": "right of", "above": "below"}

# Things that one can count and that English pluralises without surprises; people, signs and masses are left out.
THINGS = frozenset(
    """
    red_apple green_apple banana lemon tangerine pear peach strawberry kiwi_fruit tomato avocado eggplant carrot
    hot_pepper mushroom pineapple mango coconut cucumber onion potato bagel croissant pretzel cookie doughnut cupcake
    lollipop hamburger sandwich taco egg teapot cat cat_face black_cat smiling_cat_with_heart-eyes grinning_cat
    crying_cat dog dog_face poodle fox lion tiger horse cow pig rabbit bear koala panda penguin duck owl eagle swan
    parrot frog turtle snail butterfly honeybee lady_beetle spider crab lobster octopus whale dolphin shark elephant
    giraffe zebra camel kangaroo hedgehog monkey wolf mouse rocket airplane helicopter sailboat bicycle motorcycle bus
    taxi tractor fire_engine locomotive balloon kite soccer_ball basketball guitar violin drum trumpet key hammer
    wrench bell candle umbrella crown ring star red_heart blue_heart green_heart ghost robot snowman cactus
    sunflower tulip rose palm_tree house castle tent bed chair door backpack top_hat t-shirt dress camera
    telephone laptop light_bulb magnet microscope telescope trophy teddy_bear alarm_clock volcano cloud rainbow
    snowflake
    """.split()  # noqa: SIM905  one name a word reads better than 150 quoted strings
)


@dataclass(frozen=True)
class Placed:
    """One emoji on the canvas."""

    name: str
    box: Region


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true of it."""

    picture: Image.Image
    objects: tuple[Placed, ...]
    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""


def is_countable(emoji: Emoji) -> bool:
    """True for emoji that scenes are made of."""
    return emoji.name in THINGS and emoji.split == "train"


def make_scene(things: Sequence[Emoji], font: EmojiFont, *, side_px: int, generator: np.random.Generator) -> Scene:
    """One random scene of `things` (all `is_countable`) on a white square of `side_px`."""
    num_kinds = 1 if generator.random() < 0.4 else 2
    kinds = [things[int(i)] for i in generator.choice(len(things), num_kinds, replace=False)]
    relation: Relation = "left of" if generator.random() < 0.5 else "above"
    counts = _counts(num_kinds, generator)
    cells = _cells(counts, relation, generator)
    canvas = Image.new("RGBA", (side_px, side_px), "white")
    objects = []
    for kind, kind_cells in zip(kinds, cells, strict=True):
        for row, column in kind_cells:
            objects.append(_place(kind, font, canvas, row, column, generator))
    nouns = [kind.parts.subject for kind in kinds]
    return Scene(
        on_white(canvas), tuple(objects), _captions(nouns, counts, relation), _questions(nouns, counts, relation)
    )


def _counts(num_kinds: int, generator: np.random.Generator) -> tuple[int, ...]:
    if num_kinds == 1:
        return (int(generator.integers(1, 5)),)
    return ((1, 1), (1, 2), (2, 1), (2, 2))[int(generator.integers(4))]


def _cells(counts: Sequence[int], relation: Relation, generator: np.random.Generator) -> list[list[tuple[int, int]]]:
    """Cells (row, column) of a 2 x 2 canvas for each kind."""
    if len(counts) == 1:
        order = generator.permutation(4)[: counts[0]]
        return [[(int(i) // 2, int(i) % 2) for i in sorted(order)]]
    sides = []
    for side, count in enumerate(counts):
        lanes = sorted(int(i) for i in generator.permutation(2)[:count])
        sides.append([(lane, side) if relation == "left of" else (side, lane) for lane in lanes])
    return sides


def _place(
    emoji: Emoji, font: EmojiFont, canvas: Image.Image, row: int, column: int, generator: np.random.Generator
) -> Placed:
    cell = canvas.width // 2
    side = int(generator.integers(round(cell * 0.8), cell + 1))
    x = column * cell + int(generator.integers(0, cell - side + 1))
    y = row * cell + int(generator.integers(0, cell - side + 1))
    canvas.alpha_composite(font.draw(emoji.char, side), (x, y))
    fractions = (x, y, x + side, y + side)
    return Placed(emoji.parts.subject, Region(tuple(v / canvas.width for v in fractions)))


def counted(noun: str, count: int, *, word: bool = False) -> str:
    """`a red apple`, `one red apple` or `two red apples`."""
    if count == 1:
        return f"one {noun}" if word else with_article(noun)
    return f"{NUMBER_WORDS[count]} {pluralised(noun)}"


def _captions(nouns: Sequence[str], counts: Sequence[int], relation: Relation) -> tuple[str, ...]:
    if len(nouns) == 1:  # `one`, since `a red apple` is how the emoji alone is called, drawn as large as it can be
        only = counted(nouns[0], counts[0], word=True)
        return (only, f"a picture of {only}")
    first = counted(nouns[0], counts[0])
    second = counted(nouns[1], counts[1])
    return (f"{first} {relation} {second}", f"{second} {_OPPOSITE[relation]} {first}")


def _questions(nouns: Sequence[str], counts: Sequence[int], relation: Relation) -> tuple[tuple[str, str], ...]:
    questions = [
        (f"how many {pluralised(noun)} are there?", NUMBER_WORDS[count])
        for noun, count in zip(nouns, counts, strict=True)
    ]
    if len(nouns) == 2:
        questions.append((f"what is {relation} {_definite(nouns[1], counts[1])}?", counted(nouns[0], counts[0])))
        questions.append(
            (f"what is {_OPPOSITE[relation]} {_definite(nouns[0], counts[0])}?", counted(nouns[1], counts[1]))
        )
    return tuple(questions)


def questions_about(noun: str) -> list[str]:
    """Every question that scenes with this thing may raise.

    >>> questions_about("cat")[:3]
    ['how many cats are there?', 'what is left of the cat?', 'what is left of the cats?']
    """
    relations = (*_OPPOSITE, *_OPPOSITE.values())
    things = (_definite(noun, 1), _definite(noun, 2))
    asked = [f"what is {relation} {thing}?" for relation in relations for thing in things]
    return [f"how many {pluralised(noun)} are there?", *asked]


def answers_about(noun: str) -> list[str]:
    """Every answer that names this thing.

    >>> answers_about("cat")[:2]
    ['a cat', 'two cats']
    """
    return [counted(noun, count) for count in range(1, len(NUMBER_WORDS))]


def _definite(noun: str, count: int) -> str:
    return f"the {noun if count == 1 else pluralised(noun)}"
