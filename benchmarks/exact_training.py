"""Is a training run one function of its recipe? Run twice, interrupted, killed, fed by workers: the same, bit for bit.

    python benchmarks/exact_training.py RUN OUT [--steps 300] [--kills 20]

RUN is a folder in which the stages up to `tokenize` are done (`anygen run recipes/smoke`). Every variant trains the
smoke transformer for the same steps in a copy of it; compared are all weights and optimizer states, to the last bit,
and the losses of every step. Kills are SIGKILL at random moments, saves included: a checkpoint is due every two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anygen.files import sha256_of
from anygen.training.checkpoint import checkpoints
from anygen.training.loop import CHECKPOINTS
from anygen.training.metrics import METRICS_FILE, read_metrics
from anygen.training.sharding import ONE_FILE

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("data", "text_tokenizer", "teacher", "image_tokenizer", "audio_tokenizer", "tokenize")
TIMES = ("step_s", "tokens_per_s", "mfu")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    digest: str
    """sha256 of weights and optimizer states."""
    curve: tuple[tuple[float, ...], ...]
    """(step, loss, gradient norm) of every step."""
    stops: int
    """How often it was stopped on the way."""


def main() -> None:
    """Train every variant, compare, write `exact_training.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--resumes", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for name, result in variants(arguments):
        results[name] = result
        reference = results["once"]
        same = result.digest == reference.digest and result.curve == reference.curve
        print(f"{name:24} stopped {result.stops:2} times  {'identical' if same else 'DIFFERENT'}", flush=True)
    equal = {name: (r.digest, r.curve) == (reference.digest, reference.curve) for name, r in results.items()}
    facts = {
        "command": " ".join(sys.argv),
        "steps": arguments.steps,
        "identical": equal,
        "stops": {name: result.stops for name, result in results.items()},
        "sha256": reference.digest,
        "last_loss": reference.curve[-1][1],
    }
    (arguments.out / "exact_training.json").write_text(json.dumps(facts, indent=1) + "\n")
    raise SystemExit(0 if all(equal.values()) else 1)


def variants(arguments: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Each variant by name, trained."""
    dice = random.Random(arguments.seed)
    yield "once", finished(arguments, "once")
    yield "again", finished(arguments, "again")
    for _ in range(arguments.resumes):
        step = dice.randrange(1, arguments.steps)
        name = f"resumed at {step}"
        stop_at_step(arguments, name, step)
        yield name, finished(arguments, name, stops=1)
    if arguments.kills:
        kills = kill_at_random(arguments, "killed", dice)
        yield "killed", finished(arguments, "killed", stops=kills)
    for count in arguments.workers:
        name = f"{count} loader workers"
        yield name, finished(arguments, name, f"num_workers={count}")


def start(arguments: argparse.Namespace, name: str, *overrides: str) -> subprocess.Popen[str]:
    """The training process of a variant, in a folder of its own that shares the inputs."""
    root = arguments.out / name.replace(" ", "-")
    root.mkdir(exist_ok=True)
    for stage in INPUTS:
        if (arguments.run / stage).exists() and not (root / stage).exists():
            (root / stage).symlink_to((arguments.run / stage).resolve())
    loop = [f"loop.steps={arguments.steps}", "loop.log_every=1", "loop.save_every=2"]
    command = [sys.executable, "-m", "anygen", "train", str(ROOT / "recipes/smoke/pretrain.yaml"), "--root", str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(  # noqa: S603  our own command
        [*command, *loop, *overrides], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def folder_of(arguments: argparse.Namespace, name: str) -> Path:
    """Where a variant keeps its metrics and checkpoints."""
    return Path(arguments.out / name.replace(" ", "-") / "pretrain")


def finished(arguments: argparse.Namespace, name: str, *overrides: str, stops: int = 0) -> Result:
    """Train to the end."""
    process = start(arguments, name, *overrides)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name}: exit code {process.returncode}\n{said}")
    folder = folder_of(arguments, name)
    newest = checkpoints(folder / CHECKPOINTS)[-1]
    rows = read_metrics(folder / METRICS_FILE)
    curve = tuple((row["step"], row["loss"], row["grad_norm"]) for row in rows)
    return Result(sha256_of(newest / ONE_FILE), curve, stops)


def stop_at_step(arguments: argparse.Namespace, name: str, step: int) -> None:
    """SIGTERM once the log has come to a step."""
    process = start(arguments, name)
    metrics = folder_of(arguments, name) / METRICS_FILE
    while process.poll() is None and num_lines(metrics) < step:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate()


def kill_at_random(arguments: argparse.Namespace, name: str, dice: random.Random) -> int:
    """SIGKILL a run again and again, each time at a random moment of its work; returns how often."""
    rows = read_metrics(folder_of(arguments, "once") / METRICS_FILE)
    seconds = sum(row["step_s"] for row in rows) / arguments.kills
    metrics = folder_of(arguments, name) / METRICS_FILE
    for kills in range(arguments.kills):
        process = start(arguments, name)
        before = metrics.stat().st_ino if metrics.exists() else 0  # a resumed run writes its log anew
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_ino == before):
            time.sleep(0.002)
        time.sleep(dice.random() * seconds)
        if process.poll() is not None:
            return kills  # it came to its end first
        process.kill()
        process.communicate()
    return arguments.kills


def num_lines(path: Path) -> int:
    """Lines of a file that another process is writing."""
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    main()
