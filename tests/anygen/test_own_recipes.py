"""Recipes `own`: from two folders of a user's media to a bundle that answers, as the README says it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from anygen.api import AnyGen
from anygen.recipes_index import copy_recipe
from anygen.stages.run import run_folder

SHORT = [
    "image_tokenizer.vqkd_loop.steps=4", "image_tokenizer.head_loop.steps=2", "image_tokenizer.steps_without_quantiser=1",
    "image_tokenizer.vqkd_loop.compile=false", "image_tokenizer.head_loop.compile=false", "image_tokenizer.batch_size=16",
    "pretrain.loop.steps=3", "pretrain.loop.compile=false", "pretrain.row_length=512",
]  # fmt: skip
"""The recipes as they are, but for how long they train."""


def folders(root: Path) -> None:
    """Forty pictures and forty sounds of two classes each."""
    random = np.random.default_rng(0)
    for kind, names in (("my_pictures", ("cat", "ship")), ("my_sounds", ("one", "two"))):
        for number in range(40):
            folder = root / kind / names[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "my_pictures":
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            else:
                soundfile.write(folder / f"{number}.wav", random.normal(size=4000).astype(np.float32) * 0.1, 8000)


@pytest.mark.slow
def test_two_folders_become_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    copy_recipe("own", tmp_path / "mine")
    results = run_folder(tmp_path / "mine", SHORT)
    model = AnyGen.from_pretrained(results[-1].outputs[0])
    assert results[-1].outputs[0] == Path("runs/mine/bundle/own")
    output = model.generate(text="cat", output=("image", "audio"), seed=0)
    assert output.image.width and output.audio.rate_hz == 16_000
    picture = next((tmp_path / "my_pictures" / "cat").glob("*.png"))
    assert isinstance(model.generate(image=str(picture), output="text", seed=0).text, str)


@pytest.mark.slow
def test_two_folders_are_taught_to_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    copy_recipe("own/from_nano", tmp_path / "mine")
    results = run_folder(tmp_path / "mine", [option for option in SHORT if option.startswith("pretrain")])
    model = AnyGen.from_pretrained(results[-1].outputs[0])
    assert model.generate(text="a red apple", output="image", seed=0).image.size == (64, 64)
    assert model.generate(text="one", output="audio", seed=0).audio.rate_hz == 16_000
    assert set(model.bundle.renderers) == {"image"}, "the decoder came with the codes"


@pytest.mark.slow
def test_sounds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README says to delete where there are no pictures."""
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    mine = copy_recipe("own", tmp_path / "mine")
    (mine / "image_tokenizer.yaml").unlink()
    for name, left_out in (("data", "my_pictures"), ("pretrain", "image")):
        lines = (mine / f"{name}.yaml").read_text().splitlines(keepends=True)
        (mine / f"{name}.yaml").write_text("".join(line for line in lines if left_out not in line))
    results = run_folder(mine, [option for option in SHORT if not option.startswith("image")])
    model = AnyGen.from_pretrained(results[-1].outputs[0])
    assert model.generate(text="one", output="audio", seed=0).audio.rate_hz == 16_000
