"""An interpreter of the project's Gluon kernels, on Triton's: their source, with a `gl` of Triton's language.

Layouts say which thread has what, which changes no result: they are ignored, but for where shared memory puts things.
What threads must wait for is checked: asynchronous copies land when they are waited for and not before, as do products;
memory that others wrote is read behind a barrier, by tensor cores behind a fence as well; and nothing is overwritten
that was read since the last barrier, or that a product under way reads. Warps that are specialized run one at a time,
each until it waits for what the others have not done yet.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

import tests.triton_interpreter as mended
from trtllm_cli.kernels.cuda.compiler import PACKAGE

_GLUON = "triton.experimental.gluon"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constants: Any) -> None:
    """Runs a kernel, of Gluon's or Triton's, in the interpreter."""
    if type(kernel).__name__ == "GluonJITFunction":
        kernel = getattr(_interpreted(kernel.fn.__module__), kernel.fn.__name__)
    _program.num_warps = num_warps
    _program.begin(None)
    kernel[grid](*args, **constants)
    assert not _program.products, "a product was never waited for"


@functools.cache
def _interpreted(name: str) -> ModuleType:
    """A module of kernels in Gluon, for the interpreter."""
    return load(name, _file_of(name))


def load(name: str, path: Path) -> ModuleType:
    """A module of kernels in Gluon as `path` has it."""
    needed = {other: _interpreted(other) for other in _used(path)}
    spec = importlib.util.spec_from_file_location(f"interpreted.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.tl = tl  # where the interpreter looks for what it is to patch
    with mock.patch.dict(sys.modules, {**_LANGUAGE, **needed, spec.name: module}):
        spec.loader.exec_module(module)
    return module


def load_changed(module: ModuleType, line: str, instead: str, folder: Path) -> ModuleType:
    """A module of kernels with another line."""
    name, changed = module.__name__, folder / "kernel.py"
    source = _file_of(name).read_text()
    assert source.count(line) == 1
    changed.write_text(source.replace(line, instead))
    return load(name, changed)


def _used(path: Path) -> list[str]:
    """The modules of kernels in Gluon that one imports."""
    names = re.findall(rf"^from ({PACKAGE}\.\w+) import", path.read_text(), re.MULTILINE)
    return [name for name in names if f"from {_GLUON} import" in _file_of(name).read_text()]


def _file_of(name: str) -> Path:
    source = importlib.util.find_spec(name)
    assert source is not None
    assert source.origin is not None
    return Path(source.origin)


class _Program:
    """What is under way in the program that runs."""

    num_warps = 0

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, index: Any) -> None:
        """Another program begins, of this place in the grid."""
        self.index = index
        self.asked: list[_Copy] = []  # copies, not in a group yet
        self.groups: list[list[_Copy]] = []
        self.products: list[tuple[Callable[[], None], list[_Memory]]] = []
        self.of_others: list[list[tuple[Callable[[], None], list[_Memory]]]] = []  # products of specialized warps
        self.buffers: list[_Buffer] = []

    @property
    def under_way(self) -> list[tuple[Callable[[], None], list[_Memory]]]:
        """All products that nobody has waited for."""
        return [*self.products, *(product for products in self.of_others for product in products)]


_program = _Program()


@dataclass
class _Copy:
    memory: _Memory
    values: np.ndarray


_MOST_PARTITIONS = 3


def _here() -> int:
    """Which of the specialized warps run; 0 where none are."""
    return _partitions[-1].index if _partitions else 0


class _Buffer:
    """Shared memory, an element of it at a time."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.values = np.zeros(size, interpreter._get_np_dtype(dtype))
        self.there = np.zeros(size, bool)
        self.behind_barrier = np.zeros((_MOST_PARTITIONS, size), bool)  # for each of the specialized warps
        self.behind_fence = np.zeros(size, bool)
        self.read = np.zeros(size, bool)  # since the last barrier
        self.by = np.zeros(size, np.int8)  # which of the specialized warps wrote it
        self.barriers: dict[int, _Barrier] = {}  # that lie in it


@dataclass
class _Barrier:
    """An mbarrier: how many arrivals end a phase, how many are left, the phase, and copies that arrive with them."""

    count: int
    left: int
    phase: int = 0
    copies: list[_Copy] = field(default_factory=list)


