"""Chooses among the launches of linears that no times decided when the engine was built: at its first load on a GPU.

Each choice is timed with the engine's own weights, those of all layers one after another, so that the L2 cache holds
few of them. What was found is kept in the user's cache, and the loads after it read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trtllm_cli.run.backends.cuda_kinds import Step, alike, found_once

Measure = Callable[[Sequence[Step], int], float]  # milliseconds of steps of one way each, at a number of rows
_AS_FAST = 1.1  # what differs by less is not changed: what is the fastest by itself may be slower in a step


def settled(steps: Sequence[Step], plan: str, gpu: str, most_rows: Mapping[str, int], measure: Measure) -> list[Step]:
    """The steps, each with the launches that are the fastest here.

    `plan` is the engine's, as it lies in its file, and `gpu` what times depend on beside it.
    """
    kinds = alike(steps, lambda step: "others" in step)
    if not kinds:
        return list(steps)
    found = found_once(
        "settled", (gpu, plan), kinds,
        find=lambda places: _fastest([steps[p] for p in places], most_rows, measure),
        fits=lambda _, taken: all(isinstance(n, int) and n >= 0 for n in taken),
    )  # fmt: skip
    out = list(steps)
    for kind, places in kinds.items():
        for place in places:
            out[place] = _taken(steps[place], found[kind])
    return out


def _fastest(steps: Sequence[Step], most_rows: Mapping[str, int], measure: Measure) -> list[int]:
    """Of each way that has others: 0 for its own launches, or which of the others."""
    step, taken, before = steps[0], [], 0
    steps = [s for s in steps if s["by"] == step["by"]]  # buffers of what counts logits may have room for fewer rows
    for way, others in enumerate(step["others"]):
        rows = min(step["ways"][way][0], most_rows[step["by"]])
        times = [0.0]
        if others and rows > before:  # else no step is so large
            choices = [
                [s["ways"][way][1] for s in steps],
                *([s["others"][way][i] for s in steps] for i in range(len(others))),
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
