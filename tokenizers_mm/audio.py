"""The sound tokenizer: any `transformers.EncodecModel`, with its own decoder or an inverse-STFT one beside it.

The folder is a transformers checkpoint (`EncodecModel.from_pretrained` opens it with equal codes); `istft/` beside it,
where there is one, holds the light decoder.

Dimension key: K codebooks, T code frames, N samples, L latent channels.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_mm.audio_batches import Rows, can_batch, grouped, through
from tokenizers_mm.codes import Codes, IntArray, Modality, check_codes, fingerprint_of
from tokenizers_mm.encodec_folder import is_plain, load_encodec
from tokenizers_mm.errors import CheckpointError, DataError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.media import Audio, SoundSource, load_sound
from tokenizers_mm.weights import load_facts, load_weights, rounded, save_facts, save_weights, shrink

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
    def code_vectors(self) -> Tensor:
        """K x V x L: what each code stands for."""
        return torch.stack([layer.codebook.embed for layer in self.model.quantizer.layers[: self.num_codebooks]])

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

    @torch.inference_mode()
    def encode_batch(self, sounds: Sequence[SoundSource]) -> list[Codes]:
        """The codes of each sound as `encode` finds them, in the order of the sounds; those of similar length at once.

        Sums are rounded in another order: of 44,724 codes of speech two changed, between entries that were as near to
        0.01 %. A codec with chunks or norms over time takes the sounds one by one.

        Raises:
            InputError: one is not a sound, or beyond the limits of `tokenizers_mm.media`.
        """
        if not can_batch(self.model):
            return [self.encode(sound) for sound in sounds]
        waves = [load_sound(sound, rate_hz=self.sample_rate_hz).samples_T for sound in sounds]
        found: dict[int, Codes] = {}
        for group in grouped([len(wave_N) for wave_N in waves]):
            rows = Rows.of([torch.from_numpy(waves[place].copy())[None].to(self.device) for place in group])
            latents = through(self.model.encoder.layers, rows)
            codes_BKT = self.codes_of(latents.x_BCN)
            for place, codes_KT, length in zip(group, codes_BKT, latents.lengths_B.tolist(), strict=True):
                found[place] = Codes(codes_KT[:, :length], "audio", num_samples=len(waves[place]))
        return [found[place] for place in range(len(waves))]

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
        pieces = self._checked(codes)
        if codes.num_steps == 0:
            return Audio(np.zeros(0, np.float32), self.sample_rate_hz)
        frames = self._frames(pieces)
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

    @torch.inference_mode()
    def decode_batch(self, codes: Sequence[Codes]) -> list[Audio]:
        """The sound of each codes as `decode` makes it, up to rounding (1e-6); those of similar length at once.

        Raises:
            DataError: as `decode`, for any of them.
        """
        if not can_batch(self.model):
            return [self.decode(one) for one in codes]
        sizes = [sum(piece.stop for piece in self._checked(one)) for one in codes]
        waves = [np.zeros(0, np.float32)] * len(codes)
        filled = [place for place, one in enumerate(codes) if one.num_steps]
        for group in grouped([codes[place].num_steps * self.hop for place in filled]):
            places = [filled[number] for number in group]
            rows = Rows.of([self.latents_of(codes[place])[0] for place in places])
            decoded_BN = self._waveforms(rows).clamp(-1, 1).float().cpu().numpy()
            for place, wave_N in zip(places, decoded_BN, strict=True):
                waves[place] = wave_N[: sizes[place]].copy()
        return [Audio(wave_N, self.sample_rate_hz) for wave_N in waves]

    def _checked(self, codes: Codes) -> list[slice]:
        """The pieces that codes stand for; none where there are no frames."""
        check_codes(codes, "audio", self.codebook_size, self.num_codebooks)
        if codes.num_steps == 0:
            return []
        pieces = self._pieces(self._most_samples(codes.num_steps) if codes.num_samples is None else codes.num_samples)
        if sum(self._frames(pieces)) != codes.num_steps:
            length = "any whole chunks" if codes.num_samples is None else f"{codes.num_samples} samples"
            raise DataError(f"{codes.num_steps} frames of {self.hop} samples cannot be {length}")
        return pieces

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

    def _waveforms(self, rows: Rows) -> Tensor:
        """Rows of latents to B x N samples."""
        if self.istft is not None:
            return self.istft(rows.x_BCN, rows.mask_BN)
        return through(self.model.decoder.layers, rows).x_BCN[:, 0]

    def save(self, folder: Path) -> None:
        """Write a transformers checkpoint and, where there is one, the inverse-STFT decoder beside it."""
        self.model.save_pretrained(folder)
        shrink(folder / "model.safetensors")
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
        model = load_encodec(folder, num_codebooks=num_codebooks)
        if not (folder / ISTFT_FOLDER).is_dir():
            return cls(model)
        facts = load_facts(folder / ISTFT_FOLDER, kind=ISTFT_KIND)
        try:
            config, hop = InverseSTFTConfig(**facts["istft"]), int(np.prod(model.config.upsampling_ratios))
            istft = InverseSTFTDecoder(config, latent_dim=model.config.hidden_size, hop=hop)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder / ISTFT_FOLDER / 'config.json'} is broken: {error}") from error
        load_weights(folder / ISTFT_FOLDER, {"istft": istft})
        return cls(model, istft, config)


def _faded(waves: list[Tensor], pieces: list[slice]) -> Tensor:
    """Chunks that overlap as one sound, each loudest in its middle: as `EncodecModel` does it, for any last chunk."""
    if len(waves) == 1:
        return waves[0]
    share_N = torch.linspace(0, 1, len(waves[0]) + 2, device=waves[0].device)[1:-1]
    weight_N = 0.5 - (share_N - 0.5).abs()
    total_N, weights_N = torch.zeros(2, pieces[-1].stop, device=waves[0].device)
    for wave_N, piece in zip(waves, pieces, strict=True):
        total_N[piece] += weight_N[: len(wave_N)] * wave_N
        weights_N[piece] += weight_N[: len(wave_N)]
    return total_N / weights_N
