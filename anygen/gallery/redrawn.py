"""Real pictures beside what is drawn from their codes: by the tokenizer's pixel head, and by the bundle's flow decoder.

It shows what codes keep, and what a decoder makes of them, apart from anything that the transformer does.
"""

from __future__ import annotations

from PIL import Image

from anygen.bundle import Bundle
from anygen.documents import Document, Segment
from anygen.drawing import DRIVERS, DecoderName, Drawer
from anygen.errors import MissingDependency
from anygen.gallery.exhibits import EmbeddedEmoji, embedded_emoji
from tokenizers_mm.media import load_picture

_NUM_PICTURES = 8
NAMES: dict[DecoderName, str] = {"codes": "pixel head", "diffusion": "flow decoder"}


def redrawn(bundle: Bundle) -> list[tuple[EmbeddedEmoji, dict[str, Image.Image]]]:
    """Embedded emoji, and each as drawn from its codes by each decoder, by name.

    Empty where the bundle carries no flow decoder that takes codes, or diffusers is not there to open it.
    """
    drawers = {name: Drawer(bundle, decoder) for decoder, name in NAMES.items()}
    if DRIVERS["diffusion"] not in bundle.renderers.get("image", ()):
        return []
    try:
        drawers[NAMES["diffusion"]].check()
    except MissingDependency:
        return []
    rows = []
    for emoji in list(embedded_emoji().values())[:_NUM_PICTURES]:
        document = Document((Segment("image", load_picture(emoji.picture)),)).encode(bundle.tokenizers)
        drawn = {
            name: drawer.decode(document, vokens=(), noise_seed=0).segments[0].content
            for name, drawer in drawers.items()
        }
        rows.append((emoji, {name: picture for name, picture in drawn.items() if isinstance(picture, Image.Image)}))
    return rows
