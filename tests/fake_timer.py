"""A GPU that times linears as a test says, for builds on a machine without one."""

from __future__ import annotations

from collections.abc import Callable

from trtllm_cli.build.backends.cuda_linears import LinearLaunch, LinearShape
from trtllm_cli.kernels.cuda.kernel import CompiledKernel

Times = Callable[
    [str, int], float | None
]  # of a kernel's function, or "cuBLASLt", and a number of tokens: microseconds


def fragments_win(kernel: str, tokens: int) -> float | None:
    """Up to 8 tokens, which is not what ships for bfloat16."""
    if kernel == "cuBLASLt":
        return 20.0
    return 10.0 if kernel == "fragment_linear" and tokens <= 8 else 30.0


class FakeTimer:
    def __init__(self, times: Times = fragments_win, gpu: str = "NVIDIA H200") -> None:
        self.gpu, self.times = gpu, times
        self.calls: list[tuple[LinearShape, str, int]] = []
        self.closed = 0

    def kernel(self, shape: LinearShape, launch: LinearLaunch, kernel: CompiledKernel, tokens: int) -> float | None:
        assert kernel.entry == launch.source.function
        return self._time(shape, launch.source.function, tokens)

    def library(self, shape: LinearShape, dequantize: CompiledKernel | None, tokens: int) -> float | None:
        assert (dequantize is not None) == (shape.form in ("int8", "int4"))
        return self._time(shape, "cuBLASLt", tokens)

    def _time(self, shape: LinearShape, what: str, tokens: int) -> float | None:
        self.calls.append((shape, what, tokens))
        return self.times(what, tokens)

    def close(self) -> None:
        self.closed += 1
