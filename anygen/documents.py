"""Documents: what data holds, what a user passes and what comes back.

A document is a list of segments, each input (given) or target (to be generated). A segment holds media or, after
`encode`, the `Codes` of it; `encode` and `decode` map one into the other with a table of tokenizers and change
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from tokenizers_mm.codes import Codes, Modality, Tokenizer
from tokenizers_mm.media import Audio, Region

Media = str | Image.Image | Audio | Region
Tokenizers = Mapping[Modality, Tokenizer[Any]]


@dataclass(frozen=True)
class Vokens:
    """A picture written as vokens: reserved ids, always the same, whose hidden states describe it to a decoder.

    From MiniGPT-5 (arXiv 2310.02239). As a sequence every such block is the same; two of them are equal.
    """

    picture: Codes | None = field(default=None, compare=False)
    """What is to be drawn, where it is known: in training."""
    states: Any = field(default=None, compare=False, repr=False)
    """Hidden states at the vokens after the final norm, a tensor vokens x width, where a model wrote them."""


@dataclass(frozen=True)
class Segment:
    """One text, picture, sound or region of a document."""

    modality: Modality
    content: Media | Codes | Vokens
    target: bool = False
    """True where the model is to generate it, False where it is given."""

    @property
    def codes(self) -> Codes:
        """The content as codes; `assert`s that it was encoded."""
        assert isinstance(self.content, Codes), f"segment holds {type(self.content).__name__}, not codes"
        return self.content

    @property
    def written(self) -> Codes | Vokens:
        """The content as what a sequence holds of it; `assert`s that it was encoded."""
        return self.content if isinstance(self.content, Vokens) else self.codes


@dataclass(frozen=True)
class Document:
    """Segments in order, and the task where the modalities alone leave it open."""

    segments: tuple[Segment, ...]
    task: str | None = None

    def encode(self, tokenizers: Tokenizers) -> Document:
        """Every medium as codes; codes and vokens stay as they are."""
        kinds = (Codes, Vokens)
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
