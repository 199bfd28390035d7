"""`anygen bench train`: real tokens a second of our training step against transformers', in one process.

Gate first: on the same weights and documents all must give the same loss and gradients, or nothing is timed. Then
rounds: each contestant takes the round's documents to one update, in an order that turns with the round. Figures are
medians over rounds of ratios within a round, so what slows the whole machine for a while cancels.

A token is real where it is not padding. MFU counts the operations that real tokens need (`anygen.model.cost`) against
the fastest matrix product of the same type on this machine in this run: padding is no work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field as Key

from anygen.bench.contestants import Contestant, Field
from anygen.bench.machine import Window, machine_facts, measure_limits, timed
from anygen.bench.samples import COMPOSITIONS, Round, Samples, samples_of_run, synthetic_samples
from anygen.config import Config
from anygen.errors import InputError
from anygen.model.causal import ModelConfig, num_parameters
from anygen.model.cost import TrainingCost
from anygen.vocabulary import Vocabulary

BASELINE = "padded"
FEWEST_CLEAN = 5
_CONTROL_IDS = Vocabulary.create(text=0).used


@dataclass(frozen=True)
class Setup:
    """A model and the shape of its batches."""

    model: ModelConfig
    vocabulary_size: int
    row_length: int
    num_rows: int
    length_factor: int = 1
    """Of synthetic documents: a GPU needs longer ones than the emoji world's to be busy."""


SETUPS = {
    "smoke": Setup(ModelConfig(size="smoke"), 1024, 512, 1),
    "cpu": Setup(ModelConfig(size="tiny", num_kv_heads=8), 16_384, 2048, 2),
    "gpu": Setup(ModelConfig(size="small"), 32_768, 16_384, 2, length_factor=8),
}


class TrainBenchConfig(Config):
    """What to measure."""

    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    """`cpu` has 34 M parameters, `gpu` 0.1 B and documents eight times as long."""
    data: Path | None = None
    """A run after its stage `tokenize`; None for synthetic documents."""
    utilisation: float = 0.5
    """Of the padded baseline: 0.5 or 0.28; see `COMPOSITIONS`."""
    rounds: int = Key(8, ge=1)
    threads: int = Key(0, ge=0)
    """0 leaves torch's choice."""
    compile: bool = False
    """Also ours with compiled blocks: half a minute more."""
    precision: Literal["bf16", "fp32"] = "bf16"
    device: Literal["cpu", "cuda"] = "cpu"
    peak_tflops: float | None = Key(None, gt=0)
    """Of the data sheet, to name MFU against it too."""
    seed: int = 0


def bench_train(config: TrainBenchConfig, *, setup: Setup | None = None) -> dict[str, Any]:
    """Everything that was measured, JSON-able; `lines` makes a table of it.

    Raises:
        GateError: the contestants compute different things.
        InputError: no such utilisation, or no such data.
    """
    setup = setup or SETUPS[config.size]
    device = torch.device(config.device)
    samples = _samples(config, setup)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        return _bench(config, setup, samples, device)
    finally:
        torch.set_num_threads(threads)


def _bench(config: TrainBenchConfig, setup: Setup, samples: Samples, device: torch.device) -> dict[str, Any]:
    vocabulary = Vocabulary.create(text=max(setup.vocabulary_size, samples.vocabulary_size) - _CONTROL_IDS)
    field = Field(setup.model, vocabulary, device, compiled=config.compile)
    shape = {"row_length": setup.row_length, "seed": config.seed}
    gate = field.gate(samples.rounds(1, num_rows=1, **shape)[0])
    rounds = samples.rounds(config.rounds, num_rows=setup.num_rows, **shape)
    windows, clock = _windows(field, rounds, bf16=config.precision == "bf16")
    limits = measure_limits(device, clock=clock, repeats=5, small=setup.model.size == "smoke")
    fastest = max(limits[f"gemm_{config.precision}_tflops"].values())
    real, padded = sum(r.num_real for r in rounds), sum(r.num_padded for r in rounds)
    cost = TrainingCost.of_config(field.model.config)
    operations = sum(cost.of(map(len, r.documents), num_predicted=r.num_labels) for r in rounds)
    return {
        "config": config.model_dump(mode="json"),
        "machine": machine_facts(device) | {"threads": torch.get_num_threads()},
        "model": {"parameters": num_parameters(field.model), "vocabulary": vocabulary.size}
        | {"gflop_per_token": operations / real / 1e9},
        "samples": {
            "source": samples.source,
            **asdict(samples.composition),
            "mean_ids": real / sum(len(r.documents) for r in rounds),
            "ids_per_update": setup.row_length * setup.num_rows,
            "packing_utilisation": real / sum(len(r.packed.ids_T) for r in rounds),
            "padding_utilisation": real / padded,
            "padding_utilisation_in_order": samples.utilisations(),
        },
        "gate": gate,
        "clock": clock,
        "limits": limits,
        "contestants": _figures(field, windows, clock, operations / real, fastest, config.peak_tflops),
        "windows": [{name: asdict(w) for name, w in by_name.items()} | {"real": r.num_real} for r, by_name in windows],
    }


