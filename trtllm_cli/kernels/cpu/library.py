"""Loads the compiled kernels, and describes the steps that they run. Needs neither torch nor a compiler.

A plan is an array of `TlStep`, one per op, whose pointers are resolved addresses. `Pool.run` computes all of them in
one call into C++. Activations are float32, row-major `[rows, width]`; `rows` is the batch's `num_tokens` or its
`num_logits`, so one plan serves every batch. Addresses are plain integers (`array.ctypes.data`); whoever builds a plan
keeps the memory alive. Buffers should begin at a multiple of 64 bytes.

A row's result is the same bits whatever other rows are in the batch, however its prompt was cut into steps, and
whatever the number of threads.

The paged KV cache of a layer is `num_blocks * kv_bytes_per_block(...)` bytes of zeros, block after block. A block has,
per KV head, the keys transposed `[head_dim, block_size]` and then the values `[block_size, head_dim]`, with both
dimensions rounded up to 16.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

from trtllm_cli.errors import EngineError, ResourceError

if TYPE_CHECKING:
    from trtllm_cli.run.model_inputs import ModelInputs

ABI_VERSION = 1  # of the structures below; steps.h has the same
TILE = 16  # outputs of a linear layer that lie side by side

Rows = Literal["num_tokens", "num_logits"]
WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
CacheDType = Literal["float32", "bfloat16"]
TableDType = Literal["float32", "bfloat16"]
ActivationName = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
RopeLayout = Literal["neox", "gptj"]

_ROWS: dict[Rows, int] = {"num_tokens": 0, "num_logits": 1}
_FORMATS: dict[WeightFormat, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_ACTIVATIONS: dict[ActivationName, int] = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}
_LAYOUTS: dict[RopeLayout, int] = {"neox": 0, "gptj": 1}


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


class TlStep(ctypes.Structure):
    """One op with its parameters; made by the functions below, never by hand."""

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


def _step(op: Op, ints: Sequence[int], floats: Sequence[float], pointers: Sequence[int | None]) -> TlStep:
    step = TlStep(op=op)
    step.i[: len(ints)] = list(ints)
    step.f[: len(floats)] = list(floats)
    step.p[: len(pointers)] = [p or None for p in pointers]
    return step


def embedding_step(
    out: int, table: int, *, vocab_size: int, hidden_size: int, dtype: TableDType = "float32", vocab_start: int = 0
) -> TlStep:
    """out [num_tokens, hidden] = the rows of `table` [vocab_size, hidden] (row-major, not packed) that input_ids name.

    Row 0 of the table is the id `vocab_start`; ids outside the table give zeros.
    """
    return _step(Op.EMBEDDING, (0, hidden_size, vocab_size, vocab_start, _FORMATS[dtype]), (), (out, table))


def rms_norm_step(
    x: int, out: int, weight: int, *, width: int, eps: float, num_heads: int = 1, rows: Rows = "num_tokens"
) -> TlStep:
    """out = `x / sqrt(mean(x^2) + eps) * weight`, over each row of `width`, or over each of `num_heads` parts of it.

    weight is float32 [width / num_heads]. `out` may be `x`.
    """
    assert width % num_heads == 0
    return _step(Op.RMS_NORM, (_ROWS[rows], width, num_heads), (eps,), (x, out, weight))


def add_rms_norm_step(
    x: int, residual: int, out: int, weight: int, *, width: int, eps: float, rows: Rows = "num_tokens"
) -> TlStep:
    """residual += x, then out = the norm of residual; weight float32 [width]. `out` may be `x`."""
    return _step(Op.ADD_RMS_NORM, (_ROWS[rows], width), (eps,), (x, out, weight, residual))


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
    accumulate: bool = False,
    rows: Rows = "num_tokens",
    x_stride: int | None = None,
    out_stride: int | None = None,
) -> TlStep:
    """out [rows, out_features] = x [rows, in_features] @ weight.T + bias; `out +=` with `accumulate`.

    `weight` and `scale` (int8 and int4 only) are what pack.py made, bias is float32 [out_features], and `group_size`
    (int4 only) is the one that the weight was packed with. The strides are elements from row to row, by default the
    widths. `out` must not overlap `x`.
    """
    assert (scale is not None) == (fmt in ("int8", "int4"))
    assert (group_size is not None) == (fmt == "int4")
    ints = (
        _ROWS[rows], in_features, out_features, _FORMATS[fmt], group_size or in_features, int(accumulate),
        x_stride or in_features, out_stride or out_features,
    )  # fmt: skip
    return _step(Op.LINEAR, ints, (), (x, out, weight, scale, bias))


def gated_act_step(
    x: int, out: int, *, intermediate_size: int, activation: ActivationName, rows: Rows = "num_tokens"
) -> TlStep:
    """out [rows, I] = activation(gate) * up, where x [rows, 2 * I] has the gate columns and then the up columns."""
    return _step(Op.GATED_ACT, (_ROWS[rows], intermediate_size, _ACTIVATIONS[activation]), (), (x, out))


def add_step(x: int, y: int, out: int, *, width: int, broadcast: bool = False, rows: Rows = "num_tokens") -> TlStep:
    """out = x + y; y is one row [width] with `broadcast`. `out` may be `x` or `y`."""
    return _step(Op.ADD, (_ROWS[rows], width, int(broadcast)), (), (x, out, y))


def rope_append_step(
    qkv: int,
    q_out: int,
    cache: int,
    table: int | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    cache_dtype: CacheDType,
    rotary_dim: int | None = None,
    layout: RopeLayout = "neox",
    q_norm: int | None = None,
    k_norm: int | None = None,
    eps: float = 0.0,
    qkv_stride: int | None = None,
) -> TlStep:
    """Normalizes (where there is a weight) and rotates q and k, and writes k and v to the layer's cache.

    qkv is [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; q goes to q_out [num_tokens, num_heads * head_dim],
    k and v to `cache` at slot_mapping. `table` is kernels.rope.cos_sin_table's, float32 [max_positions, rotary_dim]
    indexed by positions; None rotates nothing. Elements of a head past `rotary_dim` (default head_dim) pass through.
    q_norm and k_norm are float32 [head_dim].
    """
    assert head_dim <= 1024, "rope.cpp's kMaxHeadDim"
    rotary_dim = 0 if table is None else rotary_dim or head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    ints = (
        0, num_heads, num_kv_heads, head_dim, block_size, _FORMATS[cache_dtype], rotary_dim, _LAYOUTS[layout],
        qkv_stride or width,
    )  # fmt: skip
    return _step(Op.ROPE_APPEND, ints, (eps,), (qkv, q_out, cache, table, q_norm, k_norm))


def paged_attention_step(
    q: int,
    out: int,
    cache: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    cache_dtype: CacheDType,
    scale: float,
    window: int | None = None,
) -> TlStep:
    """out [num_tokens, num_heads * head_dim]: causal attention of q over each sequence's part of the layer's cache.

    Scores are multiplied by `scale`. With `window`, a token sees itself and the `window - 1` before it.
    """
    assert num_heads % num_kv_heads == 0
    ints = (0, num_heads, num_kv_heads, head_dim, block_size, _FORMATS[cache_dtype], window or 0)
    return _step(Op.PAGED_ATTENTION, ints, (scale,), (q, out, cache))


def gather_rows_step(x: int, out: int, *, width: int) -> TlStep:
    """out [num_logits, width] = the rows of x [num_tokens, width] that logits_indices name."""
    return _step(Op.GATHER_ROWS, (1, width), (), (x, out))


def copy_rows_step(
    x: int, out: int, *, width: int, x_stride: int, out_stride: int, rows: Rows = "num_tokens"
) -> TlStep:
    """out[:, :width] = x[:, :width] between row strides given in elements: a split or a concatenation of columns."""
    return _step(Op.COPY_ROWS, (_ROWS[rows], width, x_stride, out_stride), (), (x, out))


def kv_bytes_per_block(num_kv_heads: int, head_dim: int, block_size: int, dtype: CacheDType) -> int:
    """Bytes that one block of one layer's KV cache takes, keys and values together."""
    elements = 2 * num_kv_heads * _round_up(head_dim) * _round_up(block_size)
    return elements * (4 if dtype == "float32" else 2)


def copy_block(cache: int, bytes_per_block: int, source: int, destination: int) -> None:
    """Copies one whole block of one layer's cache."""
    ctypes.memmove(cache + destination * bytes_per_block, cache + source * bytes_per_block, bytes_per_block)


def _round_up(n: int) -> int:
    return -(-n // TILE) * TILE


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
        self.num_threads = num_threads

    def run(self, steps: ctypes.Array[TlStep], batch: TlBatch) -> None:
        """Computes the steps in order; the interpreter's lock is released meanwhile. Build `steps` with `plan`."""
        assert self._handle is not None, "the pool is closed"
        failed = self._lib.tl_run(self._handle, steps, len(steps), ctypes.byref(batch))
        if failed:
            op = Op(steps[failed - 1].op).name
            raise ResourceError(f"step {failed - 1} of the plan ({op}) found no memory for its scratch")

    def close(self) -> None:
        """Ends the threads. May be called again."""
        if self._handle is not None:
            self._lib.tl_pool_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan(steps: Sequence[TlStep]) -> ctypes.Array[TlStep]:
    """The steps as the array that `Pool.run` takes."""
    return (TlStep * len(steps))(*steps)
