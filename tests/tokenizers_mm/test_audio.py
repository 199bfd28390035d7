"""EnCodec made here is EnCodec anywhere: equal codes in transformers, exact lengths, a start that listens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec, check_start, encodec_config, spread_of
from tokenizers_mm.errors import CheckpointError, DataError, InputError, TrainingError
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder
from tokenizers_mm.media import Audio
from tokenizers_mm.spectral import log_mel, mel_distance

SIZE = EncodecSize(rate_hz=8000, ratios=(8, 5, 4), num_filters=2, latent_dim=8, codebook_size=16, num_codebooks=2)


def speech_like(seconds: float = 1.0, rate_hz: int = 8000) -> torch.Tensor:
    time = torch.arange(int(seconds * rate_hz)) / rate_hz
    pitch = 120 + 40 * torch.sin(2 * torch.pi * 2 * time)
    phase = (2 * torch.pi * pitch / rate_hz).cumsum(0)
    waves = sum(torch.sin(phase * k) / k for k in range(1, 12))
    return (waves * 0.05 * (1 + torch.sin(2 * torch.pi * 3 * time)))[None]


def test_exported_folder_opens_in_transformers_alone_with_equal_codes(
    audio_tokenizer: AudioTokenizer, tmp_path: Path
) -> None:
    from transformers import EncodecModel

    audio_tokenizer.save(tmp_path)
    plain = EncodecModel.from_pretrained(tmp_path)
    for seconds in (0.02, 0.5, 1.0, 1.37):
        sound = speech_like(seconds)
        ours = audio_tokenizer.encode((sound[0].numpy(), 8000)).codes_KT
        bandwidth = max(plain.config.target_bandwidths)
        theirs = plain.encode(sound[None], bandwidth=bandwidth).audio_codes[0, 0].numpy()
        assert ours.shape == (2, int(np.ceil(sound.shape[1] / 160)))
        assert np.array_equal(ours, theirs)
    loaded = AudioTokenizer.load(tmp_path)
    assert loaded.fingerprint == audio_tokenizer.fingerprint
    codes = loaded.encode((speech_like()[0].numpy(), 8000))
    assert np.array_equal(loaded.decode(codes).samples_T, audio_tokenizer.decode(codes).samples_T)


def test_training_quantiser_and_exported_model_give_equal_codes() -> None:
    torch.manual_seed(0)
    codec = TrainableEncodec(SIZE, tokens_per_batch=200).train()
    for _ in range(3):
        codec.quantise(codec.latents(torch.cat([speech_like(), torch.randn(1, 8000) * 0.1])))
    codec.eval()
    with torch.no_grad():
        _, expected, _ = codec.quantise(codec.latents(speech_like()))
    model = codec.export()
    found = model.encode(speech_like()[None], bandwidth=max(model.config.target_bandwidths)).audio_codes[0, 0]
    assert torch.equal(found, expected[0])


@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
def test_the_gradient_passes_any_number_of_codebooks_once(num_codebooks: int) -> None:
    torch.manual_seed(0)
    size = SIZE.model_copy(update={"num_codebooks": num_codebooks})
    codec = TrainableEncodec(size, tokens_per_batch=200).train()
    latents = torch.randn(4, 8, 50)
    codec.quantise(latents)
    latents.requires_grad_()
    quantised, _, _ = codec.quantise(latents)
    passed = torch.randn(quantised.shape)
    (gradient,) = torch.autograd.grad((quantised * passed).sum(), latents)
    gain = float((gradient * passed).sum() / passed.square().sum())
    assert gain == pytest.approx(1.0) if num_codebooks > 1 else 0.3 < gain < 1.1, "one codebook rotates it"


def test_all_codebooks_start_on_the_first_batch_whatever_is_dropped_later() -> None:
    size = SIZE.model_copy(update={"num_codebooks": 4})
    for seed in range(8):
        torch.manual_seed(seed)
        codec = TrainableEncodec(size, tokens_per_batch=200).train()
        assert not codec.is_started
        codec.quantise(torch.randn(2, 8, 50))
        assert codec.is_started
    dropped = [(codec.quantise(torch.randn(2, 8, 50), leave_out=True)[1] < 0).any() for _ in range(20)]
    assert any(dropped) and not all(dropped)
    assert not any((codec.quantise(torch.randn(2, 8, 50))[1] < 0).any() for _ in range(20)), "none unless asked to"


def test_commitment_knows_no_scale() -> None:
    found = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        codec = TrainableEncodec(SIZE.model_copy(update={"num_codebooks": 2}), tokens_per_batch=200).train()
        latents = scale * (torch.randn(4, 8, 50) + 3)  # the mean is no part of it
        found.append(float(codec.quantise(latents)[2].detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-3) and 0.01 < found[0] < 2


def test_silence_does_not_make_commitment_explode() -> None:
    torch.manual_seed(0)
    codec = TrainableEncodec(SIZE, tokens_per_batch=200).train()
    loud = [float(codec.quantise(torch.randn(4, 8, 50))[2].detach()) for _ in range(3)]
    quiet = float(codec.quantise(1e-4 * torch.randn(4, 8, 50) + 1.0)[2].detach())
    assert quiet < 10 * max(loud)
    again = TrainableEncodec(SIZE, tokens_per_batch=200).train()
    again.load_state_dict(codec.state_dict())
    latents = torch.randn(4, 8, 50)
    assert torch.equal(codec.quantise(latents)[2], again.quantise(latents)[2]), "a run that goes on knows the variance"


def test_a_new_code_has_time_to_be_hit() -> None:
    torch.manual_seed(0)
    codec = TrainableEncodec(SIZE, tokens_per_batch=200).train()
    codec.quantise(torch.randn(4, 8, 50))
    book = codec.quantizer.layers[0]._codebook
    book.cluster_size[0, :5] = 0.0
    codec.quantise(torch.randn(4, 8, 50))
    assert (book.cluster_size[0, :5] >= 200 / SIZE.codebook_size * 0.98).all(), "the mean hits, not the threshold"


@pytest.mark.parametrize("ratios", [(8, 6, 5), (8, 8, 4), (8, 5, 4, 2)])
@pytest.mark.parametrize("num_codebooks", [3, 6, 12, 13])
def test_no_codebook_is_lost_to_rounding(ratios: tuple[int, ...], num_codebooks: int) -> None:
    size = EncodecSize(ratios=ratios, num_filters=2, latent_dim=4, codebook_size=1024, num_codebooks=num_codebooks)
    quantizer = TrainableEncodec(size, tokens_per_batch=200).model.quantizer
    assert len(quantizer.layers) == num_codebooks
    bandwidths = encodec_config(size).target_bandwidths
    assert [quantizer.get_num_quantizers_for_bandwidth(kbps) for kbps in bandwidths] == [*range(1, num_codebooks + 1)]


def test_under_autocast_latents_and_spectra_stay_exact_and_blocks_do_not() -> None:
    size = EncodecSize(num_filters=4, latent_dim=8)
    codec, sound = TrainableEncodec(size, tokens_per_batch=100), speech_like()
    decoder = InverseSTFTDecoder(InverseSTFTConfig(width=16, depth=1), latent_dim=8, hop=size.hop)
    kinds: dict[str, torch.dtype] = {}
    block = decoder.get_submodule("blocks.0.up")
    for name, module in (("block", block), ("spectrum", decoder.to_spectrum)):
        module.register_forward_hook(lambda _m, _x, y, name=name: kinds.__setitem__(name, y.dtype))
    exact = codec.latents(sound)
    with torch.autocast("cpu", torch.bfloat16):
        latents = codec.latents(sound)
        decoded = decoder(latents)
    assert torch.equal(latents, exact) and decoded.dtype == torch.float32
    assert kinds == {"block": torch.bfloat16, "spectrum": torch.float32}


def test_mel_distances_are_exact_under_autocast() -> None:
    sound = speech_like()
    with torch.autocast("cpu", torch.bfloat16):
        found = mel_distance(0.9 * sound, sound, rate_hz=8000)
    assert found.dtype == torch.float32 and torch.equal(found, mel_distance(0.9 * sound, sound, rate_hz=8000))


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 8000, 12_345])
def test_lengths(audio_tokenizer: AudioTokenizer, num_samples: int) -> None:
    codes = audio_tokenizer.encode((np.zeros(num_samples, np.float32), 8000))
    assert codes.num_steps == -(-num_samples // 160)
    assert len(audio_tokenizer.decode(codes).samples_T) == num_samples
    assert len(audio_tokenizer.decode(Codes(codes.codes_KT, "audio")).samples_T) == codes.num_steps * 160


def test_leading_codebooks_decode_alone_and_bad_codes_do_not(audio_tokenizer: AudioTokenizer) -> None:
    codes = audio_tokenizer.encode(Audio(speech_like()[0].numpy(), 8000))
    first = audio_tokenizer.decode(Codes(codes.codes_KT[:1], "audio"))
    assert len(first.samples_T) == 8000
    assert len(audio_tokenizer.decode(Codes(np.zeros((2, 0), int), "audio")).samples_T) == 0
    with pytest.raises(DataError):
        audio_tokenizer.decode(Codes(np.full((2, 3), 16), "audio"))
    with pytest.raises(DataError):
        audio_tokenizer.decode(Codes(np.zeros((3, 3), int), "audio"))
    with pytest.raises(InputError):
        audio_tokenizer.encode((np.array([np.nan], np.float32), 8000))


def test_the_start_makes_the_encoder_listen() -> None:
    """EnCodec's stock start gives latents that hardly depend on the sound; ours do."""
    from transformers import EncodecModel

    torch.manual_seed(0)
    sound = speech_like()[:, None] * 0.5
    size = EncodecSize()
    stock = EncodecModel(encodec_config(size)).encoder(sound)
    ours = TrainableEncodec(size, tokens_per_batch=100).latents(sound[:, 0])
    assert spread_of(stock) < 0.3 < spread_of(ours)
    check_start(ours)
    with pytest.raises(TrainingError, match="hardly depends on the sound"):
        check_start(stock)


