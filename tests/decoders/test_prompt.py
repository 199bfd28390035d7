"""Pretrained pipelines driven by vokens: every kind in miniature, saved and opened in its published layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from decoders.carried import carried, open_renderer
from decoders.pretrained import open_pipeline
from decoders.prompt import PromptDecoder
from decoders.prompt_denoising import add_noise
from decoders.prompt_ports import GENERATED, MAIN, POOLED, ports_of, text_at_ports
from tokenizers_mm.errors import CheckpointError, InputError, MissingDependency

sys.path.insert(0, str(Path(__file__).parent))
import tiny_pipelines

HIDDEN, VOKENS, QUERIES = 6, 3, 5
PORTS = {
    "sd": {MAIN: 12},
    "sdxl": {MAIN: 12, POOLED: 10},
    "sd3": {MAIN: 12, POOLED: 10},
    "pixart": {MAIN: 12},
    "sana": {MAIN: 12},
    "audioldm2": {MAIN: 12, GENERATED: 10},
}
SHAPES = dict.fromkeys(PORTS, (2, 16, 16, 3)) | {"sana": (2, 32, 32, 3), "audioldm2": (2, 64)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipelines.save(kind, root / kind) for kind in PORTS}


@pytest.fixture(scope="module")
def decoders(folders: dict[str, Path]) -> dict[str, PromptDecoder]:
    return {kind: decoder_of(open_pipeline(folder)) for kind, folder in folders.items()}


def decoder_of(pipeline: Any, *, queries: int = QUERIES) -> PromptDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = PromptDecoder.create(
            pipeline, hidden_dim=HIDDEN, vokens=VOKENS, queries=queries, width=8, layers=1, heads=2
        )
        for parameter in decoder.parameters():  # not as it begins: some outputs and the null begin at zero
            parameter.data.add_(torch.randn_like(parameter) * 0.5)
    return decoder


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, VOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(decoder: PromptDecoder, states_BND: torch.Tensor, **options: Any) -> np.ndarray:
    options = {"steps": 2, "guidance": 3.0, "generator": seeded(), "output_type": "np"} | options
    given = decoder(states_BND, **options)
    return np.asarray(given.audios if "audios" in given else given.images)


@pytest.mark.parametrize("kind", PORTS)
def test_a_pipeline_without_text_draws_from_vokens(decoders: dict[str, PromptDecoder], kind: str) -> None:
    decoder = decoders[kind]
    assert {name: port.width for name, port in ports_of(decoder.pipeline).items()} == PORTS[kind]
    assert decoder.pipeline.components.get("text_encoder") is None
    first, again, other = draw(decoder, states()), draw(decoder, states()), draw(decoder, states(1))
    assert first.shape == SHAPES[kind] and np.isfinite(first).all()
    assert (first == again).all()
    assert np.abs(first - other).max() > 1e-3, "other vokens, another drawing"


@pytest.mark.parametrize("kind", PORTS)
def test_guidance_leads_away_from_the_null_and_without_it_the_null_is_not_read(
    decoders: dict[str, PromptDecoder], kind: str
) -> None:
    decoder = decoders[kind]
    guided, plain = draw(decoder, states()), draw(decoder, states(), guidance=1.0)
    mappers: dict[str, Any] = dict(decoder.mappers.items())
    nulls = {name: mapper.null(1)[0].detach().clone() for name, mapper in mappers.items()}
    with moved_nulls(decoder, nulls):
        assert np.abs(draw(decoder, states()) - guided).max() > 1e-3
        assert (draw(decoder, states(), guidance=1.0) == plain).all()
    assert (draw(decoder, states()) == guided).all()


class moved_nulls:
    """Every mapper's null is another one for a while; which of its parameters that is shows in what `null` gives."""

    def __init__(self, decoder: PromptDecoder, nulls: dict[str, torch.Tensor]) -> None:
        self._found = []
        for name, mapper in decoder.mappers.items():
            for parameter in mapper.parameters():
                before = parameter.data.clone()
                parameter.data += 1
                moved = not torch.equal(mapper.null(1)[0], nulls[name])
                parameter.data.copy_(before)
                if moved:
                    self._found.append((parameter, before))
        assert self._found

    def __enter__(self) -> None:
        for parameter, _ in self._found:
            parameter.data += torch.randn(parameter.shape, generator=seeded(9))

    def __exit__(self, *_: object) -> None:
        for parameter, before in self._found:
            parameter.data.copy_(before)


