"""Stage `tokenize`: record shards to coded shards, one to one.

Each shard is encoded alone and published atomically, so shards can be done in any order, by any number of processes,
and again. `part=2/16` does every 16th shard from the 2nd on: sixteen such commands, on any machines that see the run's
folder, do the stage. `on=ray` hands the shards out to a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from anygen.config import Config
from anygen.data.coded import LARGE, CodedRecord, CodedUtterance, write_coded_shard
from anygen.data.records import Record, RecordStore, Utterance
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


class RayConfig(Config):
    """What each encoder on a Ray cluster gets. The run's folder must be seen by all nodes under the same path."""

    address: str | None = None
    """Of the cluster; None for the one that the environment names, or else a Ray of this machine alone."""
    concurrency: int = Field(1, ge=1)
    """Encoders at a time."""
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)


class TokenizeConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["tokenize"] = "tokenize"
    device: Literal["cpu", "cuda"] = Field("cpu", exclude_if=lambda device: device == "cpu")
    """Where tokenizers encode. A few codes in a million may differ from one kind of device to another."""
    part: str = Field("", exclude=True)
    """`i/n`: only every n-th shard from the i-th on; the stage is done when all parts are."""
    on: Literal["local", "ray"] = Field("local", exclude=True)
    ray: RayConfig = Field(RayConfig(), exclude=True)

    @field_validator("part")
    @classmethod
    def _is_part(cls, part: str) -> str:
        number, slash, count = part.partition("/")
        if part and not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError("expected i/n with i from 1 to n, as in 2/16")
        return part

    def share(self) -> str:
        """Which shards this process encodes, where others do the rest."""
        return self.part

    def own(self, paths: list[Path]) -> list[Path]:
        """Those of all shards that are this process's part."""
        number, _, count = (self.part or "1/1").partition("/")
        return paths[int(number) - 1 :: int(count)]


def main(config: TokenizeConfig) -> StageResult:
    """Encode every shard that is not there yet."""
    paths = sorted((config.root / "data").glob("*.tar"))
    if not paths:
        raise DataError(f"{config.root / 'data'} has no shards: run the stage data first")
    if config.on == "ray":
        from anygen.stages.tokenize_on_ray import encode_on_ray

        encode_on_ray(config, config.own(paths))
    else:
        _encode_here(config, config.own(paths))
    folders = tuple(config.folder / path.stem for path in paths)
    missing = [folder.name for folder in folders if not is_published(folder, sizes_only=LARGE)]
    left = (
        f"{len(missing)} of {len(folders)} shards are to be encoded by other parts, {missing[0]} first"
        if missing
        else ""
    )
    return StageResult(config.folder, folders, {"shards": float(len(folders) - len(missing))}, left)


def _encode_here(config: TokenizeConfig, paths: list[Path]) -> None:
    encoder = ShardEncoder(config)
    progress = Progress("tokenize", len(paths))
    with StopRequest() as stop:
        for path in paths:
            if encoder.encode(path):
                stop.check(f"shards up to {path.stem} are in {config.folder}")
            progress.advance()
    progress.close()


class ShardEncoder:
    """One record shard to one coded shard: the unit of work for any scheduler."""

    def __init__(self, config: TokenizeConfig) -> None:
        self._folder = config.folder
        self._image, self._audio = open_media_tokenizers(config.root)
        for tokenizer in (self._image, self._audio):
            if tokenizer is not None:
                tokenizer.to(torch.device(config.device))
        self._facts = coded_facts(self._image, self._audio)

    def encode(self, path: Path) -> bool:
        """Encode the shard at `path`, where that is still to be done; returns whether it was."""
        folder = self._folder / path.stem
        if is_published(folder):
            return False
        write_coded_shard(folder, _encode(RecordStore([path]), self._image, self._audio), facts=self._facts)
        return True


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
            pictures = iter(_encode_pictures(records, image))
            for record in records:
                picture = next(pictures) if record.picture is not None and image is not None else None
                story = _coded_story(record.story, pictures) if image is not None else ()
                coded = [CodedUtterance(u.text, u.voice, next(codes)) for u in _spoken(record) if audio is not None]
                dialogue = coded[len(record.utterances) :]
                yield CodedRecord(
                    record.key,
                    record.kind,
                    record.captions,
                    picture,
                    tuple(coded[: len(record.utterances)]),
                    record.objects,
                    record.questions,
                    tuple(zip(dialogue[::2], dialogue[1::2], strict=True)),
                    story,
                )


def _coded_story(story: tuple[str | bytes, ...], pictures: Iterator[Codes]) -> tuple[str | Codes, ...]:
    return tuple(part if isinstance(part, str) else next(pictures) for part in story)


def _spoken(record: Record) -> list[Utterance]:
    """Everything that is said in a record: its utterances, then question and answer in turn."""
    return [*record.utterances, *(utterance for pair in record.spoken_questions for utterance in pair)]


def _encode_sounds(records: list[Record], audio: AudioTokenizer, pool: Executor) -> list[Codes]:
    """Codes of every utterance in order: in groups, twice as fast; they are the same for any number of threads."""
    rate_hz = audio.sample_rate_hz
    sounds = list(pool.map(lambda u: u.audio(rate_hz), [u for record in records for u in _spoken(record)]))
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


def _encode_pictures(records: list[Record], image: ImageTokenizer | None) -> list[Codes]:
    """Codes of every picture in order: of each record its own, then its story's."""
    data = [part for record in records for part in (record.picture, *record.story) if isinstance(part, bytes)]
    if not data or image is None:
        return []
    side = image.config.side_px
    loaded = [square(load_picture(picture, max_side_px=side), side) for picture in data]
    encoded = [
        image.encode_pixels(torch.stack([to_pixels(picture) for picture in loaded[start : start + _BATCH]]))
        for start in range(0, len(loaded), _BATCH)
    ]
    return [
        Codes(found.reshape(image.num_codebooks, -1).numpy(), "image", image.grid_hw) for found in torch.cat(encoded)
    ]
