"""Flow, denoiser, drivers and the pipeline around them, with tiny random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from decoders.carried import open_renderer
from decoders.decoder import FlowDecoder
from decoders.denoiser import FlowTransformer
from decoders.drivers import CodeEmbedder, VokenMapper
from decoders.flow import flow_loss, interpolate, sample_times, step_sigmas, velocity
from decoders.spans import gather_vokens
from tokenizers_mm.errors import DataError, InputError


@pytest.fixture
def decoder() -> FlowDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = FlowTransformer(channels=2, size=(8, 12), patch=(4, 4), width=32, depth=2, heads=2, condition_dim=8)
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # nothing stays at the 0 that it starts from
        codes = CodeEmbedder(codebook_size=10, dim=8, patches=6)
        mapper = VokenMapper(hidden_dim=20, vokens=3, patches=6, dim=8, codebook_size=10, width=16, layers=1, heads=2)
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        return FlowDecoder(denoiser, scheduler, codes=codes, vokens=mapper)


CODES = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_perfect_denoiser_has_no_loss_and_steps_back_along_the_line() -> None:
    x, noise = torch.randn(3, 2, 4, 4, generator=seeded()), torch.randn(3, 2, 4, 4, generator=seeded(1))
    t = torch.tensor([0.1, 0.5, 1.0])
    x_t = interpolate(x, noise, t)
    assert torch.allclose(velocity(x, x_t, t), noise - x, atol=1e-5)
    assert float(flow_loss(lambda *_: x, x, x, generator=seeded())) == 0
    assert float(flow_loss(lambda *_: x + 1, x, x, generator=seeded())) > 1
    times = sample_times(2000, generator=seeded())
    assert 0 < float(times.min()) < 0.1 < 0.9 < float(times.max()) < 1 and abs(float(times.median()) - 0.5) < 0.03


def test_steps_end_with_data() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=step_sigmas(4))
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_every_class_is_rebuilt_from_its_config(decoder: FlowDecoder) -> None:
    for component in (decoder.denoiser, decoder.codes, decoder.vokens):
        again = type(component).from_config(component.config)
        shapes = [{name: p.shape for name, p in c.state_dict().items()} for c in (component, again)]
        assert shapes[0] == shapes[1]


def test_saved_it_draws_the_same_in_a_fresh_process(decoder: FlowDecoder, tmp_path: Path) -> None:
    drawn = decoder(codes=CODES, generator=seeded()).data_BCHW
    decoder.save_pretrained(tmp_path / "decoder")
    torch.save(drawn, tmp_path / "drawn.pt")
    code = f"""
import torch
from decoders.carried import open_renderer
decoder = open_renderer("{tmp_path}/decoder", device=torch.device("cpu"))
codes = torch.tensor({CODES.tolist()})
drawn = decoder(codes=codes, generator=torch.Generator().manual_seed(0)).data_BCHW
assert torch.equal(drawn, torch.load("{tmp_path}/drawn.pt")), "other pixels"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_saved_small_it_is_half_the_size_and_draws_nearly_the_same(decoder: FlowDecoder, tmp_path: Path) -> None:
    drawn = decoder(codes=CODES, generator=seeded()).data_BCHW
    decoder.save_pretrained(tmp_path / "whole")
    decoder.save_small(tmp_path / "small")
    again = open_renderer(tmp_path / "small", device=torch.device("cpu"))
    assert again.denoiser.dtype == again.codes.dtype == torch.float32
    assert torch.allclose(again(codes=CODES, generator=seeded()).data_BCHW, drawn, atol=0.05 * float(drawn.std()))
    weights = "denoiser/diffusion_pytorch_model.safetensors"
    sizes = [(tmp_path / name / weights).stat().st_size for name in ("small", "whole")]
    assert sizes[0] < 0.7 * sizes[1]


def test_a_condition_reaches_its_own_patch_first_and_null_differs(decoder: FlowDecoder) -> None:
    changed = CODES.clone()
    changed[0, 5] = 0
    one, other = (decoder.denoiser(torch.zeros(2, 2, 8, 12), torch.ones(2), decoder.codes(c)) for c in (CODES, changed))
    moved = (one - other)[0].abs().sum(0)
    assert float(moved[4:, 8:].mean()) > float(moved[:4, :8].mean()), "the last patch is bottom right"
    assert torch.equal(one[1], other[1]), "samples do not meet"
    assert not torch.allclose(decoder.codes(CODES), decoder.codes.null(2))
    dropped = decoder.codes(CODES, drop=torch.tensor([True, False]))
    assert torch.equal(dropped[0], decoder.codes.null(1)[0]) and torch.equal(dropped[1], decoder.codes(CODES)[1])
    states = torch.randn(2, 3, 20, generator=seeded())
    dropped = decoder.vokens(states, drop=torch.tensor([True, False]))
    assert torch.equal(dropped[0], decoder.vokens.null(1)[0]) and torch.equal(dropped[1], decoder.vokens(states)[1])


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 4), (2.0, 8)])
def test_guidance_of_one_costs_one_call_a_step(
    decoder: FlowDecoder, monkeypatch: pytest.MonkeyPatch, guidance: float, calls: int
) -> None:
    count, plain = [], decoder.denoiser.forward

    def counted(*arguments: Any) -> Any:
        count.append(1)
        return plain(*arguments)

    monkeypatch.setattr(decoder.denoiser, "forward", counted)
    decoder(codes=CODES, guidance=guidance, generator=seeded())
    assert len(count) == calls


