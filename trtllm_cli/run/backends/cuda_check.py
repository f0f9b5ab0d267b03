"""Compares what kernels for few tokens compute with torch's products, when an engine is first loaded on a GPU.

Kernels are compiled for architectures that nobody has run them on, by compilers that change: one that computes wrong
numbers gives text that looks like text. So each kind of linear is computed both ways, with the engine's own weights
and random inputs; where they differ, torch's product takes the kernel's place. What was found is kept in the user's
cache, and the loads after it read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_cli.run.backends.cuda_kinds import Step, alike, found_once
from trtllm_cli.run.backends.cuda_program import Program, TensorAt, leave_to_others

MOST = 0.05  # how far two ways may be apart: rounding makes less than 0.01
_INFINITE = 1e9
Launch = Mapping[str, Any]
_DTYPES = {"*bf16": "bfloat16", "*fp32": "float32", "*fp8e4nv": "float8_e4m3fn", "*i8": "int8"}


@dataclass
class Comparison:
    """Computes a step's ways one after another."""

    kernels: Sequence[Mapping[str, Any]]  # the plan's table
    tensor: TensorAt
    trial: Callable[[Sequence[Step], int], Program]  # steps of one way each, at a number of rows

    def __call__(self, step: Step, few: list[Launch], many: list[Launch], rows: int) -> float:
        """How far the launches of linears for few tokens are from others that compute the same, for random inputs."""
        few, many = self._alone(few), self._alone(many)
        (args, types), sizes = self._arguments(few[0]), self.sizes(few[0])
        x = self.tensor(args["x_ptr"], types["x_ptr"], (rows, sizes["K"]))
        sums = None
        if sizes.get("SUMS"):
            sums = self.tensor(args["residual_ptr"], types["residual_ptr"], (rows, sizes["N"]))
        numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * (16 if x.itemsize == 1 else 1)
        if sizes.get("X_SCALE") == "row":
            self.tensor(args["x_scale_ptr"], "float32", (rows, 1)).fill_(1 / 16)
        outputs = next(filter(None, (self.sizes(launch).get("N") for launch in reversed(few))))  # of the last linear
        args, types = self._arguments(few[-1])  # the activation's, where the linear's kernel does not compute it
        out = "y_ptr" if "y_ptr" in args else "out_ptr"
        width = outputs // 2 if step["op"].endswith("gated_act") else outputs
        y = self.tensor(args[out], types[out], (rows, width))
        found = []
        for launches in (few, many):
            x.copy_(numbers.to(x.dtype))
            if sums is not None:
                sums.zero_()
            y.zero_()
            self.trial([{**step, "ways": [[None, launches]]}], rows).enqueue()
            found.append(y.to("cpu", copy=True))
        return apart(*found)

    def _alone(self, launches: Sequence[Launch]) -> list[Launch]:
        """The launches of this rank without the others, who may know already what this load is to find out."""
        out = []
        for launch in launches:
            if launch.get("call") == "all_reduce":
                launch = {**launch, "whom": launch["whom"][:1]}
            elif "kernel" in launch and self.sizes(launch).get("RANKS", 1) > 1:
                not_met = {"step_ptr": None, "calls": 0}
                names = self.kernels[launch["kernel"]]["names"]
                args = [not_met.get(name, value) for name, value in zip(names, launch["args"], strict=True)]
                launch = {**launch, "args": args}
            out.append(launch)
        return out

    def sizes(self, launch: Mapping[str, Any]) -> dict[str, Any]:
        """What a launch's kernel was specialized for."""
        return dict(map(tuple, self.kernels[launch["kernel"]]["source"]["constants"]))

    def _arguments(self, launch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """A launch's arguments by name, and their dtypes."""
        kernel = self.kernels[launch["kernel"]]
        types = {name: _DTYPES.get(kind, "") for name, kind in kernel["source"]["args"]}
        return dict(zip(kernel["names"], launch["args"], strict=True)), types


def checked(
    steps: Sequence[Step], plan: str, gpu: str, most_rows: Mapping[str, int], comparison: Comparison
) -> tuple[list[Step], list[str]]:
    """The steps without what computes wrong numbers here, and notes for users.

    `plan` is the engine's, as it lies in its file, and `gpu` what its results depend on beside it.
    """
    kinds = alike(steps, _is_linear)
    found = found_once(
        "checked", (gpu, plan, *kinds), kinds,
        find=lambda places: _differences(steps[places[0]], _many(steps, places[0]), most_rows, comparison),
        fits=lambda places, of: (
            len(of) == len(steps[places[0]]["ways"]) - 1 and all(isinstance(by, float) for by in of)
        ),
    )  # fmt: skip
    out, notes = list(steps), []
    wrong: set[int] = set()  # where ranks meet: the others go on exchanging the same words
    for kind, places in kinds.items():
        for way, by in enumerate(found[kind]):
            if by <= MOST:
                continue
            launch = steps[places[0]]["ways"][way][1][0]
            sizes, name = comparison.sizes(launch), comparison.kernels[launch["kernel"]]["source"]["function"]
            notes.append(
                f"the kernel {name} for {sizes['N']} outputs of {sizes['K']} inputs computes wrong numbers on this "
                f"GPU ({gpu}; {by:.2g} apart): others take its place, which are slower for few tokens. "
                "Please report it"
            )
            if "without_peers" in steps[places[0]]:
                wrong.update(places)
                continue
            for place in places:
                ways = [list(each) for each in out[place]["ways"]]
                ways[way][1] = _many(steps, place)
                out[place] = {**out[place], "ways": ways}
    for place in wrong:
        leave_to_others(out, place)
    return out, notes


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two results are apart: in the norm, or of FP8 numbers the share that is more than a step apart.

    What is expected not to be finite, as weights may make it, is left out.
    """
    finite = expected.float().isfinite()
    if not finite.any():
        return 0.0
    a, b = found.float()[finite], expected.float()[finite]
    if found.itemsize == 1:
        return float((~((a - b).abs() <= 0.13 * b.abs() + 2.0**-8)).float().mean())
    difference = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return difference if difference < _INFINITE else _INFINITE  # NaN too


def _is_linear(step: Step) -> bool:
    """Whether torch's product is a step's way for many tokens, and others are for few; or it is in place of such."""
    many = step["ways"][-1][1]
    return "instead" in step or (
        len(step["ways"]) > 1 and any(launch.get("call") in ("mm", "scaled_mm") for launch in many)
    )


def _many(steps: Sequence[Step], place: int) -> list[Launch]:
    """A step's launches for many tokens, or those of the steps that it may take the place of.

    Of norms those for few, whose residual stream is that of such a step.
    """
    replaced = steps[place + 1 : place + 1 + steps[place].get("instead", 0)] or [steps[place]]
    ways = (step["ways"][1 if step["op"] == "add_rms_norm" else -1] for step in replaced)  # the first of these is empty
    return [launch for _, launches in ways for launch in launches]


def _differences(
    step: Step, many: list[Launch], most_rows: Mapping[str, int], comparison: Comparison
) -> list[float]:  # fmt: skip
    """Of each way but the last; none of one without launches, or with `many`, or that no step is large enough for."""
    found, before = [], 0
    for most, launches in step["ways"][:-1]:
        rows = min(most, most_rows[step["by"]])
        differs = rows > before and launches and launches != many
        found.append(comparison(step, launches, many, rows) if differs else 0.0)
        before = rows if launches else before
    return found
