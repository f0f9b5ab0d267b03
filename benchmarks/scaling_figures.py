"""The figures that the scaling model reckons with: each named, with where it comes from, and replaced once measured.

`scaling_inputs.json` gives every figure with its unit and source: published, assumed, or measured by hand. Where a
result file of `gpu_links.py` has a figure, it takes the place of the one given. Memory and its bandwidth come from the
GPU's own file; the rest holds for the H100 and the H200, whose processor and links are the same, and is taken from the
GPU's own file first, then from the other's.
"""

from __future__ import annotations

import bisect
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BYTES = {"bf16": 2, "fp8": 1}  # of a weight, or of a number in the KV cache
STORED = {"bf16": "bfloat16", "fp8": "fp8"}  # gpu_links.py's names for the same
SOURCES = ("measured: ", "published: ", "assumed: ")
COLLECTIVES = ("all_reduce", "all_gather")
CURVES = ("all_reduce", "all_gather", "send_recv", "pipeline_share")  # pairs; all else is one number
SCALES = {"GB": 1e9, "GB/s": 1e9, "TFLOP/s": 1e12, "us": 1e-6, "$/hour": 1, "GPUs": 1, "tokens": 1, "sequences": 1}


class InputError(ValueError):
    """An input file that cannot be reckoned with: which, where in it, and why."""


