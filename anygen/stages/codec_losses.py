"""What a codec minimises: spectrograms, waveform, commitment, and late in training the judgement of a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizers_mm.balancer import Balancer, with_gradient
from tokenizers_mm.encodec import TrainableEncodec, check_start
from tokenizers_mm.istft import InverseSTFTDecoder
from tokenizers_mm.loudness import loudness_distance
from tokenizers_mm.msstft import (
    MSSTFTConfig,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    judge_frozen,
)
from tokenizers_mm.spectral import mel_distance
from tokenizers_mm.usage import UsageMonitor

_GOLDEN = (5**0.5 - 1) / 2


def distances(
    decoded_BT: Tensor, sound_BT: Tensor, *, rate_hz: int, mel_floor_db: float | None, with_loudness: bool
) -> dict[str, Tensor]:
    """`mel`, `wave` and, where asked for, `loudness`: what a decoded sound is away from the original."""
    parts = {
        "mel": mel_distance(decoded_BT, sound_BT, rate_hz=rate_hz, floor_db=mel_floor_db),
        "wave": (decoded_BT - sound_BT).abs().mean(),
    }
    if with_loudness:
        parts["loudness"] = loudness_distance(decoded_BT, sound_BT, rate_hz=rate_hz)
    return parts


class CodecLoss(nn.Module):
    """Codec, decoder, discriminator and the monitors of the codebooks.

    Args:
        codec: encoder, quantiser and EnCodec's own decoder.
        istft: the decoder that learns; None lets EnCodec's own learn.
        weights: of the losses `mel`, `wave`, `loudness` and `commitment`; what has none is not computed.
        judge: the discriminator's; the losses `adversarial` and `features` have their weights there.
        judge_start: step of the first judgement.
        balanced: weights are shares of the gradient at the waveform (commitment's stays a plain weight).
        steps_without_quantiser: first steps.
        min_spread: of the latents that a codebook may start on.
        usage_window, usage_alarm: of the monitors.
        mel_floor_db: of the mel spectra.
    """

    spares_parameters = True

    def __init__(
        self,
        codec: TrainableEncodec,
        istft: InverseSTFTDecoder | None,
        *,
        weights: dict[str, float],
        judge: MSSTFTConfig,
        judge_start: int,
        balanced: bool,
        steps_without_quantiser: int,
        min_spread: float,
        usage_window: int,
        usage_alarm: float,
        mel_floor_db: float | None = None,
    ) -> None:
        super().__init__()
        self.codec, self.istft = codec, istft
        codec.model.decoder.requires_grad_(istft is None)
        self._commitment_weight = weights["commitment"]
        self._weights = {name: weights[name] for name in ("mel", "wave", "loudness") if weights.get(name)}
        self.discriminator = MultiScaleSTFTDiscriminator(judge) if judge.weight else None
        if judge.weight:
            self._weights |= {"adversarial": judge.weight}
        if judge.weight and judge.feature_weight:
            self._weights |= {"features": judge.feature_weight}
        self.balancer = Balancer(self._weights) if balanced else None
        self._judge_start, self._start, self._min_spread = judge_start, steps_without_quantiser, min_spread
        self._mel_floor_db = mel_floor_db
        self._step: Tensor
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))
        self.monitors = nn.ModuleList(
            UsageMonitor(
                codec.size.codebook_size,
                window=usage_window,
                alarm=usage_alarm,
                name=f"codebook {book + 1} of {codec.size.num_codebooks}",
                remedy="lower codec.codebook_size or codec.num_codebooks, or raise steps_without_quantiser",
            )
            for book in range(codec.size.num_codebooks)
        )

    def forward(self, sound_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Waveforms to the loss and its parts."""
        step = int(self._step)
        self._step += 1
        latents_BLN = self.codec.latents(sound_BT)
        commitment, report = torch.zeros((), device=sound_BT.device), {}
        if step >= self._start:
            if not self.codec.is_started:
                check_start(latents_BLN, self._min_spread)
            # evenly spread over the steps, and a run that goes on draws the same
            leave_out = step * _GOLDEN % 1 < self.codec.size.quantizer_dropout
            latents_BLN, codes_BKN, commitment = self.codec.quantise(latents_BLN, leave_out=leave_out)
            report = self._watched(codes_BKN)
        decoded_BT = self.decoded(latents_BLN)
        # The losses see a leaf: the balancer needs each one's gradient at the waveform, once.
        leaf_BT = decoded_BT.detach().requires_grad_() if self.balancer else decoded_BT
        parts = distances(
            leaf_BT,
            sound_BT,
            rate_hz=self.codec.size.rate_hz,
            mel_floor_db=self._mel_floor_db,
            with_loudness="loudness" in self._weights,
        )
        theirs = None
        if self.discriminator is not None and step >= self._judge_start:
            theirs = self._judged(leaf_BT, sound_BT, parts)
        used = {name: part for name, part in parts.items() if name in self._weights}
        loss = torch.stack([self._weights[name] * part for name, part in used.items()]).sum()
        if self.balancer is not None:
            loss = with_gradient(loss.detach(), decoded_BT, self.balancer(used, leaf_BT))
        loss = loss + self._commitment_weight * commitment
        if theirs is not None:
            loss = loss + theirs
            report["discriminator"] = theirs
        report |= {"commitment": commitment} | {name: part.detach() for name, part in parts.items()}
        return loss, report

    def decoded(self, latents_BLN: Tensor) -> Tensor:
        """Latent frames to waveforms, B x T, fp32."""
        waves_BT = self.istft(latents_BLN) if self.istft is not None else self.codec.waveform(latents_BLN)
        return waves_BT.float()

    def _judged(self, leaf_BT: Tensor, sound_BT: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Adds the codec's side to `parts`; returns the discriminator's. Neither gradient reaches the other side."""
        assert self.discriminator is not None
        real = self.discriminator(sound_BT)
        decoded = judge_frozen(self.discriminator, leaf_BT)
        parts["adversarial"] = adversarial_loss(decoded)
        if "features" in self._weights:
            parts["features"] = feature_loss(real, decoded)
        return discriminator_loss(real, self.discriminator(leaf_BT.detach()))

    def _watched(self, codes_BKN: Tensor) -> dict[str, Tensor]:
        figures: dict[str, Tensor] = {}
        for book, monitor in enumerate(self.monitors):
            codes = codes_BKN[:, book]
            # a dropped codebook has code -1
            figures |= {f"{k}{book or ''}": v for k, v in monitor.update(codes[codes >= 0]).items()}  # type: ignore[operator]
        return figures
