"""What `test_stage_processes.py` runs by torchrun in two processes: python stage_processes.py STAGE ROOT JSON [fails].

With `stop` the last process is sent SIGTERM at that batch; with `fail` it cannot read its data there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from anygen.config import build
from anygen.errors import AnyGenError, DataError
from anygen.stages.audio_tokenizer import AudioTokenizerConfig
from anygen.stages.base import Shuffled
from anygen.stages.codec_decoder import CodecDecoderConfig
from anygen.stages.image_tokenizer import ImageTokenizerConfig
from anygen.stages.run import run_stage
from anygen.stages.teacher import TeacherConfig
from anygen.training import loop, processes
from anygen.training.interrupts import Interrupted

KINDS: dict[str, Any] = {
    c.__name__: c for c in (ImageTokenizerConfig, TeacherConfig, AudioTokenizerConfig, CodecDecoderConfig)
}


def _disturbed(stop: int | None, fail: int | None) -> None:
    """From now on the stream of batches ends in one of the ways above."""
    whole = Shuffled.next

    def disturbed(order: Shuffled) -> list[int]:
        is_last = processes.rank() == processes.count() - 1
        batch = order.position // order._batch_size
        if is_last and batch == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if is_last and batch == fail:
            raise DataError("this process cannot read its pictures")
        return whole(order)

    Shuffled.next = disturbed  # type: ignore[method-assign]


def noted() -> dict[str, list[float]]:
    """Takes down the order of items and, at the end of each phase, every buffer and weight of the trained module."""
    facts: dict[str, Any] = {"items": []}
    whole, finish = Shuffled.next, loop._Run.finish

    def next_noted(order: Shuffled) -> list[int]:
        items = whole(order)
        facts["items"].append(items)
        return items

    def finish_noted(run: loop._Run) -> dict[str, float]:
        module = run.engine.plain
        facts.setdefault("states", []).append({n: t.clone() for n, t in module.state_dict().items()})
        return finish(run)

    Shuffled.next, loop._Run.finish = next_noted, finish_noted  # type: ignore[method-assign]
    return facts


def main(kind: str, folder: Path, values: dict[str, Any]) -> int:
    """Run the stage; what this process saw lies in `seen-RANK.pt`."""
    torch.set_num_threads(1)
    stop, fail = values.pop("stop", None), values.pop("fail", None)
    _disturbed(stop, fail)
    facts = noted()
    code = 0
    try:
        run_stage(build(KINDS[kind], {**values, "root": folder}, source="test"))
    except Interrupted as stopped:
        code, facts["stopped"] = 0, stopped.exit_code
    except AnyGenError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    torch.save(facts, folder / f"seen-{processes.rank()}.pt")
    processes.leave()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))
