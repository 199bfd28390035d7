"""Quizzes: a picture and several questions about it in turn, so that one reading of it teaches several answers.

A listing says what stands where, in words. Written before an answer, it turns finding what a name means in a picture
into finding a word in a text (grounded chain of thought: Shikra, arXiv 2306.15195). Without it `nano` told two kinds
of things apart no better than by chance; see benchmarks/README.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from anygen.data.coded import CodedRecord
from anygen.data.emoji_names import pluralised, with_article
from anygen.data.scenes import NUMBER_WORDS
from anygen.documents import Document, Segment
from tokenizers_mm.codes import Modality
from tokenizers_mm.media import Region

Placed = tuple[str, Region]
_ROWS, _COLUMNS = ("above", "", "below"), ("left", "", "right")


def quiz_document(record: CodedRecord, generator: random.Random, *, listed: bool) -> Document:
    """The picture, then two names with their boxes and two questions, in any order, then a box with its name.

    Few, and the box last: what was said before would give too much of an answer away. The task is that of the first
    target. Where `listed`, that is a listing, and so before every answer: a caption, as `Request.document` asks for
    one. Nobody needs it for what is in a box, which is left out.
    """
    assert record.picture is not None, "directions are given the records that they need"
    places = first_of_each(record.objects)
    if len(places) > 2:
        places = generator.sample(places, 2)
    questions = generator.sample(record.questions, min(2, len(record.questions)))
    turns: list[tuple[str, tuple[Modality, Any], tuple[Modality, Any]]] = [
        *(("answer", ("text", question), ("text", answer)) for question, answer in questions),
        *(("locate", ("text", thing), ("region", box)) for thing, box in places),
    ]
    generator.shuffle(turns)
    if not listed:
        thing, box = generator.choice(record.objects)
        turns.append(("answer", ("region", box), ("text", thing)))
    segments = [Segment("image", record.picture)]
    for _, given, answer in turns:
        segments.append(Segment(*given))
        if listed:
            segments.append(Segment("text", listing(record.objects, given[1]), target=True))
        segments.append(Segment(*answer, target=True))
    return Document(tuple(segments), "caption" if listed else turns[0][0])


def listing(objects: Sequence[Placed], question: str = "") -> str:
    """What a question is about, then what stands where, row by row; what it is about is counted.

    A place is the third of the picture in which the middle of the box lies.

    >>> cat, dog = ("cat", Region((0.6, 0.0, 1.0, 0.4))), ("dog", Region((0.0, 0.1, 0.5, 0.5)))
    >>> listing([cat, dog, ("dog", Region((0.5, 0.5)))], "how many dogs are there?")
    'a dog? above left dog one, above right cat, middle dog two'
    """
    asked, count = asked_about(question, {name for name, _ in objects}), 0
    entries = []
    for thirds, name in sorted((_thirds(region), name) for name, region in objects):
        count += name == asked
        number = [NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)] if name == asked else []
        entries.append(" ".join((*_place(*thirds), name, *number)))
    return (f"{with_article(asked)}? " if asked else "") + ", ".join(entries)


def asked_about(question: str, names: Iterable[str]) -> str:
    """The longest of these names in the question, as it is or in the plural; nothing where none is.

    >>> asked_about("what is left of the black cats?", ["cat", "black cat", "dog"])
    'black cat'
    """
    words = f" {question.strip('?.! ')} "
    found = [name for name in names if f" {name} " in words or f" {pluralised(name)} " in words]
    return max(sorted(found), key=len, default="")


def first_of_each(objects: tuple[Placed, ...]) -> list[Placed]:
    """Each name with the first box that has it (in a scene the highest, then leftmost): a name has one answer."""
    return list(dict(reversed(objects)).items())


def _thirds(region: Region) -> tuple[int, int]:
    """Row and column, 0 to 2, of the middle of a box or of a point."""
    x0, y0, x1, y1 = region.values if len(region.values) == 4 else region.values * 2
    return min(int(3 * (y0 + y1) / 2), 2), min(int(3 * (x0 + x1) / 2), 2)


def _place(row: int, column: int) -> list[str]:
    return [word for word in (_ROWS[row], _COLUMNS[column]) if word] or ["middle"]
