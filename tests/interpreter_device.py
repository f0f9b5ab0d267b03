"""A device for the cuda runner that runs an engine's kernels in Triton's interpreter, on the CPU: its slow twin.

What an engine holds of each kernel's source (module, function, constants, types) stands for the cubin.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

import tests.triton_interpreter  # noqa: F401 - mends the interpreter
from trtllm_cli.kernels.cuda.compiler import PACKAGE
from trtllm_cli.kernels.cuda.kernel import CompiledKernel, KernelSource

TORCH = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp8e4nv": torch.float8_e4m3fn, "*i8": torch.int8,
    "*u8": torch.uint8, "*i16": torch.int16, "*i32": torch.int32,
}  # fmt: skip


def fake_compile(sources, arch, progress=None):
    """In place of compile_kernels: everything about a kernel but its machine code."""
    compiled = {}
    for source in sources:
        function = _function(source.module, source.function)
        types, constants = dict(source.args), dict(source.constants)
        assert types.keys() | constants.keys() == set(function.arg_names), source
        names = tuple(name for name in function.arg_names if name in types)
        params = tuple("ptr" if types[name].startswith("*") else types[name].partition(":")[0] for name in names)
        compiled[source] = CompiledKernel(source.function, b"\0", params, names, source.num_warps, 0, True, 0, 0)
    return compiled


def _function(module: str, function: str) -> Any:
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)


class InterpreterDevice:
    torch_device = torch.device("cpu")
    name = "Triton's interpreter"

    def __init__(self) -> None:
        self._regions: list[torch.Tensor] = []
        self.launches = 0

    def empty(self, nbytes: int, what: str) -> torch.Tensor:
        region = torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float format
        self._regions.append(region)
        return region

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def load(self, kernel: dict[str, Any], cubin: bytes) -> dict[str, Any]:
        return kernel

    def prepare(self, kernel, grid, values):
        return _Launch(self, kernel, grid, values)

    def at(self, address: int, kind: str) -> torch.Tensor:
        """What is at an address, up to the end of its memory."""
        dtype = TORCH[kind]
        if address == 0:
            return torch.empty(0, dtype=dtype)
        for region in self._regions:
            start = address - region.data_ptr()
            if 0 <= start < len(region):
                end = start + (len(region) - start) // dtype.itemsize * dtype.itemsize
                return region[start:end].view(dtype)
        raise AssertionError("an address outside of all memory")

    def mm(self, x, w, bias, y):
        y.copy_(x.float() @ w.float() + (0 if bias is None else bias.float()))

    def scaled_mm(self, x, w, x_scale, w_scale, bias, y):
        y.copy_((x.float() @ w.float()) * x_scale * w_scale + (0 if bias is None else bias.float()))

    def capture(self, enqueue):
        return enqueue

    def active(self):
        return contextlib.nullcontext()

    def record(self):
        return lambda: None

    def free_memory(self):
        return 1 << 30, 1 << 30


class _Launch:
    def __init__(self, device, kernel, grid, values) -> None:
        self.device, self.kernel, self.grid, self.values = device, kernel, list(grid), list(values)
        source = kernel["source"]
        self.function = _function(source["module"], source["function"])
        self.constants = dict(source["constants"]) | {"PDL": False}
        if "ASM" in self.constants:
            self.constants["ASM"] = False
        self.types = dict(source["args"])

    def resize(self, grid, values):
        self.grid = list(grid)
        for place, value in values:
            self.values[place] = value

    def enqueue(self):
        self.device.launches += 1
        args = []
        for name, value in zip(self.kernel["names"], self.values, strict=True):
            kind = self.types[name]
            args.append(self.device.at(value, kind) if kind.startswith("*") else value)
        self.function[tuple(self.grid)](*args, **self.constants)


def source_of(kernel: dict[str, Any]) -> KernelSource:
    return KernelSource(**kernel["source"])
