"""A codec piece by piece gives what it gives at once, with any pieces; lengths come back exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.encodec import EncodecSize, encodec_config, start
from tokenizers_mm.errors import DataError, InputError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.streaming import StreamingDecoder, StreamingEncoder

RATE_HZ = 8000


def codec(*, causal: bool, istft: bool) -> AudioTokenizer:
    """Random weights, in EnCodec's full shape: residual blocks, LSTM, odd and even strides."""
    from transformers import EncodecModel

    torch.manual_seed(0)
    size = EncodecSize(
        rate_hz=RATE_HZ, ratios=(5, 4, 2), num_filters=4, latent_dim=8, codebook_size=64, num_codebooks=2
    )
    config = encodec_config(size)
    config.use_causal_conv = causal
    model = EncodecModel(config).eval()
    with torch.no_grad():
        start(model)
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn(64, 8))
    decoder_config = InverseSTFTConfig(width=16, depth=2, upsampling=2 if causal else 1)
    decoder = InverseSTFTDecoder(decoder_config, latent_dim=8, hop=40) if istft else None
    return AudioTokenizer(model, decoder, decoder_config if istft else None)


CODECS = {
    f"{'causal' if causal else 'centred'}, {'istft' if istft else 'seanet'}": codec(causal=causal, istft=istft)
    for causal in (False, True)
    for istft in (False, True)
}


def sound(length: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.2 * random.normal(size=length) * (1 + np.sin(np.arange(length) / 300))).astype(np.float32)


def cut(length: int, sizes: list[int]) -> list[slice]:
    """Pieces of the given sizes, again and again."""
    pieces, start = [], 0
    while start < length:
        end = min(length, start + sizes[len(pieces) % len(sizes)])
        pieces.append(slice(start, end))
        start = end
    return pieces


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 9000),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 7, 40]),
)
def test_pieces_equal_the_whole(name: str, length: int, sizes: list[int], chunk: int) -> None:
    tokenizer = CODECS[name]
    samples = sound(length)
    whole = tokenizer.encode((samples, RATE_HZ))
    assert len(np.unique(whole.codes_KT)) >= min(10, length // 400), "codes that tell nothing would prove nothing"
    encoder = StreamingEncoder(tokenizer, chunk=chunk)
    if length / min(sizes) > 300:
        sizes = [max(size, 40) for size in sizes]
    found = [encoder.push(samples[piece]).codes_KT for piece in cut(length, sizes)]
    found.append(encoder.finish().codes_KT)
    assert np.array_equal(np.concatenate(found, axis=1), whole.codes_KT)
    assert encoder.num_samples == length == whole.num_samples

    decoder = StreamingDecoder(tokenizer, chunk=chunk)
    steps = cut(whole.num_steps, [1 + size % 50 for size in sizes])
    waves = [decoder.push(Codes(whole.codes_KT[:, step], "audio")).samples_T for step in steps]
    waves.append(decoder.finish().samples_T)
    at_once = tokenizer.decode(whole).samples_T
    assert len(at_once) == length, "no sample is lost and none is added"
    assert np.allclose(np.concatenate(waves)[:length], at_once, atol=1e-5)


@pytest.mark.parametrize("name", CODECS)
def test_codes_and_samples_come_before_the_end(name: str) -> None:
    """And no sooner than the delay that is told allows."""
    tokenizer = CODECS[name]
    samples, hop = sound(8000), tokenizer.hop
    encoder = StreamingEncoder(tokenizer, chunk=1)
    come = 0
    for first in range(0, len(samples), hop):
        come += encoder.push(samples[first : first + hop]).num_steps
        assert come == max(0, first // hop + 1 - encoder.delay_frames)
    assert come + encoder.finish().num_steps == 200
    whole = tokenizer.encode((samples, RATE_HZ))
    decoder = StreamingDecoder(tokenizer, chunk=1)
    heard = 0
    for step in range(200):
        heard += len(decoder.push(Codes(whole.codes_KT[:, step : step + 1], "audio")).samples_T)
        assert heard == hop * max(0, step + 1 - decoder.delay_frames)
    assert heard + len(decoder.finish().samples_T) == 8000


def test_what_is_kept_does_not_grow() -> None:
    encoder = StreamingEncoder(CODECS["centred, istft"], chunk=5)
    kept = set()
    for number in range(60):
        encoder.push(sound(400, seed=number))
        stage = encoder._stages._stages[0]
        kept.add(stage._kept.shape[2])  # type: ignore[attr-defined]
    assert max(kept) < 60 * 400 / 5


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3 * RATE_HZ))
def test_as_many_samples_come_back_as_went_in(audio_tokenizer: AudioTokenizer, length: int) -> None:
    codes = audio_tokenizer.encode((np.zeros(length, np.float32), RATE_HZ))
    assert len(audio_tokenizer.decode(codes).samples_T) == length
    assert Codes(codes.codes_KT, "audio") == codes, "what a transformer writes has no length but its frames"


def test_what_cannot_be_streamed_is_refused() -> None:
    tokenizer = CODECS["centred, istft"]
    encoder = StreamingEncoder(tokenizer)
    assert encoder.push(np.zeros(0, np.float32)).num_steps == 0
    with pytest.raises(InputError, match="no samples"):
        encoder.finish()
    with pytest.raises(InputError, match="NaN"):
        encoder.push(np.array([np.nan], np.float32))
    decoder = StreamingDecoder(tokenizer)
    assert len(decoder.finish().samples_T) == 0
    decoder.push(Codes(np.zeros((1, 3), int), "audio"))
    with pytest.raises(DataError, match="the first codes had 1 codebooks, these have 2"):
        decoder.push(Codes(np.zeros((2, 3), int), "audio"))
    with pytest.raises(DataError, match="must be below 64"):
        decoder.push(Codes(np.full((1, 3), 64), "audio"))
    with pytest.raises(DataError, match="cannot be 81 samples"):
        tokenizer.decode(Codes(np.zeros((2, 2), int), "audio", num_samples=81))
    with pytest.raises(DataError, match="samples and scales belong to sounds only"):
        Codes(np.zeros((1, 4), int), "image", grid_hw=(2, 2), num_samples=3)
