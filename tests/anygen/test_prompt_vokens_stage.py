"""Stage `vokens` against a pretrained pipeline: real steps on a tiny one, both phases, and what comes of them."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "decoders"))
import tiny_pipelines

from anygen.data.records import Record, write_shard
from anygen.data.source import png_of
from anygen.errors import CheckpointError, ConfigError
from anygen.files import publishing, write_json
from anygen.recipes_index import find_recipe
from anygen.stages.pretrain import load_pretrained
from anygen.stages.prompt_losses import PromptLoss, PromptWeights
from anygen.stages.prompt_vokens import PromptVokensConfig, _trainee, main, start_decoder
from anygen.stages.run import load_recipe
from anygen.stages.tokenize import TokenizeConfig
from anygen.stages.tokenize import main as tokenize
from anygen.stages.voken_base import Writer
from decoders.carried import open_renderer
from decoders.prompt import PromptDecoder

COLOURS = ["red", "green", "blue", "white"]
LOOP = {"steps": 2, "precision": "fp32", "device": "cpu", "log_every": 1, "save_every": 1, "optimizer": {"lr": 1e-2}}
SMALL = {"width": 8, "layers": 1, "heads": 2}


def png(colour: str) -> bytes:
    return png_of(Image.new("RGB", (16, 16), colour))


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, vocabulary: Any, layout: Any, text_tokenizer: Any,
    image_tokenizer: Any,
) -> Path:  # fmt: skip
    """A run up to its pretrained transformer, and pipelines beside it."""
    root = tmp_path_factory.mktemp("run")
    (root / "data").mkdir()
    for split, count in (("train", 12), ("validation", 6)):
        records = [
            Record(f"{split}{n}", "pair", (f"a {COLOURS[n % 4]} cat",), png(COLOURS[n % 4])) for n in range(count)
        ]
        story = ("a cat.", png("red"), "a dog comes.", png("blue"))
        records += [Record(f"{split}-story", "story", story=story)]
        write_shard(root / "data" / f"{split}-00000.tar", records)
    text_tokenizer.save(root / "text_tokenizer")
    image_tokenizer.save(root / "image_tokenizer" / "tokenizer")
    tokenize(TokenizeConfig(root=root))
    with publishing(root / "pretrain" / "model") as folder:
        copy.deepcopy(tiny_model).save_pretrained(folder)
        write_json(folder / "vocabulary.json", vocabulary.manifest())
        write_json(folder / "layout.json", layout.to_json())
    for kind in ("sd", "sd3"):
        tiny_pipelines.save(kind, root / "pipelines" / kind, text=True)
    return root


def config_of(root: Path, kind: str = "sd", **changed: Any) -> PromptVokensConfig:
    renderer = {"pipeline": str(root / "pipelines" / kind), **SMALL} | changed.pop("renderer", {})
    facts = {"root": root, "renderer": renderer, "documents_per_batch": 4, "frozen_loop": LOOP}
    return PromptVokensConfig(**(facts | changed))


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    model, _, _ = load_pretrained(root / "pretrain" / "model")
    return model.state_dict()


def test_two_steps_of_each_phase_give_a_model_and_a_decoder_that_draw(root: Path, vocabulary: Any) -> None:
    joint = {"joint_loop": LOOP, "joint_mixture": {"story>voken": 1.0, "story>text,voken": 1.0}}
    result = main(config_of(root, **joint))
    for phase in ("frozen", "joint"):
        rows = [json.loads(line) for line in (root / "vokens" / phase / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) >= 2 and all(np.isfinite(rows[i]["denoise"]) for i in range(2))
    assert np.isfinite(result.metrics["validation_denoise_gap"])
    model, found, _ = load_pretrained(root / "vokens" / "model")
    assert found.manifest() == vocabulary.manifest()
    renderer = open_renderer(root / "vokens" / "decoder", device=torch.device("cpu"))
    assert isinstance(renderer, PromptDecoder) and renderer.pipeline.text_encoder is None
    states = torch.randn(1, len(vocabulary.vokens_N), model.config.hidden_size)
    assert renderer(states, steps=1).images[0].size == (16, 16)
    names = {path.relative_to(root / "vokens").parts[0] for path in (root / "vokens").rglob("*.safetensors")}
    assert "decoder" in names and not list((root / "vokens").rglob("*unet*")), (
        "the pipeline's weights stay where they are"
    )


def test_the_frozen_phase_moves_only_the_rows_of_vokens_and_the_mapper(root: Path, tmp_path: Path) -> None:
    for name in ("data", "tokenize", "text_tokenizer", "image_tokenizer", "pretrain", "pipelines"):
        (tmp_path / name).symlink_to(root / name)
    main(config_of(tmp_path))
    before, after = weights_of(root), load_pretrained(tmp_path / "vokens" / "model")[0].state_dict()
    vocabulary = load_pretrained(tmp_path / "vokens" / "model")[1]
    moved = {vocabulary.control("voken"), vocabulary.control("/voken"), *vocabulary.vokens_N.tolist()}
    for name, tensor in before.items():
        if "embed_tokens" in name or "lm_head" in name:
            rows = {int(i) for i in (tensor != after[name]).any(1).nonzero()[:, 0]}
            assert rows and rows <= moved
        else:
            assert torch.equal(tensor, after[name]), name


@pytest.fixture(scope="module")
def phase(root: Path) -> Any:
    config = config_of(root)
    writer = Writer.open(config)
    hidden_dim, vokens = writer.model.config.hidden_size, len(writer.vocabulary.vokens_N)
    losses = PromptLoss(
        writer.model, writer.vocabulary, start_decoder(config, hidden_dim=hidden_dim, vokens=vokens),
        weights=PromptWeights(1.0, 0.1, 0.01, 0.1), rows=writer.rows, model_lr_ratio=0.1,
    )  # fmt: skip
    mixture = {"text>voken": 1.0, "story>text,voken": 1.0, "story>voken": 1.0}
    return _trainee(config, writer, losses, mixture, seed=0)


def test_every_block_has_its_own_picture_and_the_text_before_it(phase: Any) -> None:
    colours = {"cat.": (1, 0, 0), "comes.": (0, 0, 1), "red": (1, 0, 0), "green": (0, 0.5, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}  # fmt: skip
    seen = set()
    for number in range(12):
        batch = phase.train.batch(number)
        assert len(batch.captions) == len(batch.pixels_MCHW) > 0
        again = phase.train.batch(number)
        assert torch.equal(batch.pixels_MCHW, again.pixels_MCHW) and batch.captions == again.captions
        for caption, pixels in zip(batch.captions, batch.pixels_MCHW, strict=True):
            word = next(w for w in colours if w in caption.split())
            assert np.allclose(pixels.mean((1, 2)), colours[word], atol=0.01), caption
            seen.add(word)
    assert seen == set(colours)


def test_the_three_terms_are_weighed_and_reach_rows_and_mapper(phase: Any) -> None:
    losses, batch = phase.losses, phase.train.batch(0)
    torch.manual_seed(0)
    loss, report = losses(batch)
    expected = 0.01 * report["text"] + report["denoise"] + 0.1 * report["align"]
    assert torch.allclose(loss.detach(), expected) and report["align"] > 0 < report["denoise"]
    loss.backward()
    assert losses.rows.input_RD.grad[2:].abs().sum() > 0, "the states at vokens come from their rows"
    assert all(p.grad is None for p in losses.text.parameters())
    first, second = losses.parts()
    assert {id(p) for p in first.parameters} == {id(p) for p in losses.rows.parameters()}
    assert {id(p) for p in second.parameters} == {id(p) for p in losses.mappers.parameters()}
    assert not [name for name in losses.state_dict() if "unet" in name or "vae" in name or "text_encoder" in name]


def test_without_a_caption_there_is_nothing_to_align(phase: Any) -> None:
    from dataclasses import replace

    batch = phase.train.batch(0)
    silent = replace(batch, captions=("",) * len(batch.captions))
    assert phase.losses(silent)[1]["align"] == 0


def test_a_flow_pipeline_is_trained_too(root: Path, tmp_path: Path) -> None:
    for name in ("data", "tokenize", "text_tokenizer", "image_tokenizer", "pretrain", "pipelines"):
        (tmp_path / name).symlink_to(root / name)
    config = config_of(
        tmp_path, "sd3", renderer={"queries": 77 + 4, "recompute": True}, frozen_loop=LOOP | {"steps": 1}
    )
    assert np.isfinite(main(config).metrics["loss"])


def test_what_cannot_be_is_told_before_anything_is_trained(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a pipeline"):
        config_of(root, renderer={"pipeline": str(tmp_path)}).check()
    config_of(root).check()
    first = config_of(root).outside_inputs()
    (root / "pipelines" / "sd" / "notes.txt").write_text("x")
    assert config_of(root).outside_inputs() != first
    recipe = tmp_path / "vokens.yaml"
    recipe.write_text("stage: vokens\nrenderer: {pipeline: x, querys: 3}\nfrozen_loop: {steps: 1}\n")
    with pytest.raises(ConfigError, match="did you mean 'queries'"):
        load_recipe(recipe)


def test_the_recipe_takes_two_real_steps_of_each_phase_at_the_size_of_a_test(root: Path, tmp_path: Path) -> None:
    for name in ("data", "tokenize", "text_tokenizer", "image_tokenizer", "pretrain", "pipelines"):
        (tmp_path / name).symlink_to(root / name)
    overrides = [f"renderer.pipeline={root / 'pipelines' / 'sd'}", "renderer.width=8", "renderer.heads=2"]
    overrides += ["documents_per_batch=2", "frozen_loop.steps=2", "joint_loop.steps=2"]
    overrides += [f"{phase}_loop.{key}" for phase in ("frozen", "joint") for key in ("device=cpu", "log_every=1")]
    config = load_recipe(find_recipe("base/minigpt5/vokens.yaml"), overrides, root=tmp_path)
    assert isinstance(config, PromptVokensConfig)
    assert (config.renderer.queries, config.denoise_weight, config.align_weight, config.text_weight) == (
        77,
        1.0,
        0.1,
        0.01,
    )
    result = main(config)
    assert np.isfinite(result.metrics["loss"]) and {path.name for path in result.outputs} == {"model", "decoder"}
