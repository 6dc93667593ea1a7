# SPDX-License-Identifier: Apache-2.0
"""Memory of this process. Linux keeps its highest resident size (VmHWM) and forgets it on request (clear_refs)."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def highest_resident(work: Callable[[], object]) -> tuple[float, float]:
    """MB resident before ``work()``, and the highest during it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident()
    work()
    return before, resident("VmHWM")


def resident(field: str = "VmRSS") -> float:
    """MB under a name of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1000
    raise OSError(f"/proc/self/status has no {field}; peak memory can only be measured on Linux")
