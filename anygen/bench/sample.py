"""`anygen bench sample`: time to first id, milliseconds a step, ids a second and share of the bandwidth, beside peers.

Gate first: the engine's logits are transformers', and all exact contestants give the same greedy ids, or nothing is
timed. Then rounds at each batch size: every contestant generates once for its first id and once for all, in an order
that turns with the round. Figures are medians over rounds of ratios within a round.

A step reads every weight once, so its limit is how fast packed weights stream through one product after another; that
is measured in the same run. What the attention reads is not counted: the share is of weights alone.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field as Key

from anygen.bench.directions import measure_bundle
from anygen.bench.machine import Window, machine_facts, timed
from anygen.bench.samplers import Contestant, contestants, gate
from anygen.bench.train import FEWEST_CLEAN, SETUPS, Setup
from anygen.config import Config
from anygen.model.causal import create_model, num_parameters
from anygen.sampling.linear import Linear
from anygen.vocabulary import Vocabulary

BASELINES = ("generate fp32", "generate bf16")
_CONTROL_IDS = Vocabulary.create(text=0).used
_STREAM_SHAPE = (2816, 512)
_STREAM_BYTES = 192 * 2**20


class SampleBenchConfig(Config):
    """What to measure."""

    size: Literal["smoke", "cpu"] = "cpu"
    """`cpu` has 34 M parameters."""
    batch_sizes: tuple[int, ...] = (1, 8)
    new_ids: int = Key(256, ge=2)
    prompt_ids: int = Key(16, ge=1)
    rounds: int = Key(5, ge=1)
    threads: int = Key(0, ge=0)
    """0 leaves torch's choice."""
    continuous: bool = False
    """Also transformers' `generate_batch`."""
    bundle: bool = True
    """Also the embedded bundle: seconds a picture, real-time factor of sound, samples a minute of each direction."""
    seed: int = 0


