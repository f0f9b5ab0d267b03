"""A device for the cuda runner that runs an engine's kernels in Triton's interpreter, on the CPU: its slow twin.

What an engine holds of each kernel's source (module, function, constants, types) stands for the cubin.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from typing import Any

import numpy as np
import torch

from tests import gluon_interpreter
from tests.thread_ranks import ThreadRank
from trtllm_cli.kernels.cuda.compiler import PACKAGE
from trtllm_cli.kernels.cuda.kernel import CompiledKernel, KernelSource

TORCH = {
    "*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp8e4nv": torch.float8_e4m3fn, "*i8": torch.int8,
    "*u8": torch.uint8, "*i16": torch.int16, "*i32": torch.int32, "*i64": torch.int64,
}  # fmt: skip


def fake_compile(sources, arch, progress=None):
    """In place of compile_kernels: everything about a kernel but its machine code."""
    compiled = {}
    for source in sources:
        function = function_of(source.module, source.function)
        types, constants = dict(source.args), dict(source.constants)
        assert types.keys() | constants.keys() == set(function.arg_names), source
        names = tuple(name for name in function.arg_names if name in types)
        params = tuple("ptr" if types[name].startswith("*") else types[name].partition(":")[0] for name in names)
        compiled[source] = CompiledKernel(source.function, b"\0", params, names, source.num_warps, 0, True, 0, 0)
    return compiled


def function_of(module: str, function: str) -> Any:
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)


class InterpreterDevice:
    """With `comm`, one of several, each in a thread: what ranks push is pulled when all have pushed."""

    torch_device = torch.device("cpu")
    name = "Triton's interpreter"
    is_checked = False  # it takes long, and kernels have tests of their own
    one_at_a_time = threading.Lock()  # the interpreter has one place for what it is at

    def __init__(self, comm: ThreadRank | None = None, *, sees_peers: bool = True) -> None:
        self._regions: list[torch.Tensor] = []
        self.launches = 0
        self.comm, self._sees_peers = comm, sees_peers
        self._group: tuple[int, ...] = ()
        self.calls: list[str] = []
        self._recorded: list[Any] | None = None

    def join(self, rank, comm):
        assert comm is self.comm

    def find_peers(self, memory, group, comm):
        self._group = group
        found = comm.exchange(str(memory.data_ptr()))
        return [int(found[rank]) for rank in group] if self._sees_peers else None

    def await_peers(self):
        if self._group:
            self.comm.all_reduce(np.zeros(1), self._group)

    def do(self, work, *args):
        """Does it, or notes it for a graph."""
        if self._recorded is None:
            work(*args)
        else:
            self._recorded.append((work, args))

    def capture(self, enqueue):
        self._recorded = recorded = []
        try:
            enqueue()
        finally:
            self._recorded = None

        def replay():
            for work, args in recorded:
                work(*args)

        return replay

    def milliseconds(self, enqueue):
        """Nothing is timed, and all is alike."""
        return 1.0

    def all_reduce(self, x, y, group):
        self.do(self._all_reduce, x, y, group)

    def _all_reduce(self, x, y, group):
        self.calls.append("all_reduce")
        total = x.float().numpy()
        self.comm.all_reduce(total, group)
        y.copy_(torch.from_numpy(total))

    def all_gather(self, x, y, group):
        self.do(self._all_gather, x, y, group)

    def _all_gather(self, x, y, group):
        self.calls.append("all_gather")
        y.copy_(torch.from_numpy(self.comm.all_gather(x.float().numpy(), group)))

    def send(self, x, to):
        self.do(lambda: self.comm.send(x.float().numpy(), to))

    def recv(self, y, source):
        self.do(self._recv, y, source)

    def _recv(self, y, source):
        got = np.empty(y.shape, np.float32)
        self.comm.recv(got, source)
        y.copy_(torch.from_numpy(got))

    def leave(self):
        pass

    def empty(self, nbytes: int, what: str) -> torch.Tensor:
        region = torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float format
        self._regions.append(region)
        return region

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def load(self, kernel: dict[str, Any], cubin: bytes, *, all_shared: bool) -> dict[str, Any]:
        return {**kernel, "all_shared": all_shared}

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

    blas = ""

    def algorithms(self, product):
        return []

    def product(self, product, algorithm):
        x, w, y, bias, scales = product
        of_x, of_w = scales or (1, 1)
        more = 0 if bias is None else bias.float()
        return lambda: self.do(lambda: y.copy_((x.float() @ w.float()) * of_x * of_w + more))

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
        self.function = function_of(source["module"], source["function"])
        self.num_warps, self.constants = source["num_warps"], dict(source["constants"]) | {"PDL": False}
        self.types = dict(source["args"])

    def resize(self, grid, values):
        self.grid = list(grid)
        for place, value in values:
            self.values[place] = value

    def enqueue(self):
        self.device.do(self._launch, list(self.grid), list(self.values))

    def _launch(self, grid, values):
        self.device.launches += 1
        args, by_name = [], dict(zip(self.kernel["names"], values, strict=True))
        for name, value in by_name.items():
            kind = self.types[name]
            args.append(self.device.at(value, kind) if kind.startswith("*") else value)
        if by_name.get("calls") == 0 or not self.constants.get("PUSH"):  # it meets no other
            self._run(grid, args, self.constants)
            return
        self._run(grid, args, self.constants | {"PULL": False})
        self.device.await_peers()  # and of programs that wait for each other, all have pushed
        self._run(grid, args, self.constants | {"PUSH": False})
        self.device.await_peers()  # and before anyone pushes again

    def _run(self, grid, args, constants):
        # Rows that are padding hold anything, and a device computes them without a word.
        with self.device.one_at_a_time, np.errstate(over="ignore", invalid="ignore"):
            gluon_interpreter.launch(self.function, tuple(grid), *args, num_warps=self.num_warps, **constants)


def source_of(kernel: dict[str, Any]) -> KernelSource:
    return KernelSource(**kernel["source"])