@pytest.mark.parametrize("kind", PORTS)
def test_the_loss_through_the_frozen_denoiser_reaches_every_mapper_and_nothing_else(
    decoders: dict[str, PromptDecoder], kind: str
) -> None:
    decoder = decoders[kind]
    decoder.mappers.zero_grad()
    latents = torch.randn(2, 4, 8, 8, generator=seeded(3))
    loss = decoder.denoise_loss(states(), latents, torch.tensor([False, True]), generator=seeded())
    loss.backward()
    again = decoder.denoise_loss(states(), latents, torch.tensor([False, True]), generator=seeded())
    assert loss.item() == again.item() and np.isfinite(loss.item())
    for mapper in decoder.mappers.values():
        assert sum(p.grad.abs().sum().item() for p in mapper.parameters() if p.grad is not None) > 0
    for component in decoder.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert all(p.grad is None and not p.requires_grad for p in component.parameters())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart", "sana"])
def test_latents_decode_to_the_picture_as_well_as_the_pipeline_can(
    decoders: dict[str, PromptDecoder], kind: str
) -> None:
    """The scale and shift of `latents_of` are those that the pipeline undoes before it decodes."""
    decoder, pixels = decoders[kind], torch.rand(2, 3, 16, 16, generator=seeded())
    vae = decoder.pipeline.vae
    found = decoder.latents_of(pixels)
    encoded = vae.encode(pixels * 2 - 1)
    plain = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    undone = found / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    assert found.shape == (2, 4, 8, 8) and torch.allclose(undone, plain, atol=1e-5)
    if kind == "sd":
        assert not torch.equal(decoder.latents_of(pixels, generator=seeded()), found), "drawn from the posterior"


def test_a_mapper_learns_to_draw_a_picture_through_the_frozen_denoiser(folders: dict[str, Path]) -> None:
    """The loss of a fixed draw of times and noise goes down when only the mapper moves."""
    decoder = decoder_of(open_pipeline(folders["sd3"]))
    latents = torch.randn(2, 4, 8, 8, generator=seeded(3))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = decoder.denoise_loss(states(), latents, generator=seeded())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses


# -- noise and targets


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_and_its_weight_are_those_of_the_schedule(kind: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    x = torch.randn(64, 4, 2, 2, generator=seeded(1))
    noised = add_noise(scheduler, x, generator=seeded())
    noise = torch.randn(x.shape, generator=seeded())
    assert torch.allclose(noised.noisy_BChw, scheduler.add_noise(x, noise, noised.time_B), atol=1e-5)
    velocity = scheduler.get_velocity(x, noise, noised.time_B)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": x}[kind]
    assert torch.allclose(noised.target_BChw, target, atol=1e-5)
    kept = scheduler.alphas_cumprod[noised.time_B]
    snr = kept / (1 - kept)
    shares = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(())}
    assert torch.allclose(noised.weight_B, snr.clamp(max=5.0) / shares[kind], rtol=1e-4)
    assert noised.time_B.unique().numel() > 50


def test_the_target_of_a_flow_leads_from_the_picture_to_the_noise() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    x = torch.randn(500, 1, 2, 2, generator=seeded(1))
    noised = add_noise(FlowMatchEulerDiscreteScheduler(shift=3.0), x, generator=seeded())
    sigma = (noised.time_B / 1000)[:, None, None, None]
    assert torch.allclose(noised.noisy_BChw, x + sigma * noised.target_BChw, atol=1e-5)
    assert torch.allclose(noised.noisy_BChw - (sigma - 1) * noised.target_BChw, x + noised.target_BChw, atol=1e-4)
    even = add_noise(FlowMatchEulerDiscreteScheduler(shift=1.0), x, generator=seeded()).time_B / 1000
    shifted = noised.time_B / 1000
    assert torch.allclose(shifted, 3 * even / (1 + 2 * even), atol=1e-5) and abs(even.median() - 0.5) < 0.05


def test_a_scheduler_of_unknown_training_is_refused() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(InputError, match="'score'"):
        add_noise(scheduler, torch.zeros(1, 4, 2, 2), generator=seeded())


