"""Sampling on one GPU, in about ten minutes; written before a GPU was at hand.

    python benchmarks/gpu_sampling.py OUT.json [--parts equal speed] [--dry-run]

- equal: static steps (one CUDA graph each) give the ids of the sampler's plain steps, at fp32, for samples in different
  modality states with guidance and filters.
- speed: milliseconds a step at 0.1, 0.35 and 1.1 B parameters, bf16, batch 1 and 64, against transformers' `generate`
  with its dynamic and its static cache; share of the memory roofline: the bytes of weights and of the cache that a step
  reads, over its time, against the copy bandwidth of the same run.

It writes OUT.json after each part, so a later failure loses nothing. `--dry-run` runs every part on a CPU in tiny
sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anygen.api import AnyGen
from anygen.bench.machine import machine_facts, measure_limits
from anygen.bench.samplers import _generate
from anygen.files import write_json
from anygen.model.causal import ModelConfig, create_model, num_parameters
from anygen.request import Request
from anygen.sampling.choose import SamplingOptions
from anygen.sampling.engine import Engine
from anygen.sampling.sampler import sample
from anygen.sampling.static import MAX_STEPS, StaticStep
from anygen.sampling.static_sampler import sample_static
from anygen.vocabulary import Vocabulary

_CONTROL_IDS = Vocabulary.create(text=0).used
PROMPT = 16


@dataclass(frozen=True)
class Scale:
    """What the parts run at."""

    device: torch.device
    models: dict[str, ModelConfig]
    vocabulary_size: int
    batch_sizes: tuple[int, ...]
    new_ids: int
    length: int
    """Of the cache."""
    repeats: int
    small: bool


MODELS = {"0.1B": ModelConfig(size="small"), "0.35B": ModelConfig(size="base"), "1.1B": ModelConfig(size="large")}
FULL = Scale(torch.device("cuda"), MODELS, 32_768, (1, 64), 256, 512, 5, False)
DRY = Scale(torch.device("cpu"), {"smoke": ModelConfig(size="smoke")}, 1024, (1, 3), 8, 64, 1, True)


def part_equal(scale: Scale) -> dict[str, Any]:
    """Ids of static steps and of plain ones."""
    model = AnyGen.from_pretrained(device=str(scale.device))
    requests = [
        Request(text="a red apple", output="image", seed=1, guidance_scale=3.0, num_samples=2),
        Request(text="a cat", output="audio", seed=2, duration_s=0.2, top_k=20),
        Request(text="two dogs", output=("text", "image"), seed=3, max_new_tokens=100, top_p=0.9),
    ][: 2 if scale.small else 3]
    found = []
    for static in (False, True):
        states = [state for request in requests for state in model._states(request)]
        # plain steps also where `sample` itself would take static ones
        steps = sample_static(model.engine, states, max_rows=16) if static else sample(model.engine, states, plain=True)
        for _ in steps:
            pass
        found.append([state.ids for state in states])
    same = sum(a == b for a, b in zip(*found, strict=True))
    return {"samples": len(found[0]), "same": same, "ids": sum(map(len, found[0]))}


def part_speed(scale: Scale) -> dict[str, Any]:
    """Milliseconds a step of ours and of transformers."""
    limits = measure_limits(scale.device, clock="wall", repeats=5, small=scale.small)
    figures: dict[str, Any] = {"copy_gb_s": limits["copy_gb_s"]}
    vocabulary = Vocabulary.create(text=scale.vocabulary_size - _CONTROL_IDS)
    for name, config in scale.models.items():
        model = create_model(config, vocabulary, seed=0).eval().to(scale.device)
        engine = Engine(model, dtype=torch.bfloat16)
        reference = copy.deepcopy(model).to(torch.bfloat16)
        reference.set_attn_implementation("sdpa")
        figures[name] = {"parameters": num_parameters(model)}
        for num_rows in scale.batch_sizes:
            ours = _ours(scale, engine, num_rows)
            share = ours.pop("bytes") / (ours["ms_per_step"] * 1e-3) / 1e9 / limits["copy_gb_s"]
            peers = {cache or "dynamic": _peer(scale, reference, cache, num_rows) for cache in (None, "static")}
            figures[name][str(num_rows)] = ours | {"share_of_copy": share} | peers
    return figures


def _ours(scale: Scale, engine: Engine, num_rows: int) -> dict[str, float]:
    """Static steps at full length of the cache, choice of every row included."""
    step = StaticStep(engine, num_rows, scale.length, filters=False)
    step.is_active_B.fill_(1)
    step.owners_B.copy_(torch.arange(num_rows))
    step.twins_B.copy_(torch.arange(num_rows))
    for row in range(num_rows):
        step.set_row(row, ((0, scale.vocabulary_size),), SamplingOptions())
    rounds = scale.new_ids // MAX_STEPS

    def play() -> None:
        step.positions_B.fill_(PROMPT)
        for _ in range(rounds):
            step.run(MAX_STEPS)

    seconds = _seconds(play, scale)
    weights = sum(p.num_bytes for layer in engine.layers for p in layer.products)
    weights += engine.head_VD.numel() * engine.dtype.itemsize
    return {"ms_per_step": 1e3 * seconds / rounds / MAX_STEPS, "bytes": weights + step.cache.num_bytes}


def _peer(scale: Scale, model: Any, cache: str | None, num_rows: int) -> float:
    prompts_BT = torch.randint(
        scale.vocabulary_size - _CONTROL_IDS, (num_rows, PROMPT), generator=torch.Generator().manual_seed(0)
    ).to(scale.device)
    generate = _generate(model, cache)
    first = _seconds(lambda: generate(prompts_BT, 1), scale)
    return 1e3 * (_seconds(lambda: generate(prompts_BT, scale.new_ids), scale) - first) / (scale.new_ids - 1)


def _seconds(work: Callable[[], object], scale: Scale) -> float:
    times = []
    for _ in range(1 + scale.repeats):  # the first warms up
        _finish(scale.device)
        start = time.perf_counter()
        work()
        _finish(scale.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


PARTS = {"equal": part_equal, "speed": part_speed}


def main() -> None:
    """Run the parts and write what each found."""
    parser = argparse.ArgumentParser(description="Sampling on one GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    scale = DRY if arguments.dry_run else FULL
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine_facts(scale.device)}
    for part in arguments.parts:
        report[part] = PARTS[part](scale)
        write_json(arguments.out, report)
        print(part, report[part], flush=True)


if __name__ == "__main__":
    main()
