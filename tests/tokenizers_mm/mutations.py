"""What tests of mutated files share: mutations of bytes, and a process of its own in which every file is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_mm.errors import InputError

ROOT = Path(__file__).parents[2]
NUM_FILES = 3000
MAX_EXTRA_MB, MAX_TIME_S = 300, 2.0

Chooser = np.random.Generator


def flipped(data: bytes, chooser: Chooser) -> bytes:
    out = bytearray(data)
    for place in chooser.integers(0, len(out), int(chooser.integers(1, 9))):
        out[place] = int(chooser.integers(256))
    return bytes(out)


def flipped_in_the_header(data: bytes, chooser: Chooser) -> bytes:
    return flipped(data[:80], chooser) + data[80:]


def truncated(data: bytes, chooser: Chooser) -> bytes:
    return data[: int(chooser.integers(1, len(data)))]


def inserted(data: bytes, chooser: Chooser) -> bytes:
    place = int(chooser.integers(len(data)))
    new = bytes(chooser.integers(0, 256, int(chooser.integers(1, 600)), dtype=np.uint8))
    return data[:place] + new + data[place:]


def shuffled(pieces: list[bytes], chooser: Chooser) -> list[bytes]:
    """Two pieces swapped, or one repeated up to 200 times, or one left out."""
    pieces = list(pieces)
    one, other = (int(i) for i in chooser.integers(0, len(pieces), 2))
    way = int(chooser.integers(3))
    if way == 0:
        pieces[one], pieces[other] = pieces[other], pieces[one]
    elif way == 1:
        pieces[one:one] = [pieces[other]] * int(chooser.choice([1, 2, 200]))
    else:
        del pieces[one]
    return pieces


def peak_mb() -> float:
    """Most memory this process ever held. `ru_maxrss` would start with what pytest holds: it survives exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def check_all(
    originals: Iterable[bytes],
    mutated: Callable[[int], bytes],
    load: Callable[[bytes], Any],
    is_good: Callable[[Any], bool],
) -> None:
    """In the process of its own: a line before each file, a line of figures at the end."""
    for data in originals:
        load(data)  # decoders are loaded before memory is counted
    begin_mb, faults, read, slowest_s = peak_mb(), [], 0, 0.0
    for seed in range(NUM_FILES):
        data = mutated(seed)
        os.write(1, f"{seed}\n".encode())  # unbuffered: a crash takes nothing with it
        begin_s, before_mb = time.process_time(), peak_mb()
        try:
            media = load(data)
            read += 1
            if not is_good(media):
                faults.append(f"{seed}: {media}")
            del media
        except InputError:
            pass
        except BaseException as error:
            faults.append(f"{seed}: {error!r}")
        slowest_s = max(slowest_s, time.process_time() - begin_s)
        if time.process_time() - begin_s > MAX_TIME_S:
            faults.append(f"{seed}: took {time.process_time() - begin_s:.1f} s")
        if peak_mb() > max(before_mb, begin_mb + MAX_EXTRA_MB):
            faults.append(f"{seed}: took {peak_mb() - begin_mb:.0f} MB")
    print(json.dumps({"faults": faults, "read": read, "slowest_s": slowest_s, "extra_mb": peak_mb() - begin_mb}))


def assert_bounded(program: str) -> None:
    """Run a test file as that process, and judge what it found."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    *seeds, last = result.stdout.splitlines() or [""]
    assert result.returncode == 0, f"crashed at {last}, mutated({last}) has its bytes; {result.stderr[-2000:]}"
    figures = json.loads(last)
    assert [int(seed) for seed in seeds] == list(range(NUM_FILES))
    assert figures["faults"] == []
    assert figures["extra_mb"] <= MAX_EXTRA_MB and figures["slowest_s"] <= MAX_TIME_S
    assert NUM_FILES // 10 < figures["read"] < NUM_FILES * 9 // 10, "mutations neither break everything nor nothing"