@dataclass(frozen=True)
class Curve:
    """A figure by another: straight lines between points, the first value before them, the last one's rate after."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, x: float) -> float:
        """The figure at `x`; for a collective the seconds of `x` bytes."""
        if x <= self.points[0][0]:
            return self.points[0][1]
        if x >= self.points[-1][0]:
            return self.points[-1][1] * x / self.points[-1][0]
        right = bisect.bisect_left(self.points, (x, 0.0))
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Figures:
    """One kind of GPU in one kind of cluster, in seconds, bytes and operations."""

    memory: float
    memory_bandwidth: float
    price: float  # $ an hour
    weight_read_share: float
    bf16_rate: float
    fp8_rate: float
    product_overhead: float
    kv_read_share: float
    attention_rate: float
    attention_overhead: float
    kernel_overhead: float
    step_overhead: float
    all_reduce: dict[int, Curve]  # by the number of GPUs
    all_gather: dict[int, Curve]
    send_recv: Curve
    nvlink_hop: float
    network_hop: float
    network_bandwidth: float
    network_share: float
    gpus_per_node: int
    pipeline_share: dict[int, float]  # by the number of stages
    usable_memory: float
    reserved_memory: float
    max_num_tokens: int
    max_batch_size: int

    def rate(self, dtype: str) -> float:
        """Operations a second of a product with weights of `dtype`."""
        return self.bf16_rate if dtype == "bf16" else self.fp8_rate


@dataclass(frozen=True)
class Input:
    """A figure as the document lists it."""

    name: str
    value: Any
    unit: str
    source: str
    instead_of: str = ""  # what a measurement replaced


class Inputs:
    """`scaling_inputs.json` and the result files that there are."""

    def __init__(self, path: Path = HERE / "scaling_inputs.json", results: list[Path] | None = None) -> None:
        self.data = _read(path)
        try:
            self._check(path.name)
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path.name}: not as the model needs it ({type(e).__name__}: {e})") from e
        paths = [path.parent / name for name in self.data["results"]] if results is None else results
        self.results = [_result(p) for p in paths if p.is_file()]

    def _check(self, file: str) -> None:
        for part in ("gpus", "chip", "cluster", "serving", "models", "known", "results", "gpu"):
            if part not in self.data:
                raise InputError(f"{file}: there is no `{part}`")
        known = {"gpu": [self.data["gpu"], *(k["gpu"] for k in self.data["known"])]}
        known["model"] = [row["model"] for k in self.data["known"] for row in k["rows"]]
        for what, there in (("gpu", self.data["gpus"]), ("model", self.data["models"])):
            for name in known[what]:
                if name not in there:
                    raise InputError(f"{file}: there is no {what} `{name}` in `{what}s`")
        names = {f.name for f in fields(Figures)}
        for gpu, own in self.data["gpus"].items():
            given = {**own, **self.data["chip"], **self.data["cluster"], **self.data["serving"]}
            for what, wrong in (("lacks", names - set(given)), ("does not know", set(given) - names)):
                if wrong:
                    raise InputError(f"{file}: the model {what} {', '.join(sorted(wrong))} for {gpu}")
            for name, figure in given.items():
                _check(file, name, figure)

    def listed(self, gpu: str) -> Iterator[Input]:
        """All inputs for a kind of GPU."""
        own = [r for r in self.results if r["gpu"] == gpu]
        others = [r for r in self.results if r["gpu"] != gpu]
        for part in (self.data["gpus"][gpu], self.data["chip"], self.data["cluster"], self.data["serving"]):
            sources = own if part is self.data["gpus"][gpu] else own + others
            for name, given in part.items():
                for key in [name, *(f"{name}_{n}" for n in (4, 8) if name in COLLECTIVES)]:
                    result = next((r for r in sources if key in r["figures"]), None)
                    replaced = given["source"].split(":")[0]
                    replaced = f"{shown(given['value'])}, {replaced}" if key == name else "reckoned from 2 GPUs"
                    if result:
                        yield Input(key, result["figures"][key], given["unit"], result["source"], replaced)
                    elif key == name:
                        yield Input(name, given["value"], given["unit"], given["source"])

    def figures(self, gpu: str) -> Figures:
        """The same as the model takes them."""
        f: dict[str, Any] = {name: {} for name in COLLECTIVES}
        for i in self.listed(gpu):
            name, _, ranks = i.name.rpartition("_")
            if i.name == "pipeline_share":
                f[i.name] = {1: 1.0, **dict(i.value)}
            elif isinstance(i.value, list):
                curve = Curve(tuple((size, us * 1e-6) for size, us in i.value))
                if i.name in COLLECTIVES:
                    f[i.name][2] = curve
                elif name in COLLECTIVES:
                    f[name][int(ranks)] = curve
                else:
                    f[i.name] = curve
            else:
                f[i.name] = i.value * SCALES.get(i.unit, 1)
        return Figures(**f)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path.name}: {e}") from e
    if not isinstance(data, dict):
        raise InputError(f"{path.name}: not a JSON object")
    return data


def _check(file: str, name: str, figure: Any) -> None:
    """Raises InputError unless it is a positive figure, or points of one, with a unit and a source."""
    where, is_curve = f"{file}: {name}", name.startswith(CURVES)
    if not isinstance(figure, dict) or {"value", "unit", "source"} - set(figure):
        raise InputError(f"{where}: needs value, unit and source")
    if not str(figure["source"]).startswith(SOURCES):
        raise InputError(f"{where}: source must start with one of {', '.join(s.strip() for s in SOURCES)}")
    if not is_curve and figure["unit"] not in SCALES and not str(figure["unit"]).startswith("of "):
        raise InputError(f"{where}: unit {figure['unit']!r} is none of {', '.join(SCALES)} or a share of something")
    value = figure["value"]
    points = value if is_curve else [[1, value]]
    pairs = points if isinstance(points, list) else [None]
    flat = [n for p in pairs for n in (p if isinstance(p, list) and len(p) == 2 else [None])]
    if not all(type(n) in (int, float) and math.isfinite(n) and n > 0 for n in flat):
        raise InputError(
            f"{where}: value must be {'pairs of positive numbers' if is_curve else 'a positive number'}, not {value!r}"
        )
    if str(figure["unit"]).startswith("of ") and any(y > 1 for y in flat[1::2]):
        raise InputError(f"{where}: value is a share and at most 1, not {value!r}")
    if not flat or any(b <= a for a, b in pairwise(flat[::2])):
        raise InputError(f"{where}: the first numbers of the pairs must rise")


def _result(path: Path) -> dict[str, Any]:
    """A result file of gpu_links.py: its GPU, the figures that it replaces and how the document names it."""
    data = _read(path)
    try:
        machine, products = data["machine"], list(each_product(data))
        figures = of_memory(data) | of_chip(data, products)
        source = f"measured: {path.name}, {machine['gpus']} x {machine['gpu']}, {machine['date'][:10]}"
        result = {"gpu": machine["gpu"], "source": source, "figures": figures, "products": products}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise InputError(f"{path.name}: not a result of gpu_links.py ({type(e).__name__}: {e})") from e
    for name, value in figures.items():
        _check(path.name, name, {"value": value, "unit": "us", "source": source})
    return result


def shown(value: Any) -> str:
    """An input's value for people; of a curve its two ends."""
    if not isinstance(value, list):
        return f"{value:.4g}"
    (x0, y0), (x1, y1) = value[0], value[-1]
    if x1 < 1024:
        return f"{y0:.4g} at {x0}, {y1:.4g} at {x1}"
    return f"{y0:.1f} at {x0 / 1024:.0f} KiB, {y1:.0f} at {x1 / 2**20:.0f} MiB"


