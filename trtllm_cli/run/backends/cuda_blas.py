"""Matrix products of torch's tensors: by torch, or by an algorithm of cuBLASLt that is named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from trtllm_cli.kernels.cuda.cublaslt import CublasLt, Operands

_WORKSPACE = 32 << 20  # bytes: what NVIDIA names for Hopper, and torch takes


class Product(NamedTuple):
    """y [rows, n] = x [rows, k] @ w [k, n], whose columns lie one after another, + bias [n].

    bfloat16, but for y, which may be float32 where there is no bias; with `scales` x and w are E4M3, times a scale each
    ([]), or one for each row of x and each column of w ([rows, 1] and [1, n]).
    """

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    bias: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


def by_torch(product: Product) -> Callable[[], object]:
    """What enqueues it."""
    x, w, y, bias, scales = product
    if scales is not None:
        return functools.partial(
            torch._scaled_mm, x, w, scale_a=scales[0], scale_b=scales[1], bias=bias, out_dtype=y.dtype,
            use_fast_accum=True, out=y,
        )  # fmt: skip
    if y.dtype == torch.float32:
        assert bias is None
        return functools.partial(torch.mm, x, w, out_dtype=torch.float32, out=y)
    if bias is not None:
        return functools.partial(torch.addmm, bias, x, w, out=y)
    return functools.partial(torch.mm, x, w, out=y)


class Blas:
    """cuBLASLt, for products of one stream of one device; its memory is taken when it is first asked."""

    def __init__(self, stream: int, device: torch.device) -> None:
        self._stream, self._device = stream, device

    @functools.cached_property
    def _lt(self) -> CublasLt | None:
        lib = CublasLt.loaded()
        if lib is None:
            return None
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=self._device)
        return CublasLt(lib, self._workspace.data_ptr(), _WORKSPACE)

    @property
    def name(self) -> str:
        """What the names of algorithms hold for."""
        return f"cuBLASLt {self._lt.version}" if self._lt else ""

    def algorithms(self, product: Product) -> list[str]:
        """What computes it, what the library takes for the fastest first; none where torch alone does."""
        operands = _operands(product)
        return self._lt.algorithms(operands) if operands and self._lt else []

    def bound(self, product: Product, algorithm: str) -> Callable[[], object]:
        """What enqueues the product by an algorithm; by torch where that is "" or does not compute it."""
        operands = _operands(product) if algorithm else None
        found = self._lt.bound(operands, algorithm, self._stream) if operands and self._lt else None
        return found or by_torch(product)


def _operands(product: Product) -> Operands | None:
    """The product as the library takes it; None where rows have scales, or something is not aligned."""
    x, w, y, bias, scales = product
    if scales is not None and (scales[0].ndim or scales[1].ndim):
        return None
    operands = Operands(
        x=x.data_ptr(), w=w.data_ptr(), y=y.data_ptr(), rows=x.shape[0], n=w.shape[1], k=w.shape[0], x_type=_name(x),
        y_type=_name(y), bias=0 if bias is None else bias.data_ptr(),
        scales=scales and (scales[0].data_ptr(), scales[1].data_ptr()),
    )  # fmt: skip
    return operands if operands.are_aligned else None


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
