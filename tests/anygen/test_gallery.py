"""The gallery: whole, static, and safe whatever the captions say."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from anygen.api import AnyGen
from anygen.errors import ConfigError
from anygen.gallery.build import Card, Shown, build_gallery, render
from anygen.gallery.exhibits import embedded_emoji, load_exhibits
from anygen.gallery.spectrogram import draw_spectrogram
from tokenizers_mm.media import load_sound


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_holds_every_direction_with_media_and_commands(model: AnyGen, tmp_path: Path) -> None:
    page = build_gallery(model, tmp_path / "g", load_exhibits())
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.sources and all((page.parent / source).is_file() for source in links.sources)
    assert "script" not in links.tags and "default-src 'none'" in text
    for section in {exhibit.section for exhibit in load_exhibits()}:
        assert f"<h2>{section}</h2>" in text
    pairs = {
        (kind, output)
        for exhibit in load_exhibits()
        for kind, _ in exhibit.inputs
        for output in exhibit.request.outputs
    }
    for kind in ("text", "image", "audio"):
        for output in ("text", "image", "audio"):
            if (kind, output) != ("image", "image"):
                assert (kind, output) in pairs, f"no exhibit shows {kind} to {output}"
    commands = re.findall(r"<code>(.*?)</code>", text, re.DOTALL)
    assert len(commands) == len(load_exhibits())
    assert all(shlex.split(command.replace("&#39;", "'"))[:2] == ["anygen", "generate"] for command in commands)


def test_hostile_captions_stay_text() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> \"'`${{7*7}} \u202e"
    card = Card(
        evil, (Shown("text", text=evil),), ((Shown("text", text=evil),),), (Shown("text", text=evil),), True, evil
    )
    page = render([card] * 3, name=evil)
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and links.tags.count("img") == 0
    assert "&lt;script&gt;" in page and "49" not in page


def test_two_galleries_of_one_model_are_equal(model: AnyGen, tmp_path: Path) -> None:
    one, two = (build_gallery(model, tmp_path / name, load_exhibits()) for name in ("a", "b"))
    for path in one.parent.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (two.parent / path.relative_to(one.parent)).read_bytes(), path.name


def test_embedded_inputs_are_real_and_some_were_held_out() -> None:
    emoji = embedded_emoji().values()
    assert {e.split for e in emoji} >= {"train", "test"}
    for one in emoji:
        assert one.picture.is_file() and load_sound(one.speech).duration_s > 0.3


@pytest.mark.parametrize(
    "content",
    ["", "a: 1", "- {section: x}", "- {section: x, output: [image], emoji: nobody}",
     "- {section: x, output: [image], inputs: [image]}", "- {section: x, output: [image], inputz: []}", "- ["],
)  # fmt: skip
def test_bad_prompt_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_exhibits(path)


def test_spectrograms_show_pitch_low_at_the_bottom() -> None:
    import numpy as np

    from tokenizers_mm.media import Audio

    time = np.arange(16_000) / 16_000
    for pitch, row in ((1000, 0.875), (7000, 0.125)):
        picture = draw_spectrogram(Audio(np.sin(2 * np.pi * pitch * time).astype(np.float32), 16_000))
        brightness = np.asarray(picture.convert("L"), dtype=float).mean(axis=1)
        assert abs(int(brightness.argmax()) / picture.height - row) < 0.05
    assert draw_spectrogram(Audio(np.zeros(3, np.float32), 8000)).height == 96
