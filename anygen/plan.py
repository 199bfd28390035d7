"""What an answer is to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anygen.sequence import BlockName
from tokenizers_mm.codes import Modality

Way = Literal["text", "text_only", "in_writing"]
"""How a text comes before an answer: in one sequence with it, as all that it reads, or in place of each sound."""


def can_stand_alone(inputs: Sequence[str], outputs: Sequence[str]) -> bool:
    """True where a text can be all that an answer reads: it tells of a picture or sound, and is not the answer itself.

    >>> can_stand_alone(["audio"], ["image"]), can_stand_alone(["image", "text"], ["text"])
    (True, False)
    """
    return bool(inputs) and "text" not in inputs and outputs[0] not in ("text", "region")


def can_be_in_writing(inputs: Sequence[str], outputs: Sequence[str]) -> bool:
    """True where sounds are about something else that is given, so that their words can stand in their place.

    >>> can_be_in_writing(["image", "audio"], ["audio"]), can_be_in_writing(["audio"], ["audio"])
    (True, False)
    """
    return "audio" in inputs and len(set(inputs)) > 1 and len(outputs) == 1


def can_be_read_back(inputs: Sequence[str], outputs: Sequence[str]) -> bool:
    """True where the input can be guessed from the answer: one medium or text that is answered with one other.

    >>> can_be_read_back(["text"], ["image"]), can_be_read_back(["text"], ["text"])
    (True, False)
    """
    media = {"text", "image", "audio"}
    return len(inputs) == len(outputs) == 1 and inputs[0] != outputs[0] and {inputs[0], outputs[0]} <= media


@dataclass(frozen=True)
class Block:
    """One block that an answer is to hold, with its shape where the caller fixes it."""

    modality: Modality
    shape: tuple[int, ...] | None = None
    """Rows and columns of a picture, digits of a sound's length, 2 or 4 for a region; None lets the model choose."""
    as_vokens: bool = False
    """A picture written as vokens, for a decoder to draw; it has no shape."""
    known: tuple[int, ...] | None = None
    """Of a picture or sound whose shape is fixed: the id of each code in the order in which they are written, -1 where
    it is to be chosen."""
    ids_apart: int = 0
    """Of a text before the answer: how many ids it may take, begin and end included, that no budget counts."""

    @property
    def name(self) -> BlockName:
        """What its begin and end tokens are called."""
        return "voken" if self.as_vokens else self.modality


@dataclass(frozen=True)
class Plan:
    """What an answer is to hold: exactly these blocks in this order or, where `free`, any blocks of these kinds."""

    blocks: tuple[Block, ...]
    """First those that are written before the answer, if any."""
    free: bool = False

    @property
    def num_via(self) -> int:
        """How many blocks are written before the answer."""
        return sum(block.ids_apart > 0 for block in self.blocks)

    @property
    def ids_apart(self) -> int:
        """How many ids these may take."""
        return sum(block.ids_apart for block in self.blocks)
