"""Codebooks: BEiT v2's rule against its definition, residual codes, collapse that is told, processes that agree."""

from __future__ import annotations

import faulthandler
import functools
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import gumbel_sample

from tokenizers_mm.quantizer import (
    NormEMA,
    QuantizerConfig,
    ResidualQuantizer,
    codebooks_of,
    is_started,
    make_quantizer,
    nearest,
)
from tokenizers_mm.usage import UsageMonitor, usage_of


def quantizer_of(dead_hits: float = 0.0, size: int = 16, dim: int = 4, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return make_quantizer(QuantizerConfig(**fields), dim=dim, codebook_size=size, decay=0.9, dead_hits=dead_hits)


def vectors(seed: int = 0, batch: int = 32, dim: int = 4) -> torch.Tensor:
    return torch.randn(batch, 6, dim, generator=torch.Generator().manual_seed(seed))


def test_norm_ema_is_beit_v2s_rule() -> None:
    quantizer = quantizer_of(size=300, update="norm_ema", kmeans_start=False)
    before = codebooks_of(quantizer)[0].clone()
    z = vectors()
    quantised, codes, loss = quantizer(z)
    flat = F.normalize(z.flatten(0, 1), dim=-1)
    assert torch.equal(codes.flatten(), ((flat[:, None] - before) ** 2).sum(-1).argmin(-1)), (
        "nearest by squared distance"
    )
    assert torch.allclose(quantised.flatten(0, 1), before[codes.flatten()], atol=1e-6)
    assert float(loss) == pytest.approx(float(((flat - before[codes.flatten()]) ** 2).mean()), rel=1e-5)
    after = codebooks_of(quantizer)[0]
    for code in range(300):
        hits = flat[codes.flatten() == code]
        expected = before[code]
        if len(hits):
            expected = F.normalize(0.9 * before[code] + 0.1 * F.normalize(hits.mean(0), dim=0), dim=0)
        assert torch.allclose(after[code], expected, atol=1e-6), code
    assert len(codes.unique()) < 200, "some code was not hit, and stayed"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient": "straight_through"},
        {"distance": "euclidean"},
        {"distance": "euclidean", "update": "gradient", "kmeans_start": False},
        {"update": "norm_ema"},
        {"num_codebooks": 3},
        {"num_codebooks": 2, "distance": "euclidean", "gradient": "straight_through"},
        {"options": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.1}},
        {"options": {"codebook_diversity_loss_weight": 0.1}},
    ],
)
def test_every_kind_has_gradients_and_is_exact_in_eval(fields: dict[str, Any]) -> None:
    quantizer = quantizer_of(**fields)
    quantizer.train()
    for seed in range(3):
        z = vectors(seed).requires_grad_()
        torch.manual_seed(seed)
        quantised, codes, loss = quantizer(z)
        (quantised.square().sum() + loss.sum()).backward()
        assert z.grad is not None and z.grad.abs().sum() > 0
    assert is_started(quantizer)
    quantizer.eval()
    frozen = codebooks_of(quantizer).clone()
    quantised, codes, _ = quantizer(vectors(9))
    assert torch.equal(codebooks_of(quantizer), frozen), "eval changes nothing"
    books = codes[:, None] if codes.ndim == 2 else codes
    rebuilt = sum(frozen[k][books[:, k]] for k in range(books.shape[1]))
    assert torch.allclose(quantised, rebuilt, atol=1e-6), "the quantised vector is the sum of its codes"
    alone = torch.cat([quantizer(v[None])[1] for v in vectors(9)])
    assert torch.equal(alone, codes), "codes do not depend on the batch"


@pytest.mark.parametrize("books", [1, 2, 4])
def test_the_gradient_passes_once_however_many_codebooks(books: int) -> None:
    quantizer = quantizer_of(num_codebooks=books, distance="euclidean", gradient="straight_through")
    z = vectors().requires_grad_()
    quantised, _, _ = quantizer(z)
    (gradient,) = torch.autograd.grad(quantised, z, torch.ones_like(quantised))
    assert torch.allclose(gradient, torch.ones_like(gradient))


def test_residual_codebooks_come_nearer_with_each() -> None:
    quantizer = quantizer_of(num_codebooks=3, dead_hits=0.5)
    assert isinstance(quantizer, ResidualQuantizer)
    for seed in range(40):
        quantizer(vectors(seed))
    quantizer.eval()
    z = vectors(99)
    target = F.normalize(z, dim=-1)
    _, codes, _ = quantizer(z)
    books = codebooks_of(quantizer)
    errors = [float((target - sum(books[k][codes[:, k]] for k in range(n))).square().mean()) for n in range(1, 4)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2], errors


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"options": {"stochastic_sample_code": True}}, "did you mean 'stochastic_sample_codes'"),
        ({"options": {"codebook_size": 3}}, "has no 'codebook_size'"),
        ({"options": {"orthogonal_reg_weight": 1.0}}, "does nothing while EMA"),
        ({"update": "gradient"}, "needs distance: euclidean"),
        ({"options": {"directional_reparam": True}}, "VectorQuantize refuses this combination"),
        ({"options": {"affine_param": True}, "distance": "euclidean"}, "has no 'affine_param'"),
        ({"update": "norm_ema", "num_codebooks": 2}, "one cosine codebook"),
    ],
)
def test_options_that_cannot_work_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        QuantizerConfig(**fields)


