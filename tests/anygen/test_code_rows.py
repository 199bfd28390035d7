"""Rows of codes start as near to each other as their codes are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from anygen.config import build
from anygen.documents import Tokenizers
from anygen.layout import Layout
from anygen.model.causal import ModelConfig, create_model
from anygen.model.code_rows import SHARE, start_code_rows
from anygen.stages.pretrain import PretrainConfig, start_model
from anygen.vocabulary import Vocabulary
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.text import TextTokenizer


def test_rows_of_codes_take_the_geometry_of_their_codebook_and_keep_their_size() -> None:
    vocabulary = Vocabulary.create(text=300, image=(1, 64), audio=(2, 32))
    generator = torch.Generator().manual_seed(0)
    vectors = {
        "image": torch.randn(1, 64, 16, generator=generator),
        "audio": torch.randn(4, 32, 8, generator=generator),
    }
    vectors["image"][0, 1] = vectors["image"][0, 0]  # two codes of one vector
    for tied in (True, False):
        config = ModelConfig(size="smoke", width=256, tie_embeddings=tied)
        plain, model = (create_model(config, vocabulary, seed=0) for _ in range(2))
        start_code_rows(model, vocabulary, vectors, seed=1)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            before, after = (getattr(m, get)().weight.detach() for m in (plain, model))
            spans = {r.name: slice(r.start, r.stop) for r in vocabulary.ranges}
            for name in ("text", "control"):
                assert torch.equal(before[spans[name]], after[spans[name]])
            for name, book in (
                ("image.0", vectors["image"][0]),
                ("audio.0", vectors["audio"][0]),
                ("audio.1", vectors["audio"][1]),
            ):
                rows, old = after[spans[name]], before[spans[name]]
                assert 0.9 < float(rows.std() / old.std()) < 1.1
                near = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
                wanted = SHARE * F.cosine_similarity(
                    (book - book.mean(0))[:, None], (book - book.mean(0))[None], dim=-1
                )
                apart = ~torch.eye(len(rows), dtype=torch.bool)
                assert float((near - wanted)[apart].abs().mean()) < 0.15
                correlation = torch.corrcoef(torch.stack([near[apart], wanted[apart]]))[0, 1]
                assert correlation > 0.8
            twins = after[spans["image.0"]][:2]
            assert 0.55 < float(F.cosine_similarity(twins[0], twins[1], dim=0)) < 0.9, "alike, and not the same"


def test_it_is_the_same_each_time_and_books_differ() -> None:
    vocabulary = Vocabulary.create(text=300, audio=(2, 32))
    book = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    models = [create_model(ModelConfig(size="smoke"), vocabulary, seed=0) for _ in range(2)]
    for model in models:
        start_code_rows(model, vocabulary, {"audio": book}, seed=1)
    first, second = (m.get_input_embeddings().weight.detach() for m in models)
    assert torch.equal(first, second)
    ranges = {r.name: r for r in vocabulary.ranges}
    rows = [first[ranges[name].start : ranges[name].stop] for name in ("audio.0", "audio.1")]
    assert float(F.cosine_similarity(rows[0], rows[1], dim=-1).abs().mean()) < 0.35, (
        "each book has directions of its own"
    )


def test_a_recipe_asks_for_it(
    image_tokenizer: ImageTokenizer, audio_tokenizer: AudioTokenizer, text_tokenizer: TextTokenizer, layout: Layout
) -> None:
    tokenizers: Tokenizers = {"text": text_tokenizer, "image": image_tokenizer, "audio": audio_tokenizer}
    vocabulary = Vocabulary.of(tokenizers)
    recipe = {"mixture": {"text>image": 1.0}, "loop": {"steps": 1}, "model": {"size": "smoke"}}
    plain, started = (
        start_model(build(PretrainConfig, recipe | more, source="test"), vocabulary, tokenizers, layout)
        for more in ({}, {"code_rows": "codebook"})
    )
    before, after = (model.get_input_embeddings().weight.detach() for model in (plain, started))
    for codes in vocabulary.ranges:
        same = torch.equal(before[codes.start : codes.stop], after[codes.start : codes.stop])
        assert same == (codes.group not in ("image", "audio")), codes.name
    assert image_tokenizer.code_vectors.shape[:2] == (image_tokenizer.num_codebooks, image_tokenizer.codebook_size)
    assert audio_tokenizer.code_vectors.shape[:2] == (audio_tokenizer.num_codebooks, audio_tokenizer.codebook_size)
