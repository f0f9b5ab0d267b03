"""Chooses among the launches of linears that no times decided when the engine was built: at its first load on a GPU.

Each choice is timed with the engine's own weights, those of all layers one after another, so that the L2 cache holds
few of them. What was found is kept in the user's cache, and the loads after it read it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_cli.kernels.compile_cache import cache_dir, keep

Step = Mapping[str, Any]
Measure = Callable[[Sequence[Step], int], float]  # milliseconds of steps of one way each, at a number of rows
_AS_FAST = 1.1  # what differs by less is not changed: what is the fastest by itself may be slower in a step


def settled(steps: Sequence[Step], plan: str, gpu: str, most_rows: Mapping[str, int], measure: Measure) -> list[Step]:
    """The steps, each with the launches that are the fastest here.

    `plan` is the engine's, as it lies in its file, and `gpu` what times depend on beside it.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        if "others" in step:
            alike[kind_of(step)].append(place)
    if not alike:
        return list(steps)
    key = hashlib.sha256("\n".join((gpu, plan)).encode()).hexdigest()[:32]
    file = cache_dir() / "settled" / f"{key}.json"
    found = _read(file)
    if found is None or found.keys() != alike.keys():
        found = {kind: _fastest([steps[p] for p in places], most_rows, measure) for kind, places in alike.items()}
        keep(file, json.dumps(found).encode())
    out = list(steps)
    for kind, places in alike.items():
        for place in places:
            out[place] = _taken(steps[place], found[kind])
    return out


def kind_of(step: Step) -> str:
    """The same for steps whose launches differ by their operands alone."""

    def kinds(launches: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [
            [launch["kernel"], launch["grid"]] if "kernel" in launch else [launch["call"], launch["n"], launch["k"]]
            for launch in launches
        ]

    ways = [[most, kinds(launches)] for most, launches in step["ways"]]
    others = [[kinds(launches) for launches in of_way] for of_way in step.get("others", [])]
    return hashlib.sha256(json.dumps([step["by"], ways, others]).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, list[int]] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    fits = isinstance(found, dict) and all(
        isinstance(taken, list) and all(isinstance(n, int) and n >= 0 for n in taken) for taken in found.values()
    )
    return found if fits else None


def _fastest(alike: Sequence[Step], most_rows: Mapping[str, int], measure: Measure) -> list[int]:
    """Of each way that has others: 0 for its own launches, or which of the others."""
    step, taken, before = alike[0], [], 0
    for way, others in enumerate(step["others"]):
        rows = min(step["ways"][way][0], most_rows[step["by"]])
        times = [0.0]
        if others and rows > before:  # else no step is so large
            choices = [
                [s["ways"][way][1] for s in alike],
                *([s["others"][way][i] for s in alike] for i in range(len(others))),
            ]
            times = [measure([{**step, "ways": [[None, launches]]} for launches in choice], rows) for choice in choices]
        best = min(range(len(times)), key=lambda i: times[i])
        taken.append(best if times[best] * _AS_FAST < times[0] else 0)
        before = rows
    return taken


def _taken(step: Step, taken: Sequence[int]) -> Step:
    ways = [list(way) for way in step["ways"]]
    for way, choice in enumerate(taken):
        if 0 < choice <= len(step["others"][way]):
            ways[way][1] = step["others"][way][choice - 1]
    return {**step, "ways": ways}
