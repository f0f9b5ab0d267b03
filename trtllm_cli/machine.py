"""What this machine has, and how much of it torch takes."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def available_cores(pid: int = 0) -> int:
    """Cores that this process may run on, or another one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(pid))
    return os.cpu_count() or 1


def default_threads(local_ranks: int = 1) -> int:
    """Threads for one of the ranks on this machine: the cores that a launcher has bound it to, or its share of all."""
    return max(1, min(available_cores(), (os.cpu_count() or 1) // local_ranks))


def cpu_name() -> str:
    """The processor's name, as the system has it."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch on so many threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
