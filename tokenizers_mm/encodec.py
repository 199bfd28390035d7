"""EnCodec made trainable: its encoder and quantiser learn here, and leave as a plain `transformers.EncodecModel`.

transformers' EnCodec is inference only (no straight-through gradient, all-zero codebooks). In training the quantiser is
`vector_quantize_pytorch.ResidualVQ`; its codebooks are copied into the model at the end, and give equal codes there.

EnCodec's own start does not learn at small size: the untrained encoder's output hardly depends on its input (spread /
mean 0.035), so the quantiser sees a constant. `start` repairs that within standard weights, and `check_start` refuses
k-means on a constant.

Source: EnCodec, arXiv 2210.13438. Dimension key: B sounds, T samples, N frames, K codebooks, L latent channels.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.config import Config
from tokenizers_mm.errors import TrainingError
from tokenizers_mm.together import averaged, gathered, has_others, same_draws, train_as_one

MIN_SPREAD = 0.3
_INPUT_GAIN = 8.0


class EncodecSize(Config):
    """Size of a codec trained here."""

    rate_hz: int = Field(16_000, ge=1)
    ratios: tuple[PositiveInt, ...] = Field((8, 5, 4, 2), min_length=1)
    """Strides, decoder order (the encoder has them reversed); their product is the hop."""
    num_filters: int = Field(8, ge=2)
    """Channels of the first convolution; each stride doubles them."""
    latent_dim: int = Field(64, ge=1)
    """Channels of a frame, and width of the codebooks."""
    causal: bool = False
    """Convolutions of the encoder and of EnCodec's own decoder see the past only, as EnCodec's at 24 kHz do."""
    lstm_layers: int = Field(1, ge=1)
    """Layers of the LSTM behind the convolutions."""
    codebook_size: int = Field(1024, ge=2)
    """A power of two: transformers' EnCodec derives bits from it."""
    num_codebooks: int = Field(1, ge=1)
    quantizer_dropout: float = Field(0.5, ge=0, le=1)
    """Share of the steps that use fewer codebooks, so that leading ones decode alone (EnCodec's bandwidths). The share
    is DAC's (arXiv 2306.06546, section 3.3), which draws for each sound of a batch; here a batch has one number."""
    start: Literal["variance_preserving", "stock"] = "variance_preserving"
    """Initial weights; with EnCodec's own a small codec does not begin to learn."""

    @field_validator("codebook_size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("must be a power of two")
        return size

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)


def encodec_config(size: EncodecSize) -> Any:
    """The `transformers.EncodecConfig` of a codec with exactly `num_codebooks` codebooks at full bandwidth."""
    from transformers import EncodecConfig

    frame_rate = math.ceil(size.rate_hz / size.hop)
    bits = int(math.log2(size.codebook_size))
    bandwidths = [_bandwidth(k, bits * frame_rate) for k in range(1, size.num_codebooks + 1)]
    return EncodecConfig(
        target_bandwidths=bandwidths,
        sampling_rate=size.rate_hz,
        audio_channels=1,
        normalize=False,
        num_filters=size.num_filters,
        upsampling_ratios=list(size.ratios),
        hidden_size=size.latent_dim,
        codebook_dim=size.latent_dim,
        codebook_size=size.codebook_size,
        num_lstm_layers=size.lstm_layers,
        use_causal_conv=size.causal,
        norm_type="weight_norm",
    )


def _bandwidth(num_codebooks: int, bits_per_s: int) -> float:
    """In kbit/s; transformers divides and rounds down, and must not lose a codebook to the last bit of a float."""
    kbps = num_codebooks * bits_per_s / 1000
    while kbps * 1000 // bits_per_s < num_codebooks or math.floor(kbps * 1000 / bits_per_s) < num_codebooks:
        kbps = math.nextafter(kbps, math.inf)
    return kbps


