"""A source as a program that computes: what calibration and the accuracy report run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.artifact import human_bytes
from trtllm_cli.convert.pipeline import Decided, whole_tensor
from trtllm_cli.convert.reader import Reader
from trtllm_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.evaluate.program import Program

Progress = Callable[[str, int, int], None]


def load_program(reader: Reader, whole: Decided, device: str = "auto", progress: Progress | None = None) -> Program:
    """The source as a program of one rank. Raises ResourceError if it does not fit into memory."""
    import torch

    from trtllm_cli.evaluate.program import Program
    from trtllm_cli.evaluate.whole_model import whole_graph

    graph = whole_graph(whole.config)
    place = chosen_device(device)
    dtype = _dtype(sum(math.prod(weight.shape) for weight in graph.weights.values()), place)
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        done += 1
        if progress is not None:
            progress("read", done, len(graph.weights))
        return whole_tensor(reader, whole, name)

    return Program(graph, read, getattr(torch, dtype), place)


def chosen_device(device: str) -> str:
    """ "cuda" or "cpu". Raises UsageError for what this torch does not have."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device is {device!r}", where="--device", fix="choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no GPU here", where="--device", fix="--device cpu")
    return device


def _dtype(elements: int, device: str) -> str:
    """float32 where two such models fit into memory, else bfloat16."""
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _available_bytes()
    for name, size in (("float32", 4), ("bfloat16", 2)):
        if 2.2 * size * elements < free:
            return name
    raise ResourceError(
        f"calibrating holds the model and its quantized twin, {human_bytes(int(4.4 * elements))} in bfloat16; "
        f"{human_bytes(free)} are free",
        where="--device",
        fix="use a larger machine, or `trtllm convert --qformat int8_wo` or int4_wo, which stream",
    )


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