# -- captions


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pipelines with tiny text encoders, opened as published ones are."""
    root = tmp_path_factory.mktemp("with_text")
    kinds = ("sd", "sdxl", "sd3", "pixart")
    return {kind: open_pipeline(tiny_pipelines.save(kind, root / kind, text=True), text=True) for kind in kinds}


CAPTIONS = ["a red cat", "a dog"]
COUNTS = {"sd": 77, "sdxl": 77, "sd3": 77 + 8, "pixart": 8}


@pytest.mark.parametrize("kind", COUNTS)
def test_aligning_to_captions_trains_the_mappers_alone(spoken: dict[str, Any], kind: str) -> None:
    decoder = decoder_of(spoken[kind], queries=COUNTS[kind])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-2)
    losses = []
    for _ in range(15):
        loss = decoder.align_loss(states(), CAPTIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for component in decoder.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert all(p.grad is None for p in component.parameters())
    for mapper in decoder.mappers.values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mapper.parameters())


def test_the_null_learns_the_empty_caption(spoken: dict[str, Any]) -> None:
    decoder = decoder_of(spoken["pixart"], queries=4)
    empty = text_at_ports(decoder.pipeline, [""], {MAIN: 4})[MAIN]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-2)
    for _ in range(150):
        loss = decoder.align_loss(states(), CAPTIONS, torch.tensor([True, False]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gap = (decoder.null(1)[MAIN] - empty).abs().mean()
    assert gap < 0.1 * empty.abs().mean(), (gap, empty.abs().mean())


def test_behind_a_captions_end_its_last_embedding_is_repeated(spoken: dict[str, Any]) -> None:
    pipeline = spoken["pixart"]
    long = text_at_ports(pipeline, CAPTIONS, {MAIN: 8})[MAIN]
    assert long.shape == (2, 8, 12)
    assert torch.equal(long[1, 3:], long[1, 2].expand(5, -1)), "a dog </s>: three embeddings"
    assert not torch.allclose(long[0, 3], long[0, 2])


def test_sd3_gets_clip_then_t5_and_both_pooled_vectors(spoken: dict[str, Any]) -> None:
    found = text_at_ports(spoken["sd3"], CAPTIONS, {MAIN: 77 + 8, POOLED: 1})
    assert found[MAIN].shape == (2, 85, 12) and found[POOLED].shape == (2, 1, 10)
    assert (found[MAIN][:, 77:].abs().sum(-1) > 0).all()


def test_audioldm2_text_goes_to_its_two_ports() -> None:
    text, mask, generated = torch.randn(2, 3, 12), torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.randn(2, 8, 10)

    class Pipeline:
        tokenizer = text_encoder = object()
        unet = torch.nn.Linear(1, 1)
        unet.device = torch.device("cpu")  # type: ignore[assignment]

        def encode_prompt(self, prompt: Any, device: Any, num_waveforms_per_prompt: int, max_new_tokens: int) -> Any:
            assert prompt == CAPTIONS and max_new_tokens == 8
            return text, mask, generated

    found = text_at_ports(Pipeline(), CAPTIONS, {MAIN: 4, GENERATED: 8})
    assert torch.equal(found[MAIN][0], text[0, [0, 1, 2, 2]]) and torch.equal(found[MAIN][1], text[1, [0, 1, 1, 1]])
    assert torch.equal(found[GENERATED], generated)


def test_what_cannot_be_aligned_says_what_is_needed(spoken: dict[str, Any], decoders: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="without its text encoder"):
        decoders["sd"].align_loss(states(), CAPTIONS)
    with pytest.raises(InputError, match="a mapper of 77"):
        decoder_of(spoken["sd"], queries=8).align_loss(states(), CAPTIONS)


# -- saving, and what is refused


@pytest.mark.parametrize("kind", ["sdxl", "audioldm2"])
def test_saved_are_the_mappers_and_the_name_of_the_base(
    decoders: dict[str, PromptDecoder], folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    decoder = decoders[kind]
    decoder.save_pretrained(tmp_path / "d")
    files = {path.name for path in (tmp_path / "d").rglob("*") if path.is_file()}
    assert files == {"model_index.json", "config.json", "diffusion_pytorch_model.safetensors"}
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"model_index.json", *PORTS[kind]}, "no base weights"
    assert carried(tmp_path) == {"d": ("vokens",)}, "a bundle carries it like any other"
    again = open_renderer(tmp_path / "d", device=torch.device("cpu"))
    assert isinstance(again, PromptDecoder)
    assert (draw(again, states()) == draw(decoder, states())).all()
    given = PromptDecoder.from_pretrained(tmp_path / "d", decoder.pipeline)
    assert given.pipeline is decoder.pipeline


def test_half_precision_pipelines_take_single_precision_mappers(folders: dict[str, Path]) -> None:
    decoder = decoder_of(open_pipeline(folders["sd3"], dtype=torch.bfloat16))
    assert decoder.pipeline.transformer.dtype == torch.bfloat16
    assert draw(decoder, states()).shape == SHAPES["sd3"]
    decoder.denoise_loss(states(), torch.randn(2, 4, 8, 8), generator=seeded()).backward()
    half = decoder_of(open_pipeline(folders["sd"], dtype=torch.float16))
    assert half.latents_of(torch.rand(2, 3, 16, 16)).dtype == torch.float32, "encoded in fp32: fp16 overflows there"
    assert half.pipeline.vae.dtype == torch.float16


def test_a_generator_for_each_sample_makes_it_independent_of_its_batch(decoders: dict[str, PromptDecoder]) -> None:
    both = draw(decoders["sd"], states(), generator=[seeded(5), seeded(6)])
    alone = draw(decoders["sd"], states()[1:], generator=[seeded(6)])
    assert np.allclose(both[1], alone[0], atol=1e-4)


def test_steps_and_guidance_are_the_pipelines_own(decoders: dict[str, PromptDecoder]) -> None:
    """`guidance=1` costs one row of the denoiser a step, guidance two."""
    rows = []
    decoder = decoders["sd3"]
    hook = decoder.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    draw(decoder, states(), steps=3, guidance=1.0)
    draw(decoder, states(), steps=2, guidance=2.0)
    hook.remove()
    assert rows == [2, 2, 2, 4, 4]


def test_several_pictures_of_one_answer(decoders: dict[str, PromptDecoder]) -> None:
    for kind in ("sd", "pixart", "sana"):
        assert len(draw(decoders[kind], states(), num_images_per_prompt=2)) == 4


def test_what_does_not_fit_is_refused(decoders: dict[str, PromptDecoder], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no option 'step'"):
        decoders["sd"](states(), step=2)
    with pytest.raises(InputError, match="takes prompt_embeds, pooled_prompt_embeds"):
        PromptDecoder(decoders["sd"].mappers[MAIN], decoders["sdxl"].pipeline)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes embeddings of 10"):
        wide = dict.fromkeys((MAIN, GENERATED), decoders["sd"].mappers[MAIN])
        PromptDecoder(wide, decoders["audioldm2"].pipeline)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="not the folder of a PromptDecoder"):
        PromptDecoder.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a pipeline"):
        open_pipeline(tmp_path)
    decoders["sd"].save_pretrained(tmp_path / "d")
    with pytest.raises(CheckpointError, match="was trained for a StableDiffusionPipeline"):
        PromptDecoder.from_pretrained(tmp_path / "d", decoders["sdxl"].pipeline)
    index = json.loads((tmp_path / "d" / "model_index.json").read_text())
    (tmp_path / "d" / "model_index.json").write_text(json.dumps(index | {"base": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match="names it as `base`"):
        PromptDecoder.from_pretrained(tmp_path / "d")
    weights = tmp_path / "d" / MAIN / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], None):
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="a mapper in"):
            PromptDecoder.from_pretrained(tmp_path / "d", decoders["sd"].pipeline)
    (tmp_path / "d" / "model_index.json").write_text(json.dumps(index | {"base": None}))
    with pytest.raises(CheckpointError, match="which pipeline"):
        PromptDecoder.from_pretrained(tmp_path / "d")
    with pytest.raises(InputError, match="takes no prompt_embeds"):
        ports_of(SimpleNamespace())


@pytest.mark.parametrize("state", ["absent", "broken"])
def test_without_diffusers_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    for name in [m for m in sys.modules if m == "diffusers" or m.startswith("diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    if state == "absent":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    else:
        (tmp_path / "diffusers").mkdir()
        (tmp_path / "diffusers" / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open')")
        monkeypatch.syspath_prepend(tmp_path)
    for call in (open_pipeline, PromptDecoder.from_pretrained):
        with pytest.raises(MissingDependency, match=r"anygen\[diffusion\]"):
            call(tmp_path)
