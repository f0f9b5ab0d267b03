"""What a compiled GPU kernel is: the source it is made of, and the cubin with all that a launch needs to know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# What engines are built for, and the compute capability of each: A100, L40S and RTX 40, H100 and H200, B200, RTX 50.
ARCHITECTURES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_120a": (12, 0)}

# Bytes of shared memory that a program may have on them.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10, "sm_100a": 227 << 10, "sm_120a": 99 << 10}

Constant = int | float | bool | str | None

_NOT_TILES = 3 << 10  # bytes of shared memory that a kernel takes for other things than its tiles


def room_for_tiles(arch: str) -> int:
    """Bytes of shared memory for the tiles of a program."""
    return SHARED_MEMORY[arch] - _NOT_TILES


def stages_that_fit(arch: str, most: int, tiles: int) -> int:
    """Of a kernel's pipeline, at most `most`: as many as shared memory has room for, each of `tiles` bytes."""
    return max(1, min(most, room_for_tiles(arch) // tiles))


# An argument's type as Triton's signatures have it, "*bf16" or "i32"; ":16" behind an integer: it is a multiple of 16.
# Pointers always are: buffers and weights begin at multiples of 256 bytes.


@dataclass(frozen=True)
class KernelSource:
    """One specialization of a kernel of `kernels/triton/`; equal ones are compiled once."""

    module: str  # "norm": of trtllm_cli.kernels.triton
    function: str
    args: tuple[tuple[str, str], ...]  # run-time arguments, in any order: name, type
    constants: tuple[tuple[str, Constant], ...]  # compile-time ones
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(
        cls, module: str, function: str, args: Mapping[str, str], *, num_warps: int = 4, num_stages: int = 3,
        **constants: Constant,
    ) -> KernelSource:  # fmt: skip
        """A source; constants by name."""
        return cls(
            module, function, tuple(sorted(args.items())), tuple(sorted(constants.items())), num_warps, num_stages
        )

    @property
    def uses_pdl(self) -> bool:
        """Whether it may start before the kernel in front of it has ended, and waits itself."""
        return bool(dict(self.constants).get("PDL"))

    def on(self, arch: str) -> KernelSource:
        """As it is compiled for an architecture: before sm_90 there is no programmatic dependent launch."""
        if ARCHITECTURES[arch] >= (9, 0):
            return self
        constants = tuple((name, False if name == "PDL" else value) for name, value in self.constants)
        return replace(self, constants=constants)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code for one architecture."""

    entry: str  # the symbol in the cubin
    cubin: bytes
    params: tuple[str, ...]  # types of the run-time arguments in the kernel's order: "ptr", "i32", "i64", "fp32"
    names: tuple[str, ...]  # of the run-time arguments
    num_warps: int
    shared: int  # bytes
    uses_pdl: bool
    registers: int  # of a thread
    spills: int  # bytes of a thread
    ptx: str = ""

    def to_json(self) -> dict[str, Any]:
        """What a plan keeps of it; the cubin is a tensor of the engine."""
        return {
            "entry": self.entry, "names": list(self.names), "params": list(self.params), "num_warps": self.num_warps,
            "shared": self.shared, "uses_pdl": self.uses_pdl, "registers": self.registers, "spills": self.spills,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], cubin: bytes) -> CompiledKernel:
        """From `to_json`'s fields, among others, and the machine code."""
        return cls(
            entry=data["entry"], cubin=cubin, params=tuple(data["params"]), names=tuple(data["names"]),
            num_warps=data["num_warps"], shared=data["shared"], uses_pdl=data["uses_pdl"],
            registers=data["registers"], spills=data["spills"], ptx=data.get("ptx", ""),
        )  # fmt: skip


def launches_of(plan: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every launch of a cuda plan, whatever way or case it is for; see build/backends/cuda_program.py."""
    for step in (*plan["steps"], *plan["sampling"].values()):
        for _, launches in step["ways"]:
            yield from launches
        yield from step.get("without_peers", ())
        for of_way in step.get("others", ()):
            for launches in of_way:
                yield from launches
    yield from plan["copy"]