class _Memory:
    """A view of shared memory: where each of its elements lies."""

    def __init__(self, buffer: _Buffer, dtype: Any, places: np.ndarray) -> None:
        self.buffer, self.dtype, self.places = buffer, dtype, places

    @property
    def shape(self) -> list[int]:
        return list(self.places.shape)

    def index(self, i: Any) -> _Memory:
        i = int(i)
        assert 0 <= i < len(self.places), f"slot {i} of {len(self.places)}"
        return _Memory(self.buffer, self.dtype, self.places[i])

    def permute(self, order: Any) -> _Memory:
        return _Memory(self.buffer, self.dtype, self.places.transpose([int(i) for i in order]))

    def slice(self, start: Any, length: Any, dim: Any = 0) -> _Memory:
        places = self.places.take(np.arange(int(start), int(start) + int(length)), axis=int(dim))
        return _Memory(self.buffer, self.dtype, places)

    def reinterpret(self, dtype: Any, shape: Any, layout: Any) -> _Memory:
        assert dtype == self.dtype
        assert self.places.size == len(self.buffer.values), "only memory as a whole is seen as another shape"
        return _Memory(self.buffer, dtype, _places(shape, layout))

    def load(self, layout: Any = None) -> tl.tensor:
        assert self.buffer.there[self.places].all(), "what is read has not landed"
        assert self.buffer.behind_barrier[_here(), self.places].all(), "no barrier between a write and a read"
        self.buffer.read[self.places] = True
        return _tensor(self.buffer.values[self.places], self.dtype)

    def store(self, value: tl.tensor) -> None:
        assert value.dtype == self.dtype
        self.overwrite()
        self.land(value.handle.data)

    def for_tensor_cores(self) -> TensorHandle:
        """The operand, which was to be behind a fence; until the product is waited for it is being read."""
        operand = self.load().handle
        assert self.buffer.behind_fence[self.places].all(), "no fence between a write and a product"
        return operand

    def overwrite(self) -> None:
        assert not self.buffer.read[self.places].any(), "no barrier between a read and a write"
        for _, operands in _program.under_way:
            for operand in operands:
                shared = operand.buffer is self.buffer and np.isin(operand.places, self.places).any()
                assert not shared, "a product under way reads what is overwritten"
        for state in (self.buffer.there, *self.buffer.behind_barrier, self.buffer.behind_fence):
            state[self.places] = False
        self.buffer.by[self.places] = _here()

    def land(self, values: np.ndarray) -> None:
        self.buffer.values[self.places] = values
        self.buffer.there[self.places] = True


def _tensor(values: np.ndarray, dtype: Any) -> tl.tensor:
    return tl.tensor(TensorHandle(values, dtype), tl.block_type(dtype, list(values.shape)))


def _allocate(dtype: Any, shape: Any, layout: Any) -> _Memory:
    index = interpreter.interpreter_builder.grid_idx
    if _program.index is not index:  # another program
        assert not _program.products, "a product was never waited for"
        _program.begin(index)
    places = _places(shape, layout)
    _program.buffers.append(_Buffer(places.size, dtype))
    return _Memory(_program.buffers[-1], dtype, places)