def test_reading_a_recipe_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    QuantizerConfig(options={"stochastic_sample_codes": True})
    assert torch.equal(torch.get_rng_state(), before)


def run_away(dead_hits: float, caplog: pytest.LogCaptureFixture) -> list[str]:
    """200 batches of an encoder that moves on: codes that it leaves behind are not hit again."""
    caplog.clear()
    quantizer = quantizer_of(dead_hits=dead_hits, size=64)
    monitor = UsageMonitor(64, window=50)
    for step in range(200):
        z = vectors(step)
        z[..., 0] += 0.1 * min(step, 100)
        monitor.update(quantizer(z)[1])
    return [record.message for record in caplog.records]


def test_collapse_is_told_within_200_steps_and_replacement_prevents_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="anygen"):
        told = run_away(0.0, caplog)
        assert told and "codebook collapse: the last 50 batches used" in told[0]
        assert not run_away(0.25 * 32 * 6 / 64, caplog), "dead codes are replaced: nothing to tell"


def test_the_monitor_counts_windows_and_survives_saving() -> None:
    monitor = UsageMonitor(4, window=2, alarm=0.0)
    assert torch.isnan(monitor.update(torch.tensor([0, 1]))["usage"]), "no whole window yet"
    other = UsageMonitor(4, window=2, alarm=0.0)
    other.load_state_dict(monitor.state_dict())
    for resumed in (monitor, other):
        figures = resumed.update(torch.tensor([1, 2]))
        assert float(figures["usage"]) == 0.75
        assert float(figures["perplexity"]) == pytest.approx(usage_of(torch.tensor([0, 1, 1, 2]), 4)[1])


def _in_process(rank: int, folder: str, update: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from tokenizers_mm.teacher import TeacherFeatures
    from tokenizers_mm.vqkd import VQKD, VQKDConfig

    faulthandler.dump_traceback_later(240, exit=True)  # no child outlives its test, whatever it waits for
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=200))
    config = VQKDConfig(
        side_px=16,
        width=16,
        depth=1,
        num_heads=2,
        codebook_size=32,
        code_dim=4,
        quantizer=QuantizerConfig(update=update),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    vqkd = VQKD(config, deep_width=8, shallow_width=8, tokens_per_batch=2 * 16 * 4)
    model = DistributedDataParallel(vqkd, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(rank)  # every process sees other pictures
    for _ in range(50):
        pixels = torch.rand(16, 3, 16, 16, generator=generator)
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).mean(-1).flatten(2).transpose(1, 2)
        target = patches.repeat(1, 1, 3)[..., :8]
        losses = model(pixels, TeacherFeatures(target, target))
        (losses.deep + losses.shallow + losses.commitment).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {"codebook": vqkd.encoder.codebooks_KVX, "weights": vqkd.encoder.to_code[2].weight}, f"{folder}/{rank}.pt"
    )
    # DDP's reducer must not be the last to hold the group: its destructor joins gloo's threads with the GIL held, and a
    # thread that still drops a finished all-reduce waits for the GIL (torch 2.13: seen twice, both hang for ever).
    del model
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["ema", "norm_ema"])
def test_two_processes_hold_bit_equal_codebooks_after_50_steps(tmp_path: Path, update: str) -> None:
    torch.multiprocessing.spawn(_in_process, (str(tmp_path), update), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["codebook"], second["codebook"])
    assert torch.equal(first["weights"], second["weights"])
    start = make_quantizer(QuantizerConfig(update="norm_ema"), dim=4, codebook_size=32, decay=0.9, dead_hits=0)
    assert isinstance(start, NormEMA) and not torch.equal(codebooks_of(start), first["codebook"]), "they have learned"


def test_our_choice_of_codes_is_the_librarys() -> None:
    """Codes, gradients and codebook stay the same to the last bit when the library chooses by its own function."""
    found: list[list[Tensor]] = []
    for own in (True, False):
        torch.manual_seed(0)
        quantizer = make_quantizer(QuantizerConfig(), dim=4, codebook_size=32, decay=0.9, dead_hits=0.5)
        assert isinstance(quantizer, VectorQuantize)
        assert quantizer._codebook.gumbel_sample is nearest
        if not own:
            quantizer._codebook.gumbel_sample = functools.partial(gumbel_sample, stochastic=False)
        kept = []
        for step in range(4):
            z_BNX = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(step)).requires_grad_()
            quantised_BNX, codes_BN, loss = quantizer(z_BNX)
            (quantised_BNX.square().sum() + loss.sum()).backward()
            assert z_BNX.grad is not None
            kept += [quantised_BNX.detach(), codes_BN, z_BNX.grad, quantizer.codebook.clone()]
        found.append(kept)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("other", [{"gradient": "straight_through"}, {"options": {"stochastic_sample_codes": True}}])
def test_other_choices_stay_with_the_library(other: dict[str, Any]) -> None:
    quantizer = make_quantizer(QuantizerConfig(**other), dim=4, codebook_size=8, decay=0.9, dead_hits=0.5)
    assert isinstance(quantizer, VectorQuantize)
    assert quantizer._codebook.gumbel_sample is not nearest
