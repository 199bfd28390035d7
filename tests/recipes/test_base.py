"""`recipes/base` at its full size: two real steps against a tiny teacher in CLIP's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anygen.recipes_index import copy_recipe, find_recipe
from anygen.stages.run import load_recipe, run_stage
from tokenizers_mm.image import ImageTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_base_takes_two_real_steps(tmp_path: Path, clip_folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(60):  # a plain folder of photographs of several sizes, one folder a class
        folder = tmp_path / "pictures" / f"class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((230 + number, 200)).save(folder / f"{number}.jpg")
    data = copy_recipe("base/data.yaml", tmp_path / "data.yaml")
    root = tmp_path / "run"
    sources = f"sources=[{{kind: folder, path: {tmp_path / 'pictures'}}}]"
    run_stage(load_recipe(data, [sources], root=root))
    overrides = [f"teacher.path={clip_folder}", "teacher.shallow_layer=1", "batch_size=2", "adversarial.start_share=0"]
    for phase in ("vqkd_loop", "head_loop"):
        overrides += [f"{phase}.steps=2", f"{phase}.log_every=1", f"{phase}.compile=false", f"{phase}.device=cpu"]
        overrides += [f"{phase}.precision=fp32"]
    result = run_stage(load_recipe(find_recipe("base/image_tokenizer.yaml"), overrides, root=root))
    for phase, figure in (("vqkd", "deep"), ("pixels", "discriminator")):
        rows = (result.folder / phase / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 2 and all(figure in json.loads(row) for row in rows)
    tokenizer = ImageTokenizer.load(result.folder / "tokenizer")
    assert tokenizer.grid_hw == (14, 14) and tokenizer.codebook_size == 8192
    codes = tokenizer.encode(next((tmp_path / "pictures").rglob("*.jpg")))
    assert codes.codes_KT.shape == (1, 196)
