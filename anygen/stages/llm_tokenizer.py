"""Stage `text_tokenizer` where its recipe names a checkpoint: the tokenizer of a language model, taken as it is.

    stage: text_tokenizer
    checkpoint: Qwen3-0.6B-Base

With `init_from` of the stage `pretrain` naming the same folder, the language model's text rows are kept one to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from anygen.files import sha256_of
from anygen.stages.base import StageConfig, StageResult
from tokenizers_mm.llm_text import TOKENIZER_JSON, LLMTextTokenizer


class LLMTokenizerConfig(StageConfig):
    """Recipe of the stage; it has nothing of a training's."""

    stage: Literal["text_tokenizer"] = "text_tokenizer"
    checkpoint: Path
    """A folder with the `tokenizer.json` of a language model (byte-level BPE: Qwen, Llama 3, GPT-2 and many others)."""

    def check(self) -> None:
        """A tokenizer that cannot be used is told before anything is moved."""
        LLMTextTokenizer.load(self.checkpoint)

    def outside_inputs(self) -> Mapping[str, str]:
        """The tokenizer's file."""
        path = self.checkpoint / TOKENIZER_JSON
        return {TOKENIZER_JSON: sha256_of(path)} if path.is_file() else {}


def main(config: LLMTokenizerConfig) -> StageResult:
    """Copy the tokenizer."""
    tokenizer = LLMTextTokenizer.load(config.checkpoint)
    tokenizer.save(config.folder)
    unused = sum(stop - start for start, stop in tokenizer.unused_codes)
    metrics = {"pieces": float(tokenizer.codebook_size - unused), "unused": float(unused)}
    return StageResult(config.folder, (config.folder / TOKENIZER_JSON,), metrics)
