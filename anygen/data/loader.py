"""Packed batches from any number of ranks and workers: lanes.

Row k of every batch of L rows comes from lane k, a packer of its own over the examples k, k + L, k + 2 L, ... So batch
s is a pure function of (seed, s), whoever packs it, and a state is one integer a lane and the numbers of the examples
that wait in its pool:

    rank 0: lanes 0 1    worker 0: lane 0    worker 1: lane 1
    rank 1: lanes 2 3    worker 0: lane 2    worker 1: lane 3

A rank has adjoining lanes, so the ranks' batches one after another are the batch of a single process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from anygen.errors import AnyGenError, CheckpointError, ConfigError, TrainingError
from anygen.packing import PackedBatch, Packer, check_state, join
from anygen.sequence import Sequence
from anygen.training import processes

LaneState = dict[str, Any]


@dataclass(frozen=True)
class Packing:
    """How a lane packs; see `Packer`."""

    row_length: int
    pool_size: int
    pad_id: int

    def lane(self, example: Callable[[int], Sequence], number: int, num_lanes: int, state: LaneState | None) -> Packer:
        """The packer of lane `number`, at `state` or at its beginning."""
        packer = Packer(
            example,
            row_length=self.row_length,
            num_rows=1,
            pool_size=self.pool_size,
            pad_id=self.pad_id,
            start=number,
            stride=num_lanes,
        )
        if state is not None:
            packer.load_state(state)
        return packer


@dataclass(frozen=True, eq=False)
class _Row:
    lane: int
    state: LaneState
    """Of the lane after this row."""
    packed: PackedBatch


class PackedLoader:
    """An endless stream of the rows of this process in each batch.

    Args:
        example: example number to sequence; pure.
        packing: of each lane.
        num_lanes: rows of a whole batch.
        num_workers: processes that pack, at most one a lane; with 0 this one does.
        rank: of this process; the process group's where it is None.
        world_size: number of processes that share a batch; the process group's where it is None.

    Raises:
        ConfigError: (when the first batch is asked for) the lanes cannot be shared out evenly.
    """

    def __init__(
        self,
        example: Callable[[int], Sequence],
        *,
        packing: Packing,
        num_lanes: int,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if num_lanes < 1 or num_workers < 0:
            raise ConfigError(f"num_lanes is 1 or more and num_workers 0 or more; got {num_lanes}, {num_workers}")
        self._example, self._packing, self._num_lanes, self._num_workers = example, packing, num_lanes, num_workers
        self._rank, self._world_size = rank, world_size
        self._states: dict[int, LaneState] = {}  # of lanes that are not at their beginning
        self._steps: Iterator[list[_Row]] | None = None
        self._workers: Any = None

    @property
    def lanes(self) -> range:
        """The lanes of this process. The process group is asked late: it is joined after data are opened."""
        rank = processes.rank() if self._rank is None else self._rank
        world_size = processes.count() if self._world_size is None else self._world_size
        share, rest = divmod(self._num_lanes, world_size)
        if rest:
            raise ConfigError(
                f"{self._num_lanes} rows a batch cannot be shared out evenly to {world_size} processes: "
                f"make rows_per_batch a multiple of {world_size}"
            )
        return range(rank * share, (rank + 1) * share)

    def next_batch(self) -> PackedBatch:
        """This process's rows of the next batch."""
        if self._steps is None:
            self._steps = self._start()
        try:
            rows = next(self._steps)
        except AnyGenError:
            self.close()  # what went wrong may pass: the step can be asked for again
            raise
        self._states |= {row.lane: row.state for row in rows}
        return join([row.packed for row in rows])

    def state(self) -> dict[str, Any]:
        """JSON-able position of this process's lanes; `merge_states` makes a whole one of all processes'."""
        beginnings = {lane: {"next_example": lane, "waiting": []} for lane in self.lanes}
        states = {str(lane): self._states.get(lane, beginning) for lane, beginning in beginnings.items()}
        return {"num_lanes": self._num_lanes, "lanes": states}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a whole state, saved by any number of processes and workers.

        Raises:
            CheckpointError: it was altered, is of another number of lanes, or lacks some.
        """
        if self._num_lanes == 1 and isinstance(state, dict) and "waiting" in state:  # saved before there were lanes
            state = {"num_lanes": 1, "lanes": {"0": state}}
        if (
            not isinstance(state, dict)
            or state.keys() != {"num_lanes", "lanes"}
            or not isinstance(state["lanes"], dict)
        ):
            raise CheckpointError("the state of the data is not one of a loader: expected num_lanes and lanes")
        lanes = state["lanes"]
        if state["num_lanes"] != self._num_lanes or lanes.keys() != {str(n) for n in range(self._num_lanes)}:
            raise CheckpointError(
                f"the state of the data is of {state['num_lanes']} rows a batch and holds {len(lanes)}; "
                f"this run has {self._num_lanes}"
            )
        for lane in range(self._num_lanes):
            check_state(lanes[str(lane)], start=lane, stride=self._num_lanes)
        self.close()
        self._states = {lane: lanes[str(lane)] for lane in self.lanes}

    def close(self) -> None:
        """Let the workers go; the next batch would start new ones."""
        self._steps = None
        if self._workers is not None:
            processes_of_it = self._workers._workers
            self._workers._shutdown_workers()
            for worker in processes_of_it:  # one that is deep in a download: it does not hear SIGTERM
                if worker.is_alive():
                    worker.kill()
                worker.join()
            self._workers = None

    def _start(self) -> Iterator[list[_Row]]:
        lanes = self.lanes
        num_workers = min(self._num_workers, len(lanes))
        stream = _Lanes(self._example, self._packing, self._num_lanes, lanes, dict(self._states))
        if not num_workers:
            return iter(stream.steps(lanes))
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError("num_workers needs a system that can fork processes: use num_workers: 0")
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_quiet_worker,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        self._workers = iter(loader)
        return self._gather(num_workers)

    def _gather(self, num_workers: int) -> Iterator[list[_Row]]:
        """Rows of a step from as many items: the workers take turns, and each gives its lanes of the step at once."""
        while True:
            rows: list[_Row] = []
            for _ in range(num_workers):
                try:
                    item = next(self._workers)
                except RuntimeError as error:
                    if "DataLoader worker (pid" not in str(error):
                        raise
                    raise TrainingError(f"a loader's worker died, for want of memory perhaps: {error}") from error
                if isinstance(item, AnyGenError):
                    raise item
                rows += item
            yield sorted(rows, key=lambda row: row.lane)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The whole state of a run from those of its processes, in any order.

    >>> halves = [{"num_lanes": 2, "lanes": {str(n): {"next_example": n, "waiting": []}}} for n in (0, 1)]
    >>> sorted(merge_states(halves)["lanes"])
    ['0', '1']

    Raises:
        CheckpointError: they are not the parts of one state.
    """
    states = list(states)
    lanes = {lane: state for part in states for lane, state in part["lanes"].items()}
    num_lanes = states[0]["num_lanes"]
    if any(part["num_lanes"] != num_lanes for part in states) or sum(len(p["lanes"]) for p in states) != num_lanes:
        raise CheckpointError(f"the processes' states of the data do not make one of {num_lanes} lanes")
    return {"num_lanes": num_lanes, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


class _Lanes(IterableDataset[Any]):
    """Lanes of one process; each worker has every n-th of them."""

    def __init__(
        self,
        example: Callable[[int], Sequence],
        packing: Packing,
        num_lanes: int,
        lanes: range,
        states: dict[int, LaneState],
    ) -> None:
        self._example, self._packing, self._num_lanes = example, packing, num_lanes
        self._all, self._states = lanes, states

    def steps(self, lanes: Iterable[int]) -> Iterator[list[_Row]]:
        """Step by step the rows of some lanes."""
        packers = {n: self._packing.lane(self._example, n, self._num_lanes, self._states.get(n)) for n in lanes}
        while True:
            rows = {n: packer.next_batch() for n, packer in packers.items()}
            yield [_Row(n, packers[n].state(), row) for n, row in rows.items()]

    def __iter__(self) -> Iterator[list[_Row] | AnyGenError]:
        worker = get_worker_info()
        assert worker is not None, "only workers iterate over it"
        try:
            yield from self.steps(self._all[worker.id :: worker.num_workers])
        except AnyGenError as error:  # torch would put a traceback into its message
            yield error


def _quiet_worker(number: int) -> None:
    """Signals are for the main process, which saves and then lets its workers go."""
    torch.set_num_threads(1)
    for name in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            signal.signal(name, signal.SIG_IGN)
