"""How many KV cache blocks to make: what was asked for, or what the engine can use and the machine can spare.

In a machine's memory the default is what a full batch can use. A GPU's memory has nothing else to do, and blocks that
no request uses keep prompts for later ones: there the default is most of what is free.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.artifact import human_bytes
from trtllm_cli.errors import ResourceError, UsageError
from trtllm_cli.run.gpu_memory import RESERVE

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.run.gpu_memory import GpuMemory

DEFAULT_SHARE = 0.5  # of the memory that is free once the weights are loaded
DEFAULT_GPU_FRACTION = 0.9  # of a GPU's, once all but the KV cache is there; TensorRT-LLM's default
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: int | str, where: str) -> int:
    """Bytes from a number or text such as 2GiB, 512MB, 1.5G. Raises UsageError, naming the flag `where`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
    number = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if number < 1:
        raise UsageError(
            f"{value!r} is no amount of memory", where=where, fix="give bytes, or a number like 2GiB or 512MB"
        )
    return int(number)


def num_blocks(
    config: BuildConfig, bytes_per_block: int, *, memory: int | None, max_blocks: int | None, available: int | None
) -> int:
    """The number of blocks.

    By default as many as `max_batch_size` requests of `max_seq_len` need, in at most half of the `available` bytes
    (None: unknown). `memory` takes the place of both; `max_blocks` caps either. Raises ResourceError if not even one
    request of `max_seq_len` would fit, or if `memory` is more than there is.
    """
    one = config.blocks_per_sequence
    if memory is not None:
        if available is not None and memory > available:
            raise ResourceError(
                f"a KV cache of {human_bytes(memory)} does not fit: {human_bytes(available)} of memory is free",
                where="--kv-cache-memory",
                fix=f"give at most {human_bytes(available)}",
            )
        count = memory // bytes_per_block
        reason = f"{human_bytes(memory)} of memory holds"
    else:
        count = config.max_batch_size * one
        reason = "the default holds"
        if available is not None and (share := int(available * DEFAULT_SHARE) // bytes_per_block) < count:
            count = share
            reason = f"half of the {human_bytes(available)} of free memory holds"
    if max_blocks is not None and max_blocks < count:
        count, reason = max_blocks, f"the cap of {max_blocks} blocks is"
    if count < one:
        raise ResourceError(
            _too_small(config, bytes_per_block, count, reason),
            where="--kv-cache-memory",
            fix=f"give --kv-cache-memory {human_bytes(one * bytes_per_block).replace(' ', '')} or more, "
            "free some memory, or rebuild the engine with a lower --max-seq-len",
        )
    return count


def num_gpu_blocks(
    config: BuildConfig,
    bytes_per_block: int,
    gpu: GpuMemory,
    *,
    fraction: float | None = None,
    memory: int | None = None,
    cap: int | None = None,
    max_blocks: int | None = None,
) -> int:
    """The number of blocks on a GPU, on which is everything but the KV cache.

    As many as a `fraction` of what is free holds; `memory` (bytes) takes its place. RESERVE stays free in any case.
    `cap` is on all bytes that the engine takes there, the reserve among them; `max_blocks` caps too. Raises
    ResourceError if not even one request of `max_seq_len` would fit, or if `memory` is more than there is.
    """
    room, why = gpu.free - RESERVE, f"of {human_bytes(gpu.free)} free on the GPU {human_bytes(RESERVE)} is kept free"
    if cap is not None and (left := cap - gpu.needs.total - RESERVE) < room:
        room, why = left, f"{human_bytes(cap)} less {gpu.needs} and {human_bytes(RESERVE)} kept free"
    room = max(0, room)
    where, size, reason = "--max-gpu-memory" if cap is not None else None, room, f"{human_bytes(room)} ({why}) holds"
    if memory is not None:
        if memory > room:
            raise ResourceError(
                f"a KV cache of {human_bytes(memory)} does not fit: there is room for {human_bytes(room)} ({why})",
                where="--kv-cache-memory",
                fix=f"give less, or leave it out for what fits ({gpu.needs} are taken)",
            )
        where, size, reason = "--kv-cache-memory", memory, f"{human_bytes(memory)} of memory holds"
    else:
        fraction = DEFAULT_GPU_FRACTION if fraction is None else fraction
        if (share := int(gpu.free * fraction)) < room:
            where, size = "--kv-cache-free-gpu-memory-fraction", share
            reason = f"{fraction:g} of the {human_bytes(gpu.free)} free on the GPU holds"
    count = size // bytes_per_block
    if max_blocks is not None and max_blocks < count:
        count, where, reason = max_blocks, "--max-num-blocks", f"the cap of {max_blocks} blocks is"
    if count < config.blocks_per_sequence:
        raise ResourceError(
            _too_small(config, bytes_per_block, count, reason),
            where=where,
            fix=(f"give a higher {where}, " if where else "")
            + "end what else runs on the GPU (see nvidia-smi), or rebuild the engine with a lower --max-seq-len or "
            f"with --kv-cache-dtype fp8 ({gpu.needs} are taken)",
        )
    return count


def _too_small(config: BuildConfig, bytes_per_block: int, count: int, reason: str) -> str:
    one = config.blocks_per_sequence
    return (
        f"the KV cache is too small: one request of max_seq_len {config.max_seq_len} takes {one} blocks "
        f"({human_bytes(one * bytes_per_block)}), {reason} {count} ({human_bytes(count * bytes_per_block)})"
    )


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, within its control group; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    free = kib * 1024
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            top = int((root / limit).read_text())
            stat = dict(line.split() for line in ((root / usage).parent / "memory.stat").read_text().splitlines())
            used = int((root / usage).read_text()) - int(stat.get(cached, 0))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        free = min(free, max(0, top - used))
    return free