def test_a_sample_with_its_own_generator_does_not_depend_on_its_batch(decoder: FlowDecoder) -> None:
    states = torch.randn(2, 3, 20, generator=seeded())
    both = decoder(vokens=states, generator=[seeded(1), seeded(2)]).data_BCHW
    alone = decoder(vokens=states[1:], generator=[seeded(2)]).data_BCHW
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_it_is_driven_by_exactly_one(decoder: FlowDecoder) -> None:
    for wrong in ({}, {"codes": CODES, "vokens": torch.zeros(2, 3, 20)}):
        with pytest.raises(InputError, match="either codes or vokens"):
            decoder(**wrong)
    with pytest.raises(InputError, match="draws from 6 codes"):
        decoder(codes=CODES[:, :5])


def test_vokens_that_are_no_whole_block_are_refused() -> None:
    states = torch.zeros(1, 4, 2)
    for ids in ([90, 5, 91, 92], [91, 92, 5, 5], [5, 5, 90, 91], [90, 92, 91, 5]):
        with pytest.raises(DataError, match="a block is 3 vokens in order"):
            gather_vokens(states, torch.tensor([ids]), first_voken=90, count=3)
    none, rows = gather_vokens(states, torch.tensor([[1, 2, 3, 4]]), first_voken=90, count=3)
    assert none.shape == (0, 3, 2) and not len(rows)


def test_eight_pictures_are_learnt_from_their_codes_and_from_no_others() -> None:
    """Over 25 dB with the right codes; with another picture's codes the drawing is another picture."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    waves = [torch.stack([torch.sin(k * x + c) * torch.cos((9 - k) * y - c) for c in range(3)]) for k in range(1, 9)]
    pictures = torch.stack(waves)
    codes = torch.randint(16, (8, 4), generator=seeded())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = FlowTransformer(size=(16, 16), patch=(8, 8), width=96, depth=2, heads=2, condition_dim=16)
        embedder = CodeEmbedder(codebook_size=16, dim=16, patches=4)
        decoder = FlowDecoder(denoiser, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), codes=embedder)
        optimizer = torch.optim.AdamW([*denoiser.parameters(), *embedder.parameters()], lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
        for _ in range(700):
            optimizer.zero_grad()
            flow_loss(denoiser, pictures, embedder(codes)).backward()
            optimizer.step()
            schedule.step()

    def psnr(given: torch.Tensor) -> float:
        drawn = decoder(codes=given, generator=seeded(3)).data_BCHW.clamp(-1, 1)
        return float(-10 * ((drawn - pictures) / 2).square().flatten(1).mean(1).log10().mean())

    assert psnr(codes) > 25 and psnr(codes) > psnr(codes.roll(1, 0)) + 8, (psnr(codes), psnr(codes.roll(1, 0)))


def test_a_mapper_says_codes_in_the_features_from_which_the_denoiser_draws_them(decoder: FlowDecoder) -> None:
    mapper, states = decoder.vokens, torch.randn(2, 3, 20, generator=seeded())
    mapper.say_as(decoder.codes)
    torch.nn.init.zeros_(mapper.says.weight)
    mapper.says.bias.data = torch.arange(10) * 40.0  # of code 9 it is sure
    assert torch.allclose(mapper(states), decoder.codes(torch.full((2, 6), 9)), atol=1e-5)
    assert torch.equal(mapper.null(2), decoder.codes.null(2))
    mapper.says.bias.data = torch.arange(10) * 0.5
    shares = [(sharpness * mapper.says.bias).softmax(-1) @ mapper.features_VK for sharpness in (1, 4)]
    for training, expected in zip((True, False), shares, strict=True):
        assert torch.allclose(mapper.train(training)(states)[0, 0], expected, atol=1e-5), "sharpened for drawings only"
    mapper.says.bias.data.zero_()
    assert torch.allclose(mapper(states)[0, 0], decoder.codes.table.weight.mean(0), atol=1e-5)
