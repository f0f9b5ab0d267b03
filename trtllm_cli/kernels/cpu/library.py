"""Loads the compiled kernels, and describes the steps that they run. Needs neither torch nor a compiler.

A plan is an array of `TlStep`, one per op, whose pointers are resolved addresses; steps.py lists what makes them.
`Pool.run` computes all of them in one call into C++. Activations are float32, row-major `[rows, width]`; `rows` is the
batch's `num_tokens` or its `num_logits`, so one plan serves every batch. Addresses are plain integers
(`array.ctypes.data`); whoever builds a plan keeps the memory alive. Buffers should begin at a multiple of 64 bytes.

A row's result is the same bits whatever other rows are in the batch, however its prompt was cut into steps, and
whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from trtllm_cli.errors import EngineError, ResourceError

if TYPE_CHECKING:
    from trtllm_cli.run.model_inputs import ModelInputs

ABI_VERSION = 3  # of the structures below; steps.h has the same
TILE = 16  # outputs of a linear layer that lie side by side

Rows = Literal["num_tokens", "num_logits"]
WeightFormat = Literal["float32", "bfloat16", "int8", "int4", "fp8"]
ActivationName = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "swiglu_oai"]

ROWS: dict[Rows, int] = {"num_tokens": 0, "num_logits": 1}
FORMATS: dict[WeightFormat, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "fp8": 4}
ACTIVATIONS: dict[ActivationName, int] = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "swiglu_oai": 4}


class Op(IntEnum):
    """What a step computes; the values are steps.h's."""

    EMBEDDING = 0
    RMS_NORM = 1
    ADD_RMS_NORM = 2
    LINEAR = 3
    GATED_ACT = 4
    ADD = 5
    ROPE_APPEND = 6
    PAGED_ATTENTION = 7
    GATHER_ROWS = 8
    COPY_ROWS = 9
    LAYER_NORM = 10
    ADD_LAYER_NORM = 11
    ACT = 12
    MUL = 13
    SCALE = 14
    SOFTCAP = 15
    ROPE = 16
    KV_APPEND = 17
    QDQ = 18
    GATHER_COLUMNS = 19
    ROUTE = 20
    EXPERT_LINEAR = 21
    EXPERT_GATED_ACT = 22
    COMBINE = 23
    CONCAT = 24


class TlStep(ctypes.Structure):
    """One op with its parameters; made by the functions of steps.py, never by hand."""

    _fields_ = (
        ("op", ctypes.c_int32),
        ("i", ctypes.c_int32 * 16),
        ("f", ctypes.c_float * 4),
        ("p", ctypes.c_void_p * 12),
    )


class TlBatch(ctypes.Structure):
    """run.model_inputs.ModelInputs, by address; arrays of int32."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_seqs", ctypes.c_int32),
        ("num_logits", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),  # the width of block_tables
        ("input_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("logits_indices", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, inputs: ModelInputs) -> TlBatch:
        """The batch of `inputs`, which must outlive it."""
        return cls(
            num_tokens=len(inputs.input_ids),
            num_seqs=len(inputs.seq_lens),
            num_logits=len(inputs.logits_indices),
            max_blocks=inputs.block_tables.shape[1],
            input_ids=inputs.input_ids.ctypes.data,
            positions=inputs.positions.ctypes.data,
            slot_mapping=inputs.slot_mapping.ctypes.data,
            block_tables=inputs.block_tables.ctypes.data,
            query_start=inputs.query_start.ctypes.data,
            seq_lens=inputs.seq_lens.ctypes.data,
            logits_indices=inputs.logits_indices.ctypes.data,
        )


def make_step(op: Op, ints: Sequence[int], floats: Sequence[float], pointers: Sequence[int | None]) -> TlStep:
    """A step of these parameters, in steps.h's places."""
    step = TlStep(op=op)
    step.i[: len(ints)] = list(ints)
    step.f[: len(floats)] = list(floats)
    step.p[: len(pointers)] = [p or None for p in pointers]
    return step


