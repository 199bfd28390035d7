"""Sounds of different lengths at once give what each gives alone, whatever lies beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_mm import audio_batches
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.audio_batches import MAX_PADDING, grouped
from tokenizers_mm.codes import Codes
from tokenizers_mm.encodec import EncodecSize, encodec_config, start
from tokenizers_mm.errors import DataError, InputError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder

RATE_HZ = 8000


def codec(config: object, *, istft: bool = False, upsampling: int = 1) -> AudioTokenizer:
    """Random weights whose codes depend on the sound."""
    from transformers import EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(config).eval()
    if model.config.norm_type == "weight_norm":
        start(model)
    with torch.no_grad():
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn(layer.codebook.embed.shape))
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):  # EnCodec's start has none, and what is behind a row is zero only without them
                tensor.copy_(0.1 * torch.randn(tensor.shape))
    decoder_config = InverseSTFTConfig(width=16, depth=2, upsampling=upsampling)
    hop = int(np.prod(model.config.upsampling_ratios))
    decoder = InverseSTFTDecoder(decoder_config, latent_dim=8, hop=hop) if istft else None
    return AudioTokenizer(model, decoder, decoder_config if istft else None)


def own() -> object:
    """As `anygen.stages.audio_tokenizer` trains it: not causal, reflected."""
    return encodec_config(
        EncodecSize(rate_hz=RATE_HZ, ratios=(5, 4, 2), num_filters=4, latent_dim=8, codebook_size=64, num_codebooks=2)
    )


def published(**fields: object) -> object:
    """EnCodec's 24 kHz layout, narrow."""
    from transformers import EncodecConfig

    return EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, target_bandwidths=[1.5, 3.0], **fields)


STEREO = {
    "audio_channels": 2,
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "norm_type": "time_group_norm",
}
CODECS = {
    "own, istft": codec(own(), istft=True),
    "own, istft, two spectra a frame": codec(own(), istft=True, upsampling=2),
    "own, seanet": codec(own()),
    "24 kHz": codec(published(sampling_rate=24_000)),
    "32 kHz": codec(published(sampling_rate=32_000, use_causal_conv=False, use_conv_shortcut=False)),
    "48 kHz": codec(published(sampling_rate=48_000, use_causal_conv=False, **STEREO)),
    "zeros at the ends": codec(published(sampling_rate=24_000, pad_mode="constant")),
}


def sound(length: int) -> np.ndarray:
    random = np.random.default_rng(length)
    return (0.2 * random.normal(size=length) * (1 + np.sin(np.arange(length) / 300))).astype(np.float32)


def lengths(rate_hz: int) -> st.SearchStrategy[list[int]]:
    """Any, and those that are a few samples, or a few samples apart."""
    near = st.integers(rate_hz - 3, rate_hz + 3)
    return st.lists(st.one_of(st.integers(1, 3 * rate_hz), st.integers(1, 700), near), min_size=1, max_size=6)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), padding=st.sampled_from([MAX_PADDING, 1.0]))
def test_a_batch_equals_its_sounds_alone(name: str, data: st.DataObject, padding: float) -> None:
    tokenizer = CODECS[name]
    rate_hz = tokenizer.sample_rate_hz
    sounds = [(sound(length), rate_hz) for length in data.draw(lengths(rate_hz))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_batches, "MAX_PADDING", padding)  # at 1 all are in one tensor, however short
        together = tokenizer.encode_batch(sounds)
        back = tokenizer.decode_batch(together)
    for one, codes, audio in zip(sounds, together, back, strict=True):
        alone = tokenizer.encode(one)
        assert codes == alone and codes.num_samples == len(one[0]) and codes.scales == alone.scales
        assert len(np.unique(alone.codes_KT)) >= min(5, alone.num_steps // 8), "equal codes of nothing prove nothing"
        expected = tokenizer.decode(alone)
        assert audio.rate_hz == rate_hz and len(audio.samples_T) == len(one[0])
        np.testing.assert_allclose(audio.samples_T, expected.samples_T, atol=1e-5)


@pytest.mark.parametrize("name", ["own, istft", "24 kHz", "48 kHz"])
def test_batches_of_what_a_transformer_wrote(name: str) -> None:
    """No lengths but the frames, different numbers of codebooks, nothing at all."""
    tokenizer = CODECS[name]
    random = np.random.default_rng(0)
    codes = [Codes(random.integers(0, 64, (k, t)), "audio") for k, t in ((2, 7), (1, 30), (2, 0), (1, 31), (2, 1))]
    for one, audio in zip(codes, tokenizer.decode_batch(codes), strict=True):
        expected = tokenizer.decode(one).samples_T
        assert len(audio.samples_T) == len(expected)
        np.testing.assert_allclose(audio.samples_T, expected, atol=1e-5)
    assert tokenizer.encode_batch([]) == [] and tokenizer.decode_batch([]) == []


def test_a_batch_refuses_what_its_sounds_alone_refuse() -> None:
    tokenizer = CODECS["own, istft"]
    good = (sound(400), RATE_HZ)
    with pytest.raises(InputError, match="NaN"):
        tokenizer.encode_batch([good, (np.array([np.nan], np.float32), RATE_HZ)])
    codes = tokenizer.encode(good)
    with pytest.raises(DataError, match="must be below 64"):
        tokenizer.decode_batch([codes, Codes(np.full((1, 3), 64), "audio")])
    with pytest.raises(DataError, match="cannot be 81 samples"):
        tokenizer.decode_batch([codes, Codes(np.zeros((2, 2), int), "audio", num_samples=81)])


@given(sizes=st.lists(st.integers(1, 2 * audio_batches.MAX_UNITS), max_size=40))
def test_groups_hold_every_sound_once_and_bound_padding_and_memory(sizes: list[int]) -> None:
    groups = grouped(sizes)
    assert sorted(place for group in groups for place in group) == [*range(len(sizes))]
    for group in groups:
        longest = max(sizes[place] for place in group)
        assert min(sizes[place] for place in group) >= (1 - MAX_PADDING) * longest
        assert len(group) == 1 or len(group) * longest <= audio_batches.MAX_UNITS
