"""What a recipe would do and cost, without data, weights or a step: `anygen train RECIPE --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anygen.stages.base import StageConfig
from anygen.stages.codec_decoder import CodecDecoderConfig, open_decoder
from anygen.stages.dry_run_pictures import weigh_image_tokenizer
from anygen.stages.dry_run_pretrain import weigh_pretrain
from anygen.stages.image_tokenizer import ImageTokenizerConfig, open_teacher
from anygen.stages.pretrain import PretrainConfig
from anygen.stages.published_codec import PublishedCodecConfig, codec_facts, open_codec


def weigh(config: StageConfig, recipe: Path | None = None) -> dict[str, Any]:
    """What a recipe would do: its whole configuration, and the cost of a picture tokenizer or a transformer.

    Args:
        config: the recipe, read.
        recipe: its file, beside which those of the tokenizers are looked for.

    Raises:
        CheckpointError, ConfigError: the recipe names a teacher, a codec or a checkpoint that cannot be used, or
            nothing says which tokenizers a transformer would have.
    """
    facts: dict[str, Any] = {"config": config.model_dump(mode="json")}
    if isinstance(config, ImageTokenizerConfig):
        found = (config.teacher.path or config.root / "teacher" / "model").is_dir()
        facts |= weigh_image_tokenizer(config, open_teacher(config) if found else None)
    if isinstance(config, PublishedCodecConfig):
        facts["codec"] = codec_facts(open_codec(config))
    if isinstance(config, CodecDecoderConfig):
        facts["codec"] = codec_facts(open_decoder(config))
    if isinstance(config, PretrainConfig):
        facts |= weigh_pretrain(config, recipe)
    return facts
