"""What an answer is to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anygen.sequence import BlockName
from tokenizers_mm.codes import Modality

Way = Literal["text", "text_only", "in_writing", "one_by_one"]
"""What leads to an answer: a text in one sequence with it, a text as all that it reads, or calls one after another
(`anygen.chains`)."""


def misfit(way: Way, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """What a way is for, where it cannot lead from these inputs to these outputs; empty where it can.

    >>> misfit("text_only", ["image"], ["audio"]), misfit("in_writing", ["image", "audio"], ["audio"])
    ('', '')
    >>> misfit("text_only", ["text"], ["audio"])
    'answers a text in place of a picture or sound, with another medium'
    """
    if way == "text_only" and (not inputs or "text" in inputs or outputs[0] in ("text", "region")):
        return "answers a text in place of a picture or sound, with another medium"
    if way == "in_writing" and ("audio" not in inputs or len(set(inputs)) < 2 or len(outputs) > 1):
        return "hears sounds beside something else, and gives one output"
    if way == "one_by_one":
        from_text = list(inputs) == ["text"] or (bool(inputs) and outputs[0] == "text")
        is_asked_aloud = "audio" in inputs and len(set(inputs)) > 1
        if not from_text or is_asked_aloud or "region" in outputs or not 1 < len(outputs) == len(set(outputs)):
            return "makes several of text, image and audio, no two of a kind, of a text or with a text first"
    return ""


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
