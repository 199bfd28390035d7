"""The README's road for one's own pictures: a folder, no sound, a mixture of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from anygen.api import AnyGen
from anygen.errors import InputError
from anygen.recipes_index import copy_recipe
from anygen.stages.run import run_folder

ROOT = Path(__file__).parents[2]
STEPS = ("teacher.loop", "image_tokenizer.vqkd_loop", "image_tokenizer.head_loop", "pretrain.loop")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pictures_in(folder: Path) -> Path:
    folder.mkdir()
    colours = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
    rows = []
    for number in range(120):
        name = sorted(colours)[number % 3]
        side = 10 + number % 7
        picture = Image.new("RGB", (20, 20), "white")
        picture.paste(colours[name], (0, 0, side, side))
        picture.save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a {name} square"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_folder_of_pictures_becomes_a_model_that_draws(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "pictures")
    recipes = copy_recipe("smoke", tmp_path / "own")
    for name in ("audio_tokenizer", "gallery", "evaluate"):
        (recipes / f"{name}.yaml").unlink()
    (recipes / "data.yaml").write_text(f"stage: data\nsources:\n  - {{kind: folder, path: {pictures}}}\n")
    (mixture,) = re.findall(r"`(pretrain\.mixture=\{.*?\})`", (ROOT / "README.md").read_text(encoding="utf-8"))
    overrides = [mixture, *(f"{loop}.steps=3" for loop in STEPS)]
    if shutil.which("g++"):  # what nano's recipe does, and smoke does not
        overrides.append("pretrain.loop.compile=true")
    results = run_folder(recipes, overrides, root=tmp_path / "run")
    assert results[0].metrics["bad_items"] == 0
    (bundle,) = results[-1].outputs
    model = AnyGen.from_pretrained(bundle)
    assert model.generate(text="a red square", output="image").image.size[0] >= 8
    assert isinstance(model.generate(image=pictures / "0.png", output="text", max_new_tokens=20).text, str)
    with pytest.raises(InputError, match="no 'audio' output; it has text, image"):
        model.generate(text="a red square", output="audio")