def linear_step(
    x: int,
    out: int,
    weight: int,
    *,
    fmt: WeightFormat,
    in_features: int,
    out_features: int,
    scale: int | None = None,
    bias: int | None = None,
    group_size: int | None = None,
    minima: bool = False,
    accumulate: bool = False,
    stack: int = 1,
    rows: Rows = "num_tokens",
    x_stride: int | None = None,
    out_stride: int | None = None,
) -> TlStep:
    """out [rows, out_features] = x [rows, in_features] @ weight.T + bias; `out +=` with `accumulate`.

    `weight` and `scale` are what pack.pack made, `fmt`, `group_size` and `minima` what pack.step_arguments says; bias
    is float32 [out_features]. With `stack`, so many weights lie one after another, and each multiplies its own columns
    of x [rows, stack * in_features] to its own columns of out. The strides are elements from row to row, by default the
    widths. `out` must not overlap `x`.
    """
    ints = (
        ROWS[rows], in_features, out_features, FORMATS[fmt], group_size or 0, int(accumulate),
        x_stride or stack * in_features, out_stride or stack * out_features, int(minima), stack,
    )  # fmt: skip
    return make_step(Op.LINEAR, ints, (), (x, out, weight, scale, bias))


class Library:
    """The shared library, loaded into this process for good."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._lib = handle
        self._lib.tl_abi_version.restype = ctypes.c_int32
        self._lib.tl_pool_create.argtypes = (ctypes.c_int32,)
        self._lib.tl_pool_create.restype = ctypes.c_void_p
        self._lib.tl_pool_destroy.argtypes = (ctypes.c_void_p,)
        self._lib.tl_pool_destroy.restype = None
        self._lib.tl_run.argtypes = (
            ctypes.c_void_p, ctypes.POINTER(TlStep), ctypes.c_int32, ctypes.POINTER(TlBatch),
        )  # fmt: skip
        self._lib.tl_run.restype = ctypes.c_int32
        found = self._lib.tl_abi_version()
        if found != ABI_VERSION:
            raise EngineError(f"the engine's kernels have interface {found}, this trtllm needs {ABI_VERSION}",
                              fix="build the engine again, with this trtllm")  # fmt: skip
        self._lib.tl_pool_progress.argtypes = (ctypes.c_void_p,)
        self._lib.tl_pool_progress.restype = ctypes.c_int64

    @classmethod
    def load(cls, image: bytes | memoryview) -> Library:
        """Loads compiled kernels from memory, once. Raises EngineError when the machine cannot load them.

        Does not look at the CPU: ask compiler.missing_features first.
        """
        key = hashlib.sha256(image).digest()
        if key not in _loaded:
            try:
                _loaded[key] = cls(ctypes.CDLL(_spill(image)))
            except OSError as e:
                raise EngineError(f"the engine's kernels cannot be loaded: {e}") from e
        return _loaded[key]

    def pool(self, num_threads: int) -> Pool:
        """Threads to run steps with; the caller is one of them."""
        handle = self._lib.tl_pool_create(num_threads)
        if not handle:
            raise ResourceError(f"cannot start {num_threads - 1} threads", where="--num-threads")
        return Pool(self._lib, handle, num_threads)


_loaded: dict[bytes, Library] = {}


def _spill(image: bytes | memoryview) -> str:
    """The image as a file that dlopen can read.

    dlopen takes a path that it has seen before for the same library, so the descriptor stays open and keeps its number.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("trtllm-kernels")
        path = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp(prefix="trtllm-", suffix=".so")
    view = memoryview(image)
    while view:
        view = view[os.write(descriptor, view) :]
    return path


class Pool:
    """Persistent threads. One `run` at a time; close it, or use it as a context."""

    def __init__(self, lib: ctypes.CDLL, handle: int, num_threads: int) -> None:
        self._lib = lib
        self._handle: int | None = handle
        self._lock = threading.Lock()  # over the handle's end
        self.num_threads = num_threads

    def run(self, steps: ctypes.Array[TlStep], batch: TlBatch) -> None:
        """Computes the steps in order; the interpreter's lock is released meanwhile. Build `steps` with `plan`."""
        assert self._handle is not None, "the pool is closed"
        failed = self._lib.tl_run(self._handle, steps, len(steps), ctypes.byref(batch))
        if failed:
            op = Op(steps[failed - 1].op).name
            raise ResourceError(f"step {failed - 1} of the plan ({op}) found no memory for its scratch")

    def progress(self) -> int:
        """Pieces of steps that were computed so far; may be called from any thread."""
        with self._lock:
            return int(self._lib.tl_pool_progress(self._handle)) if self._handle is not None else 0

    def close(self) -> None:
        """Ends the threads. May be called again."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.tl_pool_destroy(handle)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan(steps: Sequence[TlStep]) -> ctypes.Array[TlStep]:
    """The steps as the array that `Pool.run` takes."""
    return (TlStep * len(steps))(*steps)
