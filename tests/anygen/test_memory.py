"""Freed memory stays in the process: the second use of a large block costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import resource, torch
from anygen.training.memory import keep_freed_memory
assert {keep} == 0 or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_large_block_is_used_again_without_page_faults() -> None:
    faults = {}
    for keep in (0, 1):
        program = PROGRAM.format(keep=keep)
        faults[keep] = int(
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True).stdout
        )
    assert faults[0] > 10 and faults[1] < faults[0] / 10, faults
