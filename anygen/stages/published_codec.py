"""Stage `audio_tokenizer` where its recipe names a checkpoint: an EnCodec that somebody trained, taken as it is.

    stage: audio_tokenizer
    checkpoint: encodec_24khz
    num_codebooks: 2

Later stages find `audio_tokenizer/tokenizer`, as after a training.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from anygen.errors import CheckpointError
from anygen.files import publishing, sha256_of
from anygen.stages.base import StageConfig, StageResult, check_elsewhere
from anygen.stages.from_bundle import bundle_at
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec_package import convert


class PublishedCodecConfig(StageConfig):
    """Recipe of the stage; it has nothing of a training's."""

    stage: Literal["audio_tokenizer"] = "audio_tokenizer"
    checkpoint: Path
    """A folder that transformers opens (EnCodec at 24, 32 or 48 kHz, or one made here), a .th file of the encodec
    package, or a bundle with a codec (`nano`: the embedded one)."""
    num_codebooks: int | None = Field(None, ge=1)
    """Keep the leading ones only, as many as one of the codec's bandwidths has; all by default."""

    @property
    def path(self) -> Path:
        """Where the checkpoint lies."""
        bundle = bundle_at(self.checkpoint)
        return self.checkpoint if bundle is None else bundle / "tokenizers" / "audio"

    def check(self) -> None:
        """A checkpoint that cannot be used is told before anything is moved."""
        check_elsewhere("checkpoint", self.path, self.folder)
        open_codec(self)

    def outside_inputs(self) -> Mapping[str, str]:
        """The checkpoint's files."""
        path = self.path
        files = [path] if path.is_file() else [*path.rglob("*.safetensors"), *path.rglob("*.json")]
        return {file.relative_to(path.parent).as_posix(): sha256_of(file) for file in sorted(files)}


def main(config: PublishedCodecConfig) -> StageResult:
    """Copy the codec, with the codebooks that are kept, to `tokenizer/`."""
    tokenizer = open_codec(config)
    with publishing(config.folder / "tokenizer") as folder:
        tokenizer.save(folder)
    facts = codec_facts(tokenizer)
    return StageResult(
        config.folder,
        (config.folder / "tokenizer",),
        {name: float(facts[name]) for name in ("codebooks", "bits_per_s")},
    )


def open_codec(config: PublishedCodecConfig) -> AudioTokenizer:
    """The codec that a recipe names.

    Raises:
        CheckpointError: missing, not an EnCodec, or without a bandwidth of so many codebooks.
    """
    path = config.path
    if not path.exists():
        raise CheckpointError(f"there is no codec at {path}: expected a folder of an EnCodec model, or a .th file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no codec, it has no config.json: of a run, name RUN/audio_tokenizer/tokenizer"
        )
    if path.is_dir():
        return AudioTokenizer.load(path, num_codebooks=config.num_codebooks)
    with tempfile.TemporaryDirectory() as folder:
        convert(path, Path(folder))
        return AudioTokenizer.load(Path(folder), num_codebooks=config.num_codebooks)


def codec_facts(tokenizer: AudioTokenizer) -> dict[str, Any]:
    """Its rates, codes and size, JSON-able."""
    parts = [tokenizer.model, *([tokenizer.istft] if tokenizer.istft is not None else [])]
    return {
        "sample_rate_hz": tokenizer.sample_rate_hz,
        "hop": tokenizer.hop,
        "frames_per_s": round(tokenizer.rate_hz, 3),
        "codebooks": tokenizer.num_codebooks,
        "codes": tokenizer.codebook_size,
        "bits_per_s": round(tokenizer.rate_hz * tokenizer.num_codebooks * math.log2(tokenizer.codebook_size), 3),
        "decoder": "SEANet" if tokenizer.istft is None else "inverse STFT",
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }
