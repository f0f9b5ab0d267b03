"""Time to the first token, and decoding alone: python -m benchmarks.h200.ttft --format bf16

One request at a time through the executor (or `LLM`, with --engine-dir): from when it is added to its first token, the
median of 20 prompts of random token ids that are all different, prefix cache off. Each asks for four tokens, so that
the step after the first is enqueued before the first token is waited for, as in service. Then one request of many
tokens: milliseconds a token after the first.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from benchmarks.common import say
from benchmarks.h200 import floors
from benchmarks.h200.serving import (
    Probe,
    add_arguments,
    cuda_marks,
    idle,
    line_of,
    open_target,
    random_prompts,
    row_of,
    shape_of,
    write,
)

WARM_UP = 3


def ttft(target: Any, length: int, count: int) -> dict[str, Any]:
    """Of `count` prompts, one after the other."""
    times = []
    for prompt in random_prompts(count + WARM_UP, length, target.vocab_size, seed=length):
        [timing] = target.serve([prompt], [4])
        times.append(timing.ttft * 1e3)
    kept = sorted(times[WARM_UP:])
    return {
        "median_ms": statistics.median(kept), "least_ms": kept[0], "most_ms": kept[-1], "first_ms": times[0],
        "prompts": len(kept),
    }  # fmt: skip


def decode_alone(target: Any, probe: Probe, prompt: int, output: int, repeats: int) -> dict[str, Any]:
    """One request of `output` tokens: the median run."""
    runs = []
    for ids in random_prompts(repeats + 1, prompt, target.vocab_size, seed=output):
        probe.begin()
        [timing] = target.serve([ids], [output])
        probe.end()
        host = statistics.median(spent - waited for spent, waited, _ in probe.calls)
        runs.append(
            {"ms": timing.per_token * 1e3, "prompt": prompt, "output": output, "host_median_ms": host * 1e3}
            | idle(probe.steps, timing.last - timing.arrival)
        )
    runs = sorted(runs[1:], key=lambda run: run["ms"])  # the first one captures the graph
    return runs[len(runs) // 2] | {"runs_ms": [run["ms"] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--count", type=int, default=20, help="prompts of each length")
    parser.add_argument("--tokens", type=int, default=512, help="of the request that is decoded alone")
    a = parser.parse_args()
    longest = max([*a.lengths, 128 + a.tokens]) + 64
    target = open_target(a, longest=longest, at_once=4)
    probe = Probe(mark=None if a.no_events else cuda_marks(target.runner))
    probe.attach(target.runner, target.executor)
    rows = []

    def add(case: str, value: float, more: dict[str, Any]) -> None:
        kept = case in floors.UNITS and not a.layers
        rows.append(row_of(case, shape_of(a), a.format, a.kv, value, _floor(case, a) if kept else None, more))
        say(line_of(rows[-1]))

    alone = decode_alone(target, probe, 128, a.tokens, 5)
    add("decode-1", alone["ms"], alone)
    say(f"   runs {' '.join(f'{ms:.3f}' for ms in alone['runs_ms'])}; host {alone['host_median_ms']:.3f} ms a step")
    if alone["idle"] is not None:
        say(f"   GPU without work {alone['idle']:.2%} to {alone['idle_most']:.2%}; {alone['late_steps']:.1%} late")
    for length in a.lengths:
        figures = ttft(target, length, a.count)
        add(f"ttft-{length}", figures["median_ms"], figures)
        say(f"   {figures['least_ms']:.2f} to {figures['most_ms']:.2f} ms; the first of all {figures['first_ms']:.1f}")
    target.close()
    write("ttft", rows, a.output)


def _floor(case: str, a: argparse.Namespace) -> float:
    return floors.floor(case, a.shape, a.format, a.kv)


if __name__ == "__main__":
    main()
