"""Makes the embedded inputs of the gallery: run once, where the emoji font and flite are installed.

python -m anygen.gallery.make_inputs
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from anygen.data.emoji_names import spoken_forms
from anygen.data.emoji_pictures import EmojiFont, on_white
from anygen.data.scenes import is_countable, make_scene
from anygen.data.sources import flac_of
from anygen.data.speech import speak
from anygen.gallery.exhibits import INPUTS

NAMES = (
    "red_apple",
    "cat_face",
    "rocket",
    "smiling_face_with_heart-eyes",
    "Norway",
    "guitar",
    "woman_health_worker_medium-dark_skin_tone",
    "man_kneeling_facing_right",
)
HELD_OUT = 4
VOICE = "slt"
SCENES = {"two_stars_left_of_a_backpack.png": 5, "a_strawberry_left_of_two_red_apples.png": 15}
"""File to seed of a generator; stage `data` of `nano` draws from those of 0 and a number."""


def main(folder: Path = Path(__file__).parent / "inputs") -> None:
    """Write pictures, speech and `metadata.jsonl`."""
    folder.mkdir(exist_ok=True)
    font = EmojiFont()
    catalogue = {emoji.name: emoji for emoji in font.catalogue()}
    held_out = [emoji for emoji in catalogue.values() if emoji.split != "train"]
    chosen = [catalogue[name] for name in NAMES] + held_out[:: len(held_out) // HELD_OUT][:HELD_OUT]
    rows = []
    for emoji in chosen:
        text = spoken_forms(emoji.parts)[-1]
        on_white(font.draw(emoji.char, 64)).save(folder / f"{emoji.key}.png", optimize=True)
        (folder / f"{emoji.key}.flac").write_bytes(flac_of(speak(text, VOICE)))
        row = {"name": emoji.name, "split": emoji.split, "text": text}
        rows.append({**row, "picture": f"{emoji.key}.png", "speech": f"{emoji.key}.flac"})
    things = [emoji for emoji in catalogue.values() if is_countable(emoji)]
    for file, seed in SCENES.items():
        scene = make_scene(things, font, side_px=64, generator=np.random.default_rng(seed))
        scene.picture.save(folder / file, optimize=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / INPUTS).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
