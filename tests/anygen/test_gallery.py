"""The gallery: whole, static, and safe whatever the captions say."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anygen.api import AnyGen
from anygen.errors import ConfigError
from anygen.evaluation.spectrogram import draw_spectrogram
from anygen.gallery.build import Card, Shown, _framed, build_gallery, render
from anygen.gallery.exhibits import embedded_emoji, load_exhibits
from anygen.gallery.redrawn import redrawn
from tokenizers_mm.media import Region, load_sound


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
            assert (kind, output) in pairs, f"no exhibit shows {kind} to {output}"
    commands = [html.unescape(command) for command in re.findall(r"<code>(.*?)</code>", text, re.DOTALL)]
    assert len(commands) == len(load_exhibits())
    assert all(command.startswith("anygen generate ") for command in commands)


def test_the_command_beside_an_exhibit_gives_it_again(model: AnyGen, tmp_path: Path) -> None:
    prompts = tmp_path / "p.yaml"
    prompts.write_text(
        "- {section: a, emoji: red_apple, inputs: [image, audio, text], output: [image, text], num_samples: 2, seed: 5,"
        " options: {size: 24, top_k: 3, temperature: 0.7, max_new_tokens: 60, via: text}}"
    )
    page = build_gallery(model, tmp_path / "g", load_exhibits(prompts))
    (command,) = re.findall(r"<code>(.*?)</code>", page.read_text(), re.DOTALL)
    words = shlex.split(html.unescape(command))
    program = [sys.executable, "-c", "from anygen.cli import main; main()", *words[1:], "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(program, cwd=page.parent, env=environment, check=True)
    for sample in range(2):
        shown, again = page.parent / f"media/00-{sample}-0.png", tmp_path / f"out/{sample:02d}-0-image.png"
        assert np.array_equal(np.asarray(Image.open(shown)), np.asarray(Image.open(again)))
        assert Image.open(shown).size == (24, 24)


def test_a_box_is_drawn_on_its_picture_and_what_was_written_first_is_shown(
    model: AnyGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "bundle", dataclasses.replace(model.bundle, via={"image,text>region": "text"}))
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    prompts = tmp_path / "p.yaml"
    prompts.write_text(
        "- {section: a, inputs: [image=white.png, text=where], output: [region], options: {temperature: 5.0}}"
    )
    page = build_gallery(model, tmp_path / "g", load_exhibits(prompts))
    (card,) = [card for card in json.loads((page.parent / "gallery.json").read_text()) if card["section"] == "a"]
    via, box = card["answers"][0]
    assert via["modality"] == "via" and via["text"] and page.read_text().count('<p class="via">first: <bdi>') == 1
    assert Image.open(page.parent / box["file"]).size == (192, 192) and box["file"] in page.read_text()


@pytest.mark.parametrize(
    ("size", "region", "frame"),
    [
        ((16, 16), (0.25, 0.5, 0.5, 0.75), (48, 96, 96, 144)),
        ((16, 16), (0.5, 0.75, 0.25, 0.5), (48, 96, 96, 144)),
        ((400, 200), (0.5, 0.0, 1.0, 0.5), (96, 0, 191, 48)),
        ((32, 64), (0.5, 0.5), (40, 88, 56, 104)),
    ],
)
def test_boxes_and_points_are_where_they_are(
    size: tuple[int, int], region: tuple[float, ...], frame: tuple[int, int, int, int]
) -> None:
    pixels = np.asarray(_framed(Image.new("RGB", size, "white"), Region(region)))
    is_red = (pixels == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(is_red)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == frame
    assert (pixels[~is_red] == 255).all() and not is_red[rows.min() + 3, columns.min() + 3], "a frame, and nothing else"


def test_real_pictures_are_drawn_again_where_a_bundle_can(
    drawing_folder: Path, model: AnyGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = AnyGen.from_pretrained(drawing_folder)
    page = build_gallery(drawing, tmp_path / "page", load_exhibits()[:1]).read_text(encoding="utf-8")
    assert "Drawn from the codes of a real picture" in page and "flow decoder" in page and "<code></code>" not in page
    pictures = [np.array(Image.open(tmp_path / f"page/media/redrawn-00-{place}.png")) for place in (0, 1)]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any(), "two ways of drawing"
    assert redrawn(model.bundle) == [] or "image" in model.bundle.renderers
    monkeypatch.setitem(sys.modules, "diffusers", None)
    drawing = AnyGen.from_pretrained(drawing_folder)
    assert redrawn(drawing.bundle) == [], "without diffusers the rest of the page stands"


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


def test_the_page_is_named_as_the_folder_was(model: AnyGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`anygen run recipes/smoke` works in a folder relative to where it is called."""
    monkeypatch.chdir(tmp_path)
    page = build_gallery(model, Path("g"), load_exhibits()[:1])
    assert page == Path("g") / "index.html" and (tmp_path / page).is_file()


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
     "- {section: x, output: [image], inputs: [image]}", "- {section: x, output: [image], inputs: [image=none.png]}",
     "- {section: x, output: [image], inputs: [audio=none.flac]}",
     "- {section: x, output: [image], inputs: [text=a, text=b]}",
     "- {section: x, output: [image], emoji: red_apple, inputs: [text, image]}", "- {section: x, output: [image], inputz: []}", "- ["],
)  # fmt: skip
def test_bad_prompt_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_exhibits(path)


def test_a_sound_beside_the_prompts_is_an_input(tmp_path: Path) -> None:
    shutil.copy(embedded_emoji()["guitar"].speech, tmp_path / "said.flac")
    (tmp_path / "p.yaml").write_text("- {section: x, output: [audio], emoji: guitar, inputs: [image, audio=said.flac]}")
    (exhibit,) = load_exhibits(tmp_path / "p.yaml")
    assert exhibit.request.kinds == ("image", "audio") and exhibit.inputs[1] == ("audio", tmp_path / "said.flac")


def test_spectrograms_show_pitch_low_at_the_bottom() -> None:
    from tokenizers_mm.media import Audio

    time = np.arange(16_000) / 16_000
    for pitch, row in ((1000, 0.875), (7000, 0.125)):
        picture = draw_spectrogram(Audio(np.sin(2 * np.pi * pitch * time).astype(np.float32), 16_000))
        brightness = np.asarray(picture.convert("L"), dtype=float).mean(axis=1)
        assert abs(int(brightness.argmax()) / picture.height - row) < 0.05
    assert draw_spectrogram(Audio(np.zeros(3, np.float32), 8000)).height == 96
