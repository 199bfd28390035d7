"""Beginning with the weights of an earlier training: a codec learns more sounds, and what cannot be begun with is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_audio_tokenizer_stage import recipe_of, root  # noqa: F401  a fixture

from anygen.errors import CheckpointError, ConfigError
from anygen.stages.base import StageConfig
from anygen.stages.run import run_stage
from tokenizers_mm.audio import AudioTokenizer

STILL: dict[str, Any] = {"codec": {"quantizer_dropout": 0.0}, "loop": {"steps": 1, "optimizer": {"lr": 1e-12}}}


def codec_of(config: StageConfig) -> AudioTokenizer:
    return AudioTokenizer.load(config.folder / "tokenizer")


def test_a_codec_goes_on_where_another_stopped(root: Path, tmp_path: Path) -> None:  # noqa: F811
    first = recipe_of(root, tmp_path / "first", loop={"ema_decay": 0.5, "optimizer": {"lr": 0.03, "warmup_steps": 0}})
    run_stage(first)
    still = {**STILL, "loop": STILL["loop"] | {"start_from": str(first.folder)}}
    second = recipe_of(root, tmp_path / "second", steps_without_quantiser=0, **still)
    run_stage(second)
    anew = recipe_of(root, tmp_path / "anew", steps_without_quantiser=0, **STILL)
    run_stage(anew)
    learned, kept, fresh = (
        torch.cat([weight.flatten() for weight in codec_of(config).model.encoder.parameters()])
        for config in (first, second, anew)
    )
    assert (kept - learned).abs().max() < 1e-4, "one step of no length: the running means of the first training"
    assert (fresh - learned).abs().max() > 0.03


def test_what_cannot_be_begun_with_is_told_before_anything_is_moved(root: Path, tmp_path: Path) -> None:  # noqa: F811
    first = recipe_of(root, tmp_path / "first", loop={"steps": 3})
    run_stage(first)
    for start, says in ((tmp_path / "nothing", r"has no checkpoints/step-\*"), (first.folder, "name another root")):
        fields = first.model_dump(exclude={"stage"})
        fields["loop"] |= {"start_from": start}
        with pytest.raises(ConfigError, match=says):
            run_stage(type(first)(**fields))
        assert (first.folder / "stage.json").is_file(), "what was there is not moved"
    larger = recipe_of(root, tmp_path / "larger", codec={"latent_dim": 16}, loop={"start_from": str(first.folder)})
    with pytest.raises(CheckpointError, match="does not fit this run"):
        run_stage(larger)
