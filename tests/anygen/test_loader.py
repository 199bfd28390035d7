"""The loader: the same batches from any number of ranks and workers, stopped and resumed anywhere, and quiet ends."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.data.loader import PackedLoader, Packing, merge_states
from anygen.errors import CheckpointError, ConfigError, DataError, TrainingError
from anygen.packing import PackedBatch, Packer, join
from anygen.sequence import Sequence

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than this machine has cores

PACKING = Packing(row_length=50, pool_size=8, pad_id=0)
ROOT = Path(__file__).parent.parent.parent


def example(number: int) -> Sequence:
    length = 1 + 37 * number * number % 53  # some are longer than a row
    return Sequence(np.arange(length) + 1000 * (number + 1), np.arange(length) % 2 == 0, ())


def digest(batch: PackedBatch) -> str:
    arrays = (batch.ids_T, batch.positions_T, batch.labels_T, batch.predicts_T, batch.target_T)
    return hashlib.sha256(
        b"".join(a.tobytes() for a in arrays) + repr((batch.lengths, batch.num_padding)).encode()
    ).hexdigest()


@pytest.fixture
def loader() -> Iterator[Callable[..., PackedLoader]]:
    made: list[PackedLoader] = []

    def make(num_lanes: int, **options: Any) -> PackedLoader:
        made.append(PackedLoader(options.pop("of", example), packing=PACKING, num_lanes=num_lanes, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_one_lane_gives_the_stream_that_it_gave_before_there_were_lanes(loader: Callable[..., PackedLoader]) -> None:
    lane, total = loader(1), hashlib.sha256()
    for _ in range(60):
        batch = lane.next_batch()
        total.update(batch.ids_T.astype("<i8").tobytes())
        total.update(repr(batch.lengths).encode())
    assert total.hexdigest() == "bf2db22f6e6cbf5510d90057800e91f19714ffcc52159ede1c043b5ec07d1adf"
    waiting = [[n, 0] for n in (101, 104, 105, 107, 108, 109)]
    before = {"next_example": 111, "waiting": waiting}
    assert lane.state() == {"num_lanes": 1, "lanes": {"0": before}}
    old = Packer(example, row_length=50, num_rows=1, pool_size=8, pad_id=0)
    old.load_state(before)
    resumed = loader(1)
    resumed.load_state(before)  # of a checkpoint from then
    assert [digest(resumed.next_batch()) for _ in range(5)] == [digest(old.next_batch()) for _ in range(5)]


def test_every_example_is_packed_once_by_its_lane(loader: Callable[..., PackedLoader]) -> None:
    three = loader(3)
    seen: dict[int, int] = {}
    for _ in range(30):
        batch = three.next_batch()
        for row, ids in enumerate(batch.ids_T.reshape(3, 50)):
            for number in {int(i) // 1000 - 1 for i in ids if i}:
                assert number % 3 == row
                seen[number] = seen.get(number, 0) + sum(int(i) // 1000 - 1 == number for i in ids)
    lanes = three.state()["lanes"].values()
    waiting = {number for lane in lanes for number, _ in lane["waiting"]}
    for number in range(min(lane["next_example"] for lane in lanes)):
        assert number in waiting or seen[number] == len(example(number))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_ranks_and_workers_change_nothing(
    loader: Callable[..., PackedLoader], num_workers: int, world_size: int
) -> None:
    single = loader(6)
    ranks = [loader(6, rank=r, world_size=world_size, num_workers=num_workers) for r in range(world_size)]
    for _ in range(7):
        together = join([rank.next_batch() for rank in ranks])
        assert digest(together) == digest(single.next_batch())
    assert merge_states(rank.state() for rank in reversed(ranks)) == single.state()


@pytest.mark.parametrize(("stop", "before", "after"), [(0, 1, 2), (1, 2, 1), (5, 2, 2), (9, 4, 1), (23, 1, 4)])
def test_it_goes_on_with_other_ranks_and_workers(
    loader: Callable[..., PackedLoader], stop: int, before: int, after: int
) -> None:
    single = loader(4)
    stopped = [loader(4, rank=r, world_size=before, num_workers=stop % 3) for r in range(before)]
    for _ in range(stop):
        single.next_batch()
        for rank in stopped:
            rank.next_batch()
    state = json.loads(json.dumps(merge_states([rank.state() for rank in stopped])))
    resumed = [loader(4, rank=r, world_size=after, num_workers=(stop + 1) % 3) for r in range(after)]
    for rank in resumed:
        rank.load_state(state)
    assert merge_states([rank.state() for rank in resumed]) == state
    for _ in range(4):
        assert digest(join([rank.next_batch() for rank in resumed])) == digest(single.next_batch())


def alterations(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The state with one thing wrong."""

    def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        other = copy.deepcopy(state)
        change(other)
        return other

    yield {}
    yield changed(lambda s: s.update(more=1))
    yield changed(lambda s: s.pop("lanes"))
    yield changed(lambda s: s.update(lanes=[1]))
    yield changed(lambda s: s.update(num_lanes=4))
    yield changed(lambda s: s["lanes"].pop("1"))
    yield changed(lambda s: s["lanes"].update({"2": s["lanes"]["1"]}))
    yield changed(lambda s: s["lanes"].update({"0": s["lanes"]["1"], "1": s["lanes"]["0"]}))
    for value in (-2, 7, 2.0, "2", None, True, 2):
        yield changed(lambda s, v=value: s["lanes"]["0"].update(next_example=v))
    yield changed(lambda s: s["lanes"]["0"].update(extra=0))
    yield changed(lambda s: s["lanes"]["0"].update(waiting=None))
    yield changed(lambda s: s["lanes"]["0"]["waiting"].reverse())
    yield changed(lambda s: s["lanes"]["0"]["waiting"].append(s["lanes"]["0"]["waiting"][-1]))
    for key in ([10**6, 0], [-2, 0], [1, 0], [0, -1], [0], [0, 0, 0], ["0", 0], [True, 0], 0):
        yield changed(lambda s, k=key: s["lanes"]["0"]["waiting"].__setitem__(0, k))