def of_memory(result: dict[str, Any]) -> dict[str, Any]:
    """What a result file says of the GPU's memory, in the inputs' names and units."""
    return {"memory": result["machine"]["memory_bytes"] / 1e9, "memory_bandwidth": copy_rate(result) / 1e9}


def copy_rate(result: dict[str, Any]) -> float:
    """Bytes read and written a second by the largest copy."""
    size, us = max(((int(size), us) for size, us in result["copy"].items()))
    return 2 * size / (us * 1e-6)


def of_chip(result: dict[str, Any], products: list[Product]) -> dict[str, Any]:
    """What it says of the processor and its links. Medians over the products of few rows, or of many."""
    copied = copy_rate(result)
    share = statistics.median(
        p.weight_bytes / p.seconds / copied for p in products if p.weight_bytes >= 100e6 and p.rows <= 16
    )
    overheads = (p.seconds - p.weight_bytes / (share * copied) for p in products if p.rows <= 32)
    found: dict[str, Any] = {
        "weight_read_share": share,
        "product_overhead": statistics.median(overheads) * 1e6,
        "kernel_overhead": result["launch"]["kernel_in_graph"],
        "step_overhead": result["launch"]["graph_launched_and_awaited"],
    }
    for dtype in BYTES:
        rates = (p.operations / p.seconds for p in products if p.dtype == dtype and p.rows >= 1024)
        found[f"{dtype}_rate"] = statistics.median(rates) / 1e12
    found |= of_attention(result, copied)
    for name in (*COLLECTIVES, "send_recv"):
        for ranks, ways in (result["links"] or {}).get(name, {}).items():
            times = ways.get("graph") or ways.get("eager")
            if times:
                key = name if ranks == "2" else f"{name}_{ranks}"
                found[key] = sorted([int(size), us] for size, us in times.items())
    return found


def of_attention(result: dict[str, Any], copied: float) -> dict[str, float]:
    """The faster kernel's rates in the largest cases; the overhead is what the smallest takes beyond its bytes."""
    heads, kv_heads, size = 32, 8, 128  # gpu_links.py's
    cases = [(c, min(c["us"].values()) * 1e-6) for c in result.get("attention", []) if c["us"]]
    decodes = sorted((c["batch"] * c["keys"] * kv_heads * size * 4, s) for c, s in cases if c["queries"] == 1)
    prefills = [2 * c["batch"] * c["queries"] * c["keys"] * heads * size / s for c, s in cases if c["queries"] > 1]
    if len(decodes) < 2 or not prefills:
        return {}
    (small, short), (large, long) = decodes[0], decodes[-1]
    return {
        "kv_read_share": large / long / copied,
        "attention_rate": max(prefills) / 1e12,
        "attention_overhead": (short - small * long / large) * 1e6,
    }


@dataclass(frozen=True)
class Product:
    """One product that gpu_links.py timed."""

    dtype: str
    rows: int
    outputs: int
    inputs: int
    seconds: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight."""
        return self.outputs * self.inputs * BYTES[self.dtype]

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.outputs * self.inputs


def each_product(result: dict[str, Any]) -> Iterator[Product]:
    """All products in a result file."""
    for dtype, stored in STORED.items():
        for shape in result["products"][stored].values():
            for rows, us in shape["us"].items():
                yield Product(dtype, int(rows), shape["outputs"], shape["inputs"], us * 1e-6)