def test_istft_with_same_padding_inverts_an_stft() -> None:
    """Fed the true spectrum of a sound, the overlap-add gives the sound back."""
    decoder = InverseSTFTDecoder(InverseSTFTConfig(width=8, depth=1), latent_dim=4, hop=64)
    sound = torch.randn(2, 64 * 20)
    pad = (decoder.window - decoder.hop) // 2
    padded = torch.nn.functional.pad(sound, (pad, pad))
    frames = padded.unfold(1, decoder.window, decoder.hop) * decoder.hann
    spectrum = torch.fft.rfft(frames, dim=-1).transpose(1, 2)
    back = decoder._overlap_add(spectrum)
    inner = slice(decoder.window, -decoder.window)
    assert back.shape == sound.shape
    assert (back - sound)[:, inner].abs().max() < 1e-4


def test_mel_distance_is_zero_for_equal_and_grows_with_noise() -> None:
    sound = speech_like()
    noise = torch.randn(sound.shape, generator=torch.Generator().manual_seed(0))
    distances = [float(mel_distance(sound + level * noise, sound, rate_hz=8000)) for level in (0.0, 0.01, 0.1)]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


def test_what_is_below_the_floor_hardly_counts() -> None:
    sound = speech_like()
    hiss = 1e-5 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(0))
    silence = torch.zeros_like(sound)
    assert mel_distance(hiss, silence, rate_hz=8000) > 2 > 0.2 > mel_distance(hiss, silence, rate_hz=8000, floor_db=-80)
    assert mel_distance(0.5 * sound, sound, rate_hz=8000, floor_db=-80) > 0.3
    level = 10 ** (-80 / 20)  # a sine at the floor is twice the floor
    sine = level * torch.sin(torch.arange(8192) * 2 * torch.pi / 8)[None]
    bands = log_mel(torch.cat([sine, 0 * sine]), rate_hz=8000, window=1024, floor_db=-80)
    assert (
        bands[1].exp() == pytest.approx(level * 256, rel=1e-4)
        and level * 256 < bands[0, :, 8].max().exp() < 3 * level * 256
    )


