"""Times linears on the GPU of this machine: each tactic, and cuBLASLt beside them.

What is timed runs in a CUDA graph, one launch after another over distinct weights (more than the L2 cache holds), on
random data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trtllm_cli.build.backends.cuda_candidates import candidates, timed_tokens
from trtllm_cli.build.backends.cuda_linears import (
    MOST_TOKENS,
    LinearLaunch,
    LinearShape,
    Tactic,
    dequantized,
    is_grouped,
    launch_of,
    packed_tensors,
    weight_only,
)
from trtllm_cli.build.timing_cache import TimedShape, TokenTimes
from trtllm_cli.errors import DeviceError, EngineError, ResourceError
from trtllm_cli.kernels.cuda.compiler import compile_kernels
from trtllm_cli.kernels.cuda.driver import Driver, LoadedKernel, gpu_arch
from trtllm_cli.kernels.cuda.graph_time import graph_milliseconds
from trtllm_cli.kernels.cuda.kernel import CompiledKernel, KernelSource

_DEVICE = "cuda"
_MOST_BYTES = 2 << 30  # of a shape's distinct weights
_LAUNCHES = (32, 512)  # in a graph: at least, and at most to fill the L2 cache so many times
_L2_TIMES = 4

Told = Callable[[int, int], None]  # how many are done, and of how many
Compiled = Mapping[KernelSource, CompiledKernel]


class Timer(Protocol):
    """A GPU that times linears, or in tests what stands for it.

    Raises ResourceError where it has no room for the weights, DeviceError where it fails.
    """

    gpu: str  # its name

    def kernel(self, shape: LinearShape, launch: LinearLaunch, kernel: CompiledKernel, tokens: int) -> float | None:
        """Microseconds of a launch; None if the GPU does not run it."""
        ...

    def library(self, shape: LinearShape, dequantize: CompiledKernel | None, tokens: int) -> float | None:
        """Microseconds of cuBLASLt, of int8 and int4 after `dequantize`; None if it has no way."""
        ...

    def close(self) -> None:
        """Gives back the GPU's memory."""
        ...


@dataclass(frozen=True)
class Work:
    """What is to be timed of a linear of so many tokens; `known` are the times that there are."""

    shape: TimedShape
    tokens: int
    tactics: list[Tactic]
    known: TokenTimes | None = None

    @property
    def count(self) -> int:
        """How many times are taken."""
        return len(self.tactics) + (self.known is None)

    @property
    def sources(self) -> list[KernelSource]:
        """The kernels that it takes."""
        linear = self.shape.linear
        plain = [dequantized(linear).source] if weight_only(linear) else []
        return plain + [launch_of(linear, tactic).source for tactic in self.tactics]


def missing(
    shape: TimedShape, known: Mapping[int, TokenTimes], arch: str, tokens: Sequence[int] = ()
) -> list[Work]:  # fmt: skip
    """What is not timed yet of a linear, for `tokens` or all that it is timed for."""
    work = []
    for count in tokens or timed_tokens(shape.linear, arch):
        times = known.get(count)
        done = times.tactics if times else {}
        tactics = [tactic for tactic in candidates(shape.linear, count, arch) if str(tactic) not in done]
        if times is None or tactics:
            work.append(Work(shape, count, tactics, times))
    return work


def compile_work(work: Sequence[Work], arch: str, told: Told | None = None) -> Compiled:
    """The kernels of all, by their sources. Raises what compile_kernels does."""
    sources = dict.fromkeys(source for each in work for source in each.sources)
    compiled = compile_kernels([source.on(arch) for source in sources], arch, told)
    return {source: compiled[source.on(arch)] for source in sources}


def time_work(
    timer: Timer, work: Sequence[Work], compiled: Compiled, told: Told | None = None
) -> Iterator[tuple[Work, TokenTimes]]:
    """Each with its times, what was known among them. Raises what the timer does."""
    done, total = 0, sum(each.count for each in work)
    for each in work:
        linear = each.shape.linear
        known = each.known or TokenTimes(
            tokens=each.tokens, cublas_us=_rounded(_library(timer, linear, compiled, each.tokens)), tactics={}
        )
        tactics = {}
        for tactic in each.tactics:
            launch = launch_of(linear, tactic)
            tactics[str(tactic)] = _rounded(timer.kernel(linear, launch, compiled[launch.source], each.tokens))
        yield each, known.updated(tactics)
        done += each.count
        if told is not None:
            told(done, total)


def _library(timer: Timer, shape: LinearShape, compiled: Compiled, tokens: int) -> float | None:
    if is_grouped(shape):
        return None  # which cuBLASLt does not compute
    plain = compiled[dequantized(shape).source] if weight_only(shape) else None
    return timer.library(shape, plain, tokens)


def _rounded(us: float | None) -> float | None:
    return None if us is None else max(round(us, 3), 1e-3)


def find_timer(arch: str) -> Timer | None:
    """This machine's GPU, if it is of the architecture and torch can use it."""
    return GpuTimer(Driver.open()) if gpu_arch() == arch and torch.cuda.is_available() else None