def _places(shape: Any, layout: Any) -> np.ndarray:
    """Where each element lies; swizzled rows of 128 bytes lie below each other, panel by panel."""
    shape = [int(n) for n in shape]
    if layout.panel is None:
        return np.arange(np.prod(shape)).reshape(shape)
    *leading, rows, columns = shape
    assert rows % 8 == 0
    assert columns % layout.panel == 0
    places = np.arange(np.prod(shape)).reshape([*leading, columns // layout.panel, rows, layout.panel])
    return np.moveaxis(places, -3, -2).reshape(shape)


def _copy(memory: _Memory, pointer: tl.tensor, mask: tl.tensor | None = None) -> None:
    """Zeros where `mask` is not."""
    assert list(pointer.shape) == memory.shape, f"{pointer.shape} copied to {memory.shape}"
    memory.overwrite()
    values = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)
    _program.asked.append(_Copy(memory, values.handle.data))


def _commit_group() -> None:
    _program.groups.append(_program.asked)
    _program.asked = []


def _wait_group(most: Any) -> None:
    while len(_program.groups) > int(most):
        for copy in _program.groups.pop(0):
            copy.memory.land(copy.values)


def _barrier() -> None:
    for buffer in _program.buffers:
        buffer.behind_barrier[_here()] |= buffer.there & (buffer.by == _here())
        buffer.read[:] = False


def _fence() -> None:
    for buffer in _program.buffers:
        buffer.behind_fence |= buffer.there


class _Partitions:
    """Specialized warps, each in a thread; who has the turn runs."""

    def __init__(self, parts: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self._turn = threading.Condition()
        self._running, self._left = 0, dict.fromkeys(range(len(parts)))
        self._error: BaseException | None = None
        self._idle = 0  # how many have found nothing to do since one did something
        self._parts = parts

    def run(self) -> None:
        """Until all have ended."""
        _program.of_others = [[] for _ in self._parts]
        threads = [threading.Thread(target=self._run, args=(i, *part)) for i, part in enumerate(self._parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, index: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._take(index)
        try:
            if self._error is None:
                function(*args)
                assert not _program.products, "a product was never waited for"
        except BaseException as e:  # whoever started the warps raises it
            self._error = self._error or e
        self._left.pop(index)
        self._idle = 0
        self._pass_on(index)

    def _take(self, index: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == index)
        _program.products = _program.of_others[index]
        self.index = index

    def _pass_on(self, index: int) -> None:
        with self._turn:
            later = [i for i in self._left if i > index]
            self._running = min(later or self._left or [-1])
            self._turn.notify_all()

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Until others have done what this one waits for."""
        index = self.index
        while not is_done():
            self._idle += 1
            assert self._error is None, "other warps failed"
            assert self._idle <= len(self._left), "all warps wait for each other"
            self._pass_on(index)
            self._take(index)
        self._idle = 0


_partitions: list[_Partitions] = []


def _warp_specialize(parts: Any, warps: Any, registers: Any) -> None:
    _partitions.append(_Partitions([(function, tuple(args)) for function, args in parts]))
    try:
        _partitions[-1].run()
    finally:
        _partitions.pop()


def _barrier_at(memory: _Memory) -> _Barrier:
    return memory.buffer.barriers[int(memory.places.reshape(-1)[0])]


def _init_barrier(memory: _Memory, count: Any) -> None:
    memory.buffer.barriers[int(memory.places.reshape(-1)[0])] = _Barrier(int(count), int(count))


def _arrive(memory: _Memory, *, count: Any = 1) -> None:
    barrier = _barrier_at(memory)
    barrier.left -= int(count)
    assert barrier.left >= 0, "more arrivals than a phase has"
    if barrier.left == 0:
        barrier.left, barrier.phase = barrier.count, barrier.phase + 1


def _arrive_with_copies(memory: _Memory, increment_count: Any = True) -> None:
    """Each thread of a warpgroup, once its copies have landed."""
    assert not increment_count
    _barrier_at(memory).copies += _program.asked
    _program.asked = []
    _arrive(memory, count=128)


def _wait_for(memory: _Memory, phase: Any) -> None:
    """The end of a phase of this parity; what others wrote before they arrived may be read from then on."""
    barrier, parity = _barrier_at(memory), int(phase)
    _partitions[-1].wait(lambda: barrier.phase % 2 != parity)
    for copy in barrier.copies:
        copy.memory.land(copy.values)
    barrier.copies = []
    for buffer in _program.buffers:
        buffer.behind_barrier[_here()] |= buffer.there & (buffer.by != _here())
        buffer.read[:] = False


def _mma(a: Any, b: Any, acc: tl.tensor, *, use_acc: bool = True, is_async: bool = False) -> tl.tensor:
    """a [m, k] times b [k, n], which is shared memory; NaN, of int8 the least number, until it is waited for."""
    operands = [x for x in (a, b) if isinstance(x, _Memory)]
    left, right = (x.for_tensor_cores() if isinstance(x, _Memory) else x.handle for x in (a, b))
    whole = left.data.dtype == np.int8
    kind, unknown = (np.int32, -(2**31)) if whole else (np.float32, np.nan)
    found = np.full((left.data.shape[0], right.data.shape[1]), unknown, kind)

    def multiply() -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            product = mended.widened(left).astype(np.float32) @ mended.widened(right)
        found[:] = product + acc.handle.data if use_acc else product

    _program.products.append((multiply, operands))
    if not is_async:
        _mma_wait(0, [])
    return _tensor(found, tl.int32 if whole else tl.float32)


def _mma_wait(most: Any, values: Any) -> Any:
    while len(_program.products) > int(most):
        _program.products.pop(0)[0]()
    return values[0] if len(values) == 1 else tuple(values)


def _mma_v2(a: tl.tensor, b: tl.tensor, acc: tl.tensor, input_precision: Any = None) -> tl.tensor:
    """a [warps, m, k] times b [warps, k, n], of registers, plus acc."""
    return tl.dot(a, b, acc=acc, input_precision=input_precision)


def _assembly(text: str, constraints: str, args: Any, *, dtype: Any, is_pure: bool, pack: int) -> Any:
    """PTX that takes `pack` elements of each argument in registers, and gives as many of each type."""
    given = np.broadcast_arrays(*(arg.handle.data for arg in args))
    registers = [r for data in given for r in np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32).T]
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    counts = [pack * interpreter._get_np_dtype(kind).itemsize // 4 for kind in kinds]
    values = {f"${sum(counts) + i}": register for i, register in enumerate(registers)}
    for op, operands in re.findall(r"^ *([a-z]\w*(?:\.\w+)+) ([^;]+);", text, re.MULTILINE):
        to, *sources = operands.split(", ")
        values[to] = _PTX[op](*(values[s] if s in values else np.uint32(int(s, 0)) for s in sources))
    outputs = iter([values[f"${i}"] for i in range(sum(counts))])
    tensors = []
    for kind, count in zip(kinds, counts, strict=True):
        found = np.stack([next(outputs) for _ in range(count)], -1)
        tensors.append(_tensor(found.view(interpreter._get_np_dtype(kind)).reshape(given[0].shape), kind))
    return tuple(tensors) if isinstance(dtype, tuple) else tensors[0]


def _prmt(a: np.ndarray, b: np.ndarray, places: np.uint32) -> np.ndarray:
    octets = np.stack([a, b], -1).view(np.uint8)
    selected = octets[:, [int(places) >> shift & 7 for shift in (0, 4, 8, 12)]]
    return np.ascontiguousarray(selected).view(np.uint32)[:, 0]


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.uint32) -> np.ndarray:
    found = a ^ a
    for i in range(8):
        if int(table) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _of_pairs(function: Callable[..., torch.Tensor]) -> Callable[..., np.ndarray]:
    """A function of float32 on registers of two bf16."""

    def computed(*registers: np.ndarray) -> np.ndarray:
        halves = [(np.stack([r << 16, r & 0xFFFF0000], -1)).view(np.float32) for r in map(np.uint32, registers)]
        return _as_pair(function(*map(torch.from_numpy, halves)))

    return computed


def _as_pair(x: torch.Tensor) -> np.ndarray:
    """float32 [., 2] to registers of two bf16, rounded to even."""
    return x.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint32)[:, 0]


_PTX: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "cvt.rn.bf16x2.f32": lambda high, low: _as_pair(torch.from_numpy(np.stack([low, high], -1).view(np.float32))),
    "sub.rn.bf16x2": _of_pairs(torch.sub),
    "mul.rn.bf16x2": _of_pairs(torch.mul),
    "fma.rn.bf16x2": _of_pairs(lambda a, b, c: a * b + c),
}


def _jit(fn: Callable[..., Any]) -> Any:
    function = triton.jit(fn)
    rewritten = function.rewrite()
    rewritten.__annotations__ = {name: kind.replace("gl.", "tl.") for name, kind in rewritten.__annotations__.items()}
    return function


def _layout(*args: Any, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(panel=None)


def _modules() -> dict[str, ModuleType]:
    """What the kernels import, by name."""
    names = ["", ".language", ".language.nvidia", ".language.nvidia.hopper", ".language.nvidia.ampere"]
    modules = {f"{_GLUON}{name}": ModuleType(f"{_GLUON}{name}") for name in names}
    modules["triton.experimental"] = ModuleType("triton.experimental")
    gluon, gl, _, hopper, ampere, experimental = modules.values()
    experimental.gluon = gluon
    gluon.jit, gluon.constexpr_function, gluon.language = _jit, triton.constexpr_function, gl
    gl.__getattr__ = functools.partial(getattr, tl)  # when it is called, for the interpreter patches tl
    for name in ("BlockedLayout", "SliceLayout", "DotOperandLayout", "DistributedLinearLayout",
                 "NVMMADistributedLayout", "SwizzledSharedLayout"):  # fmt: skip
        setattr(gl, name, _layout)
    gl.NVMMASharedLayout = lambda swizzle, bits, rank: SimpleNamespace(panel=swizzle * 8 // bits)
    gl.arange = lambda start, end, layout=None: tl.arange(start, end)
    gl.zeros = lambda shape, dtype, layout=None: tl.zeros(shape, dtype)
    gl.full = lambda shape, value, dtype, layout=None: tl.full(shape, value, tl.float32).to(dtype)
    gl.convert_layout = lambda x, layout, assert_trivial=False: x
    gl.num_warps = lambda: _program.num_warps
    gl.allocate_shared_memory, gl.barrier, gl.inline_asm_elementwise = _allocate, _barrier, _assembly
    gl.shared_memory_descriptor = _Memory
    hopper.async_copy = ampere.async_copy = SimpleNamespace(
        async_load=_copy, commit_group=_commit_group, wait_group=_wait_group
    )
    hopper.async_copy.mbarrier_arrive = _arrive_with_copies
    hopper.mbarrier = SimpleNamespace(init=_init_barrier, arrive=_arrive, wait=_wait_for, MBarrierLayout=_layout)
    gl.warp_specialize = _warp_specialize
    ampere.mma_v2 = _mma_v2
    hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _fence, _mma, _mma_wait
    return modules


_LANGUAGE = _modules()
tl.block_type.layout = None
