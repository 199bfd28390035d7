"""Stage `audio_tokenizer`: EnCodec's encoder, its residual codebooks and an inverse-STFT decoder, trained together.

The first steps run without the quantiser, so that its k-means starts on an encoder that already listens.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from anygen.data.records import RecordStore
from anygen.errors import DataError
from anygen.files import publishing
from anygen.seeding import borrowed_randomness, seed_of
from anygen.stages.base import Shuffled, StageConfig, StageResult, open_records
from anygen.training.loop import LoopConfig, train
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec, check_start
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.spectral import mel_distance
from tokenizers_mm.usage import usage_in_batch, usage_of
from tokenizers_mm.weights import rounded


class AudioTokenizerConfig(StageConfig):
    """Recipe of the stage."""

    stage: Literal["audio_tokenizer"] = "audio_tokenizer"
    codec: EncodecSize = EncodecSize()
    decoder: InverseSTFTConfig = InverseSTFTConfig()
    crop_s: float = Field(1.0, gt=0)
    """Length of the pieces of sound that are trained on."""
    batch_size: int = Field(16, ge=1)
    """Pieces a step."""
    steps_without_quantiser: int = Field(200, ge=0)
    """First steps, in which the encoder learns to tell sounds apart."""
    mel_weight: float = 2.0
    """Weight of the distance of multi-scale mel spectrograms."""
    wave_weight: float = 0.5
    """Weight of the distance of waveforms."""
    commitment_weight: float = 0.25
    """Weight of keeping latents close to their codes."""
    loop: LoopConfig


def main(config: AudioTokenizerConfig) -> StageResult:
    """Train and save `tokenizer/`."""
    trainee = _CodecTraining(config)
    metrics = train(trainee, config.loop, config.folder, title="audio tokenizer")
    with publishing(config.folder / "tokenizer") as folder:
        trainee.tokenizer().save(folder)
    return StageResult(config.folder, (config.folder / "tokenizer",), metrics)


class _CodecLoss(nn.Module):
    def __init__(self, config: AudioTokenizerConfig, codec: TrainableEncodec, decoder: InverseSTFTDecoder) -> None:
        super().__init__()
        self.codec, self.decoder = codec, decoder
        self._config = config

    def forward(self, batch: tuple[Tensor, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        sound_BT, quantise = batch
        config = self._config
        latents_BLN = self.codec.latents(sound_BT)
        commitment = torch.zeros((), device=sound_BT.device)
        if quantise:
            if not bool(self.codec.quantizer.layers[0]._codebook.initted):
                check_start(latents_BLN)
            latents_BLN, codes_BKN, commitment = self.codec.quantise(latents_BLN)
        predicted_BT = self.decoder(latents_BLN)
        mel = mel_distance(predicted_BT, sound_BT, rate_hz=config.codec.rate_hz)
        wave = (predicted_BT - sound_BT).abs().mean()
        loss = config.mel_weight * mel + config.wave_weight * wave + config.commitment_weight * commitment
        report = {"mel": mel, "wave": wave, "commitment": commitment}
        if quantise:
            report["usage_batch"] = usage_in_batch(codes_BKN[:, 0], config.codec.codebook_size)
        return loss, report


class _CodecTraining:
    def __init__(self, config: AudioTokenizerConfig) -> None:
        self._config = config
        size = config.codec
        self._crop = int(config.crop_s * size.rate_hz) // size.hop * size.hop
        if self._crop == 0:
            raise DataError(f"crop_s={config.crop_s} is shorter than one code frame")
        self._sounds = SoundSet(open_records(config.root, "train"), size.rate_hz)
        self._held_out = SoundSet(open_records(config.root, "validation"), size.rate_hz)
        self._order = Shuffled(len(self._sounds), config.batch_size, seed=seed_of(config.loop.seed, "audio"))
        self._batches_done = 0
        with borrowed_randomness(config.loop.seed):
            tokens = config.batch_size * self._crop // size.hop
            codec = TrainableEncodec(size, tokens_per_batch=tokens)
            decoder = InverseSTFTDecoder(config.decoder, latent_dim=size.latent_dim, hop=size.hop)
        self._loss = _CodecLoss(config, codec, decoder)
        self.module: nn.Module = self._loss

    def next_batch(self) -> tuple[Tensor, bool]:
        items = self._order.next()
        generator = self._order.generator()
        quantise = self._batches_done >= self._config.steps_without_quantiser
        self._batches_done += 1
        crops = []
        for item in items:
            samples_T = self._sounds.samples(item)
            start = generator.randint(0, max(0, len(samples_T) - self._crop))
            crop_T = samples_T[start : start + self._crop] * generator.uniform(0.6, 1.3)
            crops.append(np.pad(crop_T, (0, self._crop - len(crop_T))))
        return torch.from_numpy(np.stack(crops).astype(np.float32)), quantise

    def to_device(self, batch: tuple[Tensor, bool], device: torch.device) -> tuple[Tensor, bool]:
        return batch[0].to(device), batch[1]

    def state(self) -> dict[str, Any]:
        return {"position": self._order.position, "batches": self._batches_done}

    def load_state(self, state: dict[str, Any]) -> None:
        self._order.position, self._batches_done = int(state["position"]), int(state["batches"])

    def validate(self, module: nn.Module, device: torch.device) -> dict[str, float]:
        codec, decoder = self._loss.codec, self._loss.decoder
        distances, codes = [], []
        for item in range(0, len(self._held_out), max(1, len(self._held_out) // 32)):
            samples_T = self._held_out.samples(item)
            samples_T = samples_T[: len(samples_T) // codec.size.hop * codec.size.hop]
            if len(samples_T) == 0:
                continue
            sound_1T = torch.from_numpy(samples_T.copy())[None].to(device)
            latents_1LN = codec.latents(sound_1T)
            if codec.quantizer.layers[0]._codebook.initted:  # else a first use would start it, on held-out sound
                latents_1LN, codes_1KN, _ = codec.quantise(latents_1LN)
                codes.append(codes_1KN[0, 0].cpu())
            distances.append(mel_distance(decoder(latents_1LN), sound_1T, rate_hz=codec.size.rate_hz))
        if not codes:
            return {"mel": float(torch.stack(distances).mean())}
        usage, perplexity = usage_of(torch.cat(codes), codec.size.codebook_size)
        return {"mel": float(torch.stack(distances).mean()), "usage": usage, "perplexity": perplexity}

    def compile(self) -> None:
        for block in self._loss.decoder.blocks:
            block.compile()

    def tokenizer(self) -> AudioTokenizer:
        """What was learned, as a tokenizer; weights rounded as they are saved."""
        model = rounded(self._loss.codec.export(), keep=("codebook",))
        return AudioTokenizer(model, self._loss.decoder, self._config.decoder)


class SoundSet:
    """Every utterance of a record store, decoded when asked for."""

    def __init__(self, store: RecordStore, rate_hz: int) -> None:
        self._store, self._rate_hz = store, rate_hz
        self._places = [(index, turn) for index in range(len(store)) for turn in range(store.num_sounds(index))]
        if not self._places:
            raise DataError("the data hold no sounds")

    def __len__(self) -> int:
        return len(self._places)

    def samples(self, item: int) -> Any:
        """float32 samples of one utterance."""
        index, turn = self._places[item]
        return self._store[index].utterances[turn].audio(self._rate_hz).samples_T
