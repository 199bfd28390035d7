"""A codec piece by piece: the same codes and the same waveform as at once, with a bounded memory and a known delay.

Convolutions see only so far: each is run on a window that reaches `context` beyond what is new at both sides, and what
the window's own edges touched is thrown away. The LSTMs of EnCodec look back only; they carry their state.

Dimension key: C channels, N units of input or output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes, check_codes
from tokenizers_mm.encodec_folder import is_plain
from tokenizers_mm.errors import CheckpointError, DataError, InputError
from tokenizers_mm.istft import InverseSTFTDecoder
from tokenizers_mm.media import Audio, FloatArray, load_sound


class StreamingEncoder:
    """Samples to codes while they come.

    >>> encoder = StreamingEncoder(tokenizer)                    # doctest: +SKIP
    >>> for samples in microphone:                               # doctest: +SKIP
    ...     send(encoder.push(samples))                          # doctest: +SKIP
    >>> send(encoder.finish())                                   # doctest: +SKIP

    Args:
        tokenizer: of the codes.
        chunk: code frames that are found together; more is faster, and later.

    Raises:
        CheckpointError: a codec that looks at whole chunks of sound.
    """

    def __init__(self, tokenizer: AudioTokenizer, *, chunk: int = 25) -> None:
        _check(tokenizer)
        self._tokenizer = tokenizer
        self.num_samples = 0
        """Samples so far."""
        layers = list(tokenizer.model.encoder.layers)
        (place,) = (i for i, layer in enumerate(layers) if _is_lstm(layer))
        front, lstm, back = layers[:place], layers[place], layers[place + 1 :]
        self._stages = _Chain(
            _Windowed(
                nn.Sequential(*front), context=_reach(front, tokenizer.hop), per_frame=(tokenizer.hop, 1), chunk=chunk
            ),
            _Recurrent(lstm),
            _Windowed(nn.Sequential(*back), context=_reach(back, 1), per_frame=(1, 1), chunk=1),
        )

    @property
    def delay_frames(self) -> int:
        """Code frames that are still missing when a frame's own samples have come; the chunk's come on top."""
        return self._stages.delay

    def push(self, samples_T: FloatArray) -> Codes:
        """More samples, mono, at the tokenizer's rate, to the codes that are certain now: K x T, T may be 0.

        Raises:
            InputError: not an array of finite floats.
        """
        samples_T = np.asarray(samples_T)
        if samples_T.size == 0:
            return self._codes(None)
        checked_T = load_sound((samples_T, self._tokenizer.sample_rate_hz)).samples_T
        self.num_samples += len(checked_T)
        piece_1CN = torch.from_numpy(checked_T.copy()).view(1, 1, -1).to(self._tokenizer.device)
        with torch.inference_mode():
            return self._codes(self._stages.push(piece_1CN, is_last=False))

    def finish(self) -> Codes:
        """The codes of what is left; afterwards the encoder is used up.

        Raises:
            InputError: there were no samples at all.
        """
        if not self.num_samples:
            raise InputError("the sound has no samples")
        with torch.inference_mode():
            return self._codes(self._stages.push(None, is_last=True))

    def _codes(self, latents_1LN: Tensor | None) -> Codes:
        if latents_1LN is None or latents_1LN.shape[2] == 0:
            return Codes(np.zeros((self._tokenizer.num_codebooks, 0), np.int64), "audio")
        return Codes(self._tokenizer.codes_of(latents_1LN)[0], "audio")


class StreamingDecoder:
    """Codes to samples while they come.

    Args:
        tokenizer: of the codes.
        chunk: code frames that are decoded together; more is faster, and later.

    Raises:
        CheckpointError: a codec that looks at whole chunks of sound.
    """

    def __init__(self, tokenizer: AudioTokenizer, *, chunk: int = 25) -> None:
        _check(tokenizer)
        self._tokenizer = tokenizer
        self._num_codebooks: int | None = None
        hop = tokenizer.hop
        stages: list[_Stage]
        if tokenizer.istft is not None:
            context = _istft_reach(tokenizer.istft)
            stages = [_Windowed(_with_channel(tokenizer.istft), context=context, per_frame=(1, hop), chunk=chunk)]
        else:
            layers = list(tokenizer.model.decoder.layers)
            (place,) = (i for i, layer in enumerate(layers) if _is_lstm(layer))
            front, lstm, back = layers[:place], layers[place], layers[place + 1 :]
            stages = [
                _Windowed(nn.Sequential(*front), context=_reach(front, 1), per_frame=(1, 1), chunk=1),
                _Recurrent(lstm),
                _Windowed(nn.Sequential(*back), context=_reach(back, 1), per_frame=(1, hop), chunk=chunk),
            ]
        self._stages = _Chain(*stages)

    @property
    def delay_frames(self) -> int:
        """Code frames that must follow before a frame can be heard; the chunk's come on top."""
        return self._stages.delay

    def push(self, codes: Codes) -> Audio:
        """More codes, K x T with the same K each time, to the samples that are certain now.

        Raises:
            DataError: codes that this tokenizer does not have, or another number of codebooks than before.
        """
        check_codes(codes, "audio", self._tokenizer.codebook_size, self._tokenizer.num_codebooks)
        if codes.num_codebooks != (self._num_codebooks or codes.num_codebooks):
            raise DataError(f"the first codes had {self._num_codebooks} codebooks, these have {codes.num_codebooks}")
        self._num_codebooks = codes.num_codebooks
        if codes.num_steps == 0:
            return self._audio(None)
        with torch.inference_mode():
            return self._audio(self._stages.push(self._tokenizer.latents_of(codes), is_last=False))

    def finish(self) -> Audio:
        """The samples of what is left; afterwards the decoder is used up."""
        if self._num_codebooks is None:
            return self._audio(None)
        with torch.inference_mode():
            return self._audio(self._stages.push(None, is_last=True))

    def _audio(self, waves_1CN: Tensor | None) -> Audio:
        rate_hz = self._tokenizer.sample_rate_hz
        if waves_1CN is None:
            return Audio(np.zeros(0, np.float32), rate_hz)
        return Audio(waves_1CN[0, 0].clamp(-1, 1).float().cpu().numpy(), rate_hz)


