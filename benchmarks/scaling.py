"""Writes scaling.md: what Llama-3.1 8B, 70B, 405B and two mixtures of experts would give on 1 to 64 GPUs, on paper.

    python benchmarks/scaling.py                                       # writes benchmarks/scaling.md
    python benchmarks/scaling.py --inputs mine.json --output mine.md    # for other GPUs, links, prices or models

The model is in scaling_model.py, what it reckons with in scaling_inputs.json and in the result files of gpu_links.py
(scaling_figures.py). The same inputs give the same document, byte for byte.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import common
from scaling_figures import HERE, InputError, Inputs, shown
from scaling_model import Model, Plan, Split, Throughput, legal_splits

COUNTS = (1, 2, 4, 8, 16, 32, 64)
PACE = 30  # tokens a second that a reader is not kept waiting with
CONTEXT = 1000  # tokens of the only sequence
MARGIN = 0.10  # a split that takes more GPUs, stages or groups of experts must give more by this

# tests/test_scaling.py holds each sentence against the figures.
IN_SHORT = """\
- **Saturated**: always the smallest replica that fits, as often as there is room; the price of a token is the same from
  there to 64 GPUs, within 5%. Within a replica tensor parallelism, or two stages of it where weights fill most of the
  memory: with two stages a GPU takes part in half of the all-reduces. That gives 405B 11% more, DeepSeek-V3 24% or
  more.
- **30 tok/s each**: the same for 8B, 70B and Mixtral. 405B and DeepSeek-V3 need more tensor parallelism (TP8 to TP32),
  and pay 2 to 6 times as much for it. Stages never win: they divide the work and not the wait.
- **Batch 1**: tensor parallelism within a node, TP4 for 8B and TP8 for the others; a second node only for 405B and for
  what does not fit on one, a fourth only for 405B in bf16. More gains less than 10%: all-reduces take a third to a
  half of the time by then. A token costs 75 to 220 times as much as a saturated one.
- **Stages** hang on one input: by `pipeline_share` eight of them work 46% of the time, as published for 70B on another
  GPU. If none ever waited, they would win wherever weights fill much of the memory: at 405B by a quarter, at
  DeepSeek-V3 by two thirds.
- **Experts**: dividing them (EP) gives within 10% of splitting each (TP) for Mixtral, and up to 18% more for
  DeepSeek-V3 at a large batch. At batch 1 it loses: some rank has several of the chosen experts, others none.
- **fp8** gives 1.8 to 3.2 times as many tokens a $ as bf16: half the bytes, twice the rate, room for more sequences.
"""

LEFT_OUT = """\
- **The host** but for launching a graph a step, and all unevenness: requests are alike, prompts arrive as answers
  leave, experts are chosen evenly, caches are full to the last block and contiguous. Rates are those of short bursts.
  So the model is faster than engines are, most of all at short prompts.
- **More than two GPUs**: an all-reduce within a node is reckoned from the one measured on two, with a ring's bytes and
  hops; the network was not measured at all. A result of `gpu_links.py` on 4 or 8 GPUs takes the place of the first.
- **Faster all-reduces**: one-shot kernels, multicast, overlap with products would favour tensor parallelism, at batch
  1 most. TensorRT-LLM has them: the ratios above fall from 1.2 on one GPU to 1.0 on eight. So the model is 10 to 20%
  harder on eight ranks than on one, and two stages for 405B are a draw.
- **All-to-all, and attention of each rank's own sequences** would favour experts in parallel and DeepSeek-V3, whose
  cache is whole on every rank of a stage. trtllm has neither; DeepSeek-V3 has no measured point here.
