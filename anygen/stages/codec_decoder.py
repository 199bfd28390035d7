"""Stage `audio_tokenizer` where its recipe says `codes_of`: a codec whose decoder learns on, while its codes stay.

A codec's decoder is made for all its codebooks and every voice. A transformer that writes the leading ones alone
(`layout.audio_kept`), in voices of its own, is understood better through a decoder that was trained for just that, as
SoundStream's is for any number of codebooks (arXiv 2107.03312, section 3.4). Whatever was coded before stays valid.

Dimension key: B sounds, K codebooks, N code frames, L latent channels, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anygen.data.order import Permutation
from anygen.data.records import RecordStore
from anygen.errors import CheckpointError, ConfigError
from anygen.files import publishing
from anygen.seeding import seed_of
from anygen.stages.audio_tokenizer import SoundSet
from anygen.stages.base import Shuffled, StageConfig, StageResult, check_elsewhere, open_records
from anygen.stages.codec_losses import distances
from anygen.stages.published_codec import PublishedCodecConfig, open_codec
from anygen.training import processes
from anygen.training.loop import LoopConfig, train
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes, IntArray
from tokenizers_mm.istft import InverseSTFTDecoder
from tokenizers_mm.loudness import WINDOW_S
from tokenizers_mm.media import Audio
from tokenizers_mm.spectral import WINDOWS, mel_distance

MAX_VALIDATED, MAX_NAMED = 64, 12


class CodecDecoderConfig(StageConfig):
    """Recipe of the stage."""

    several_processes: ClassVar[bool] = True
    stage: Literal["audio_tokenizer"] = "audio_tokenizer"
    codes_of: Path
    """The codec: a folder of one made here (`runs/first/audio_tokenizer/tokenizer`), with an inverse-STFT decoder, or a
    bundle (`nano`: the embedded one)."""
    leading: int = Field(1, ge=1)
    """Codebooks that the transformer writes (its `layout.audio_kept`); sounds in `voices` are decoded from these."""
    voices: tuple[str, ...] = ()
    """Those that it speaks in, as the records call them (a folder's `flite/slt` is `fliteslt`); all by default."""
    rehearsed: int = Field(2, ge=0)
    """Sounds of each batch that are of any voice, decoded from one codebook to all: so it does not forget these."""
    batch_size: int = Field(8, ge=1)
    """Sounds a step, of all processes together."""
    crop_s: float = Field(2.0, gt=0)
    """Longer sounds are cut to a piece of this length, drawn anew each time."""
    mel_weight: float = Field(2.0, gt=0)
    """Weights of the distances of mel spectra, waveform and loudness, and the first one's floor, are as in training a
    codec (`anygen.stages.audio_tokenizer`)."""
    mel_floor_db: float | None = Field(-80.0, lt=0)
    wave_weight: float = Field(0.5, ge=0)
    loudness_weight: float = Field(0.0, ge=0)
    learned_share: float = Field(1.0, gt=0, le=1)
    """Of what was learned is kept; the rest of each weight is as before, for other voices (WiSE-FT, 2109.01903)."""
    loop: LoopConfig

    @property
    def source(self) -> PublishedCodecConfig:
        """The codec as a recipe that takes it as it is."""
        return PublishedCodecConfig(root=self.root, checkpoint=self.codes_of)

    @property
    def on_cpu(self) -> bool:
        """True where the recipe wants no GPU."""
        return self.loop.device == "cpu"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rehearsed >= self.batch_size:
            raise ValueError(f"rehearsed={self.rehearsed} leaves nothing of a batch of {self.batch_size} to be learned")
        if self.crop_s < 2 * WINDOW_S:  # loudness is heard in windows so long
            raise ValueError(f"crop_s={self.crop_s} is too short to be heard: take {2 * WINDOW_S} s or more")
        return self

    def check(self) -> None:
        """What cannot be used is told before anything is moved."""
        processes.own_rows(self.batch_size)
        check_elsewhere("codes_of", self.source.path, self.folder)
        open_decoder(self)
        for split in ("train", "validation") if self.voices else ():
            check_voices(self.voices, open_records(self.root, split), split)

    def outside_inputs(self) -> dict[str, str]:
        """The codec's files."""
        return dict(self.source.outside_inputs())


def open_decoder(config: CodecDecoderConfig) -> AudioTokenizer:
    """The codec that a recipe names.

    Raises:
        CheckpointError: missing, without an inverse-STFT decoder, or without so many codebooks.
    """
    tokenizer = open_codec(config.source)
    if tokenizer.istft is None:
        raise CheckpointError(
            f"{config.codes_of} decodes with EnCodec's own decoder: only an inverse-STFT one is trained on here"
        )
    if config.leading > tokenizer.num_codebooks:
        raise CheckpointError(f"leading={config.leading}, but the codec has {tokenizer.num_codebooks} codebooks")
    return tokenizer


def check_voices(voices: Collection[str], store: RecordStore, split: str) -> None:
    """Raise ConfigError where a split has nothing in one of the voices."""
    there = sorted({voice for index in range(len(store)) for voice in store.voices(index)})
    for voice in sorted(set(voices) - set(there)):
        near = get_close_matches(voice, there) or there
        raise ConfigError(
            f"voices: the split {split} has nothing in the voice {voice!r}; it has {', '.join(near[:MAX_NAMED])}"
            + (f" and {len(near) - MAX_NAMED} more" if len(near) > MAX_NAMED else "")
        )


def main(config: CodecDecoderConfig) -> StageResult:
    """Train and save `tokenizer/`."""
    trainee = _DecoderTraining(config)
    metrics = train(trainee, config.loop, config.folder, title="decoder of sounds")
    if config.learned_share < 1:
        metrics |= trainee.mixed(config.learned_share)
    if processes.rank() == 0:
        with publishing(config.folder / "tokenizer") as folder:
            trainee.tokenizer().save(folder)
    processes.wait()
    return StageResult(config.folder, (config.folder / "tokenizer",), metrics)


class _Batch(NamedTuple):
    """Sounds of several lengths, padded with silence."""

    latents_BLN: Tensor
    mask_BN: Tensor
    """True where there is sound."""
    sound_BT: Tensor


class _DecoderLoss(nn.Module):
    """An inverse-STFT decoder and what it minimises."""

    def __init__(self, istft: InverseSTFTDecoder, config: CodecDecoderConfig, rate_hz: int) -> None:
        super().__init__()
        self.istft, self._config, self._rate_hz = istft, config, rate_hz

    def forward(self, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts."""
        config = self._config
        wave_BT = self.istft(batch.latents_BLN, batch.mask_BN).float()
        hop = wave_BT.shape[1] // batch.mask_BN.shape[1]
        wave_BT = wave_BT * batch.mask_BN.repeat_interleave(hop, dim=1)  # a sound's last window reaches beyond its end
        parts = distances(
            wave_BT,
            batch.sound_BT,
            rate_hz=self._rate_hz,
            mel_floor_db=config.mel_floor_db,
            with_loudness=config.loudness_weight > 0,
        )
        loss = torch.stack([getattr(config, f"{name}_weight") * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}


class _DecoderTraining:
    def __init__(self, config: CodecDecoderConfig) -> None:
        self._config, self._tokenizer = config, open_decoder(config)
        assert self._tokenizer.istft is not None
        self._tokenizer.istft.requires_grad_(True).train()
        self._num_frames = max(1, round(config.crop_s * self._tokenizer.rate_hz))
        self._spoken, self._held_out = (self._sounds_of(split, config.voices) for split in ("train", "validation"))
        self._any_voice, self._any_held_out = (self._sounds_of(split) for split in ("train", "validation"))
        seeds = [seed_of(config.loop.seed, "decoder of sounds", what) for what in ("spoken", "rehearsed")]
        self._order = Shuffled(len(self._spoken), config.batch_size - config.rehearsed, seed=seeds[0])
        self._rehearsal = Shuffled(len(self._any_voice), config.rehearsed, seed=seeds[1])
        self._rows = processes.own_rows(config.batch_size)
        self._codes: dict[SoundSet, dict[int, IntArray]] = {}
        self._loss = _DecoderLoss(self._tokenizer.istft, config, self._tokenizer.sample_rate_hz)
        self.module: nn.Module = self._loss

    def _sounds_of(self, split: str, voices: tuple[str, ...] = ()) -> SoundSet:
        return SoundSet(open_records(self._config.root, split), self._tokenizer.sample_rate_hz, voices)

    def next_batch(self) -> _Batch:
        spoken, rehearsed = self._order.next(), self._rehearsal.next()
        generator = self._order.generator()
        drawn = [(self._spoken, item, self._config.leading) for item in spoken]
        drawn += [(self._any_voice, item, generator.randint(1, self._tokenizer.num_codebooks)) for item in rehearsed]
        places = [generator.random() for _ in drawn]
        pieces = [self._piece(*d, place) for d, place in list(zip(drawn, places, strict=True))[self._rows]]
        num, hop = self._num_frames, self._tokenizer.hop  # always: processes weigh sounds alike, and shapes stay
        mask_BN = torch.stack([torch.arange(num) < latents_LN.shape[1] for latents_LN, _ in pieces])
        latents_BLN = torch.stack([_padded(latents_LN, num) for latents_LN, _ in pieces])
        sound_BT = torch.stack([_padded(sound_T, num * hop) for _, sound_T in pieces])
        return _Batch(latents_BLN, mask_BN, sound_BT)

    def _piece(self, sounds: SoundSet, item: int, books: int, place: float) -> tuple[Tensor, Tensor]:
        """Latents L x N of leading codebooks and sound T of what is cut from a sound, at `place` of what could be."""
        codes_KN, samples_T = self._coded(sounds, item)
        start = int(place * (max(0, codes_KN.shape[1] - self._num_frames) + 1))
        piece_KN = codes_KN[:, start : start + self._num_frames]
        hop = self._tokenizer.hop
        sound_T = _padded(torch.from_numpy(samples_T.copy()), codes_KN.shape[1] * hop)
        return self._latents(piece_KN[:books]), sound_T[start * hop : (start + piece_KN.shape[1]) * hop]

    def _coded(self, sounds: SoundSet, item: int) -> tuple[IntArray, Any]:
        """Codes of a whole sound, as in use and found only once, and its samples."""
        samples_T = sounds.samples(item)
        known = self._codes.setdefault(sounds, {})
        if item not in known:
            known[item] = self._tokenizer.encode(Audio(samples_T, self._tokenizer.sample_rate_hz)).codes_KT
        return known[item], samples_T

    def _latents(self, codes_KN: IntArray) -> Tensor:
        return self._tokenizer.latents_of(Codes(codes_KN, "audio"))[0]

    def to_device(self, batch: _Batch, device: torch.device) -> _Batch:
        return _Batch(*(part.to(device) for part in batch))

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position, "rehearsed": self._rehearsal.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position, self._rehearsal.position = int(state["position"]), int(state["rehearsed"])

    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return processes.agreed(states)

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        """`mel` of held-out sounds as it speaks, `mel_rehearsed` of any from all codebooks; no floor, as a codec's."""
        figures = {"mel": self._distance(self._held_out, self._config.leading, device)}
        if self._config.rehearsed:
            figures["mel_rehearsed"] = self._distance(self._any_held_out, self._tokenizer.num_codebooks, device)
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def _distance(self, sounds: SoundSet, books: int, device: torch.device) -> float:
        rate_hz, distances = self._tokenizer.sample_rate_hz, []
        some = Permutation(len(sounds), 0)  # evenly spaced ones could all be of one voice
        for item in map(some, range(min(len(sounds), MAX_VALIDATED))):
            codes_KN, samples_T = self._coded(sounds, item)
            if len(samples_T) < WINDOWS[0]:
                continue
            sound_1T = torch.from_numpy(samples_T.copy())[None].to(device)
            wave_1T = self._loss.istft(self._latents(codes_KN[:books])[None].to(device))[:, : sound_1T.shape[1]]
            distances.append(float(mel_distance(wave_1T.float(), sound_1T, rate_hz=rate_hz)))
        return float(np.mean(distances)) if distances else math.nan

    @torch.no_grad()
    def mixed(self, share: float) -> dict[str, float]:
        """Take back the rest of what was learned; returns the figures of validation anew."""
        before = open_decoder(self._config).istft
        assert before is not None
        for weight, old in zip(self._loss.istft.parameters(), before.parameters(), strict=True):
            weight.copy_(torch.lerp(old.to(weight), weight, share))
        figures = self.validate(self._loss.eval(), next(self._loss.parameters()).device)
        return {f"validation_{name}": value for name, value in figures.items()}

    def compile(self) -> None:
        for block in self._loss.istft.blocks:
            block.compile()

    def tokenizer(self) -> AudioTokenizer:
        """The codec with what its decoder learned, weights rounded as they are saved."""
        codec = self._tokenizer
        return AudioTokenizer(codec.model, self._loss.istft, codec.istft_config)


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros behind it, up to `length` in its last dimension."""
    return nn.functional.pad(x, (0, length - x.shape[-1]))