class TrainableEncodec(nn.Module):
    """An EnCodec encoder with a quantiser that learns."""

    def __init__(self, size: EncodecSize, *, tokens_per_batch: int, dead_code_share: float = 0.25) -> None:
        super().__init__()
        from transformers import EncodecModel

        self.size = size
        self.model = EncodecModel(encodec_config(size))
        if size.start == "variance_preserving":
            start(self.model)
        self.quantizer = ResidualVQ(
            dim=size.latent_dim,
            codebook_size=size.codebook_size,
            num_quantizers=size.num_codebooks,
            decay=0.99,
            kmeans_init=True,
            kmeans_iters=20,
            threshold_ema_dead_code=dead_code_share * tokens_per_batch / size.codebook_size,
            rotation_trick=True,
            quantize_dropout=size.num_codebooks > 1,
            sync_codebook=has_others(),
        )
        self._variance: Tensor
        self.register_buffer("_variance", torch.zeros(()))
        for layer in self.quantizer.layers:
            # A new code starts with the mean hits, not at the threshold: else it is replaced again before it is hit.
            layer._codebook.reset_cluster_size = tokens_per_batch / size.codebook_size
            train_as_one(layer._codebook)

    @property
    def is_started(self) -> bool:
        """False before the first quantised batch gave the codebooks their vectors."""
        return all(bool(layer._codebook.initted) for layer in self.quantizer.layers)

    def latents(self, sound_BT: Tensor) -> Tensor:
        """Waveforms to B x L x N, before the quantiser; always fp32, as in use (bf16 is no faster here)."""
        with torch.autocast(sound_BT.device.type, enabled=False):
            return self.model.encoder(sound_BT[:, None].float())

    def quantise(self, latents_BLN: Tensor, *, leave_out: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(quantised B x L x N, codes B x K x N, commitment loss); always fp32. Dropped codebooks have code -1.

        Commitment is relative to a running variance of the latents: the encoder is free to choose its scale, and large
        latents do not drown the other losses when the codebooks start. Of one batch it would explode at silence.

        Args:
            latents_BLN: the encoder's output.
            leave_out: in training use a random number of leading codebooks only.
        """
        several = self.size.num_codebooks > 1
        # No codebook is left out before it has started: else held-out sound could be the first that it sees.
        self.quantizer.quantize_dropout = several and leave_out and self.is_started
        with torch.autocast(latents_BLN.device.type, enabled=False):
            latents_BNL = latents_BLN.float().transpose(1, 2)
            seed = self._dropout_seed(latents_BNL.device) if self.training else None
            quantised_BNL, codes_BNK, losses = self.quantizer(latents_BNL, rand_quantize_dropout_fixed_seed=seed)
            if several and self.training:  # of several codebooks each would pass the gradient once
                quantised_BNL = latents_BNL + (quantised_BNL - latents_BNL).detach()
            if self.training:
                variance = _variance_of(latents_BNL.detach().flatten(0, 1)).mean()
                self._variance.lerp_(variance, 0.01 if self._variance > 0 else 1.0)
        return quantised_BNL.transpose(1, 2), codes_BNK.transpose(1, 2), losses.sum() / self._variance.clamp_min(1e-8)

    def _dropout_seed(self, device: torch.device) -> int | None:
        """What one process draws itself; the library adds up the draws of several."""
        if not has_others() or not self.quantizer.quantize_dropout:
            return None
        with same_draws(device):
            return int(torch.randint(0, 10_000, (), device=device))

    def waveform(self, latents_BLN: Tensor) -> Tensor:
        """Latent frames to a waveform of N x hop samples, with EnCodec's own decoder."""
        decoded_B1T: Tensor = self.model.decoder(latents_BLN)
        return decoded_B1T[:, 0, : latents_BLN.shape[2] * self.size.hop]

    def export(self) -> Any:
        """The `EncodecModel` with the learned codebooks in it."""
        layers = self.model.quantizer.layers
        for layer, learned in zip(layers[: self.size.num_codebooks], self.quantizer.layers, strict=True):
            codebook = learned.codebook.detach().clone()
            layer.codebook.embed.copy_(codebook)
            layer.codebook.embed_avg.copy_(codebook)
            layer.codebook.cluster_size.fill_(1.0)
            layer.codebook.inited.fill_(True)
        return self.model.eval()


@torch.no_grad()
def start(model: Any) -> None:
    """Initial weights that let a small EnCodec learn; all of them remain standard EnCodec weights.

    Zero biases; kaiming through the weight norm (gain 1.2); an input gain of 8 folded into the first convolution.
    """
    first = True
    for module in model.encoder.modules():
        if not isinstance(module, nn.Conv1d):
            continue
        if module.bias is not None:
            module.bias.zero_()
        norm: Any = module.parametrizations.weight  # type: ignore[union-attr]
        nn.init.kaiming_normal_(norm.original1)
        gain = 1.2 * (_INPUT_GAIN if first else 1.0)
        norm.original0.copy_(gain * norm.original1.flatten(1).norm(dim=1).view_as(norm.original0))
        first = False


def _variance_of(frames_ML: Tensor) -> Tensor:
    """L variances over the frames of all processes."""
    variance_L = frames_ML.var(0, correction=0)
    if not has_others():
        return variance_L
    mean_L = frames_ML.mean(0)
    return averaged(variance_L + (mean_L - averaged(mean_L)).square())


def spread_of(latents_BLN: Tensor) -> float:
    """How much latents, of all processes together, vary around their mean vector, relative to its length."""
    frames_ML = gathered(latents_BLN.detach().float().transpose(1, 2).flatten(0, 1))
    mean_L = frames_ML.mean(0)
    return float((frames_ML - mean_L).pow(2).mean().sqrt() / mean_L.pow(2).mean().sqrt().clamp_min(1e-8))


def check_start(latents_BLN: Tensor, min_spread: float = MIN_SPREAD) -> None:
    """Refuse to start a codebook on latents that hardly vary.

    Raises:
        TrainingError: the spread is below `min_spread`; k-means would give one code.
    """
    spread = spread_of(latents_BLN)
    if spread < min_spread:
        raise TrainingError(
            f"the encoder's output hardly depends on the sound (spread {spread:.3f}, expected {min_spread} or more): "
            "a codebook would collapse. Is the data silent, or codec.start not variance_preserving?"
        )