def bench_sample(config: SampleBenchConfig, *, setup: Setup | None = None) -> dict[str, Any]:
    """Everything that was measured, JSON-able; `lines` makes a table of it.

    Raises:
        GateError: the contestants compute different things.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        return _bench(config, setup or SETUPS[config.size])
    finally:
        torch.set_num_threads(threads)


def _bench(config: SampleBenchConfig, setup: Setup) -> dict[str, Any]:
    vocabulary = Vocabulary.create(text=setup.vocabulary_size - _CONTROL_IDS)
    model = create_model(setup.model, vocabulary, seed=config.seed).eval()
    made = contestants(model, continuous=config.continuous)
    generator = torch.Generator().manual_seed(config.seed)

    def prompts(num_rows: int) -> torch.Tensor:
        return torch.randint(vocabulary.used, (num_rows, config.prompt_ids), generator=generator)

    checked = gate(model, made, prompts(4), min(32, config.new_ids))
    clock, batches = "wall", {}
    for num_rows in config.batch_sizes:
        windows, clock = _windows(config, made, prompts(num_rows), clock)
        batches[str(num_rows)] = (windows, clock)
    limits = {str(dtype)[6:]: stream_gb_s(dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    figures = {rows: _figures(config, made, windows, limits, int(rows), c) for rows, (windows, c) in batches.items()}
    return {
        "config": config.model_dump(mode="json"),
        "machine": machine_facts(torch.device("cpu")) | {"threads": torch.get_num_threads()},
        "model": {"parameters": num_parameters(model), "vocabulary": vocabulary.size},
        "gate": checked,
        "clock": {rows: clock for rows, (_, clock) in batches.items()},
        "limits": {"packed_stream_gb_s": limits},
        "batches": figures,
        "bundle": measure_bundle(config.rounds, clock) if config.bundle else None,
    }


Windows = list[dict[str, tuple[Window, Window]]]


def _windows(config: SampleBenchConfig, made: list[Contestant], prompts_BT: Any, clock: str) -> tuple[Windows, str]:
    """Clean rounds on the wall clock; where they are too few, all rounds in CPU time of one thread."""
    if clock == "wall":
        windows = _play(config, made, prompts_BT)
        clean = [w for w in windows if all(first.clean and whole.clean for first, whole in w.values())]
        if len(clean) >= min(FEWEST_CLEAN, config.rounds):
            return clean, "wall"
        if torch.get_num_threads() == 1:
            return windows, "cpu"
    torch.set_num_threads(1)
    return _play(config, made, prompts_BT), "cpu"


def _play(config: SampleBenchConfig, made: list[Contestant], prompts_BT: torch.Tensor) -> Windows:
    device = torch.device("cpu")
    for contestant in made:  # warm-up
        contestant.generate(prompts_BT, 2)
    windows: Windows = []
    for number in range(config.rounds):
        turn, by_name = number % len(made), {}
        for contestant in made[turn:] + made[:turn]:
            first = timed(lambda c=contestant: c.generate(prompts_BT, 1), device)  # type: ignore[misc]
            whole = timed(lambda c=contestant: c.generate(prompts_BT, config.new_ids), device)  # type: ignore[misc]
            by_name[contestant.name] = (first, whole)
        windows.append(by_name)
    return windows


def stream_gb_s(dtype: torch.dtype, clock: str) -> float:
    """The fastest of a few passes of one row through packed products that do not fit the caches."""
    shape = _STREAM_SHAPE
    products = [
        Linear(torch.ones(shape), dtype) for _ in range(_STREAM_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    ]
    x_MD = torch.ones(1, shape[1], dtype=dtype)
    windows = [timed(lambda: [product(x_MD) for product in products * 4], torch.device("cpu")) for _ in range(6)]
    return 4 * sum(p.num_bytes for p in products) / min(w.seconds(clock) for w in windows) / 1e9


def _figures(
    config: SampleBenchConfig,
    made: list[Contestant],
    windows: Windows,
    limits: dict[str, float],
    num_rows: int,
    clock: str,
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for contestant in made:
        whole = [w[contestant.name][1].seconds(clock) for w in windows]
        steps = [
            (w[contestant.name][1].seconds(clock) - w[contestant.name][0].seconds(clock)) / (config.new_ids - 1)
            for w in windows
        ]
        ms = 1e3 * statistics.median(steps)
        limit = limits["bfloat16" if "bf16" in contestant.name else "float32"]
        figures[contestant.name] = {
            "first_id_ms": 1e3 * statistics.median(w[contestant.name][0].seconds(clock) for w in windows),
            "ms_per_step": ms,
            "ids_per_s": num_rows * config.new_ids / statistics.median(whole),
            "share_of_stream": contestant.num_bytes / (ms * 1e-3) / 1e9 / limit,
            "same_ids": contestant.exact,
            "windows": [[asdict(part) for part in w[contestant.name]] for w in windows],
        } | {f"ratio_to_{name}": _ratio(windows, name, whole, clock) for name in BASELINES}
    return figures


def _ratio(windows: Windows, baseline: str, seconds: list[float], clock: str) -> dict[str, float]:
    ratios = [w[baseline][1].seconds(clock) / own for w, own in zip(windows, seconds, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as tables."""
    machine, limits = report["machine"], report["limits"]["packed_stream_gb_s"]
    text = [
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {report['model']['parameters'] / 1e6:.1f} M parameters",
        f"packed weights stream at {limits['float32']:.1f} (fp32), {limits['bfloat16']:.1f} GB/s (bf16); "
        f"gate: logits differ by {report['gate']['logits_difference']:.1e}, greedy ids are the same",
    ]
    for num_rows, figures in report["batches"].items():
        clock = report["clock"][num_rows]
        note = "wall clock" if clock == "wall" else "process CPU time: too few rounds were undisturbed"
        text.append(f"batch {num_rows}, {note}")
        text.append(
            f"{'':20}{'first id ms':>12}{'ms a step':>11}{'ids/s':>9}{'of stream':>11}"
            f"{'x generate fp32':>18}{'bf16':>8}"
        )
        for name, f in figures.items():
            exact, rough = (f[f"ratio_to_{base}"]["median"] for base in BASELINES)
            text.append(
                f"{name:20}{f['first_id_ms']:12.1f}{f['ms_per_step']:11.2f}{f['ids_per_s']:9.0f}"
                f"{100 * f['share_of_stream']:9.0f} %{exact:18.2f}{rough:8.2f}"
            )
    if report["bundle"]:
        text += [f"{name}: {value:.3f}" for name, value in report["bundle"]["figures"].items()]
        text += [f"{name}: {value:.0f} samples a minute" for name, value in report["bundle"]["per_minute"].items()]
    return text
