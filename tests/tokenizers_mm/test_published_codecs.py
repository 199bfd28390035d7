"""EnCodec's published layouts (24, 32 and 48 kHz), narrow and with random weights: codes and waveforms are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.encodec import start
from tokenizers_mm.errors import CheckpointError, DataError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.streaming import StreamingDecoder, StreamingEncoder

NARROW: dict[str, Any] = {"num_filters": 4, "hidden_size": 8, "codebook_dim": 8}
# As in config.json of facebook/encodec_24khz, encodec_32khz (MusicGen) and encodec_48khz, but for the width.
LAYOUTS: dict[str, dict[str, Any]] = {
    "24khz": {"target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0], "sampling_rate": 24_000, "num_lstm_layers": 2},
    "32khz": {
        "target_bandwidths": [2.2],
        "sampling_rate": 32_000,
        "upsampling_ratios": [8, 5, 4, 4],
        "codebook_size": 2048,
        "use_causal_conv": False,
        "use_conv_shortcut": False,
    },
    "48khz": {
        "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
        "sampling_rate": 48_000,
        "audio_channels": 2,
        "normalize": True,
        "chunk_length_s": 1.0,
        "overlap": 0.01,
        "norm_type": "time_group_norm",
        "use_causal_conv": False,
    },
}
BOOKS = {"24khz": [2, 4, 8, 16, 32], "32khz": [4], "48khz": [2, 4, 8, 16]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import EncodecConfig, EncodecModel

    made = {}
    for name, layout in LAYOUTS.items():
        torch.manual_seed(0)
        model = EncodecModel(EncodecConfig(**layout, **NARROW)).eval()
        if model.config.norm_type == "weight_norm":
            start(model)
        with torch.no_grad():
            for layer in model.quantizer.layers:
                layer.codebook.embed.copy_(torch.randn(layer.codebook.embed.shape))
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def sound(length: int) -> np.ndarray:
    random = np.random.default_rng(length)
    return (0.1 * random.normal(size=length) * (1 + np.sin(np.arange(length) / 5000))).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_waveforms_are_those_of_transformers_at_every_bandwidth(folders: dict[str, Path], name: str) -> None:
    from transformers import EncodecModel

    plain = EncodecModel.from_pretrained(folders[name]).eval()
    channels, length = plain.config.audio_channels, 2 * plain.config.sampling_rate + 100
    wave = torch.from_numpy(sound(length)).expand(1, channels, -1)
    assert [plain.quantizer.get_num_quantizers_for_bandwidth(kbps) for kbps in plain.config.target_bandwidths] == BOOKS[
        name
    ]
    for books, kbps in zip(BOOKS[name], plain.config.target_bandwidths, strict=True):
        ours = AudioTokenizer.load(folders[name], num_codebooks=books)
        assert ours.num_codebooks == books
        codes = ours.encode((wave[0, 0].numpy(), plain.config.sampling_rate))
        with torch.no_grad():
            encoded = plain.encode(wave, bandwidth=kbps)
            decoded = plain.decode(
                encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length
            )
        chunks = [chunk[0].numpy() for chunk in encoded.audio_codes]
        if encoded.last_frame_pad_length:
            chunks[-1] = chunks[-1][:, : -encoded.last_frame_pad_length]
        assert np.array_equal(codes.codes_KT, np.concatenate(chunks, axis=1)) and codes.num_codebooks == books
        back = ours.decode(codes).samples_T
        expected = decoded.audio_values[0].mean(0)[:length].clamp(-1, 1).numpy()
        assert len(back) == length
        np.testing.assert_allclose(back, expected, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_saved_opens_with_the_kept_codebooks(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    books = BOOKS[name][0]
    ours = AudioTokenizer.load(folders[name], num_codebooks=books)
    ours.save(tmp_path)
    again = AudioTokenizer.load(tmp_path)
    assert again.num_codebooks == books and again.fingerprint == ours.fingerprint
    if len(BOOKS[name]) > 1:
        assert again.fingerprint != AudioTokenizer.load(folders[name]).fingerprint
    source = (sound(5000), ours.sample_rate_hz)
    assert again.encode(source) == ours.encode(source)
    with pytest.raises(CheckpointError, match="not of 3"):
        AudioTokenizer.load(folders[name], num_codebooks=3)


@settings(max_examples=25, deadline=None)
@given(length=st.one_of(st.integers(1, 3000), st.integers(47_300, 48_200), st.integers(94_900, 96_500)))
def test_chunks_give_back_every_length(folders: dict[str, Path], length: int) -> None:
    """Also those on which `EncodecModel` itself fails: a last chunk that is shorter than the overlap."""
    tokenizer = _tokenizer_48khz(folders["48khz"])
    codes = tokenizer.encode((sound(length), 48_000))
    assert codes.scales is not None and codes.num_samples == length
    assert len(tokenizer.decode(codes).samples_T) == length
    written = Codes(codes.codes_KT, "audio")
    assert written == codes
    longest = len(tokenizer.decode(written).samples_T)
    assert length <= longest < length + 320, "without a length: the longest sound that has so many frames"


_opened: dict[Path, AudioTokenizer] = {}


def _tokenizer_48khz(folder: Path) -> AudioTokenizer:
    return _opened.setdefault(folder, AudioTokenizer.load(folder, num_codebooks=2))


def test_loudness_comes_back(folders: dict[str, Path]) -> None:
    tokenizer = _tokenizer_48khz(folders["48khz"])
    loud = tokenizer.encode((sound(60_000), 48_000))
    soft = tokenizer.encode((0.1 * sound(60_000), 48_000))
    assert loud == soft, "loudness is taken out of the codes"
    a, b = (tokenizer.decode(codes).samples_T for codes in (loud, soft))
    np.testing.assert_allclose(b, 0.1 * a, atol=1e-5)
    assert 151 < tokenizer.rate_hz < 152


def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = _tokenizer_48khz(folders["48khz"])
    for streaming in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(CheckpointError, match="whole chunks of sound"):
            streaming(tokenizer)
    config = InverseSTFTConfig(width=8, depth=1)
    with pytest.raises(CheckpointError, match="inverse-STFT decoder needs"):
        AudioTokenizer(tokenizer.model, InverseSTFTDecoder(config, latent_dim=8, hop=320), config)
    with pytest.raises(DataError, match="2 chunks need as many scales, got 1"):
        tokenizer.decode(Codes(np.zeros((2, 151), int), "audio", scales=(0.1,)))
    with pytest.raises(DataError, match="cannot be 7 samples"):
        tokenizer.decode(Codes(np.zeros((2, 151), int), "audio", num_samples=7))
    text = (folders["48khz"] / "config.json").read_text().replace('"overlap": 0.01', '"overlap": null')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((folders["48khz"] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no overlap"):
        AudioTokenizer.load(tmp_path)
