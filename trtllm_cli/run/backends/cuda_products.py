"""A plan's matrix products, and which of a library's algorithms computes each the fastest here.

cuBLASLt's heuristic names some algorithms for a product, and torch takes the first of them. On an H200 another one is
up to 13% faster (benchmarks/h200/NOTES.md), so the first load on a GPU times them, for each kind of product and some
numbers of rows, and keeps what it found in the user's cache. TensorRT-LLM's GEMM plugin does so when it builds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trtllm_cli.run.backends.cuda_blas import Product
from trtllm_cli.run.backends.cuda_kinds import Step, found_once

if TYPE_CHECKING:
    from trtllm_cli.run.backends.cuda_device import Device

TensorAt = Callable[[Any, str, tuple[int, int]], "torch.Tensor"]  # of a dtype, [rows, columns], at a reference
Launch = Mapping[str, Any]
Chosen = Mapping[str, Sequence[tuple[int, str]]]  # by kind: most rows, and the algorithm for so many

_FEW = 768  # rows: up to so many the library's own choice makes steps as short
_ROWS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)  # that are timed
_FEWEST_WEIGHTS = 1 << 20  # of a product that is worth it
_FASTER = 0.98  # of the time of the library's own choice: what takes more is not taken
_LAYERS = 2  # whose weights are read one after another, as an L2 cache may hold one's
_AT_ONCE = 128  # rows that random numbers are made for: in float32 first, of which torch keeps the memory


class ProductLaunch:
    """A product of a plan: {"call": "mm" | "scaled_mm", ...}."""

    def __init__(
        self, device: Device, call: Launch, tensor: TensorAt, most_rows: Mapping[str, int], chosen: Chosen
    ) -> None:
        n, k, most = call["n"], call["k"], most_rows[call["rows"]]
        self._device, self._symbol, self._chosen = device, call["rows"], chosen.get(kind_of(call), ())
        self._x = tensor(call["x"], call["x_dtype"], (most, k))
        self._w = tensor(call["w"], call["x_dtype"], (n, k)).t()
        self._makes_weights = isinstance(call["w"], str) and call["w"].startswith("s:")
        self._bias = None if call["bias"] is None else tensor(call["bias"], "bfloat16", (1, n))[0]
        y, dtype = call["y"], call["y_dtype"]
        if isinstance(y, list):  # behind so many bytes for each row
            base, _, size = y
            self._y: Callable[[int], torch.Tensor] = lambda rows: tensor([base, None, rows * size], dtype, (rows, n))
        else:
            whole = tensor(y, dtype, (most, n))
            self._y = lambda rows: whole[:rows]
        self._scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if call["call"] == "scaled_mm":
            by_row = call["x_scale_rows"] or call["w_scale_rows"]
            x_scale = tensor(call["x_scale"], "float32", (most if call["x_scale_rows"] else 1, 1))
            w_scale = tensor(call["w_scale"], "float32", (1, n if call["w_scale_rows"] else 1))
            if by_row:
                self._scales = x_scale.expand(most, 1).contiguous(), w_scale.expand(1, n).contiguous()
            else:
                self._scales = x_scale.reshape(()), w_scale.reshape(())
            # a copy would not see what a later step writes
            assert not call["x_scale_rows"] or self._scales[0].data_ptr() == x_scale.data_ptr()

    def of(self, rows: int) -> Product:
        """The product of so many rows."""
        scales = self._scales
        if scales is not None and scales[0].ndim:
            scales = scales[0][:rows], scales[1]
        return Product(self._x[:rows], self._w, self._y(rows), self._bias, scales)

    def resize(self, counts: Mapping[str, int]) -> None:
        """Readies a step of these counts."""
        rows = counts[self._symbol]
        algorithm = next((name for most, name in self._chosen if rows <= most), "")
        # Where no logits are wanted there is nothing to multiply.
        self.enqueue = self._device.product(self.of(rows), algorithm) if rows else nothing

    def fill(self) -> None:
        """Random inputs, and weights where they are what is made of others: zeros take less power, and so less time."""
        size = 16 if self._x.itemsize == 1 else 1
        for tensor in (self._x, self._w.t()) if self._makes_weights else (self._x,):
            for part in tensor.split(_AT_ONCE):
                part.copy_(torch.randn(part.shape, device=part.device) * size)


def nothing() -> None:
    """What enqueues nothing."""


def kind_of(call: Launch) -> str:
    """Products of one kind differ by their operands alone."""
    shape = [call[name] for name in ("call", "n", "k", "x_dtype", "y_dtype", "rows")]
    return json.dumps([*shape, call["bias"] is not None, bool(call.get("x_scale_rows") or call.get("w_scale_rows"))])


def chosen(
    steps: Sequence[Step], gpu: str, most_rows: Mapping[str, int], device: Device, tensor: TensorAt,
    tick: Callable[[], None],
) -> Chosen:  # fmt: skip
    """The algorithms that are the fastest here for the products of a plan; `gpu` is what times depend on."""
    calls = [
        call for call in _products(steps)
        if most_rows[call["rows"]] > _FEW and call["n"] * call["k"] >= _FEWEST_WEIGHTS
    ]  # fmt: skip
    if not calls or not device.blas:
        return {}
    kinds: dict[str, list[int]] = defaultdict(list)
    for place, call in enumerate(calls):
        kinds[kind_of(call)].append(place)

    def find(places: Sequence[int]) -> list[Any]:
        tick()
        return _fastest([calls[place] for place in places[:_LAYERS]], most_rows, device, tensor)

    depends = (gpu, device.blas, json.dumps(dict(most_rows)), *kinds)
    return found_once("products", depends, kinds, find, lambda _, of: all(map(_is_row, of)))


def has_fp8_products(steps: Sequence[Step]) -> bool:
    """Whether a plan has any."""
    return any(call["call"] == "scaled_mm" for call in _products(steps))


def _products(steps: Sequence[Step]) -> Iterator[Launch]:
    """All products of a plan."""
    for step in steps:
        choices = [launches for _, launches in step["ways"]]
        choices += [launches for others in step.get("others", []) for launches in others]
        for launches in [*choices, step.get("without_peers", [])]:
            yield from (call for call in launches if call.get("call") in ("mm", "scaled_mm"))


def _fastest(
    calls: Sequence[Launch], most_rows: Mapping[str, int], device: Device, tensor: TensorAt
) -> list[tuple[int, str]]:
    """For products of one kind, by most rows. Those of several layers are timed one after another."""
    most = most_rows[calls[0]["rows"]]
    launches = [ProductLaunch(device, call, tensor, most_rows, {}) for call in calls]
    launches[0].fill()
    found = [(_FEW, "")]
    for rows in (*(size for size in _ROWS if size < most), most):
        products = [launch.of(rows) for launch in launches]
        times = {name: _milliseconds(device, products, name) for name in device.algorithms(products[0])}
        if times:
            first, best = next(iter(times)), min(times, key=times.__getitem__)
            found.append((rows, best if times[best] < _FASTER * times[first] else first))
    return found


def _milliseconds(device: Device, products: Sequence[Product], algorithm: str) -> float:
    parts = [device.product(product, algorithm) for product in products]

    def enqueue() -> None:
        for part in parts:
            part()

    return device.milliseconds(enqueue)


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], int) and isinstance(row[1], str)
        and len(row[1]) in (0, 128) and set(row[1]) <= set("0123456789abcdef")
    )  # fmt: skip
