"""Commands that measure speed: `bench train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anygen.cli.options import print_json

app = typer.Typer(help="Measure speed against limits and peers taken in the same run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `train` a command of its own while it is the only one."""


@app.command()
def train(
    size: Annotated[str, typer.Option(help="smoke; cpu: 34 M parameters; gpu: 0.1 B.")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Run with tokenize/; by default documents as long.")] = None,
    utilisation: Annotated[float, typer.Option(help="Of the padded baseline: 0.5 or 0.28.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Each has every contestant once.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Also our step with compiled blocks.")] = False,
    precision: Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    peak_tflops: Annotated[float | None, typer.Option(help="Peak of the data sheet, for MFU beside it.")] = None,
    seed: Annotated[int, typer.Option(help="Of documents and their order.")] = 0,
) -> None:
    """Our training step against transformers': same weights, same documents. The last line is one JSON object."""
    import shlex
    import sys

    from anygen.bench.train import TrainBenchConfig, bench_train, lines
    from anygen.config import build

    values: dict[str, Any] = {"size": size, "data": data, "utilisation": utilisation, "rounds": rounds}
    values |= {"threads": threads, "compile": compiled, "precision": precision, "device": device, "seed": seed}
    config = build(TrainBenchConfig, values | {"peak_tflops": peak_tflops}, source="bench train")
    report = {"command": shlex.join(["anygen", *sys.argv[1:]])} | bench_train(config)
    print(*lines(report), sep="\n")
    print_json(report)
