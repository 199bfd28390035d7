"""Every stage: where its code is, whose work it reads, and the order of a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Where a stage's code is, and whose work it reads."""

    config_class: str
    needs: tuple[str, ...]


STAGES: dict[str, Stage] = {
    "data": Stage("DataConfig", ()),
    "text_tokenizer": Stage("TextTokenizerConfig", ("data",)),
    "teacher": Stage("TeacherConfig", ("data", "text_tokenizer")),
    "image_tokenizer": Stage("ImageTokenizerConfig", ("data", "teacher")),
    "audio_tokenizer": Stage("AudioTokenizerConfig", ("data",)),
    "tokenize": Stage("TokenizeConfig", ("data", "image_tokenizer", "audio_tokenizer")),
    "pretrain": Stage("PretrainConfig", ("text_tokenizer", "tokenize")),
    "decoder": Stage("DecoderConfig", ("data", "tokenize")),
    "vokens": Stage("VokensConfig", ("data", "tokenize", "pretrain", "decoder")),
    "bundle": Stage("BundleConfig", ("pretrain", "decoder", "vokens")),
    "evaluate": Stage("EvaluateConfig", ("bundle",)),
    "gallery": Stage("GalleryConfig", ("bundle",)),
}
"""Every stage, in the order in which a family runs them."""
ALTERNATIVES = {
    ("audio_tokenizer", "checkpoint"): ("published_codec", "PublishedCodecConfig"),
    ("audio_tokenizer", "codes_of"): ("codec_decoder", "CodecDecoderConfig"),
    ("text_tokenizer", "checkpoint"): ("llm_tokenizer", "LLMTokenizerConfig"),
    ("vokens", "renderer"): ("prompt_vokens", "PromptVokensConfig"),
}
"""Stage and a key that makes its recipe one of another kind -> where that kind's code is."""
OPTIONAL = ("teacher", "image_tokenizer", "audio_tokenizer", "decoder", "vokens")
"""A teacher may come from elsewhere, and a run may do without pictures, without sound or without diffusion."""
