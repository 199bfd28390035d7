"""Stage `audio_tokenizer`: EnCodec's encoder, its residual codebooks and a decoder, trained together.

The first steps run without the quantiser, so that its k-means starts on an encoder that already listens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from typing import Any, ClassVar, Literal, Self

import numpy as np
import soxr
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anygen.data.records import RecordStore
from anygen.errors import DataError
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import Shuffled, StageConfig, StageResult, open_records
from anygen.stages.codec_losses import CodecLoss
from anygen.training import processes
from anygen.training.loop import LoopConfig, train
from tokenizers_mm import loudness
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import MIN_SPREAD, EncodecSize, TrainableEncodec
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.msstft import MSSTFTConfig
from tokenizers_mm.spectral import WINDOWS, mel_distance
from tokenizers_mm.usage import usage_of
from tokenizers_mm.weights import rounded

MAX_JOINED = 32
"""Sounds read for one piece; what is still missing repeats them."""


class AudioTokenizerConfig(StageConfig):
    """Recipe of the stage."""

    several_processes: ClassVar[bool] = True
    stage: Literal["audio_tokenizer"] = "audio_tokenizer"
    codec: EncodecSize = EncodecSize()
    decode_with: Literal["istft", "seanet"] = "istft"
    """An inverse-STFT decoder beside the model, or EnCodec's own."""
    decoder: InverseSTFTConfig = InverseSTFTConfig()
    """Of the inverse-STFT decoder."""
    crop_s: float = Field(1.0, gt=0)
    """Length of the pieces of sound that are trained on."""
    speed_change: float = Field(0.0, ge=0, lt=1)
    """Play pieces up to this share faster or slower, pitch and formants with it: more voices than the data have."""
    quieter_db: float = Field(0.0, ge=0, le=60, exclude_if=lambda most: most == 0)
    """Make half of the pieces quieter, by up to so much: people are recorded at any level."""
    batch_size: int = Field(16, ge=1)
    """Pieces a step, of all processes together."""
    steps_without_quantiser: int = Field(200, ge=0)
    """First steps, in which the encoder learns to tell sounds apart."""
    mel_weight: float = Field(2.0, gt=0)
    """Weight of the distance of multi-scale mel spectrograms."""
    mel_floor_db: float | None = Field(-80.0, lt=0)
    """What is quieter hardly counts in it, in dB of a full-scale sine; null counts all down to -124 to -154 dB."""
    wave_weight: float = Field(0.5, ge=0)
    """Weight of the distance of waveforms."""
    loudness_weight: float = Field(0.0, ge=0)
    """Weight of the distance of loudness in critical bands, PESQ's as a loss (`tokenizers_mm.loudness`)."""
    commitment_weight: float = Field(0.25, ge=0)
    """Weight of keeping latents close to their codes."""
    adversarial: MSSTFTConfig = MSSTFTConfig()
    balancer: bool = False
    """Take the weights as shares of the gradient at the waveform; commitment's stays a plain weight, and weighs ten to
    twenty times less beside them than without the balancer."""
    min_spread: float = Field(MIN_SPREAD, ge=0)
    """Spread of the encoder's output, relative to its mean, below which no codebook is started on it."""
    usage_window: int = Field(50, ge=1)
    """Batches over which use of the codebooks is watched."""
    usage_alarm: float = Field(0.5, ge=0, le=1)
    """Share of a codebook below which the run says that it collapses."""
    loop: LoopConfig

    @property
    def crop(self) -> int:
        """Samples of a piece, whole code frames."""
        return int(self.crop_s * self.codec.rate_hz) // self.codec.hop * self.codec.hop

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.loop.device == "cpu"

    def check(self) -> None:
        """A batch size that cannot be divided is told before anything is moved."""
        processes.own_rows(self.batch_size)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.crop < max(self.codec.hop, WINDOWS[0]):
            raise ValueError(
                f"crop_s={self.crop_s} is too short: a piece has a code frame of {self.codec.hop} samples or more, and "
                f"{WINDOWS[0]} samples for the shortest spectrum"
            )
        if self.adversarial.weight and self.crop < (longest := max(self.adversarial.windows)):
            raise ValueError(f"crop_s={self.crop_s} is shorter than the discriminator's window of {longest} samples")
        if self.loudness_weight and self.crop_s < loudness.WINDOW_S:
            raise ValueError(
                f"crop_s={self.crop_s} is shorter than the {loudness.WINDOW_S} s in which loudness is heard"
            )
        if self.decode_with == "istft" and self.codec.hop % self.decoder.upsampling:
            raise ValueError(
                f"decoder.upsampling={self.decoder.upsampling} does not divide the codec's hop of {self.codec.hop}"
            )
        if self.steps_without_quantiser >= self.loop.steps:
            raise ValueError(f"steps_without_quantiser={self.steps_without_quantiser} leaves no step with codes")
        return self


