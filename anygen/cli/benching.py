"""Commands that measure speed: `bench train` and `bench sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anygen.cli.options import print_json

app = typer.Typer(help="Measure speed against limits and peers taken in the same run.", no_args_is_help=True)


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


@app.command()
def sample(
    size: Annotated[str, typer.Option(help="smoke; cpu: 34 M parameters.")] = "cpu",
    batch_size: Annotated[list[int] | None, typer.Option(help="Rows at once; repeat for several. 1 and 8.")] = None,
    new_ids: Annotated[int, typer.Option(min=2, help="Ids a row.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Each has every contestant once.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: as many as torch takes.")] = 0,
    continuous: Annotated[bool, typer.Option("--continuous", help="Also transformers' generate_batch.")] = False,
    bundle: Annotated[bool, typer.Option(help="Also the embedded bundle, in every direction.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
) -> None:
    """Our sampling step against transformers' generate: same weights, same ids. The last line is one JSON object."""
    import shlex
    import sys

    from anygen.bench.sample import SampleBenchConfig, bench_sample, lines
    from anygen.config import build

    values: dict[str, Any] = {"size": size, "new_ids": new_ids, "rounds": rounds, "threads": threads, "seed": seed}
    values |= {"continuous": continuous, "bundle": bundle, "batch_sizes": tuple(batch_size or (1, 8))}
    config = build(SampleBenchConfig, values, source="bench sample")
    report = {"command": shlex.join(["anygen", *sys.argv[1:]])} | bench_sample(config)
    print(*lines(report), sep="\n")
    print_json(report)
