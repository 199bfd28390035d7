"""Stories of the emoji world: two to four scenes, each a sentence and a picture that go on from the one before.

Things come, leave, and turn into others; who stays keeps place and size, so that a picture follows from all that was
told and shown before it, and not from its own sentence alone.

    a cat and a rocket.   a drum comes.   the cat turns into an owl.   the rocket leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from anygen.data.emoji_names import with_article
from anygen.data.emoji_pictures import Emoji, EmojiFont, on_white

MAX_THINGS = 4


@dataclass(frozen=True)
class _Actor:
    """One thing on the canvas, and where it stays."""

    emoji: Emoji
    side_px: int
    x: int
    y: int

    @property
    def name(self) -> str:
        return self.emoji.parts.subject


def make_story(
    things: Sequence[Emoji], font: EmojiFont, *, side_px: int, generator: np.random.Generator
) -> tuple[tuple[str, Image.Image], ...]:
    """Sentences with their pictures.

    Args:
        things: what may appear, `is_countable` all; at least eight.
        font: draws them.
        side_px: of the pictures, which are white squares.
        generator: of all choices.
    """
    cast = [things[int(i)] for i in generator.choice(len(things), 8, replace=False)]  # nobody appears twice
    cells = [divmod(int(i), 2) for i in generator.permutation(4)]
    actors: dict[int, _Actor] = {}
    for cell in range(1 + int(generator.integers(2))):
        actors[cell] = _arrive(cast.pop(), cells[cell], side_px, generator)
    sentence = " and ".join(with_article(actor.name) for actor in actors.values())
    story = [(f"{sentence}.", _draw(actors, font, side_px))]
    for _ in range(1 + int(generator.integers(3))):
        sentence = _go_on(actors, cast, cells, side_px, generator)
        story.append((sentence, _draw(actors, font, side_px)))
    return tuple(story)


def _go_on(
    actors: dict[int, _Actor],
    cast: list[Emoji],
    cells: Sequence[tuple[int, int]],
    side_px: int,
    generator: np.random.Generator,
) -> str:
    """Change who is there; the sentence that says how."""
    events = ["turns"] + ["comes"] * (len(actors) < MAX_THINGS) + ["leaves"] * (len(actors) > 1)
    event = events[int(generator.integers(len(events)))]
    if event == "comes":
        cell = next(cell for cell in range(MAX_THINGS) if cell not in actors)
        actors[cell] = _arrive(cast.pop(), cells[cell], side_px, generator)
        return f"{with_article(actors[cell].name)} comes."
    cell = sorted(actors)[int(generator.integers(len(actors)))]
    before = actors[cell]
    if event == "leaves":
        del actors[cell]
        return f"the {before.name} leaves."
    actors[cell] = replace(before, emoji=cast.pop())
    return f"the {before.name} turns into {with_article(actors[cell].name)}."


def _arrive(emoji: Emoji, cell: tuple[int, int], side_px: int, generator: np.random.Generator) -> _Actor:
    lane = side_px // 2
    side = int(generator.integers(round(lane * 0.8), lane + 1))
    x, y = (index * lane + int(generator.integers(0, lane - side + 1)) for index in (cell[1], cell[0]))
    return _Actor(emoji, side, x, y)


def _draw(actors: dict[int, _Actor], font: EmojiFont, side_px: int) -> Image.Image:
    canvas = Image.new("RGBA", (side_px, side_px), "white")
    for actor in actors.values():
        canvas.alpha_composite(font.draw(actor.emoji.char, actor.side_px), (actor.x, actor.y))
    return on_white(canvas)
