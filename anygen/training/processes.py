"""The processes of a run: which one this is, and the few things that they tell each other.

`accelerate launch` (or torchrun) starts them; alone, there is one and nothing here costs anything. Which data a process
reads follows from its rank, so they exchange little beside gradients: sums, states, and that one was told to stop.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anygen.errors import ConfigError
from tokenizers_mm import compat  # noqa: F401  accelerate looks at the same fragile packages as transformers


def started_as_several() -> bool:
    """True where a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(*, cpu: bool) -> None:
    """Meet the other processes, where there are any: gloo on CPUs, NCCL on GPUs."""
    alone_but_sharded = "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if (started_as_several() or alone_but_sharded) and not dist.is_initialized():
        from accelerate import PartialState
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=cpu or not torch.cuda.is_available())


def leave() -> None:
    """Part from them. Modules wrapped for several processes must be gone: torch's DDP waits on the group it is of."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(batch_size: int, name: str = "batch_size") -> slice:
    """This process's rows of a batch of all: equal parts, in the order of ranks.

    Raises:
        ConfigError: it does not divide into equal parts; `name` is the recipe's field.
    """
    num_parts = count()
    if batch_size % num_parts:
        raise ConfigError(
            f"{name}={batch_size} is of all processes together and must be a multiple of their number, {num_parts}"
        )
    size = batch_size // num_parts
    return slice(rank() * size, (rank() + 1) * size)


def wait() -> None:
    """Go on when all have come here."""
    if count() > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """Sum over the processes, the same on each; a new tensor."""
    summed = values.clone()
    if count() > 1:
        dist.all_reduce(summed)
    return summed


def gathered(value: Any) -> list[Any]:
    """What each process passed, in the order of ranks; JSON-able values."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def agreed(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The one state that all processes have."""
    assert all(state == states[0] for state in states), states
    return states[0]


def told(value: Any) -> Any:
    """What the first process passed."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean_of(figures: Sequence[tuple[dict[str, float], dict[str, int]]]) -> dict[str, float]:
    """Means by name from each process's (sums, counts).

    >>> mean_of([({"loss": 3.0}, {"loss": 1}), ({"loss": 5.0, "text": 2.0}, {"loss": 1, "text": 2})])
    {'loss': 4.0, 'text': 1.0}
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for process_sums, process_counts in figures:
        for name, value in process_sums.items():
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + process_counts[name]
    return {name: value / counts[name] for name, value in sums.items()}
