"""Keep freed memory in the process: on a CPU a training step frees and asks for the same gigabyte again and again.

glibc hands large blocks back to the kernel, which must zero every page of them before the next step can use it.
"""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks instead of returning them; False where the C library is another one.

    It holds for the rest of the process, whose memory stays at its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # musl, macOS, Windows
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
