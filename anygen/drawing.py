"""Drawing: what an answer holds as codes or as vokens becomes media; the one place that chooses a picture's decoder.

    codes       the tokenizer's own pixel head
    diffusion   the bundle's flow decoder, from the same codes
    voken       the bundle's flow decoder, from the hidden states at the vokens (MiniGPT-5, arXiv 2310.02239)

A flow decoder starts from noise. It comes from the sample's seed and the picture's place in the answer, so neither the
batch nor the moment of drawing matters; with `size` given, "codes" and "diffusion" sample the same ids. Pictures are
drawn one at a time: the last bits of a batched product would depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from anygen.bundle import Bundle
from anygen.documents import Document, Segment, Vokens
from anygen.errors import InputError
from anygen.seeding import seed_of

DecoderName = Literal["codes", "diffusion", "voken"]
DRIVERS: dict[str, str] = {"diffusion": "codes", "voken": "vokens"}
"""What drives the flow decoder."""


@dataclass(frozen=True)
class Drawer:
    """Decodes documents of one call.

    Args:
        bundle: with the tokenizers and, where `decoder` asks for one, a flow decoder.
        decoder: as above.
        steps: of the flow decoder; None for its own number.
    """

    bundle: Bundle
    decoder: DecoderName = "codes"
    steps: int | None = None

    def check(self) -> None:
        """Load the decoder.

        Raises:
            InputError: the bundle has no such decoder.
            MissingDependency: diffusers is absent or broken.
        """
        if self.decoder == "codes":
            return
        found = self.bundle.renderers.get("image", ())
        if DRIVERS[self.decoder] not in found:
            names = ["codes", *(name for name, driver in DRIVERS.items() if driver in found)]
            raise InputError(
                f"decoder={self.decoder!r}: this bundle carries no diffusion decoder that draws pictures from "
                f"{DRIVERS[self.decoder]}; it has decoder {', '.join(map(repr, names))}"
            )
        self.bundle.renderer("image")

    def decode(self, document: Document, *, vokens: Sequence[Tensor], noise_seed: int, place: int = 0) -> Document:
        """A document of codes and vokens as media.

        Args:
            document: what `parse` read.
            vokens: hidden states of its voken blocks, in order.
            noise_seed: of the sample.
            place: how many pictures of the sample come before this document's.
        """
        waiting, segments = iter(vokens), []
        for segment in document.segments:
            if isinstance(segment.content, Vokens):
                segment = replace(segment, content=Vokens(states=next(waiting)))
            if segment.modality == "image" and self.decoder != "codes":
                segment = replace(segment, content=self._draw(segment, seed_of(noise_seed, "noise", place)))
            place += segment.modality == "image"
            segments.append(segment)
        return replace(document, segments=tuple(segments)).decode(self.bundle.tokenizers)

    def _draw(self, segment: Segment, seed: int) -> Image.Image:
        renderer = self.bundle.renderer("image")
        condition: dict[str, Any]
        if isinstance(segment.content, Vokens):
            condition = {"vokens": segment.content.states[None]}
        else:
            condition = {"codes": torch.from_numpy(segment.codes.codes_KT[:1].copy())}
        steps = {} if self.steps is None else {"steps": self.steps}
        generator = torch.Generator().manual_seed(seed)
        picture: Image.Image = renderer(**condition, **steps, generator=generator).images[0]
        return picture


def noise_seed(generator: torch.Generator, seed: int | None, place: int) -> int:
    """What the noise of a sample is drawn from; `generator`, which draws its ids, is left as it is.

    Args:
        generator: of the sample.
        seed: of the sample; None where the caller passed a generator, which several samples may share.
        place: of the sample among those of its call.
    """
    if seed is not None:
        return seed
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return seed_of(int(torch.randint(2**62, (), generator=copy)), place)
