"""What is known of a run's tokenizers before they exist: the run's own where it has them, else what recipes say.

The recipes looked at lie beside that of the transformer, or one folder above it, where a family keeps them that several
sizes share: `FAMILY/text_tokenizer.yaml` for `FAMILY/large/pretrain.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anygen.errors import ConfigError
from anygen.stages.audio_tokenizer import AudioTokenizerConfig
from anygen.stages.base import StageConfig, open_text_tokenizer
from anygen.stages.codec_decoder import CodecDecoderConfig
from anygen.stages.image_tokenizer import ImageTokenizerConfig
from anygen.stages.llm_tokenizer import LLMTokenizerConfig
from anygen.stages.published_codec import PublishedCodecConfig, open_codec
from anygen.stages.run import load_recipe
from anygen.stages.text_tokenizer import TextTokenizerConfig
from anygen.stages.tokenize import open_media_tokenizers
from tokenizers_mm.llm_text import LLMTextTokenizer

_ENCODEC_24KHZ = (32, 1024, 75.0)
"""Books, codes and frames a second of the published codec at 24 kHz."""


@dataclass(frozen=True)
class TokenizerFacts:
    """Sizes of the tokenizers; 0 books where a modality is absent."""

    text: int
    image: tuple[int, int] = (0, 0)
    """Books, codes of each."""
    grid_hw: tuple[int, int] = (0, 0)
    audio: tuple[int, int] = (0, 0)
    rate_hz: float = 0.0
    """Code frames a second."""
    sources: tuple[str, ...] = ()
    """For each tokenizer, whether it was seen or is assumed, and from what."""


def tokenizer_facts(root: Path, recipe: Path | None) -> TokenizerFacts:
    """What a transformer trained in `root` by `recipe` would read and write.

    Raises:
        ConfigError: nothing says what its text tokenizer is.
    """
    text, text_source = _text(root, recipe)
    image, grid_hw, image_source = _image(root, recipe)
    audio, rate_hz, audio_source = _audio(root, recipe)
    sources = (f"text: {text_source}", f"image: {image_source}", f"audio: {audio_source}")
    return TokenizerFacts(text, image, grid_hw, audio, rate_hz, sources)


def _text(root: Path, recipe: Path | None) -> tuple[int, str]:
    if (root / "text_tokenizer" / "stage.json").is_file():
        return open_text_tokenizer(root).codebook_size, "the run's"
    config, said = _sibling(recipe, "text_tokenizer")
    if isinstance(config, TextTokenizerConfig):
        return config.vocabulary_size, f"assumed from {said}"
    if isinstance(config, LLMTokenizerConfig):
        return LLMTextTokenizer.load(config.checkpoint).codebook_size, f"of {config.checkpoint}, from {said}"
    raise ConfigError(
        f"nothing says how many text ids there are: {root} has no text tokenizer, and there is no text_tokenizer.yaml "
        "beside the recipe"
    )


def _image(root: Path, recipe: Path | None) -> tuple[tuple[int, int], tuple[int, int], str]:
    made, _ = open_media_tokenizers(root)
    if made is not None:
        return (made.num_codebooks, made.codebook_size), made.grid_hw or (8, 8), "the run's"
    config, said = _sibling(recipe, "image_tokenizer")
    if not isinstance(config, ImageTokenizerConfig):
        return (0, 0), (0, 0), "none"
    encoder = config.encoder
    side = encoder.side_px // encoder.patch_px
    return (encoder.quantizer.num_codebooks, encoder.codebook_size), (side, side), f"assumed from {said}"


def _audio(root: Path, recipe: Path | None) -> tuple[tuple[int, int], float, str]:
    _, made = open_media_tokenizers(root)
    if made is not None:
        return (made.num_codebooks, made.codebook_size), made.rate_hz, "the run's"
    config, said = _sibling(recipe, "audio_tokenizer")
    if isinstance(config, AudioTokenizerConfig):
        codec = config.codec
        return (codec.num_codebooks, codec.codebook_size), codec.rate_hz / codec.hop, f"assumed from {said}"
    if isinstance(config, CodecDecoderConfig):
        config = config.source
    if not isinstance(config, PublishedCodecConfig):
        return (0, 0), 0.0, "none"
    if config.path.exists():
        made = open_codec(config)
        return (made.num_codebooks, made.codebook_size), made.rate_hz, f"of {config.checkpoint}, from {said}"
    books, codes, rate_hz = _ENCODEC_24KHZ
    source = f"assumed EnCodec at 24 kHz: {config.checkpoint}, named in {said}, is not here"
    return (config.num_codebooks or books, codes), rate_hz, source


def _sibling(recipe: Path | None, stage: str) -> tuple[StageConfig | Any, str]:
    folders = [recipe.resolve().parent, recipe.resolve().parent.parent] if recipe else []
    path = next((path for folder in folders if (path := folder / f"{stage}.yaml").is_file()), None)
    return (load_recipe(path), f"{path.parent.name}/{path.name}") if path else (None, "")