- **Fused or overlapping kernels, speculative decoding, prefix reuse, prefill on other GPUs**: not reckoned with.
"""


@dataclass(frozen=True)
class Choice:
    """A split, as often as there is room."""

    plan: Plan
    replicas: int
    one: Throughput  # of a replica

    @property
    def name(self) -> str:
        """Such as `4 x TP2`."""
        return f"{self.replicas} x {self.plan.split}" if self.replicas > 1 else str(self.plan.split)

    @property
    def tokens_per_second(self) -> float:
        """Of all replicas."""
        return self.one.tokens_per_second * self.replicas

    @property
    def each(self) -> float:
        """Tokens a second of a sequence."""
        return self.one.tokens_per_second / self.one.batch

    @property
    def cost(self) -> float:
        """$ for a million output tokens."""
        return self.plan.figures.price * self.plan.split.ranks / 3600 / self.one.tokens_per_second * 1e6


def choose(found: Sequence[tuple[Plan, Throughput | None]], gpus: int, *, replicas: bool) -> Choice | None:
    """What gives most on so many GPUs; of those within MARGIN of it the simplest. None where nothing fits."""
    fit = [(plan, one) for plan, one in found if one and plan.split.ranks <= gpus]
    options = [Choice(plan, gpus // plan.split.ranks if replicas else 1, one) for plan, one in fit]
    most = max((o.tokens_per_second for o in options), default=0.0)
    near = [o for o in options if o.tokens_per_second * (1 + MARGIN) >= most]
    return min(near, key=lambda o: (o.plan.split.ranks, o.plan.split.pp, o.plan.split.ep), default=None)


@dataclass(frozen=True)
class Case:
    """A model in one dtype; its KV cache has the same."""

    name: str
    base: Plan

    @cached_property
    def plans(self) -> list[Plan]:
        """All legal splits."""
        return [plan for ranks in COUNTS for plan in legal_splits(self.base, ranks)]

    @cached_property
    def alone(self) -> dict[int, Choice | None]:
        """By GPUs at most: the split that gives a lone sequence most tokens a second."""
        found = [(p, Throughput(1 / p.token_time(CONTEXT).total, 1)) for p in self.plans]
        return {n: choose(found, n, replicas=False) for n in COUNTS}

    def _saturated(self, pace: float) -> dict[int, Choice | None]:
        found = [(p, p.saturated(1000, 1000, pace)) for p in self.plans]
        return {n: choose(found, n, replicas=True) for n in COUNTS}

    @cached_property
    def paced(self) -> dict[int, Choice | None]:
        """By GPUs: the split that gives most where each sequence gets PACE tokens a second."""
        return self._saturated(PACE)

    @cached_property
    def saturated(self) -> dict[int, Choice | None]:
        """By GPUs: the split that gives most."""
        return self._saturated(0)

    @cached_property
    def smallest(self) -> int:
        """GPUs of the smallest replica that fits."""
        return min(p.split.ranks for p in self.plans)

    @property
    def never_idle(self) -> Case:
        """The same where stages never wait for each other."""
        share = dict.fromkeys(self.base.figures.pipeline_share, 1.0)
        return Case(self.name, replace(self.base, figures=replace(self.base.figures, pipeline_share=share)))


def cases(inputs: Inputs) -> list[Case]:
    """Every model in fp8 and bf16."""
    figures = inputs.figures(inputs.data["gpu"])
    return [
        Case(f"{name}, {dtype}", Plan(Model.of(data), Split(), figures, dtype, dtype))
        for name, data in inputs.data["models"].items()
        for dtype in ("fp8", "bf16")
    ]


# The document


def document(inputs: Inputs) -> str:
    """scaling.md."""
    gpu, all_cases = inputs.data["gpu"], cases(inputs)
    price = all_cases[0].base.figures.price
    text = [
        "# Scaling on paper",
        f"Written by `scaling.py` (`make scaling`); do not edit. {gpu}, 1 to 64 of them, 8 to a node, ${price:.2f} an"
        " hour each (assumed). Weights in fp8 or bf16 (the head in bf16), the KV cache in the same. `4 x TP2 PP2` is"
        " four replicas of two stages of two ranks; EP divides the experts within a stage. tok/s are output tokens, $/M"
        f" is the price of a million. **Batch 1**: one sequence, {CONTEXT} tokens of context, on at most so many GPUs."
        f" **Saturated**: requests without end, 1000 tokens in and 1000 out, as many at once as fit. **{PACE} tok/s"
        f" each**: only as many at once as get that much. Of splits within {MARGIN:.0%} of the best the one with the"
        " fewest GPUs a replica is shown, then the one with the fewest stages and groups of experts.",
        "## Which split wins where",
        IN_SHORT,
        "The winner on 64 GPUs, and $/M. `fits on` is how many GPUs hold the weights and a sequence of 4096 tokens."
        " The last column is what would win if no stage ever waited for another. At most 8 stages are considered: for"
        " more there is no figure.",
        _summary(all_cases),
        *(_case(case) for case in all_cases if case.base.weights == "fp8"),
        "## How far to trust it",
        *_known(inputs),
        "What the model leaves out, and whom that favours:",
        LEFT_OUT,
        "## Inputs",
        "`measured` names the result file, or what was measured by hand. `instead of` is what a result file replaced;"
        " `make bench-links` writes one.",
        _inputs(inputs),
    ]
    return "\n\n".join(_wrapped(part) for part in text) + "\n"


def _wrapped(part: str) -> str:
    """A paragraph in lines of 120; tables, headings and lists as they are."""
    part = part.rstrip("\n")
    return part if part.startswith(("|", "#", "-")) else textwrap.fill(part, 120, break_on_hyphens=False)


def _summary(all_cases: list[Case]) -> str:
    headings = ["", "fits on", "batch 1", f"{PACE} tok/s each", "saturated", "saturated, never idle"]
    rows = []
    for case in all_cases:
        best = [c[64] for c in (case.alone, case.paced, case.saturated, case.never_idle.saturated)]
        cells = [f"{c.plan.split}, ${c.cost:.2f}" if c else "–" for c in best]
        rows.append([case.name, case.smallest, *cells])
    return common.table(headings, rows)


def _case(case: Case) -> str:
    headings = [f"{case.name}; GPUs"]
    for what in ("batch 1", f"{PACE} tok/s each", "saturated"):
        headings += [what, "tok/s", "$/M"]
    rows = []
    for n in COUNTS:
        best = case.alone[n], case.paced[n], case.saturated[n]
        if any(best):
            cells = [c for b in best for c in ([b.name, _number(b.tokens_per_second), f"{b.cost:.2f}"] if b else "–––")]
            rows.append([n, *cells, _number(best[-1].each) if best[-1] else "–"])
    return common.table([*headings, "tok/s each"], rows)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 20 else f"{x:.1f}"


UNITS = {"token": "ms a token", "first token": "ms to the first", "at once": "tok/s", "saturated": "tok/s"}
WHAT = {"token": "batch 1", "first token": "prompt of {isl}", "at once": "{count} at once, {isl}/{osl}"}


def known_points(inputs: Inputs) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Who measured, the case, and what the model says of it."""
    for source in inputs.data["known"]:
        figures = inputs.figures(source["gpu"])
        for row in source["rows"]:
            model = Model.of(inputs.data["models"][row["model"]])
            plan = Plan(model, Split(row["tp"]), figures, row["weights"], row["kv"])
            match row["what"]:
                case "token":
                    value = plan.token_time(row["context"]).total * 1e3
                case "first token":
                    value = plan.first_token_time(row["isl"]).total * 1e3
                case "at once":
                    value = plan.at_once(row["count"], row["isl"], row["osl"])
                case _:
                    found = plan.saturated(row["isl"], row["osl"])
                    value = found.tokens_per_second if found else 0.0
            yield source["by"], row, value


