"""The host's time of a step, on a device that does nothing: python -m benchmarks.h200.host_steps

Serves a workload of serving.py's, saturated, and prints the median and the longest of the steps' times, with Python's
garbage collection as an engine's load leaves it and as it is without. Takes no GPU. The longest one is what a GPU may
have to wait for: a step of 1024 sequences takes an H200 about 20 ms. The result lies in benchmarks/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import say
from benchmarks.h200 import floors, serving
from benchmarks.h200.machine import machine
from trtllm_cli.engine import BuildConfig
from trtllm_cli.run.load import leave_out_of_collection


class Idle:
    """A runner whose every token is 7, at once. See SamplingRunner."""

    vocab_size, bytes_per_block = floors.VOCAB, 1

    def allocate_kv_cache(self, num_blocks: int) -> None: ...

    def copy_blocks(self, pairs: Any) -> None: ...

    def forward(self, inputs: Any) -> None:  # noqa: ARG002
        raise AssertionError("it samples")

    def samples(self, params: Any, num_banned: int) -> bool:  # noqa: ARG002
        return True

    def start(self, inputs: Any, sampling: Any) -> Tokens:  # noqa: ARG002
        return Tokens(len(sampling.rows))

    def close(self) -> None: ...


class Tokens:
    """See PendingTokens."""

    def __init__(self, count: int) -> None:
        self._count = count

    def tokens(self) -> Any:
        return np.full(self._count, 7, np.int32)

    def logprobs(self) -> list[None]:
        return [None] * self._count


def step_times(work: floors.Workload, batch: int = 1024) -> list[float]:
    """Milliseconds of each step."""
    longest = work.prompt + work.output
    limits = BuildConfig(
        max_batch_size=batch, max_num_tokens=max(batch, 8192), max_seq_len=longest, max_input_len=work.prompt,
        tokens_per_block=64, weight_dtype="bfloat16", kv_cache_dtype="bfloat16",
    )  # fmt: skip
    target = serving.OnExecutor(Idle(), limits, vocab_size=floors.VOCAB, num_blocks=batch * -(-longest // 64) + 8)
    step, times = target.executor.step, []

    def timed() -> Any:
        started = time.perf_counter()
        events = step()
        times.append((time.perf_counter() - started) * 1e3)
        return events

    target.executor.step = timed  # type: ignore[method-assign]
    target.serve(serving.random_prompts(work.requests, work.prompt, floors.VOCAB), [work.output] * work.requests)
    target.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", choices=floors.WORKLOADS, default="sat-128-128")
    parser.add_argument("--output", default="", help="JSON")
    a = parser.parse_args()
    import torch  # noqa: F401 - what a full collection looks at, with what the lines above have imported
    import transformers  # noqa: F401

    rows = []
    for left_out in (False, True, False, True):
        if left_out:
            leave_out_of_collection()
        times = step_times(floors.WORKLOADS[a.workload])
        gc.unfreeze()
        row = {"left_out": left_out, "steps": len(times), "median_ms": median(times), "longest_ms": max(times)}
        rows.append(row)
        how = "what was loaded is left out of collection" if left_out else "as Python does it"
        say(f"{a.workload}, {how}: {len(times)} steps, median {median(times):.2f} ms, longest {max(times):.1f} ms")
    if a.output:
        with open(a.output, "w") as f:
            json.dump({"script": "host_steps", "machine": machine(), "workload": a.workload, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