class GpuTimer:
    """See Timer. Takes the GPU's memory when it first times something."""

    def __init__(self, driver: Driver) -> None:
        self.gpu, self._driver = driver.name, driver
        self._loaded: dict[CompiledKernel, LoadedKernel] = {}
        self._operands: _Operands | None = None

    @functools.cached_property
    def _stream(self) -> Any:
        torch.zeros(1, device=_DEVICE)  # makes the context
        return torch.cuda.Stream()

    def kernel(self, shape: LinearShape, launch: LinearLaunch, kernel: CompiledKernel, tokens: int) -> float | None:
        """See Timer."""
        return self._microseconds(lambda: self._launches(self._of(shape), launch, kernel, tokens))

    def library(self, shape: LinearShape, dequantize: CompiledKernel | None, tokens: int) -> float | None:
        """See Timer."""

        def calls() -> list[Callable[[], object]]:
            operands = self._of(shape)
            if dequantize is None:
                return [functools.partial(operands.product, w, tokens) for w in operands.weights["w"]]
            writes = self._launches(operands, dequantized(shape), dequantize, tokens)
            product = functools.partial(operands.product, operands.plain.flatten(), tokens)
            return [functools.partial(_both, write, product) for write in writes]

        return self._microseconds(calls)

    def close(self) -> None:
        """See Timer."""
        self._operands = None
        torch.cuda.empty_cache()

    def _of(self, shape: LinearShape) -> _Operands:
        """The operands of a shape; those of the one before go."""
        if self._operands is None or self._operands.shape != shape:
            self._operands = None
            self._operands = _Operands(shape)
        return self._operands

    def _launches(
        self, operands: _Operands, launch: LinearLaunch, kernel: CompiledKernel, tokens: int
    ) -> list[Callable[[], object]]:
        """The kernel once for each of the weights."""
        if kernel not in self._loaded:
            self._loaded[kernel] = self._driver.load(kernel)
        grid = [-(-tokens // dim[1]) if isinstance(dim, tuple) else dim for dim in launch.grid]
        scratch = torch.zeros(max(launch.scratch, 16), dtype=torch.uint8, device=_DEVICE)
        operands.scratch = scratch  # which lives as long as it is in use
        shared = {
            "x": operands.x.data_ptr(), "y": operands.y.data_ptr(), "out": operands.plain.data_ptr(),
            "scratch": scratch.data_ptr(), "num_tokens": tokens, "eps": 0.0, "calls": 0, "call": 0,
        }  # fmt: skip
        calls: list[Callable[[], object]] = []
        for i in range(operands.count):
            values = shared | {role: tensor[i].data_ptr() for role, tensor in operands.weights.items()}
            made = self._loaded[kernel].prepare(
                [*grid, 1, 1][:3], [values.get(role, operands.ones.data_ptr()) for role in launch.operands]
            )
            made.set_stream(self._stream.cuda_stream)
            calls.append(made.enqueue)
        return calls

    def _microseconds(self, make: Callable[[], list[Callable[[], object]]]) -> float | None:
        """Of each of the calls; None where they cannot be made, and the GPU is as well as before."""
        try:
            stream = self._stream
            calls = make()
            stream.wait_stream(torch.cuda.current_stream())
            return 1e3 * graph_milliseconds(stream, lambda: [call() for call in calls]) / len(calls)
        except (RuntimeError, DeviceError, EngineError) as refused:
            if "out of memory" in str(refused):
                raise ResourceError(
                    "the GPU has no room for the weights of a linear", fix="end what else runs on it (see nvidia-smi)"
                ) from refused
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise DeviceError(
                    f"the GPU failed while kernels were timed: {str(refused).splitlines()[0]}",
                    fix="see nvidia-smi and dmesg (Xid errors)",
                ) from refused
            return None


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


class _Operands:
    """What a linear reads and writes, on the GPU: distinct weights, and one of everything else; random numbers."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        packed = packed_tensors(shape)
        self.count = _copies(sum(tensor.nbytes for tensor in packed.values()))
        roles = {"weight": "w", "scale": "w_scale", "zero": "w_zero"}
        self.weights = {roles[role]: _random(self.count, tensor) for role, tensor in packed.items()}
        x_type = torch.float8_e4m3fn if shape.form == "fp8" else torch.bfloat16
        self.x = torch.randn(MOST_TOKENS, shape.k, device=_DEVICE).to(x_type)
        self.y = torch.empty(MOST_TOKENS * shape.n, dtype=torch.bfloat16, device=_DEVICE)
        self.ones = torch.ones(
            max(shape.n, MOST_TOKENS * (shape.k // shape.group if shape.group else 1)), device=_DEVICE
        )
        plain = (shape.n, shape.k) if weight_only(shape) else (1, 8)
        self.plain = torch.empty(plain, dtype=torch.bfloat16, device=_DEVICE)
        self.scratch = self.ones

    def product(self, weight: torch.Tensor, tokens: int) -> None:
        """By torch, as an engine calls it for many tokens."""
        n, k = self.shape.n, self.shape.k
        x, y = self.x[:tokens], self.y[: tokens * n].view(tokens, n)
        w = weight[: n * k].view(n, k).t()
        if self.shape.form != "fp8":
            torch.mm(x, w, out=y)
            return
        by_row = "row" in (self.shape.w_scale, self.shape.x_scale)
        scales = (self.ones[:tokens, None], self.ones[None, :n]) if by_row else (self.ones[0], self.ones[0])
        torch._scaled_mm(x, w, *scales, out_dtype=torch.bfloat16, use_fast_accum=True, out=y)


def _copies(nbytes: int) -> int:
    """How many distinct weights of so many bytes."""
    least, most = _LAUNCHES
    fill = -(-_L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size // nbytes)
    return max(1, min(max(least, fill), most, _MOST_BYTES // nbytes))


def _random(count: int, like: torch.Tensor) -> torch.Tensor:
    """`count` flat tensors [count, elements], each beginning at a multiple of 256 bytes."""
    out = torch.empty(count, -(-like.numel() // 256) * 256, dtype=like.dtype, device=_DEVICE)
    for part in out:  # one at a time: random bytes are no random FP8 numbers, which are made of wider ones
        if like.dtype in (torch.uint8, torch.int8):
            part.random_()
        else:
            part.copy_(torch.randn(part.shape, device=_DEVICE, dtype=torch.bfloat16))
    return out