def _known(inputs: Inputs) -> Iterator[str]:
    points = [(by, row, value, value / row["value"]) for by, row, value in known_points(inputs)]
    rows: list[list[str]] = []
    others: dict[str, list[float]] = {}
    for by, row, value, ratio in points:
        model = f"{row['model']} {row['weights']}, KV {row['kv']}"
        if "published" in by:
            others.setdefault(f"{row['model']} TP{row['tp']}", []).append(ratio)
            continue
        what = WHAT.get(row["what"], "saturated, {isl}/{osl}").format(**row)
        shown_value = f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
        rows.append(
            [by.split(",")[0], model, what, UNITS[row["what"]], f"{row['value']:,}", shown_value, f"{ratio:.2f}"]
        )
    yield (
        "Points that others reach, beside the model; nothing was fitted to them. Ratios are model / measured. Measured"
        f" on one {inputs.data['gpu']}:"
    )
    yield common.table(["by", "model", "case", "unit", "measured", "model ", "ratio"], rows)
    published = sorted({by for by, *_ in points if "published" in by})
    published = "; ".join(sorted({by for by, *_ in points if "published" in by}))
    ratios = "; ".join(f"{model} {_span(r)} ({len(r)})" for model, r in others.items())
    yield f"Saturated, on H200 and H100, fp8 with KV in fp8, with the number of points. {published}: {ratios}."
    span = {what: _span([r for *_, row, _, r in points if row["what"] == what]) for what in UNITS}
    rates = [r for *_, row, _, r in points if row["what"] == "saturated"]
    fit = [r for result in inputs.results for r in fits(inputs, result)]
    within = sum(abs(r - 1) <= 0.15 for r in fit) / len(fit) if fit else 0
    yield (
        f"So a token at batch 1 takes {span['token']} of the measured time and a first token {span['first token']};"
        f" saturated throughput is {span['saturated']} of the measured one, with a median of"
        f" {statistics.median(rates):.2f} over {len(rates)} points. No point has stages or more than one node: there"
        f" the model is untested. Of the {len(fit)} matrix products in the result files, from which rates and overheads"
        f" were taken, it gives the time of {within:.0%} to within 15%."
    )


def _span(ratios: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{r:.2f}" for r in (min(ratios), max(ratios))))


def fits(inputs: Inputs, result: dict[str, Any]) -> list[float]:
    """The model's time of each product in a result file over the measured one."""
    any_model = Model.of(next(iter(inputs.data["models"].values())))
    plan = Plan(any_model, Split(), inputs.figures(result["gpu"]))
    return [plan.product(p.rows, p.outputs, p.inputs, p.dtype) / p.seconds for p in result["products"]]


def _inputs(inputs: Inputs) -> str:
    rows = [[f"`{i.name}`", shown(i.value), i.unit, i.source, i.instead_of] for i in inputs.listed(inputs.data["gpu"])]
    return common.table(["input", "value", "unit", "source", "instead of"], rows)


def main() -> None:
    """Writes scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=HERE / "scaling_inputs.json")
    parser.add_argument("--output", type=Path, default=HERE / "scaling.md")
    args = parser.parse_args()
    try:
        args.output.write_text(document(Inputs(args.inputs)))
    except InputError as e:
        sys.exit(f"error: {e}")
    print(f"wrote {args.output.name}")


if __name__ == "__main__":
    main()