def _samples(config: TrainBenchConfig, setup: Setup) -> Samples:
    if config.utilisation not in COMPOSITIONS:
        raise InputError(f"utilisation is one of {', '.join(map(str, COMPOSITIONS))}; got {config.utilisation}")
    composition = COMPOSITIONS[config.utilisation]
    if config.data is not None:
        return samples_of_run(config.data, composition, seed=config.seed)
    facts = {"vocabulary_size": setup.vocabulary_size, "length_factor": setup.length_factor}
    return synthetic_samples(composition, seed=config.seed, **facts)


Windows = list[tuple[Round, dict[str, Window]]]


def _windows(field: Field, rounds: list[Round], *, bf16: bool) -> tuple[Windows, str]:
    """Clean rounds on the wall clock; where they are too few, all rounds in CPU time of one thread."""
    windows = _play(field, rounds, bf16=bf16)
    clean = [(r, by_name) for r, by_name in windows if all(window.clean for window in by_name.values())]
    if len(clean) >= FEWEST_CLEAN or field.device.type != "cpu":
        return clean, "wall"
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        windows = _play(field, rounds, bf16=bf16)
    return windows, "cpu"


def _play(field: Field, rounds: list[Round], *, bf16: bool) -> Windows:
    for contestant in field.contestants:  # warm-up: allocations, compilation
        field.step(contestant, contestant.prepare(rounds[0]), bf16=bf16)
    windows = []
    for number, r in enumerate(rounds):
        turn = number % len(field.contestants)
        by_name = {}
        for contestant in field.contestants[turn:] + field.contestants[:turn]:
            by_name[contestant.name] = timed(_work(field, contestant, r, bf16=bf16), field.device)
        windows.append((r, by_name))
    return windows


def _work(field: Field, contestant: Contestant, r: Round, *, bf16: bool) -> Callable[[], None]:
    batches = contestant.prepare(r)
    return lambda: field.step(contestant, batches, bf16=bf16)


def _figures(
    field: Field, windows: Windows, clock: str, operations: float, fastest: float, peak: float | None
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for contestant in field.contestants:
        seconds = [by_name[contestant.name].seconds(clock) for _, by_name in windows]
        rates = [r.num_real / s for (r, _), s in zip(windows, seconds, strict=True)]
        ratios = [by_name[BASELINE].seconds(clock) / s for (_, by_name), s in zip(windows, seconds, strict=True)]
        tflops = statistics.median(rates) * operations / 1e12
        figures[contestant.name] = {
            "real_tokens_per_s": _spread(rates),
            "ratio_to_padded": _spread(ratios),
            "tflops": tflops,
            "mfu_of_measured_gemm": tflops / fastest,
            "mfu_of_given_peak": None if peak is None else tflops / peak,
            "same_computation": contestant.gated,
        }
    return figures


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as a table."""
    machine, samples, limits = report["machine"], report["samples"], report["limits"]
    clock = "wall clock" if report["clock"] == "wall" else "process CPU time: fewer than 5 rounds were undisturbed"
    gemms = {t: max(limits[f"gemm_{t}_tflops"].values()) for t in ("bf16", "fp32")}
    text = [
        f"{machine['processor']}, {machine['threads']} threads, {clock}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}",
        f"{report['model']['parameters'] / 1e6:.1f} M parameters, {samples['source']}, "
        f"{samples['mean_ids']:.0f} ids each",
        f"fastest GEMM: bf16 {gemms['bf16']:.3f}, fp32 {gemms['fp32']:.3f} TFLOP/s; "
        f"copy {limits['copy_gb_s']:.1f} GB/s",
        f"packing utilisation {samples['packing_utilisation']:.4f}; padding utilisation "
        f"{samples['padding_utilisation']:.3f} in batches of {samples['documents_per_batch']}",
        "gate: "
        + ", ".join(
            f"{name} loss {g['loss_difference']:.1e} gradients {g['gradient_difference']:.1e}"
            for name, g in report["gate"].items()
        ),
        f"{'':15}{'real tokens/s':>14} {'of padded (min to max)':>27} {'MFU':>7}",
    ]
    for name, figures in report["contestants"].items():
        ratio = figures["ratio_to_padded"]
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        note = "" if figures["same_computation"] else "  no document mask: reads across documents"
        rate, mfu = figures["real_tokens_per_s"]["median"], 100 * figures["mfu_of_measured_gemm"]
        text.append(f"{name:15}{rate:14.0f} {spread:>27} {mfu:5.1f} %{note}")
    return text
