"""A bundle whose vokens drive a pretrained pipeline answers in the API like any other, by the pipeline's own numbers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "decoders"))
import tiny_pipelines

from anygen.api import AnyGen
from anygen.bundle import save_bundle
from anygen.errors import InputError
from decoders.pretrained import open_pipeline
from decoders.prompt import PromptDecoder


@pytest.fixture(scope="module")
def driven(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, vocabulary: Any, layout: Any, tokenizers: Any
) -> AnyGen:
    folder = tmp_path_factory.mktemp("driven")
    pipeline = open_pipeline(tiny_pipelines.save("sd", folder / "base"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = PromptDecoder.create(
            pipeline, hidden_dim=tiny_model.config.hidden_size, vokens=4, queries=5, width=8, layers=1, heads=2
        )
    decoder.save_pretrained(folder / "decoder")
    save_bundle(
        folder / "bundle", model=copy.deepcopy(tiny_model), vocabulary=vocabulary, layout=layout, tokenizers=tokenizers,
        defaults={}, provenance={}, card="# driven\n", decoders={"image": folder / "decoder"},
    )  # fmt: skip
    return AnyGen.from_pretrained(folder / "bundle", device="cpu")


def test_vokens_drive_the_pipeline(driven: AnyGen, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**more: Any) -> Any:
        return driven.generate(text="a red apple", output="image", decoder="voken", **more)

    picture = make(num_inference_steps=2, seed=1).image
    assert picture.size == (16, 16)
    assert make(num_inference_steps=2, seed=1).image == picture
    assert make(num_inference_steps=2, seed=2).image != picture, "other noise"
    assert len(make(num_inference_steps=1, num_samples=2).images) == 2
    assert driven.bundle.renderers == {"image": ("vokens",)}
    counts = []
    pipeline = driven.bundle.renderer("image").pipeline
    pipeline.scheduler.set_timesteps(50)
    expected = len(pipeline.scheduler.timesteps)  # PNDM adds one
    pipeline.unet.register_forward_pre_hook(lambda *_: counts.append(1))
    make()
    assert len(counts) == expected, "the pipeline's own 50 steps where none are asked for"


def test_codes_do_not(driven: AnyGen) -> None:
    with pytest.raises(InputError, match="codes; it has decoder 'codes', 'voken'"):
        driven.generate(text="a", output="image", decoder="diffusion")


def test_states_of_another_model_are_refused(driven: AnyGen) -> None:
    with pytest.raises(InputError, match=r"4 vokens of 32; got states of shape \(1, 4, 33\)"):
        driven.bundle.renderer("image")(torch.zeros(1, 4, 33))
