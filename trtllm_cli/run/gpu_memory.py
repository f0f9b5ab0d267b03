"""What an engine takes of a GPU's memory beside its KV cache, and the account of where that memory goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import human_bytes
from trtllm_cli.errors import ResourceError
from trtllm_cli.run.backends.cuda_inputs import InputLayout, SpecialLayout

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig

ALIGNMENT = 256  # bytes: at multiples of which buffers begin
# What comes only when the first steps run and must find room then: CUDA graphs (some MiB for each size of a decode
# step), cuBLAS's workspaces (32 MiB for each stream), kernels of libraries that the driver loads when they are first
# used, the large pages in which torch's allocator takes memory.
RESERVE = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True)
class GpuNeeds:
    """Bytes that an engine takes on a GPU before it has a KV cache."""

    weights: int  # and the kernels' machine code
    activations: int
    scratch: int  # of kernels, token counts for penalties among it; the steps' inputs; what other ranks write to

    @classmethod
    def of(cls, plan: dict[str, Any], weights: int, limits: BuildConfig) -> GpuNeeds:
        """Of a cuda plan, the bytes of its rank file's tensors, and the limits that the engine was built with."""
        rows = {"num_tokens": limits.max_num_tokens, "num_logits": limits.max_batch_size}
        layouts = (InputLayout(limits, mixed=False), InputLayout(limits, mixed=True), SpecialLayout(limits))
        inputs = sum(layout.size * 4 for layout in layouts)
        last_tokens = (limits.max_batch_size + 1) * 4
        return cls(
            weights=weights,
            activations=_aligned(rows[b["rows"]] * b["bytes"] for b in plan["buffers"]),
            scratch=_aligned([*plan["scratch"].values(), *plan["exchange"].values()]) + inputs + last_tokens,
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.scratch

    def __str__(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "scratch memory": self.scratch}
        return ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())

    def check_free(self, free: int, total: int, limits: BuildConfig) -> None:
        """Raises ResourceError where a GPU with so many bytes free, of `total`, cannot hold it."""
        if self.total <= free:
            return
        raise ResourceError(
            f"the engine does not fit on the GPU: it takes {human_bytes(self.total)} before its KV cache ({self}), "
            f"{human_bytes(free)} of {human_bytes(total)} is free",
            fix=("end what else runs on the GPU (see nvidia-smi), or " if self.total <= total else "")
            + self._lower(free, limits),
        )

    def check_cap(self, cap: int, limits: BuildConfig) -> None:
        """Raises ResourceError where --max-gpu-memory leaves nothing for a KV cache."""
        needed = self.total + RESERVE
        if cap <= needed:
            raise ResourceError(
                f"a cap of {human_bytes(cap)} leaves no room for a KV cache: the engine takes "
                f"{human_bytes(self.total)} before it ({self}), and {human_bytes(RESERVE)} is kept for CUDA graphs and "
                "libraries",
                where="--max-gpu-memory",
                fix=f"give {-(-needed // _MIB) + 1}MiB or more"
                + (f", or {self._lower(cap - RESERVE, limits)}" if cap > RESERVE else ""),
            )

    def _lower(self, room: int, limits: BuildConfig) -> str:
        """What makes it smaller: the activations where these are too much, else the weights."""
        if self.weights < room:
            return (
                f"build the engine again with less than --max-num-tokens {limits.max_num_tokens} and "
                f"--max-batch-size {limits.max_batch_size}"
            )
        return "build it with smaller weights: --weight-dtype int8 or int4, or a checkpoint of trtllm quantize"


@dataclass(frozen=True)
class GpuMemory:
    """Where a GPU's memory goes, in bytes, once an engine is loaded, with or without its KV cache."""

    gpu: str  # its name
    total: int
    free: int
    needs: GpuNeeds
    kv_cache: int = 0

    @property
    def reserve(self) -> int:
        """Of what is free: kept so."""
        return min(RESERVE, self.free)

    @property
    def other(self) -> int:
        """The driver's own memory for this process, and other processes."""
        return max(0, self.total - self.free - self.needs.total - self.kv_cache)


def _aligned(sizes: Iterable[int]) -> int:
    """Bytes of these one after another."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
