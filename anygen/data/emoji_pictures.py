"""Emoji as pictures, drawn from the system's Noto Color Emoji font (fonts-noto-color-emoji, SIL OFL 1.1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from anygen.data.emoji_names import EmojiName, Split, parse_name, split, spoken_forms
from anygen.errors import MissingDependency

FONT_PATHS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),
)
_BITMAP_SIZE = 109  # the font holds bitmaps of this one size; Pillow refuses any other
_TAG_FLAGS = ("England", "Scotland", "Wales")


@dataclass(frozen=True)
class Emoji:
    """One emoji that the font can draw."""

    char: str
    name: str
    """Its name in the `emoji` package, without colons."""

    @property
    def key(self) -> str:
        """Its code points, a name that is safe in files: `1f469-1f3fd-200d-1f33e`."""
        return "-".join(f"{ord(c):x}" for c in self.char)

    def words_of(self, voice: str) -> str:
        """The phrasing that a voice speaks: always the same one, so evaluation asks for what was taught."""
        forms = spoken_forms(self.parts)
        turn = int(hashlib.sha256(f"{self.name}|{voice}".encode()).hexdigest(), 16)
        return forms[turn % len(forms)]

    @property
    def split(self) -> Split:
        """The split that all its modalities belong to."""
        return split(self.name)

    @cached_property
    def parts(self) -> EmojiName:
        """Its name taken apart."""
        is_flag = "\U0001f1e6" <= self.char[0] <= "\U0001f1ff" or self.name in _TAG_FLAGS
        return parse_name(self.name, is_flag=is_flag)


class EmojiFont:
    """Draws emoji; knows which ones the font has.

    Raises:
        MissingDependency: no font, or a Pillow that cannot shape sequences (raqm with fribidi).
    """

    def __init__(self, path: Path | None = None) -> None:
        found = [p for p in ((path,) if path else FONT_PATHS) if p.is_file()]
        if not found:
            raise MissingDependency(
                "no Noto Color Emoji font found; install it (Debian: apt-get install fonts-noto-color-emoji)"
            )
        if not features.check("raqm") or not features.check("fribidi"):
            raise MissingDependency(
                "Pillow cannot join emoji sequences; install fribidi (Debian: apt-get install libfribidi0)"
            )
        self._font = ImageFont.truetype(found[0], _BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
        self._advance = self._font.getlength("\U0001f600")

    def catalogue(self) -> list[Emoji]:
        """Every fully qualified (RGI) emoji that the font draws as one glyph, in the order of the `emoji` package."""
        try:
            import emoji
        except ImportError as error:
            raise MissingDependency("the emoji world needs the package emoji: pip install emoji") from error
        qualified = emoji.STATUS["fully_qualified"]
        return [
            Emoji(char, str(facts["en"]).strip(":"))
            for char, facts in emoji.EMOJI_DATA.items()
            if facts["status"] == qualified and self._has(char)
        ]

    def _has(self, char: str) -> bool:
        # What the font does not know is drawn as several glyphs side by side (a sequence) or as nothing.
        return (
            0 < self._font.getlength(char) <= self._advance * 1.1
            and self._font.getmask(char, mode="RGBA").getbbox() is not None
        )

    def draw(self, char: str, side_px: int) -> Image.Image:
        """One emoji, centred on a transparent square, RGBA."""
        left, top, right, bottom = self._font.getbbox(char)
        side = max(round(self._advance), int(bottom - top))
        square = Image.new("RGBA", (side, side))
        position = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
        ImageDraw.Draw(square).text(position, char, font=self._font, embedded_color=True)
        return square.resize((side_px, side_px), Image.Resampling.LANCZOS)


def on_white(picture: Image.Image) -> Image.Image:
    """A transparent picture over white, RGB."""
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")
