"""Documents: what data holds, what a user passes and what comes back.

A document is a list of segments, each input (given) or target (to be generated). A segment holds media or, after
`encode`, the `Codes` of it; `encode` and `decode` map one into the other with a table of tokenizers and change
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenizers_mm.codes import Codes, Modality, Tokenizer
from tokenizers_mm.media import Audio, Region

Media = str | Image.Image | Audio | Region
Tokenizers = Mapping[Modality, Tokenizer[Any]]
_DEFAULT_TASKS: dict[tuple[tuple[str, ...], str], str] = {
    (("text",), "image"): "depict",
    (("audio",), "image"): "depict",
    (("image",), "text"): "caption",
    (("image",), "audio"): "caption",
    (("text",), "audio"): "speak",
    (("audio",), "text"): "transcribe",
}


def default_task(inputs: tuple[Modality, ...], target: Modality) -> str:
    """The task that a set of inputs and the first output suggest, where the caller names none.

    >>> default_task(("text",), "image"), default_task(("image", "text"), "text"), default_task((), "image")
    ('depict', 'answer', 'continue')
    """
    if target == "region":
        return "locate"
    kinds = tuple(dict.fromkeys(inputs))
    if not kinds or kinds == (target,):
        return "continue"
    return _DEFAULT_TASKS.get((kinds, target), "answer")


@dataclass(frozen=True, eq=False)
class Holed:
    """A picture or sound of which only some codes are known.

    >>> holed = Holed(Codes(np.array([[3, 1, 2, 7]]), "image", grid_hw=(2, 2)), np.array([[True, True, False, True]]))
    >>> holed.codes.codes_KT.tolist()
    [[3, 1, 0, 7]]
    """

    codes: Codes
    """0 where unknown: what stood there is not kept."""
    known_KT: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        assert self.known_KT.shape == self.codes.codes_KT.shape, (self.known_KT.shape, self.codes.codes_KT.shape)
        object.__setattr__(self, "known_KT", self.known_KT.astype(bool))
        object.__setattr__(self, "codes", replace(self.codes, codes_KT=self.codes.codes_KT * self.known_KT))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Holed) and self.codes == other.codes and np.array_equal(self.known_KT, other.known_KT)

    def __hash__(self) -> int:
        return hash((self.codes, self.known_KT.tobytes()))


@dataclass(frozen=True)
class Vokens:
    """A picture written as vokens: reserved ids, always the same, whose hidden states describe it to a decoder.

    From MiniGPT-5 (arXiv 2310.02239). As a sequence every such block is the same; two of them are equal.
    """

    picture: Codes | None = field(default=None, compare=False)
    """What is to be drawn, where it is known: in training."""
    key: str = field(default="", compare=False)
    """Of the record that the picture is of, in training; behind it `/2` for the third picture of its story."""
    states: Any = field(default=None, compare=False, repr=False)
    """Hidden states at the vokens after the final norm, a tensor vokens x width, where a model wrote them."""


@dataclass(frozen=True)
class Segment:
    """One text, picture, sound or region of a document."""

    modality: Modality
    content: Media | Codes | Holed | Vokens
    target: bool = False
    """True where the model is to generate it, False where it is given."""

    @property
    def codes(self) -> Codes:
        """The content as codes; `assert`s that it was encoded."""
        assert isinstance(self.content, Codes), f"segment holds {type(self.content).__name__}, not codes"
        return self.content

    @property
    def written(self) -> Codes | Holed | Vokens:
        """The content as what a sequence holds of it; `assert`s that it was encoded."""
        return self.content if isinstance(self.content, Vokens | Holed) else self.codes


@dataclass(frozen=True)
class Document:
    """Segments in order, and the task where the modalities alone leave it open."""

    segments: tuple[Segment, ...]
    task: str | None = None

    def encode(self, tokenizers: Tokenizers) -> Document:
        """Every medium as codes; codes, also with holes, and vokens stay as they are."""
        kinds = (Codes, Holed, Vokens)
        return self._map(lambda segment: tokenizers[segment.modality].encode(segment.content), kinds, invert=False)

    def decode(self, tokenizers: Tokenizers) -> Document:
        """Every segment's codes as media; media and vokens (which a decoder draws) stay as they are."""
        return self._map(lambda segment: tokenizers[segment.modality].decode(segment.codes), Codes, invert=True)

    def _map(self, change: Callable[[Segment], Media | Codes], kind: Any, *, invert: bool) -> Document:
        return replace(
            self,
            segments=tuple(
                replace(segment, content=change(segment)) if isinstance(segment.content, kind) == invert else segment
                for segment in self.segments
            ),
        )
