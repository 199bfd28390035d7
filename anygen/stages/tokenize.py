"""Stage `tokenize`: record shards to coded shards, one to one.

Each shard is encoded alone and published atomically, so shards can be done in any order, by any number of processes,
and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from anygen.data.coded import CodedRecord, CodedUtterance, write_coded_shard
from anygen.data.records import Record, RecordStore
from anygen.errors import DataError
from anygen.files import is_published
from anygen.stages.base import StageConfig, StageResult
from anygen.training.interrupts import StopRequest
from anygen.training.metrics import Progress
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.audio_batches import can_batch, grouped
from tokenizers_mm.codes import Codes
from tokenizers_mm.image import ImageTokenizer, square, to_pixels
from tokenizers_mm.media import load_picture

_BATCH = 64


class TokenizeConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["tokenize"] = "tokenize"


def main(config: TokenizeConfig) -> StageResult:
    """Encode every shard that is not there yet."""
    image, audio = open_media_tokenizers(config.root)
    facts = coded_facts(image, audio)
    paths = sorted((config.root / "data").glob("*.tar"))
    if not paths:
        raise DataError(f"{config.root / 'data'} has no shards: run the stage data first")
    progress = Progress("tokenize", len(paths))
    folders = []
    with StopRequest() as stop:
        for path in paths:
            folder = config.folder / path.stem
            if not is_published(folder):
                write_coded_shard(folder, _encode(RecordStore([path]), image, audio), facts=facts)
                stop.check(f"shards up to {folder.name} are in {config.folder}")
            folders.append(folder)
            progress.advance()
    progress.close()
    return StageResult(config.folder, tuple(folders), {"shards": float(len(folders))})


def open_media_tokenizers(root: Path) -> tuple[ImageTokenizer | None, AudioTokenizer | None]:
    """The picture and sound tokenizers of a run, where it has them."""
    image, audio = root / "image_tokenizer" / "tokenizer", root / "audio_tokenizer" / "tokenizer"
    return (
        ImageTokenizer.load(image) if image.is_dir() else None,
        AudioTokenizer.load(audio) if audio.is_dir() else None,
    )


def coded_facts(image: ImageTokenizer | None, audio: AudioTokenizer | None) -> dict[str, Any]:
    """What coded shards depend on."""
    return {
        "image": image.fingerprint if image else None,
        "audio": audio.fingerprint if audio else None,
    }


def _encode(store: RecordStore, image: ImageTokenizer | None, audio: AudioTokenizer | None) -> Iterator[CodedRecord]:
    # a group of sounds a thread: threads inside one layer would wait
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(store), _BATCH):
            records = [store[index] for index in range(start, min(start + _BATCH, len(store)))]
            codes = iter(_encode_sounds(records, audio, pool)) if audio is not None else iter(())
            for record, picture in zip(records, _encode_pictures(records, image), strict=True):
                utterances = tuple(
                    CodedUtterance(u.text, u.voice, next(codes)) for u in record.utterances if audio is not None
                )
                yield CodedRecord(
                    record.key, record.kind, record.captions, picture, utterances, record.objects, record.questions
                )


def _encode_sounds(records: list[Record], audio: AudioTokenizer, pool: Executor) -> list[Codes]:
    """Codes of every utterance in order: in groups, twice as fast; they are the same for any number of threads."""
    rate_hz = audio.sample_rate_hz
    sounds = list(pool.map(lambda u: u.audio(rate_hz), [u for record in records for u in record.utterances]))
    groups = (
        grouped([len(s.samples_T) for s in sounds]) if can_batch(audio.model) else [[n] for n in range(len(sounds))]
    )
    encoded = pool.map(audio.encode_batch, [[sounds[place] for place in group] for group in groups])
    found = {
        place: codes
        for group, batch in zip(groups, encoded, strict=True)
        for place, codes in zip(group, batch, strict=True)
    }
    return [found[place] for place in range(len(sounds))]


def _encode_pictures(records: list[Record], image: ImageTokenizer | None) -> list[Codes | None]:
    codes: list[Codes | None] = [None] * len(records)
    places = [place for place, record in enumerate(records) if record.picture is not None and image is not None]
    if not places or image is None:
        return codes
    side = image.config.side_px
    loaded = [
        load_picture(picture, max_side_px=side) for place in places if (picture := records[place].picture) is not None
    ]
    encoded = image.encode_pixels(torch.stack([to_pixels(square(picture, side)) for picture in loaded]))
    for place, found in zip(places, encoded, strict=True):
        codes[place] = Codes(found.reshape(image.num_codebooks, -1).numpy(), "image", image.grid_hw)
    return codes
