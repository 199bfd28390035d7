"""Directions that continue a story, of which a record holds texts and pictures in order.

    story>image          everything up to a picture, the last text included, to that picture
    story>voken          the same, the picture written as vokens
    story>text           everything up to a text to that text
    story,image>text     the same, with the picture that the text belongs to
    story>text,voken     a beginning to all that follows, texts and pictures in turn (story>text,image likewise)

The first, second and fourth with the last are the three tasks that MiniGPT-5 (arXiv 2310.02239) learns of VIST. Where
a story goes on from is drawn for each document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from anygen.data.coded import CodedRecord
from anygen.documents import Document, Segment, Vokens, default_task
from anygen.errors import DataError
from anygen.sequence import BlockName
from tokenizers_mm.codes import Codes, Modality

STORY: dict[str, tuple[BlockName, ...]] = {"story": ("text", "image", "voken"), "story,image": ("text",)}
"""What is given -> what may be asked for."""


def story_document(record: CodedRecord, given: str, targets: Sequence[BlockName], generator: random.Random) -> Document:
    """One document of a story.

    Args:
        record: its story is told.
        given: a key of `STORY`.
        targets: one kind of block, or two that follow in turn.
        generator: draws where the story goes on.

    Raises:
        DataError: the story has no part of these kinds.
    """
    story = record.story
    first = generator.choice(_places(record, targets))
    parts = list(story[:first])
    if given == "story,image":
        parts += [part for part in story[first + 1 : first + 2] if isinstance(part, Codes)]
    segments = [Segment(_modality_of(part), part) for part in parts]
    last = len(story) if len(targets) > 1 else first + 1
    as_vokens = "voken" in targets
    segments += [_target(record, place, as_vokens) for place in range(first, last)]
    return Document(
        tuple(segments), default_task(tuple(s.modality for s in segments[: len(parts)]), _modality_of(story[first]))
    )


def _places(record: CodedRecord, targets: Sequence[BlockName]) -> list[int]:
    """Where the target may begin; not with the first part, unless there is no other."""
    wanted = {"image" if target == "voken" else target for target in targets}
    places = [place for place, part in enumerate(record.story) if _modality_of(part) in wanted]
    if not places:
        raise DataError(f"the story {record.key!r} has no {' or '.join(sorted(wanted))}")
    return [place for place in places if place] or places


def _target(record: CodedRecord, place: int, as_vokens: bool) -> Segment:
    part = record.story[place]
    if not as_vokens or isinstance(part, str):
        return Segment(_modality_of(part), part, target=True)
    number = sum(isinstance(before, Codes) for before in record.story[:place])
    return Segment("image", Vokens(part, f"{record.key}/{number}"), target=True)


def _modality_of(part: str | Codes) -> Modality:
    return "text" if isinstance(part, str) else "image"
