"""The picture tokenizer's stage: its variants, its monitor, exact resume, what a recipe would cost."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anygen.config import build
from anygen.data.records import Record, write_shard
from anygen.data.sources import png_of
from anygen.errors import ConfigError
from anygen.recipes_index import find_recipe
from anygen.stages import image_tokenizer
from anygen.stages.dry_run import weigh
from anygen.stages.image_tokenizer import ImageTokenizerConfig
from anygen.stages.run import load_recipe, run_stage
from anygen.stages.tokenize import TokenizeConfig
from tokenizers_mm.features import FeatureDecoder
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.teacher import VisionTeacher
from tokenizers_mm.vqkd import PictureEncoder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """A run with records of 16 px pictures and the tiny random CLIP as its teacher."""
    root = tmp_path_factory.mktemp("run")
    (root / "data").mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 48), ("validation", 8)):
        patches = torch.rand(count, 3, 2, 2, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
        pictures = [Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy()) for p in patches]
        records = [Record(f"{split}{i}", "pair", ("a",), png_of(p)) for i, p in enumerate(pictures)]
        write_shard(root / "data" / f"{split}-00000.tar", records)
    (root / "data" / "stage.json").write_text(json.dumps({"identity": "data"}))
    (root / "teacher").mkdir()
    (root / "teacher" / "model").symlink_to(clip_folder)
    (root / "teacher" / "stage.json").write_text(json.dumps({"identity": "teacher"}))
    return root


def recipe_of(root: Path, *, steps: int = 4, head_steps: int = 4, **fields: Any) -> ImageTokenizerConfig:
    loop: dict[str, Any] = {"log_every": 1, "save_every": 2, "precision": "fp32", "device": "cpu"}
    values: dict[str, Any] = {
        "root": root,
        "encoder": {"side_px": 16, "width": 16, "depth": 1, "num_heads": 2, "codebook_size": 16, "code_dim": 4},
        "head": {"width": 16, "depth": 1, "num_heads": 2, "refine_channels": 2},
        "batch_size": 16,
        "vqkd_loop": {"steps": steps, **loop},
        "head_loop": {"steps": head_steps, **loop},
    }
    for name, value in fields.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return build(ImageTokenizerConfig, values, source="test")


def work_in(root: Path, folder: Path) -> Path:
    """A run of its own with the same data and teacher."""
    folder.mkdir()
    for name in ("data", "teacher"):
        (folder / name).symlink_to(root / name)
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "joint": {"pixel_weight": 1.0, "head_start": "joint"},
    "joint, with structure": {"pixel_weight": 1.0, "joint_structure_weight": 0.5},
    "pixels only": {"deep_weight": 0.0, "shallow_weight": 0.0, "pixel_weight": 1.0},
    "two codebooks": {"encoder": {"quantizer": {"num_codebooks": 2}}},
    "beit": {"encoder": {"quantizer": {"update": "norm_ema", "gradient": "straight_through"}}},
    "perceptual and judged": {
        "perceptual_weight": 0.5,
        "structure_weight": 0.5,
        "adversarial": {"weight": 0.5, "start_share": 0.5, "channels": 8, "layers": 1},
    },
    "augmented": {"augmentation": {"crop_scale": [0.5, 1.0], "flip": 0.5}},
    "finer grid": {"encoder": {"patch_px": 4}},
    "late codes": {"steps_without_quantiser": 2},
    "muon": {"vqkd_loop": {"optimizer": {"kind": "muon"}}},
    "neighbours": {"pixel_weight": 1.0, "joint_neighbour_weight": 3.0, "neighbour_weight": 2.0},
    "described": {"features_loop": {"steps": 4, "log_every": 1, "save_every": 2, "precision": "fp32"}},
    "described, augmented": {
        "features_loop": {"steps": 2, "log_every": 1, "save_every": 2, "precision": "fp32"},
        "features_depth": 2,
        "augmentation": {"colour": 0.2},
    },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_saves_and_encodes(root: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    config = recipe_of(work_in(root, tmp_path / "run"), **fields)
    result = run_stage(config)
    assert result.metrics["validation_psnr_db"] > 0 and 0 < result.metrics["validation_usage"] <= 1
    tokenizer = ImageTokenizer.load(config.folder / "tokenizer")
    picture = Image.new("RGB", (16, 16), "red")
    codes = tokenizer.encode(picture)
    assert codes.num_codebooks == tokenizer.num_codebooks and tokenizer.decode(codes).size == (16, 16)
    distils = bool(config.deep_weight or config.shallow_weight)
    assert (config.folder / "features").exists() == distils
    if distils:
        features = FeatureDecoder.load(config.folder / "features")
        pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        vectors = tokenizer.encoder.vectors_of(tokenizer.encode_pixels(pixels))
        predicted = features(vectors, tokenizer.grid_hw)
        assert features.config.depth == (
            config.features_depth if config.features_loop else config.encoder.decoder_depth
        )
        assert features.config.teacher.path is None, "a run that is moved still finds its own teacher"
        own = features.config.teacher.model_copy(update={"path": root / "teacher" / "model"})
        target = VisionTeacher.open(own)(pixels, tokenizer.grid_hw)
        assert predicted.deep_BND.shape == target.deep_BND.shape
        assert predicted.shallow_BND.shape == target.shallow_BND.shape
    rows = [json.loads(line) for line in (config.folder / "vqkd" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert (row["structure"] > 0) == ("joint_structure_weight" in fields)
        parts = row["deep"] * config.deep_weight + row["shallow"] * config.shallow_weight + row["commitment"]
        parts += row["pixels"] * config.pixel_weight + row["structure"] * config.joint_structure_weight
        parts += row["neighbours"] * config.joint_neighbour_weight
        assert (row["neighbours"] > 0) == (config.joint_neighbour_weight > 0)
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    drawn = [json.loads(line) for line in (config.folder / "pixels" / "metrics.jsonl").read_text().splitlines()]
    assert all(("neighbours" in row) == (config.neighbour_weight > 0) for row in drawn)
    if config.features_loop:
        rows = [json.loads(line) for line in (config.folder / "described" / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == config.features_loop.steps
        for row in rows:
            assert row["loss"] == pytest.approx(
                row["deep"] * config.deep_weight + row["shallow"] * config.shallow_weight, rel=1e-4
            )
        assert 0 < rows[-1]["validation_described_deep"] < 2
    if "adversarial" in fields:
        rows = [json.loads(line) for line in (config.folder / "pixels" / "metrics.jsonl").read_text().splitlines()]
        assert ["discriminator" in row for row in rows] == [False, False, True, True], "judged in the second half"


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        **VARIANTS["perceptual and judged"],
        "augmentation": {"flip": 0.5},
        "vqkd_loop": {"optimizer": {"kind": "muon"}},
    }
    whole = recipe_of(work_in(root, tmp_path / "whole"), **fields)
    run_stage(whole)
    parts = recipe_of(work_in(root, tmp_path / "parts"), **fields)
    for phase in ("Distillation", "Drawing"):
        trainee = getattr(image_tokenizer, phase)
        dealt = trainee.next_batch

        def dies(self: Any, dealt: Any = dealt, count: list[int] = [0]) -> Any:  # noqa: B006
            count[0] += 1
            if count[0] == 4:
                raise KeyboardInterrupt
            return dealt(self)

        monkeypatch.setattr(trainee, "next_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            run_stage(parts)
        monkeypatch.setattr(trainee, "next_batch", dealt)
    run_stage(parts)
    for name in ("tokenizer", "features"):
        assert (whole.folder / name / "model.safetensors").read_bytes() == (
            parts.folder / name / "model.safetensors"
        ).read_bytes()


def test_without_replacement_the_run_says_that_its_codebook_collapses(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(share: float, name: str) -> list[str]:
        caplog.clear()
        encoder = {
            "codebook_size": 128,
            "ema_decay": 0.9,
            "dead_code_share": share,
            "quantizer": {"kmeans_start": False},
        }
        config = recipe_of(work_in(root, tmp_path / name), steps=100, head_steps=1, encoder=encoder)
        config = config.model_copy(update={"vqkd_loop": config.vqkd_loop.model_copy(update={"log_every": 50})})
        run_stage(config)
        rows = [json.loads(line) for line in (config.folder / "vqkd" / "metrics.jsonl").read_text().splitlines()]
        assert "usage" in rows[-1]
        return [record.message for record in caplog.records if "codebook collapse" in record.message]

    with caplog.at_level(logging.WARNING, logger="anygen"):
        assert told(0.0, "off")
        assert not told(0.25, "on")


def test_recipes_that_cannot_work_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to learn from"):
        recipe_of(root, deep_weight=0.0, shallow_weight=0.0)
    with pytest.raises(ConfigError, match="needs pictures of 32 px or more"):
        recipe_of(root, adversarial={"weight": 1.0, "layers": 3})
    with pytest.raises(ConfigError, match="joint needs pixel_weight"):
        recipe_of(root, head_start="joint")
    with pytest.raises(ConfigError, match="joint_structure_weight needs pixel_weight"):
        recipe_of(root, joint_structure_weight=0.5)
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "data").symlink_to(root / "data")
    with pytest.raises(ConfigError, match=r"there is no teacher in .*teacher\.path"):
        run_stage(recipe_of(empty))


def test_a_mistake_leaves_finished_work_where_it_is(root: Path, tmp_path: Path) -> None:
    run = work_in(root, tmp_path / "run")
    done = recipe_of(run, steps=2, head_steps=1)
    run_stage(done)
    for teacher in ({"path": "nowhere"}, {"shallow_layer": 9}):
        with pytest.raises(ConfigError):
            run_stage(recipe_of(run, steps=2, head_steps=1, teacher=teacher))
    assert (done.folder / "tokenizer").is_dir() and not (run / "old").exists()
    (done.folder / "stage.json").unlink()
    with pytest.raises(ConfigError, match=r"was begun in .* and is not finished"):
        run_stage(TokenizeConfig(root=run))


def test_validation_before_the_codes_begin_does_not_start_them(root: Path, tmp_path: Path) -> None:
    config = recipe_of(work_in(root, tmp_path / "run"), steps_without_quantiser=2, vqkd_loop={"validate_every": 1})
    run_stage(config)
    rows = [json.loads(line) for line in (config.folder / "vqkd" / "metrics.jsonl").read_text().splitlines()]
    assert ["validation_usage" in row for row in rows] == [False, False, True, True]
    assert all("validation_deep" in row for row in rows)


def test_the_cost_of_a_recipe_is_known_before_it_runs(root: Path) -> None:
    config = recipe_of(root)
    facts = weigh(config)
    assert facts["codes per picture"] == 4 and "CLIP" in facts["teacher"]
    encoder = PictureEncoder(config.encoder)
    assert facts["parameters"]["encoder"] == sum(p.numel() for p in encoder.parameters())
    untaught = weigh(recipe_of(root, deep_weight=0.0, shallow_weight=0.0, pixel_weight=1e-9))
    judged = weigh(recipe_of(root, perceptual_weight=1.0))
    assert judged["pixels"]["GFLOP per step"] > facts["pixels"]["GFLOP per step"], "the teacher looks at both pictures"
    assert untaught["teacher"] == "not weighed"
    wide = weigh(recipe_of(root, batch_size=32))
    for phase in ("vqkd", "pixels"):
        assert wide[phase]["GFLOP per step"] == pytest.approx(2 * facts[phase]["GFLOP per step"], rel=0.01)
        assert wide[phase]["GB activations"] == pytest.approx(2 * facts[phase]["GB activations"], rel=0.05)


def test_base_is_beit_v2s_size_and_weighed_without_its_teacher(tmp_path: Path) -> None:
    facts = weigh(load_recipe(find_recipe("base/image_tokenizer.yaml"), root=tmp_path))
    assert facts["codes per picture"] == 196 and facts["teacher"] == "not weighed"
    assert 85e6 < facts["parameters"]["encoder"] < 88e6, "ViT-B/16"
    assert facts["vqkd"]["pictures seen"] == 128_000_000, "100 epochs of ImageNet-1k"
    assert facts["vqkd"]["GB activations"] > 10
