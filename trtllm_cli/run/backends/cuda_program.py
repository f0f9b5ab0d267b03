"""The plan's steps with addresses for names: what one step of a kind enqueues. build/backends/cuda_program.py says what
a plan is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trtllm_cli.run.backends.cuda_products import Chosen, ProductLaunch, TensorAt, nothing

if TYPE_CHECKING:
    from trtllm_cli.run.backends.cuda_device import Device

Counts = Mapping[str, int]  # of tokens, sequences, logits, samples


class Program:
    """Launches for steps that take the same way at each node."""

    def __init__(
        self, device: Device, kernels: Sequence[Any], steps: Sequence[Mapping[str, Any]], address: Callable[[Any], int],
        tensor: TensorAt, most_rows: Counts, key: tuple[int, ...], *,
        mixed: bool, chosen: Chosen,
    ) -> None:  # fmt: skip
        """`address` gives a reference's address; `key`: see `key_of`; `chosen`: products' algorithms."""
        self._parts: list[_Kernel | ProductLaunch | _Collective] = []
        for step, way in zip(steps, key, strict=True):
            for launch in step["ways"][way][1]:
                if launch.get("when") == ("decode" if mixed else "mixed"):
                    continue
                if "kernel" in launch:
                    self._parts.append(_Kernel(device, kernels, launch, address))
                elif launch["call"] in ("mm", "scaled_mm"):
                    self._parts.append(ProductLaunch(device, launch, tensor, most_rows, chosen))
                else:
                    self._parts.append(_Collective(device, launch, tensor, most_rows[launch["rows"]]))

    def resize(self, counts: Counts) -> None:
        """Readies a step of these counts."""
        for part in self._parts:
            part.resize(counts)

    def run(self, counts: Counts) -> None:
        """Enqueues a step of these counts, each launch as soon as it has its size."""
        for part in self._parts:
            part.resize(counts)
            part.enqueue()

    def enqueue(self) -> None:
        """Enqueues a step of the counts of the last `run` or `resize`."""
        for part in self._parts:
            part.enqueue()


def key_of(steps: Sequence[Mapping[str, Any]], counts: Counts) -> tuple[int, ...]:
    """Which way each node takes."""
    return tuple(
        next(i for i, (most, _) in enumerate(step["ways"]) if most is None or counts[step["by"]] <= most)
        for step in steps
    )


def without_peers(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps of a rank that does not see others' memory."""
    out = list(steps)
    for place, step in enumerate(steps):
        if "without_peers" in step and "instead" in step:
            leave_to_others(out, place)
    return [
        {**step, "ways": [[None, step["without_peers"]]]} if "without_peers" in step else step for step in out
    ]  # fmt: skip


def leave_to_others(steps: list[Mapping[str, Any]], place: int) -> None:
    """Lets the steps behind this one, which computes them for few rows, do so themselves."""
    for after in range(place + 1, place + 1 + steps[place]["instead"]):
        step = dict(steps[after])
        for name in ("ways", "others"):
            if name in step:
                step[name] = step[name][1:]
        steps[after] = step
    steps[place] = {"op": steps[place]["op"], "by": steps[place]["by"], "ways": [[None, []]]}


class _Kernel:
    """A launch of ours."""

    def __init__(
        self, device: Device, kernels: Sequence[Any], launch: Mapping[str, Any], address: Callable[[Any], int]
    ) -> None:
        self._grid = launch["grid"]
        values, self._counted, self._moved = [], [], []
        for place, value in enumerate(launch["args"]):
            if isinstance(value, str) and value.startswith("n:"):
                self._counted.append((place, [value[2:], 1]))
                values.append(0)
            elif isinstance(value, list) and value[0] == "n":
                self._counted.append((place, value[1]))
                values.append(0)
            elif isinstance(value, list) and value[1] is not None:
                self._moved.append((place, address(value[0]), value[1], value[2]))
                values.append(0)
            elif isinstance(value, (str, list)):
                values.append(address(value))
            else:
                values.append(0 if value is None else value)
        self._launch = device.prepare(kernels[launch["kernel"]], (1, 1, 1), values)

    def resize(self, counts: Counts) -> None:
        values = [(place, _extent(dim, counts)) for place, dim in self._counted]
        values += [(place, base + counts[symbol] * size) for place, base, symbol, size in self._moved]
        grid = [_extent(dim, counts) for dim in self._grid]
        self._launch.resize(grid, values)
        self.enqueue = self._launch.enqueue if all(grid) else nothing  # no logits are wanted in this step


def _extent(dim: int | Sequence[Any], counts: Counts) -> int:
    if isinstance(dim, int):
        return dim
    symbol, per, *rest = dim
    name, _, factor = symbol.partition("*")
    count = counts[name] * int(factor or 1)
    if not rest:
        return int(-(-count // per))
    other, *times = rest
    more = other if isinstance(other, int) else counts[other]
    return int((count // per + more) * (times[0] if times else 1))


class _Collective:
    """What ranks exchange, by NCCL."""

    def __init__(self, device: Device, call: Mapping[str, Any], tensor: TensorAt, most: int) -> None:
        self._function, self._whom, self._symbol = getattr(device, call["call"]), call["whom"], call["rows"]
        if call["call"] == "all_reduce" and len(self._whom) == 1:
            self._function = lambda x, y, _: y.copy_(x)
        dtype, width = call["dtype"], call["width"]
        across = width * len(call["whom"]) if call["call"] == "all_gather" else width
        widths = {"x": width, "y": across}
        self._tensors = [tensor(call[name], dtype, (most, widths[name])) for name in ("x", "y") if name in call]

    def resize(self, counts: Counts) -> None:
        rows = counts[self._symbol]
        tensors = [t[:rows] for t in self._tensors]
        self.enqueue = functools.partial(self._function, *tensors, self._whom) if rows else nothing