def test_a_state_that_was_altered_or_does_not_fit_is_refused(loader: Callable[..., PackedLoader]) -> None:
    two = loader(2)
    for _ in range(9):
        two.next_batch()
    state = two.state()
    expected = digest(two.next_batch())
    other = loader(2)
    for altered in alterations(state):
        with pytest.raises(CheckpointError, match="state of the data"):
            other.load_state(altered)
    other.load_state(state)
    assert digest(other.next_batch()) == expected
    for num_lanes in (1, 4):
        with pytest.raises(CheckpointError, match="2 rows a batch"):
            loader(num_lanes).load_state(state)
    for parts in ([state, state], [{**state, "lanes": {"0": state["lanes"]["0"]}}]):
        with pytest.raises(CheckpointError, match="do not make one"):
            merge_states(parts)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_piece_that_no_example_has_is_refused(loader: Callable[..., PackedLoader], num_workers: int) -> None:
    state = {"num_lanes": 1, "lanes": {"0": {"next_example": 5, "waiting": [[3, 2]]}}}
    one = loader(1, num_workers=num_workers)
    one.load_state(state)
    with pytest.raises(CheckpointError, match="piece 2 of example 3 waits"):
        one.next_batch()


def test_lanes_that_cannot_be_shared_out() -> None:
    with pytest.raises(ConfigError, match=r"3 rows a batch cannot be shared out evenly to 2 processes"):
        PackedLoader(example, packing=PACKING, num_lanes=3, rank=0, world_size=2).next_batch()
    with pytest.raises(ConfigError, match="num_lanes is 1 or more"):
        PackedLoader(example, packing=PACKING, num_lanes=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_wrong_with_data_is_said_as_it_was_and_the_step_can_be_asked_for_again(
    loader: Callable[..., PackedLoader], tmp_path: Path, num_workers: int
) -> None:
    broken = tmp_path / "broken"

    def sometimes(number: int) -> Sequence:
        if number == 40 and broken.exists():
            raise DataError("shard train-00003 was changed")
        return example(number)

    whole, hurt = loader(2), loader(2, of=sometimes, num_workers=num_workers)
    expected = [digest(whole.next_batch()) for _ in range(40)]
    broken.touch()
    found = []
    with pytest.raises(DataError) as caught:
        while True:
            found.append(digest(hurt.next_batch()))
    assert str(caught.value) == "shard train-00003 was changed"
    assert 0 < len(found) < 40
    broken.unlink()
    found += [digest(hurt.next_batch()) for _ in range(40 - len(found))]
    assert found == expected


def test_a_worker_that_is_killed_is_an_error_of_training(loader: Callable[..., PackedLoader]) -> None:
    def deadly(number: int) -> Sequence:
        if number == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return example(number)

    with pytest.raises(TrainingError, match="worker died"):
        mortal = loader(1, of=deadly, num_workers=1)
        for _ in range(40):
            mortal.next_batch()


def test_workers_are_no_more_than_lanes_compute_on_one_thread_and_take_no_randomness(
    loader: Callable[..., PackedLoader],
) -> None:
    def told(number: int) -> Sequence:
        return Sequence(np.array([os.getpid(), torch.get_num_threads()]), np.ones(2, bool), ())

    before = torch.get_rng_state()
    four = loader(4, of=told, num_workers=9, rank=1, world_size=2)
    ids = four.next_batch().ids_T.reshape(-1, 2)
    ids = ids[ids[:, 0] > 0]  # not the padding
    assert set(ids[:, 1].tolist()) == {1}
    assert len(set(ids[:, 0].tolist()) - {os.getpid()}) == 2
    assert torch.equal(before, torch.get_rng_state())
    four.close()
    for pid in set(ids[:, 0].tolist()):
        assert not Path(f"/proc/{pid}").exists()


SCRIPT = """
    import os, signal, sys, time
    import numpy as np
    from anygen.data.loader import PackedLoader, Packing
    from anygen.sequence import Sequence
    from anygen.training.interrupts import StopRequest

    def example(number):
        return Sequence(np.array([os.getpid()] * 20), np.ones(20, bool), ())

    loader = PackedLoader(example, packing=Packing(20, 1, 0), num_lanes=2, num_workers=2)
    with StopRequest() as stop:
        print(*sorted(set(loader.next_batch().ids_T.tolist())), flush=True)
        while stop.signal_number is None:
            time.sleep(0.02)
        for _ in range(20):  # the step that is under way needs its batches
            loader.next_batch()
    loader.close()
    print("closed", flush=True)
"""


def started() -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_only_the_main_one_which_lets_its_workers_go(name: signal.Signals) -> None:
    process, workers = started()
    assert len(workers) == 2
    os.killpg(process.pid, name)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("closed\n", "", 0)
    assert gone(workers, 1)


def test_workers_do_not_outlive_a_main_process_that_was_killed() -> None:
    process, workers = started()
    process.kill()
    process.wait()
    assert gone(workers, 15)
    process.communicate()