def test_several_spectra_a_frame() -> None:
    decoder = InverseSTFTDecoder(InverseSTFTConfig(width=8, depth=1, upsampling=4), latent_dim=4, hop=64)
    latents = torch.randn(2, 4, 5)
    assert decoder(latents).shape == (2, 5 * 64) and decoder.window == 64
    frames = decoder.spread_out(latents)
    assert frames.shape == (2, 4, 20)
    changed = latents.clone()
    changed[:, :, 2] += 1
    moved = (decoder.spread_out(changed) != frames).any(dim=1)[0]
    assert moved.tolist() == [8 <= n < 12 for n in range(20)], "a frame becomes its own four"
    with pytest.raises(ValueError, match="does not divide"):
        InverseSTFTDecoder(InverseSTFTConfig(upsampling=3), latent_dim=4, hop=64)


@pytest.mark.slow
def test_a_small_codec_learns() -> None:
    torch.manual_seed(0)
    codec = TrainableEncodec(SIZE, tokens_per_batch=200).train()
    decoder = InverseSTFTDecoder(InverseSTFTConfig(width=32, depth=1), latent_dim=8, hop=160)
    optimizer = torch.optim.Adam([*codec.parameters(), *decoder.parameters()], 2e-3)
    losses = []
    for step in range(60):
        sound = torch.cat([speech_like() * gain for gain in (0.5, 1.0, 1.5)])
        latents = codec.latents(sound)
        if step >= 10:
            latents, _, _ = codec.quantise(latents)
        loss = mel_distance(decoder(latents), sound, rate_hz=8000)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_broken_folders(audio_tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        AudioTokenizer.load(tmp_path)
    audio_tokenizer.save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"encodec"', '"llama"'))
    with pytest.raises(CheckpointError, match="not of an EnCodec model"):
        AudioTokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError):
        AudioTokenizer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "istft" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        AudioTokenizer.load(tmp_path)