class _Stage(Protocol):
    delay: int
    """Frames of output that wait for frames of input."""

    def push(self, piece_1CN: Tensor | None, *, is_last: bool) -> Tensor | None:
        """More input to the output that is certain now; None is nothing."""
        ...


class _Chain:
    def __init__(self, *stages: _Stage) -> None:
        self._stages = stages
        self.delay = sum(stage.delay for stage in stages)

    def push(self, piece_1CN: Tensor | None, *, is_last: bool) -> Tensor | None:
        for stage in self._stages:
            piece_1CN = stage.push(piece_1CN, is_last=is_last)
        return piece_1CN


class _Windowed:
    """A function of the whole signal that sees `context` frames to both sides, on one window after the other."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], *, context: int, per_frame: tuple[int, int], chunk: int
    ) -> None:
        self._function, self.delay, self._chunk = function, context, chunk
        self._in, self._out = per_frame
        self._kept: Tensor | None = None
        self._before = 0
        """Frames at the start of what is kept whose output has been given."""

    def push(self, piece_1CN: Tensor | None, *, is_last: bool) -> Tensor | None:
        if piece_1CN is not None:
            self._kept = piece_1CN if self._kept is None else torch.cat([self._kept, piece_1CN], dim=2)
        if self._kept is None:
            return None
        frames = self._kept.shape[2] / self._in
        certain = math.ceil(frames) if is_last else math.floor(frames) - self.delay
        if certain <= self._before or (not is_last and certain - self._before < self._chunk):
            return None
        found_1CN = self._function(self._kept)[:, :, self._before * self._out : certain * self._out]
        dropped = max(0, certain - self.delay)
        self._kept, self._before = self._kept[:, :, dropped * self._in :], certain - dropped
        return found_1CN


class _Recurrent:
    """EnCodec's LSTM with its shortcut, its state carried on."""

    delay = 0

    def __init__(self, layer: Any) -> None:
        self._lstm, self._state = layer.lstm, None

    def push(self, piece_1CN: Tensor | None, *, is_last: bool) -> Tensor | None:
        if piece_1CN is None:
            return None
        steps_N1C = piece_1CN.permute(2, 0, 1)
        states_N1C, self._state = self._lstm(steps_N1C, self._state)
        return (states_N1C + steps_N1C).permute(1, 2, 0)


def _check(tokenizer: AudioTokenizer) -> None:
    if not is_plain(tokenizer.model) or tokenizer.model.config.norm_type != "weight_norm":
        raise CheckpointError(
            "this codec looks at whole chunks of sound (their loudness, or norms over time): encode and decode at once"
        )


def _is_lstm(layer: Any) -> bool:
    return hasattr(layer, "lstm")


def _with_channel(istft: InverseSTFTDecoder) -> Callable[[Tensor], Tensor]:
    def decode(latents_1LN: Tensor) -> Tensor:
        waves_1T: Tensor = istft(latents_1LN)
        return waves_1T[:, None]

    return decode


def _istft_reach(istft: InverseSTFTDecoder) -> int:
    """Code frames to each side: every convolution's, and the frames that overlap."""
    kernel = istft.embed.kernel_size[0]
    frames = (1 + len(istft.blocks)) * (kernel // 2) + math.ceil(istft.window / istft.hop)
    return math.ceil(frames / istft.upsampling)


def _reach(layers: Iterable[nn.Module], inputs_per_frame: int) -> int:
    """An upper bound of how many frames to one side the layers see.

    Args:
        layers: convolutions, down or up, and residual blocks.
        inputs_per_frame: of the first layer's input.
    """
    per_frame, reach = float(inputs_per_frame), 0.0
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv1d):
                reach += (module.kernel_size[0] - 1) * module.dilation[0] / per_frame
                per_frame /= module.stride[0]
            elif isinstance(module, nn.ConvTranspose1d):
                reach += math.ceil(module.kernel_size[0] / module.stride[0]) / per_frame
                per_frame *= module.stride[0]
    return math.ceil(reach)