def main(config: AudioTokenizerConfig) -> StageResult:
    """Train and save `tokenizer/`."""
    trainee = _CodecTraining(config)
    metrics = train(trainee, config.loop, config.folder, title="audio tokenizer")
    if processes.rank() == 0:
        with publishing(config.folder / "tokenizer") as folder:
            trainee.tokenizer().save(folder)
    processes.wait()
    return StageResult(config.folder, (config.folder / "tokenizer",), metrics)


class _CodecTraining:
    def __init__(self, config: AudioTokenizerConfig) -> None:
        self._config = config
        size = config.codec
        self._crop = config.crop
        self._sounds = SoundSet(open_records(config.root, "train"), size.rate_hz)
        self._held_out = SoundSet(open_records(config.root, "validation"), size.rate_hz)
        self._order = Shuffled(len(self._sounds), config.batch_size, seed=seed_of(config.loop.seed, "audio"))
        self._rows = processes.own_rows(config.batch_size)
        with borrowed_randomness(config.loop.seed):
            tokens = config.batch_size * self._crop // size.hop
            codec = TrainableEncodec(size, tokens_per_batch=tokens)
            istft = InverseSTFTDecoder(config.decoder, latent_dim=size.latent_dim, hop=size.hop)
            self._loss = _codec_loss(config, codec, istft if config.decode_with == "istft" else None)
        self.module: nn.Module = self._loss

    def next_batch(self) -> Tensor:
        items = self._order.next()
        generator = self._order.generator()
        for item in items[: self._rows.start or 0]:  # where the draws of this process's pieces begin
            self._drawn(item, generator)
        pieces = [self._piece(item, generator) for item in items[self._rows]]
        return torch.from_numpy(np.stack(pieces).astype(np.float32))

    def _drawn(self, item: int, generator: random.Random) -> tuple[float, list[int], int, float]:
        """What is drawn for a piece: its speed, the sounds, its start in them, its loudness.

        What follows a short sound are others, so that no step is spent on padding.
        """
        speed = (1 + self._config.speed_change) ** generator.uniform(-1, 1)
        length = self._length(speed)
        sounds, available = [item], self._sounds.num_samples(item)
        while available < length and len(sounds) < MAX_JOINED:
            sounds.append(generator.randrange(len(self._sounds)))
            available += self._sounds.num_samples(sounds[-1])
        start, loudness = generator.randint(0, max(length, available) - length), generator.uniform(0.6, 1.3)
        if self._config.quieter_db:
            loudness *= 10 ** (-self._config.quieter_db / 20 * max(0.0, generator.uniform(-1, 1)))
        return speed, sounds, start, loudness

    def _piece(self, item: int, generator: random.Random) -> Any:
        speed, sounds, start, loudness = self._drawn(item, generator)
        length = self._length(speed)
        samples_T = np.concatenate([self._sounds.samples(sound) for sound in sounds])
        piece_T = np.resize(samples_T, max(length, len(samples_T)))[start : start + length]
        if self._config.speed_change:
            piece_T = soxr.resample(piece_T, self._config.codec.rate_hz * speed, self._config.codec.rate_hz)
        return piece_T[: self._crop] * loudness

    def _length(self, speed: float) -> int:
        return math.ceil(self._crop * speed) + 1 if self._config.speed_change else self._crop

    def to_device(self, batch: Tensor, device: torch.device) -> Tensor:
        return batch.to(device)

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position = int(state["position"])

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        codec = self._loss.codec
        distances, codes = [], []
        for item in range(0, len(self._held_out), max(1, len(self._held_out) // 32)):
            samples_T = self._held_out.samples(item)
            samples_T = samples_T[: len(samples_T) // codec.size.hop * codec.size.hop]
            if len(samples_T) < WINDOWS[0]:
                continue
            sound_1T = torch.from_numpy(samples_T.copy())[None].to(device)
            latents_1LN = codec.latents(sound_1T)
            if codec.is_started:  # else a first use would start it, on held-out sound
                latents_1LN, codes_1KN, _ = codec.quantise(latents_1LN)
                codes.append(codes_1KN[0].cpu())
            # without the floor, which is the recipe's: a validation compares recipes
            distances.append(mel_distance(self._loss.decoded(latents_1LN), sound_1T, rate_hz=codec.size.rate_hz))
        figures = {"mel": float(torch.stack(distances).mean())} if distances else {}
        for book, codes_F in enumerate(torch.cat(codes, dim=1) if codes else ()):
            usage, perplexity = usage_of(codes_F, codec.size.codebook_size)
            figures |= {f"usage{book or ''}": usage, f"perplexity{book or ''}": perplexity}
        return figures

    def compile(self) -> None:
        for block in self._loss.istft.blocks if self._loss.istft is not None else ():
            block.compile()

    def tokenizer(self) -> AudioTokenizer:
        """What was learned, as a tokenizer; weights rounded as they are saved."""
        model = rounded(self._loss.codec.export(), keep=("codebook",))
        return AudioTokenizer(model, self._loss.istft, self._config.decoder if self._loss.istft is not None else None)


def _codec_loss(config: AudioTokenizerConfig, codec: TrainableEncodec, istft: InverseSTFTDecoder | None) -> CodecLoss:
    return CodecLoss(
        codec,
        istft,
        weights={name: getattr(config, f"{name}_weight") for name in ("mel", "wave", "loudness", "commitment")},
        judge=config.adversarial,
        judge_start=round(config.adversarial.start_share * config.loop.steps),
        balanced=config.balancer,
        steps_without_quantiser=config.steps_without_quantiser,
        min_spread=config.min_spread,
        usage_window=config.usage_window,
        usage_alarm=config.usage_alarm,
        mel_floor_db=config.mel_floor_db,
    )


class SoundSet:
    """Every utterance of a record store, or those in some voices, decoded when asked for."""

    def __init__(self, store: RecordStore, rate_hz: int, voices: Collection[str] = ()) -> None:
        self._store, self._rate_hz = store, rate_hz
        self._lengths: dict[int, int] = {}
        self._kept: dict[int, Any] = {}
        self._places = [
            (index, voice)
            for index in range(len(store))
            for voice in store.voices(index)
            if not voices or voice in voices
        ]
        if not self._places:
            raise DataError("the data hold no sounds" + (f" in the voices {', '.join(voices)}" if voices else ""))

    def __len__(self) -> int:
        return len(self._places)

    def samples(self, item: int) -> Any:
        """float32 samples of one utterance."""
        if item in self._kept:
            return self._kept.pop(item)
        samples_T = self._store.utterance(*self._places[item]).audio(self._rate_hz).samples_T
        self._lengths[item] = len(samples_T)
        return samples_T

    def num_samples(self, item: int) -> int:
        """Length of one utterance; it is decoded for that, once, and kept for who asks next."""
        if item not in self._lengths:
            samples_T = self.samples(item)
            if len(self._kept) >= MAX_JOINED:
                self._kept.clear()
            self._kept[item] = samples_T
        return self._lengths[item]
