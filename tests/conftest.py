"""Shared fixtures: a tiny, untrained but complete bundle, and what it is made of."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from anygen.bundle import save_bundle
from anygen.layout import Layout
from anygen.model.causal import ModelConfig, create_model
from anygen.sampling.choose import SamplingOptions
from anygen.sequence import Sequencer
from anygen.vocabulary import Vocabulary
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig
from tokenizers_mm.regions import RegionTokenizer
from tokenizers_mm.text import TextTokenizer, train_text_tokenizer
from tokenizers_mm.vqkd import PictureEncoder, VQKDConfig

SENTENCES = [
    "a red apple",
    "two cats left of a dog",
    "the flag of Norway",
    "how many apples are there?",
    "one",
    "two",
] * 20


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests are small: threads would only wait for one another


@pytest.fixture(scope="session")
def text_tokenizer() -> TextTokenizer:
    return train_text_tokenizer(SENTENCES, vocabulary_size=320)


@pytest.fixture(scope="session")
def llm_json() -> bytes:
    """The tokenizer.json of a language model as Qwen writes it: byte-level BPE, NFC, added tokens at the end."""
    import tokenizers as library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made = library.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(library.Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [*SENTENCES, "hi! hi! \u00e9t\u00e9"] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>", "</think>"])
    return made.to_str().encode()


@pytest.fixture(scope="session")
def image_tokenizer() -> ImageTokenizer:
    """An untrained VQ-KD tokenizer of 16 px pictures, 2 x 2 codes of 32."""
    torch.manual_seed(0)
    config = VQKDConfig(side_px=16, patch_px=8, width=16, depth=1, num_heads=2, codebook_size=32, code_dim=4)
    encoder = PictureEncoder(config)
    encoder.train()
    encoder(torch.rand(64, 3, 16, 16))  # the first batch starts the codebook
    head_config = PixelHeadConfig(width=16, depth=1, num_heads=2, refine_channels=4)
    head = PixelHead(head_config, code_dim=4, patch_px=8)
    return ImageTokenizer(config, encoder, head_config, head)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP saved in the published layout. Do not change it: copy it first."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


@pytest.fixture(scope="session")
def audio_tokenizer() -> AudioTokenizer:
    """An untrained codec at 8 kHz, 50 frames a second, 2 codebooks of 16."""
    torch.manual_seed(0)
    size = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=16, num_codebooks=2)
    codec = TrainableEncodec(size, tokens_per_batch=100)
    codec.train()
    codec.quantise(codec.latents(torch.randn(4, 8000) * 0.1))
    config = InverseSTFTConfig(width=16, depth=1)
    decoder = InverseSTFTDecoder(config, latent_dim=8, hop=160)
    return AudioTokenizer(codec.export(), decoder, config)


@pytest.fixture(scope="session")
def tokenizers(
    text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer, audio_tokenizer: AudioTokenizer
) -> dict[str, Any]:
    return {
        "text": text_tokenizer,
        "image": image_tokenizer,
        "audio": audio_tokenizer,
        "region": RegionTokenizer(num_bins=10),
    }


@pytest.fixture(scope="session")
def layout() -> Layout:
    return Layout(
        image_codebooks=1,
        audio_codebooks=2,
        audio_order="delay",
        native_grid_hw=(2, 2),
        max_side=6,
        native_frames=10,
        max_frames=300,
    )


@pytest.fixture(scope="session")
def vocabulary(tokenizers: dict[str, Any]) -> Vocabulary:
    return Vocabulary.of(tokenizers, voken=4)


@pytest.fixture(scope="session")
def sequencer(vocabulary: Vocabulary, layout: Layout) -> Sequencer:
    return Sequencer(vocabulary, layout)


@pytest.fixture(scope="session")
def tiny_model(vocabulary: Vocabulary) -> Any:
    """An untrained transformer."""
    config = ModelConfig(size="smoke", width=32, head_width=16, mlp_width=48, max_positions=1024)
    return create_model(config, vocabulary, seed=0).eval()


@pytest.fixture(scope="session")
def bundle_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Any,
    vocabulary: Vocabulary,
    layout: Layout,
    tokenizers: dict[str, Any],
) -> Path:
    """A complete bundle on disk. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    save_tiny_bundle(folder, tiny_model, vocabulary, layout, tokenizers)
    return folder


def save_tiny_bundle(
    folder: Path,
    model: Any,
    vocabulary: Vocabulary,
    layout: Layout,
    tokenizers: dict[str, Any],
    decoders: dict[str, Path] | None = None,
) -> None:
    save_bundle(
        folder,
        model=copy.deepcopy(model),
        vocabulary=vocabulary,
        layout=layout,
        tokenizers=tokenizers,
        defaults={"image": SamplingOptions(guidance_scale=2.0)},
        provenance={"name": "tiny"},
        card="# tiny\n",
        decoders=decoders,
    )


@pytest.fixture(scope="session")
def model(bundle_folder: Path) -> Any:
    """The bundle, opened."""
    from anygen.api import AnyGen

    return AnyGen.from_pretrained(bundle_folder, device="cpu")


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def drawing_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Any,
    vocabulary: Vocabulary,
    layout: Layout,
    tokenizers: dict[str, Any],
) -> Path:
    """A bundle with an untrained diffusion decoder that takes codes and vokens. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny_decoder(folder / "decoder", layout, vocabulary, hidden_dim=tiny_model.config.hidden_size)
    decoders = {"image": folder / "decoder"}
    save_tiny_bundle(folder / "drawing", tiny_model, vocabulary, layout, tokenizers, decoders)
    return folder / "drawing"


@pytest.fixture(scope="session")
def codes_only_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Any,
    vocabulary: Vocabulary,
    layout: Layout,
    tokenizers: dict[str, Any],
) -> Path:
    """A bundle with an untrained diffusion decoder that takes codes only. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny_decoder(folder / "decoder", layout, vocabulary, hidden_dim=None)
    decoders = {"image": folder / "decoder"}
    save_tiny_bundle(folder / "codes", tiny_model, vocabulary, layout, tokenizers, decoders)
    return folder / "codes"


def tiny_decoder(folder: Path, layout: Layout, vocabulary: Vocabulary, *, hidden_dim: int | None) -> None:
    """Save a random decoder of 16 px pictures: driven by codes and, where `hidden_dim` says their width, by vokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from decoders.decoder import FlowDecoder
    from decoders.denoiser import FlowTransformer
    from decoders.drivers import CodeEmbedder, VokenMapper

    patches = layout.native_grid_hw[0] * layout.native_grid_hw[1]
    book = vocabulary.range("image.0").size
    vokens = len(vocabulary.vokens_N)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = FlowTransformer(size=(16, 16), patch=(8, 8), width=32, depth=1, heads=2, condition_dim=8)
        torch.nn.init.normal_(denoiser.out.weight, std=0.1)  # else it would ignore its condition
        mapper = None
        if hidden_dim is not None:
            mapper = VokenMapper(
                hidden_dim=hidden_dim, vokens=vokens, patches=patches, dim=8,
                codebook_size=book, width=16, layers=1, heads=2,
            )  # fmt: skip
        codes = CodeEmbedder(codebook_size=book, dim=8, patches=patches)
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        FlowDecoder(denoiser, scheduler, codes=codes, vokens=mapper).save_pretrained(folder)
