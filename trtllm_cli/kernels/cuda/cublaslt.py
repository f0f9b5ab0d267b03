"""cuBLASLt through ctypes: the algorithms that it names for a matrix product, and products by one of them.

torch always takes the first; which one is the fastest shows when they are timed (run/backends/cuda_products.py).
The library is the one that torch has loaded. API: docs.nvidia.com/cuda/cublas, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int8, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from trtllm_cli.errors import DeviceError

ALIGNMENT = 16  # bytes, of all operands: what the algorithms are named for
MOST_ALGORITHMS = 8  # it names no more of those that an H200 has

_TYPES = {"float32": 0, "bfloat16": 14, "float8_e4m3fn": 28}  # cudaDataType
_COMPUTE_32F, _SCALE_32F = 68, 0
_TRANSPOSED = 1
_EPILOGUE_BIAS = 4
_INPLACE_OR_COMPUTE_TYPE = 3  # how split sums may be added: not as bfloat16
# Attributes of a product, and of what is asked for.
_TRANSA, _EPILOGUE, _BIAS, _A_SCALE, _B_SCALE, _FAST_ACCUM = 3, 7, 8, 17, 18, 25
_MAX_WORKSPACE, _REDUCTION_SCHEMES, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


class Operands(NamedTuple):
    """y [rows, n] = x [rows, k] times the transpose of w [n, k], all row by row; addresses, and names of dtypes.

    With `scales`, the addresses of x's and w's, both are E4M3. `bias` [n] is of y's type, 0: none.
    """

    x: int
    w: int
    y: int
    rows: int
    n: int
    k: int
    x_type: str
    y_type: str
    bias: int = 0
    scales: tuple[int, int] | None = None

    @property
    def are_aligned(self) -> bool:
        """Whether each begins at a multiple of ALIGNMENT, and so each row."""
        rows = self.k * (1 if self.scales else 2), self.n * 2
        return not any(at % ALIGNMENT for at in (self.x, self.w, self.y, self.bias, *rows))


class CublasLt:
    """The library, with a workspace for the products of one stream after another."""

    def __init__(self, lib: ctypes.CDLL, workspace: int, workspace_bytes: int) -> None:
        """`workspace`: the address of memory of the current device, at a multiple of 256 bytes."""
        lib.cublasLtGetVersion.restype = c_size_t
        lib.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
        self._lib = lib
        self._workspace, self._workspace_bytes = workspace, workspace_bytes
        self.version = int(lib.cublasLtGetVersion())
        self._handle = c_void_p()
        _check(lib.cublasLtCreate(byref(self._handle)))
        self._preference = c_void_p()
        _check(lib.cublasLtMatmulPreferenceCreate(byref(self._preference)))
        for attribute, value in (
            (_MAX_WORKSPACE, c_size_t(workspace_bytes)), (_REDUCTION_SCHEMES, c_uint32(_INPLACE_OR_COMPUTE_TYPE)),
            *((attribute, c_uint32(ALIGNMENT)) for attribute in _ALIGNMENTS),
        ):  # fmt: skip
            _check(
                lib.cublasLtMatmulPreferenceSetAttribute(
                    self._preference, attribute, byref(value), c_size_t(sizeof(value))
                )
            )
        # Few of each, and kept: a model's layers, and the sizes of its steps.
        self._layout = cache(self._new_layout)
        self._product = cache(self._new_product)
        self._is_taken = cache(self._takes)

    @staticmethod
    def loaded() -> ctypes.CDLL | None:
        """The library as this process has loaded it, or None."""
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
            paths = (f"/{line.partition('/')[2]}" for line in lines if "libcublasLt.so" in line)
            return next(map(ctypes.CDLL, paths), None)
        except OSError:
            return None

    def algorithms(self, operands: Operands) -> list[str]:
        """What computes it, what the library's heuristic takes for the fastest first. Names are of this version."""
        results, count = (_Heuristic * MOST_ALGORITHMS)(), c_int()
        code = self._lib.cublasLtMatmulAlgoGetHeuristic(
            self._handle, *self._problem(operands), self._preference, MOST_ALGORITHMS, results, byref(count)
        )
        if code:
            return []  # there are none
        return [bytes(result.algorithm).hex() for result in results[: count.value] if result.state == 0]

    def bound(self, operands: Operands, algorithm: str, stream: int) -> Callable[[], None] | None:
        """What enqueues the product by one of `algorithms`; None where that does not compute it."""
        somewhere = ALIGNMENT  # which is not looked at
        shape = operands._replace(
            x=0, w=0, y=0, bias=operands.bias and somewhere, scales=operands.scales and (somewhere, somewhere)
        )
        if not self._is_taken(shape, algorithm):
            return None
        product, a, b, c, d = self._problem(operands)
        one, zero, algo = c_float(1.0), c_float(0.0), _named(algorithm)
        args = (
            self._handle, product, byref(one), c_void_p(operands.w), a, c_void_p(operands.x), b, byref(zero),
            c_void_p(operands.y), c, c_void_p(operands.y), d, byref(algo), c_void_p(self._workspace),
            c_size_t(self._workspace_bytes), c_void_p(stream),
        )  # fmt: skip
        matmul = self._lib.cublasLtMatmul

        def enqueue() -> None:
            _check(matmul(*args))

        return enqueue

    def _problem(self, operands: Operands) -> tuple[c_void_p, ...]:
        """What the library calls D [n, rows] = A^T B: column by column, A is w, B is x."""
        _, _, _, rows, n, k, x_type, y_type, bias, scales = operands
        y = self._layout(y_type, n, rows)
        return self._product(bias, scales), self._layout(x_type, k, n), self._layout(x_type, k, rows), y, y

    def _takes(self, shape: Operands, algorithm: str) -> bool:
        """Whether the algorithm computes products of this shape, in the workspace that there is."""
        result, algo = _Heuristic(), _named(algorithm)
        code = self._lib.cublasLtMatmulAlgoCheck(self._handle, *self._problem(shape), byref(algo), byref(result))
        return code == 0 and result.state == 0 and result.workspace <= self._workspace_bytes

    def _new_layout(self, dtype: str, rows: int, columns: int) -> c_void_p:
        out = c_void_p()
        _check(
            self._lib.cublasLtMatrixLayoutCreate(
                byref(out), _TYPES[dtype], c_uint64(rows), c_uint64(columns), c_int64(rows)
            )
        )
        return out

    def _new_product(self, bias: int, scales: tuple[int, int] | None) -> c_void_p:
        out = c_void_p()
        _check(self._lib.cublasLtMatmulDescCreate(byref(out), _COMPUTE_32F, _SCALE_32F))
        attributes: list[tuple[int, Any]] = [(_TRANSA, c_int(_TRANSPOSED))]
        if bias:
            attributes += [(_EPILOGUE, c_uint32(_EPILOGUE_BIAS)), (_BIAS, c_void_p(bias))]
        if scales:
            of_x, of_w = scales
            attributes += [(_FAST_ACCUM, c_int8(1)), (_A_SCALE, c_void_p(of_w)), (_B_SCALE, c_void_p(of_x))]
        for attribute, value in attributes:
            _check(self._lib.cublasLtMatmulDescSetAttribute(out, attribute, byref(value), c_size_t(sizeof(value))))
        return out


def _named(algorithm: str) -> _Algorithm:
    return _Algorithm.from_buffer_copy(bytes.fromhex(algorithm))


def _check(code: int) -> None:
    if code:
        raise DeviceError(
            f"cuBLASLt failed (status {code})", fix="see nvidia-smi and dmesg (Xid errors); report it with --debug"
        )
