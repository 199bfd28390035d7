"""The sound tokenizer: any `transformers.EncodecModel`, with its own decoder or an inverse-STFT one beside it.

The folder is a transformers checkpoint (`EncodecModel.from_pretrained` opens it, without this project, with equal
codes); a file `istft/` beside it, where there is one, holds the light decoder.

Dimension key: K codebooks, T code frames, N samples, L latent channels.
"""

from __future__ import annotations

import json
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


class AudioTokenizer:
    """Sounds to K x T codes, and back; mono, without chunking.

    Args:
        model: an EncodecModel (mono, not normalising, not chunked).
        istft: a decoder on the same codes; None uses the model's SEANet decoder.
        istft_config: its architecture.
    """

    modality: Modality = "audio"
    grid_hw = None

    def __init__(
        self, model: Any, istft: InverseSTFTDecoder | None = None, istft_config: InverseSTFTConfig | None = None
    ) -> None:
        config = model.config
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
            raise CheckpointError(
                "only mono EnCodec models without loudness normalisation and chunks are supported yet"
            )
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
        """Code frames per second."""
        return self.sample_rate_hz / self.hop

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the codes: encoder, quantiser, rate."""
        state = self.model.state_dict()
        arrays = {k: v.cpu().numpy() for k, v in state.items() if k.startswith("encoder.") or k.endswith(".embed")}
        return fingerprint_of({"kind": "encodec", "rate_hz": self.sample_rate_hz, "hop": self.hop}, arrays)

    @torch.inference_mode()
    def encode(self, media: SoundSource) -> Codes:
        """One sound to K x T codes, T = ceil(samples / hop); they know how many samples there were.

        Raises:
            InputError: not a sound, or beyond the limits of `tokenizers_mm.media`.
        """
        samples_N = torch.from_numpy(load_sound(media, rate_hz=self.sample_rate_hz).samples_T.copy())
        codes_BKT = self.codes_of(self.model.encoder(samples_N.view(1, 1, -1).to(self.device)))
        return Codes(codes_BKT[0], "audio", num_samples=len(samples_N))

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
        whole = codes.num_steps * self.hop
        length = whole if codes.num_samples is None else codes.num_samples
        if not whole - self.hop < length <= whole:
            raise DataError(f"{codes.num_steps} frames of {self.hop} samples cannot be {length} samples")
        if codes.num_steps == 0:
            return Audio(np.zeros(0, np.float32), self.sample_rate_hz)
        samples_BN = self._waveform(self.latents_of(codes))[:, :length]
        return Audio(samples_BN[0].clamp(-1, 1).float().cpu().numpy(), self.sample_rate_hz)

    def _waveform(self, latents_BLT: Tensor) -> Tensor:
        if self.istft is not None:
            return self.istft(latents_BLT)
        return self.model.decoder(latents_BLT)[:, 0]

    def save(self, folder: Path) -> None:
        """Write a transformers checkpoint and, where there is one, the inverse-STFT decoder beside it."""
        self.model.save_pretrained(folder)
        if self.istft is not None and self.istft_config is not None:
            save_facts(folder / ISTFT_FOLDER, {"kind": ISTFT_KIND, "istft": self.istft_config.model_dump()})
            save_weights(folder / ISTFT_FOLDER, {"istft": self.istft})

    @classmethod
    def load(cls, folder: Path) -> AudioTokenizer:
        """Open an EnCodec checkpoint, ours or a published one.

        Raises:
            CheckpointError: missing, broken, or not an EnCodec model.
        """
        model = _load_encodec(folder)
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
