"""The sound tokenizer: any `transformers.EncodecModel`, with its own decoder or an inverse-STFT one beside it.

The folder is a transformers checkpoint (`EncodecModel.from_pretrained` opens it, without this project, with equal
codes); a file `istft/` beside it, where there is one, holds the light decoder.

Dimension key: K codebooks, T code frames, N samples, L latent channels.
"""

from __future__ import annotations

import bisect
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.codes import Codes, IntArray, Modality, check_codes, fingerprint_of
from tokenizers_mm.errors import CheckpointError, DataError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.media import Audio, SoundSource, load_sound
from tokenizers_mm.weights import UNREADABLE, load_facts, load_weights, rounded, save_facts, save_weights

ISTFT_FOLDER = "istft"
ISTFT_KIND = "istft"
_USUAL = {
    "audio_channels": 1, "normalize": False, "chunk_length_s": None, "overlap": None,
    "use_causal_conv": False, "pad_mode": "reflect",
}  # fmt: skip
"""What decides codes besides the weights, as it is in the codecs trained here: fingerprints hold what differs."""
_USUAL_SCALE = 0.1
"""Loudness (RMS) of what a transformer wrote for a codec that takes loudness out: nothing in the codes says it."""


class AudioTokenizer:
    """Sounds to K x T codes, and back.

    Sounds are mono here: a stereo codec gets them twice and gives the mean of its channels. A codec that works in
    chunks with overlap (EnCodec at 48 kHz) has its chunks' frames one after the other in T.

    Args:
        model: an EncodecModel.
        istft: a decoder on the same codes; None uses the model's SEANet decoder.
        istft_config: its architecture.

    Raises:
        CheckpointError: an inverse-STFT decoder on a codec that works in chunks, or chunks without overlap.
    """

    modality: Modality = "audio"
    grid_hw = None

    def __init__(
        self, model: Any, istft: InverseSTFTDecoder | None = None, istft_config: InverseSTFTConfig | None = None
    ) -> None:
        if model.config.chunk_length is not None and model.config.chunk_stride is None:
            raise CheckpointError("the codec works in chunks, but its config has no overlap")
        if istft is not None and not is_plain(model):
            raise CheckpointError("an inverse-STFT decoder needs a mono codec without normalisation and chunks")
        self.model = model.eval().requires_grad_(False)
        self.istft = rounded(istft).eval().requires_grad_(False) if istft is not None else None
        self.istft_config = istft_config
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> AudioTokenizer:
        """Move to a device; returns itself."""
        self.model.to(device)
        if self.istft is not None:
            self.istft.to(device)
        self.device = device
        return self

    @property
    def codebook_size(self) -> int:
        """Entries of each codebook."""
        return int(self.model.config.codebook_size)

    @property
    def num_codebooks(self) -> int:
        """Codebooks at the model's full bandwidth."""
        return int(self.model.quantizer.get_num_quantizers_for_bandwidth(max(self.model.config.target_bandwidths)))

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of the sounds it codes; others are resampled."""
        return int(self.model.config.sampling_rate)

    @property
    def hop(self) -> int:
        """Samples per code frame."""
        return int(np.prod(self.model.config.upsampling_ratios))

    @property
    def rate_hz(self) -> float:
        """Code frames per second; where chunks overlap, a little more than the codec's own."""
        frames, seconds = 1.0, self.hop / self.sample_rate_hz
        if (chunk := self.model.config.chunk_length) is not None:
            frames, seconds = math.ceil(chunk / self.hop), self.model.config.chunk_stride / self.sample_rate_hz
        return frames / seconds

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the codes: encoder, quantiser, rate."""
        state = self.model.state_dict()
        arrays = {k: v.cpu().numpy() for k, v in state.items() if k.startswith("encoder.") or k.endswith(".embed")}
        config, facts = self.model.config, {"kind": "encodec", "rate_hz": self.sample_rate_hz, "hop": self.hop}
        facts |= {name: value for name, usual in _USUAL.items() if (value := getattr(config, name)) != usual}
        return fingerprint_of(facts, arrays)

    @torch.inference_mode()
    def encode(self, media: SoundSource) -> Codes:
        """One sound to K x T codes, T = ceil(samples / hop); they know how many samples there were.

        Raises:
            InputError: not a sound, or beyond the limits of `tokenizers_mm.media`.
        """
        samples_N = torch.from_numpy(load_sound(media, rate_hz=self.sample_rate_hz).samples_T.copy()).to(self.device)
        config, codes, scales = self.model.config, [], []
        for piece in self._pieces(len(samples_N)):
            wave_1CN = samples_N[piece].expand(1, config.audio_channels, -1)
            if config.normalize:
                scales.append(float(wave_1CN.square().mean().sqrt()) + 1e-8)
                wave_1CN = wave_1CN / scales[-1]
            codes.append(self.codes_of(self.model.encoder(wave_1CN))[0])
        loudness = tuple(scales) if config.normalize else None
        return Codes(np.concatenate(codes, axis=1), "audio", num_samples=len(samples_N), scales=loudness)

    def codes_of(self, latents_BLT: Tensor) -> IntArray:
        """The encoder's output to codes, B x K x T."""
        codes_KBT = self.model.quantizer.encode(latents_BLT, max(self.model.config.target_bandwidths))
        found: IntArray = codes_KBT.transpose(0, 1).cpu().numpy()
        return found

    def latents_of(self, codes: Codes) -> Tensor:
        """What the decoder decodes, 1 x L x T."""
        codes_K1T = torch.from_numpy(codes.codes_KT.copy())[:, None].to(self.device)
        latents_1LT: Tensor = self.model.quantizer.decode(codes_K1T)
        return latents_1LT

    @torch.inference_mode()
    def decode(self, codes: Codes) -> Audio:
        """Codes to a sound; leading codebooks alone are enough.

        It has as many samples as were encoded where the codes know it, else T x hop.

        Raises:
            DataError: codes that this tokenizer does not have, or a number of samples that T frames cannot hold.
        """
        check_codes(codes, "audio", self.codebook_size, self.num_codebooks)
        if codes.num_steps == 0:
            return Audio(np.zeros(0, np.float32), self.sample_rate_hz)
        pieces = self._pieces(self._most_samples(codes.num_steps) if codes.num_samples is None else codes.num_samples)
        frames = self._frames(pieces)
        if sum(frames) != codes.num_steps:
            length = "any whole chunks" if codes.num_samples is None else f"{codes.num_samples} samples"
            raise DataError(f"{codes.num_steps} frames of {self.hop} samples cannot be {length}")
        scales = codes.scales or (_USUAL_SCALE,) * len(pieces) if self.model.config.normalize else (1.0,) * len(pieces)
        if len(scales) != len(pieces):
            raise DataError(f"{len(pieces)} chunks need as many scales, got {len(scales)}")
        waves, done = [], 0
        for piece, count, scale in zip(pieces, frames, scales, strict=True):
            part = Codes(codes.codes_KT[:, done : done + count], "audio")
            waves.append(self._waveform(self.latents_of(part))[0, : piece.stop - piece.start] * scale)
            done += count
        samples_N = _faded(waves, pieces).clamp(-1, 1)
        return Audio(samples_N.float().cpu().numpy(), self.sample_rate_hz)

    def _pieces(self, num_samples: int) -> list[slice]:
        """What is coded by itself: everything, or chunks that overlap."""
        if (chunk := self.model.config.chunk_length) is None:
            return [slice(0, num_samples)]
        starts = range(0, num_samples, self.model.config.chunk_stride)
        return [slice(start, min(start + chunk, num_samples)) for start in starts]

    def _most_samples(self, num_frames: int) -> int:
        """Samples of so many frames where nobody knows better: the longest sound that has them."""
        if self.model.config.chunk_length is None:
            return num_frames * self.hop
        counts = range(1, num_frames * self.hop + 1)
        return bisect.bisect_right(counts, num_frames, key=lambda count: sum(self._frames(self._pieces(count))))

    def _frames(self, pieces: list[slice]) -> list[int]:
        """Code frames of each piece."""
        return [math.ceil((piece.stop - piece.start) / self.hop) for piece in pieces]

    def _waveform(self, latents_BLT: Tensor) -> Tensor:
        if self.istft is not None:
            return self.istft(latents_BLT)
        decoded_BCN: Tensor = self.model.decoder(latents_BLT)
        return decoded_BCN.mean(dim=1)

    def save(self, folder: Path) -> None:
        """Write a transformers checkpoint and, where there is one, the inverse-STFT decoder beside it."""
        self.model.save_pretrained(folder)
        if self.istft is not None and self.istft_config is not None:
            save_facts(folder / ISTFT_FOLDER, {"kind": ISTFT_KIND, "istft": self.istft_config.model_dump()})
            save_weights(folder / ISTFT_FOLDER, {"istft": self.istft})

    @classmethod
    def load(cls, folder: Path, *, num_codebooks: int | None = None) -> AudioTokenizer:
        """Open an EnCodec checkpoint, ours or a published one.

        Args:
            folder: a transformers checkpoint.
            num_codebooks: keep the leading codebooks only, one of EnCodec's bandwidths; what is saved then has no more.

        Raises:
            CheckpointError: missing, broken, or not an EnCodec model, or without a bandwidth of so many codebooks.
        """
        model = _load_encodec(folder)
        if num_codebooks is not None:
            _keep_codebooks(model, num_codebooks)
        if not (folder / ISTFT_FOLDER).is_dir():
            return cls(model)
        facts = load_facts(folder / ISTFT_FOLDER, kind=ISTFT_KIND)
        try:
            config = InverseSTFTConfig(**facts["istft"])
            istft = InverseSTFTDecoder(
                config, latent_dim=model.config.hidden_size, hop=int(np.prod(model.config.upsampling_ratios))
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder / ISTFT_FOLDER / 'config.json'} is broken: {error}") from error
        load_weights(folder / ISTFT_FOLDER, {"istft": istft})
        return cls(model, istft, config)


