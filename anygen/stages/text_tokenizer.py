"""Stage `text_tokenizer`: SentencePiece pieces from every text of the training split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from anygen.data.records import RecordStore
from anygen.errors import DataError
from anygen.stages.base import StageConfig, StageResult, open_records
from tokenizers_mm.text import MODEL_FILE, train_text_tokenizer


class TextTokenizerConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["text_tokenizer"] = "text_tokenizer"
    vocabulary_size: int = Field(2048, ge=260)
    """Pieces at most; 256 of them are single bytes."""


def main(config: TextTokenizerConfig) -> StageResult:
    """Train and save the tokenizer."""
    sentences = list(texts_of(open_records(config.root, "train")))
    if not any(sentences):
        raise DataError(
            "no record has a text: add captions (metadata.jsonl, or a folder for each class). Picture codes alone need "
            "neither this stage nor stage teacher: name a vision model in teacher.path, or learn from pixels only"
        )
    tokenizer = train_text_tokenizer(sentences, vocabulary_size=config.vocabulary_size)
    tokenizer.save(config.folder)
    pieces = sum(tokenizer.encode(sentence).num_steps for sentence in sentences)
    metrics = {
        "pieces": float(tokenizer.codebook_size),
        "characters_per_piece": sum(len(sentence) for sentence in sentences) / pieces,
    }
    return StageResult(config.folder, (config.folder / MODEL_FILE,), metrics)


def texts_of(store: RecordStore) -> Iterator[str]:
    """Every text of every record."""
    for record in store:
        yield from record.captions
        yield from (utterance.text for utterance in record.utterances)
        for question, answer in record.questions:
            yield question
            yield answer
        yield from (name for name, _ in record.objects)
        yield from (part for part in record.story if isinstance(part, str))
