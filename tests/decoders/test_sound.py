"""Sound through the classes of pictures: latents of a codec as data, and codes of the same codec as what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from decoders.carried import open_renderer
from decoders.decoder import FlowDecoder
from decoders.denoiser import FlowTransformer
from decoders.drivers import CodeEmbedder
from decoders.flow import flow_loss
from decoders.sound import LatentScale
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.codes import Codes
from tokenizers_mm.encodec import EncodecSize, TrainableEncodec
from tokenizers_mm.istft import InverseSTFTConfig, InverseSTFTDecoder

FRAMES, BOOKS = 12, 2


@pytest.fixture(scope="module")
def codec() -> AudioTokenizer:
    """Random, but with codebooks that lie among its own latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = EncodecSize(
            rate_hz=8000, ratios=[4, 5], num_filters=4, latent_dim=8, codebook_size=16, num_codebooks=BOOKS
        )
        encodec = TrainableEncodec(size, tokens_per_batch=64)
        encodec.train()
        for _ in range(3):
            encodec.quantise(encodec.latents(torch.randn(8, FRAMES * size.hop)))
        config = InverseSTFTConfig(width=8, depth=1)
        return AudioTokenizer(encodec.export(), InverseSTFTDecoder(config, latent_dim=8, hop=size.hop), config)


def drawn_codes(decoder: FlowDecoder, codec: AudioTokenizer, codes: torch.Tensor) -> torch.Tensor:
    data = decoder(codes=codes, generator=torch.Generator().manual_seed(0)).data_BCHW
    return torch.from_numpy(codec.codes_of(decoder.scale.latents(data)))


def test_the_scale_is_undone(codec: AudioTokenizer) -> None:
    latents = torch.randn(3, 8, FRAMES, generator=torch.Generator().manual_seed(0)) * 4 + 2
    scale = LatentScale(channels=8)
    scale.measure(latents)
    data = scale.data(latents)
    assert data.shape == (3, 8, 1, FRAMES) and abs(float(data.mean())) < 1e-5 and abs(float(data.std()) - 1) < 0.02
    assert torch.allclose(scale.latents(data), latents, atol=1e-5)


def test_the_first_book_is_drawn_and_the_second_filled_in(codec: AudioTokenizer, tmp_path: Path) -> None:
    """Codes -> latents -> codes of every book: what was drawn can be read again, and survives saving."""
    generator = torch.Generator().manual_seed(1)
    codes_BKT = torch.randint(16, (6, BOOKS, FRAMES), generator=generator)
    latents = torch.cat([codec.latents_of(Codes(codes.numpy(), "audio")) for codes in codes_BKT]).clone()
    codes_BKT = torch.from_numpy(codec.codes_of(latents))  # what the codec itself reads in these latents
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale = LatentScale(channels=8)
        scale.measure(latents)
        denoiser = FlowTransformer(
            channels=8, size=(1, FRAMES), patch=(1, 1), width=48, depth=2, heads=2, condition_dim=16
        )
        embedder = CodeEmbedder(codebook_size=16, dim=16, patches=FRAMES)
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        decoder = FlowDecoder(denoiser, scheduler, codes=embedder, scale=scale)
        before = (drawn_codes(decoder, codec, codes_BKT[:, 0]) == codes_BKT).float().mean()
        parts = [*denoiser.parameters(), *embedder.parameters()]
        optimizer = torch.optim.AdamW(parts, lr=5e-3)
        for _ in range(250):
            loss = flow_loss(denoiser.train(), scale.data(latents), embedder(codes_BKT[:, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    drawn = drawn_codes(decoder, codec, codes_BKT[:, 0])
    agreement_K = (drawn == codes_BKT).float().mean((0, 2))
    assert float(before) < 0.3 and float(agreement_K[0]) > 0.9 and float(agreement_K[1]) > 0.5, (before, agreement_K)
    decoder.save_pretrained(tmp_path / "decoder")
    again = open_renderer(tmp_path / "decoder", device=torch.device("cpu"))
    assert torch.equal(drawn_codes(again, codec, codes_BKT[:, 0]), drawn)
    assert codec.decode(Codes(drawn[0].numpy(), "audio")).samples_T.shape == (FRAMES * codec.hop,)