def is_plain(model: Any) -> bool:
    """True for an EnCodec that is mono, leaves loudness alone and works on the whole sound at once."""
    config = model.config
    return config.audio_channels == 1 and not config.normalize and config.chunk_length is None


def _keep_codebooks(model: Any, num_codebooks: int) -> None:
    counts = {model.quantizer.get_num_quantizers_for_bandwidth(kbps): kbps for kbps in model.config.target_bandwidths}
    if num_codebooks not in counts:
        raise CheckpointError(f"the codec has bandwidths of {sorted(counts)} codebooks, not of {num_codebooks}")
    kept = [kbps for kbps in model.config.target_bandwidths if kbps <= counts[num_codebooks]]
    model.config.target_bandwidths = kept
    model.quantizer.num_quantizers, model.quantizer.layers = num_codebooks, model.quantizer.layers[:num_codebooks]


def _faded(waves: list[Tensor], pieces: list[slice]) -> Tensor:
    """Chunks that overlap as one sound, each loudest in its middle: as `EncodecModel` does it, for any last chunk."""
    if len(waves) == 1:
        return waves[0]
    longest = len(waves[0])
    share_N = torch.linspace(0, 1, longest + 2, device=waves[0].device)[1:-1]
    weight_N = 0.5 - (share_N - 0.5).abs()
    total_N, weights_N = torch.zeros(2, pieces[-1].stop, device=waves[0].device)
    for wave_N, piece in zip(waves, pieces, strict=True):
        total_N[piece] += weight_N[: len(wave_N)] * wave_N
        weights_N[piece] += weight_N[: len(wave_N)]
    return total_N / weights_N


def _load_encodec(folder: Path) -> Any:
    from transformers import EncodecConfig, EncodecModel

    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("model_type") != "encodec":
            raise CheckpointError(f"{folder / 'config.json'} is not of an EnCodec model")
        # Our own class from our own reading of the file: nothing in a checkpoint chooses which code runs.
        config = EncodecConfig.from_dict(facts)
        model, report = EncodecModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"no usable EnCodec model in {folder}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise CheckpointError(
            f"the EnCodec model in {folder} is incomplete: {sorted(report['missing_keys'])[:3]} missing"
        )
    return model
