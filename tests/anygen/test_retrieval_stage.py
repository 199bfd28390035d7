"""Retrieval as an option of stage `vokens`: on held-out documents the head decides, and finds, better than chance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_decoder
from PIL import Image

from anygen.data.records import Record, write_shard
from anygen.data.source import png_of
from anygen.files import publishing, write_json
from anygen.stages.tokenize import TokenizeConfig
from anygen.stages.tokenize import main as tokenize
from anygen.stages.vokens import VokensConfig, main
from decoders.retrieval import RetrievalHead

COLOURS = ["red", "green", "blue", "white"]
OPTIMIZER = {"lr": 1e-2, "warmup_steps": 2}


@pytest.fixture
def root(
    tmp_path: Path, tiny_model: Any, vocabulary: Any, layout: Any, text_tokenizer: Any, image_tokenizer: Any
) -> Path:
    """A run up to its decoder: apples are in a library, cats are to be drawn; held out are pairs of words that are known apart."""
    (tmp_path / "data").mkdir()
    pairs = [(word, colour) for word in ("a", "the", "one", "my", "this", "big") for colour in COLOURS]
    for split, chosen in {"validation": pairs[::5], "train": [p for n, p in enumerate(pairs) if n % 5]}.items():
        records = []
        for word, colour in chosen:
            picture = png_of(Image.new("RGB", (16, 16), colour))
            records += [
                Record(f"{split}-{word}-{colour}-{thing}", thing, (f"{word} {colour} {thing}",), picture)
                for thing in ("apple", "cat")
            ]
        write_shard(tmp_path / "data" / f"{split}-00000.tar", records)
    text_tokenizer.save(tmp_path / "text_tokenizer")
    image_tokenizer.save(tmp_path / "image_tokenizer" / "tokenizer")
    tokenize(TokenizeConfig(root=tmp_path))
    model = copy.deepcopy(tiny_model)
    for parameter in model.model.layers.parameters():  # so that states depend on what came before, untrained as it is
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    with publishing(tmp_path / "pretrain" / "model") as folder:
        model.save_pretrained(folder)
        write_json(folder / "vocabulary.json", vocabulary.manifest())
        write_json(folder / "layout.json", layout.to_json())
    tiny_decoder(tmp_path / "decoder" / "model", layout, vocabulary, hidden_dim=None)
    return tmp_path


def test_the_head_learns_beside_vokens_that_stay(root: Path) -> None:
    loop = {"precision": "fp32", "device": "cpu", "log_every": 50, "optimizer": OPTIMIZER}
    retrieval = {"library": ("apple",), "embed_dim": 16, "drop": 0.0, "loop": {"steps": 800, **loop}}
    config = VokensConfig(
        root=root, mapper={"width": 16, "layers": 1, "heads": 2}, documents_per_batch=16,
        frozen_loop={"steps": 1, **loop}, retrieval=retrieval,
    )  # fmt: skip
    result = main(config)
    print(result.metrics)
    assert result.metrics["retrieval_validation_decided"] > 0.65, "0.5 is chance"
    assert result.metrics["retrieval_validation_found"] > 0.6, "0.25 is chance"
    head = RetrievalHead.load(result.outputs[2])
    assert not head.training and all(torch.isfinite(p).all() for p in head.parameters())
