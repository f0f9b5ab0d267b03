"""Requests through the executor, as in service: python -m benchmarks.h200.serving --format fp8 --kv fp8 batch64

The executor batches in flight, runs one step ahead and has the device sample, on an engine whose weights are made on
the device (synthetic.py), or with --engine-dir on a real one through `LLM`, with token ids. Greedy, past the end token,
random token ids, prefix cache off. All requests come at once; ramp-up and tail are part of what is measured, as in the
offline benchmarks of TensorRT-LLM and vLLM. By default a saturated workload lasts 5 to 15 s at about 20,000 tok/s;
--full takes as many requests as TensorRT-LLM's published figures are of (two to four minutes each).

Before, one run meets every batch size and one whole prompts, so that graphs and libraries are ready.

Host time a step is the time in `Executor.step` outside of waiting for tokens. Whether the GPU had work is measured with
two CUDA events a step: `begin` in front of its first copy and `end` behind its last. From one step's end to the next
one's begin nothing was enqueued: these gaps are `idle`. A step that was enqueued when the one before had ended already
is late; while it was being enqueued the GPU had only a part of it, so `idle_most` adds that time. The truth lies
between. (An event waits in the stream like any work: behind a step that is under way it adds nothing.)
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import say
from benchmarks.h200 import floors
from benchmarks.h200.machine import machine
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.executor import Executor
from trtllm_cli.run.load import leave_out_of_collection
from trtllm_cli.run.request import SamplingParams

Prompts = Sequence[list[int]]
RESERVE = 6 << 30  # bytes on the GPU for activations, graphs and libraries


@dataclass(slots=True)
class Timing:
    """A request, as it was served."""

    prompt: int  # tokens
    arrival: float  # seconds
    first: float = 0.0  # token
    last: float = 0.0
    output: int = 0  # tokens

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def per_token(self) -> float:
        """Seconds a token after the first."""
        return (self.last - self.first) / (self.output - 1)


@dataclass
class Step:
    """One step, as the runner was given it."""

    tokens: int
    sequences: int
    enqueue: float  # seconds in the runner's start
    begin: Any = None  # marks on the GPU
    end: Any = None
    is_late: bool = False  # the one before had ended


@dataclass
class Probe:
    """Watches a runner and an executor from outside: what they are asked, and how long that takes."""

    mark: Callable[[], Any] | None = None  # puts a CUDA event, None without a GPU
    steps: list[Step] = field(default_factory=list)
    calls: list[tuple[float, float, int]] = field(
        default_factory=list
    )  # a call of step: seconds, of them waiting, started
    profile: cProfile.Profile | None = None  # of the steps from when all prompts are computed
    _waited: float = 0.0
    _on: bool = False

    def attach(self, runner: Any, executor: Any) -> None:
        """From here on it watches, while it is on."""
        start, step = runner.start, executor.step

        def watched_start(inputs: Any, sampling: Any) -> Any:
            if not self._on:
                return start(inputs, sampling)
            begin = self.mark() if self.mark else None
            at = time.perf_counter()
            pending = start(inputs, sampling)
            entry = Step(inputs.num_tokens, inputs.num_seqs, time.perf_counter() - at, begin)
            if self.mark:
                entry.is_late = bool(self.steps) and self.steps[-1].end.query()
                entry.end = self.mark()
            self.steps.append(entry)
            return SimpleNamespace(tokens=lambda: self._wait(pending), logprobs=pending.logprobs)

        def watched_step() -> Any:
            if not self._on:
                return step()
            self._waited, before = 0.0, len(self.steps)
            profile = self.profile if self.profile and before and self._is_decode(self.steps[-1]) else None
            at = time.perf_counter()
            if profile:
                profile.enable()
            try:
                return step()
            finally:
                if profile:
                    profile.disable()
                self.calls.append((time.perf_counter() - at, self._waited, len(self.steps) - before))

        runner.start, executor.step = watched_start, watched_step

    def begin(self) -> None:
        """Forgets what was seen, and watches."""
        self.steps.clear()
        self.calls.clear()
        self._on = True

    def end(self) -> None:
        """Watches no more."""
        self._on = False

    def _wait(self, pending: Any) -> Any:
        at = time.perf_counter()
        tokens = pending.tokens()
        self._waited += time.perf_counter() - at
        return tokens

    @staticmethod
    def _is_decode(step: Step) -> bool:
        return step.tokens == step.sequences


class OnExecutor:
    """Serves requests in this thread, with an executor of its own on a runner that samples."""

    def __init__(
        self, runner: Any, limits: Any, *, vocab_size: int, num_blocks: int, policy: str = "guaranteed_no_evict",
        prefix: bool = False, comm: Any = None,
    ) -> None:  # fmt: skip
        self.runner, self.limits, self.vocab_size = runner, limits, vocab_size
        self.executor = Executor(
            limits, runner, comm or SingleRank(), vocab_size=vocab_size, num_blocks=num_blocks,
            enable_prefix_cache=prefix, policy=policy,
        )  # fmt: skip
        self._next = 0

    def serve(self, prompts: Prompts, outputs: Sequence[int]) -> list[Timing]:
        """All requests at once, each to its number of tokens."""
        timings, arrival = {}, time.perf_counter()
        for prompt, output in zip(prompts, outputs, strict=True):
            self.executor.add_request(self._next, prompt, SamplingParams(max_tokens=output, ignore_eos=True))
            timings[self._next] = Timing(len(prompt), arrival)
            self._next += 1
        new, wanted = set(timings), dict(zip(timings, outputs, strict=True))
        while self.executor.has_work:
            events = self.executor.step()
            now = time.perf_counter()
            for event in events:
                if event.request_id in new:
                    timings[event.request_id].first = now
                    new.discard(event.request_id)
                if event.finish_reason:
                    timings[event.request_id].last = now
                    timings[event.request_id].output = (
                        wanted[event.request_id] if event.finish_reason == "length" else 0
                    )
        return list(timings.values())

    def close(self) -> None:
        self.executor.close()
        self.runner.close()


class OnEngine:
    """Serves requests with an engine directory, as a program that uses `LLM` does."""

    def __init__(self, engine_dir: Path, *, num_blocks: int | None, policy: str, prefix: bool) -> None:
        from trtllm_cli.run.llm import LLM

        self.llm = LLM(engine_dir, max_num_blocks=num_blocks, scheduler_policy=policy, enable_prefix_cache=prefix)
        self.runner, self.executor = self.llm._loop._loaded.result()
        self.limits, self.vocab_size = self.llm.build_config, self.llm.engine.config.pretrained_config.vocab_size

    def serve(self, prompts: Prompts, outputs: Sequence[int]) -> list[Timing]:
        """See OnExecutor. Times are the step loop's own."""
        params = [SamplingParams(max_tokens=output, ignore_eos=True) for output in outputs]
        done = self.llm.generate(list(prompts), params)
        return [
            Timing(len(o.prompt_token_ids), t.arrival, t.first_token, t.last_token, len(o.outputs[0].token_ids))
            for o, t in ((o, o.times) for o in done)
        ]

    def close(self) -> None:
        self.llm.close()


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids."""
    draw = random.Random(seed)
    return [draw.choices(range(vocab_size), k=length) for _ in range(count)]


def warm_up(target: Any, work: floors.Workload, sizes: Iterable[int]) -> None:
    """Meets every batch size once or twice on the way down, then whole prompts as they will come."""
    most = min(target.limits.max_batch_size, work.requests)
    levels = [size for size in sizes if size < most] + [most]
    # Request i goes on while the batch has more than i: two steps a level.
    outputs = [2 + 2 * sum(level > i for level in levels) for i in range(most)]
    length = min(16, work.prompt)
    target.serve(random_prompts(most, length, target.vocab_size, 1), outputs)
    count = min(work.requests, target.limits.max_num_tokens // work.prompt + 2)
    target.serve(random_prompts(count, work.prompt, target.vocab_size, 2), [min(4, work.output)] * count)


def run_workload(target: Any, probe: Probe, work: floors.Workload, sizes: Iterable[int]) -> dict[str, Any]:
    """Serves a workload, and reports it."""
    warm_up(target, work, sizes)
    prompts = random_prompts(work.requests, work.prompt, target.vocab_size)
    preempted = target.executor.stats.preemptions
    probe.begin()
    timings = target.serve(prompts, [work.output] * work.requests)
    probe.end()
    preemptions = target.executor.stats.preemptions - preempted
    assert all(t.output == work.output for t in timings), "a request ended before its length"
    return {"preemptions": preemptions, **report(timings, probe)}


def report(timings: Sequence[Timing], probe: Probe) -> dict[str, Any]:
    """The figures of a run; times in milliseconds."""
    start, end = min(t.arrival for t in timings), max(t.last for t in timings)
    seconds = end - start
    output = sum(t.output for t in timings)
    ttfts = [t.ttft for t in timings]
    steps, calls = probe.steps, probe.calls
    decodes = [s for s in steps if s.tokens == s.sequences]
    host = sum(spent - waited for spent, waited, _ in calls)
    one_each = [spent - waited for spent, waited, started in calls if started == 1]
    per_token = [t.per_token for t in timings if t.output > 1]
    figures = {
        "requests": len(timings), "seconds": seconds, "output_tok_s": output / seconds,
        "total_tok_s": (output + sum(t.prompt for t in timings)) / seconds, "requests_s": len(timings) / seconds,
        "ttft_mean_ms": statistics.fmean(ttfts) * 1e3, "ttft_median_ms": statistics.median(ttfts) * 1e3,
        "tpot_mean_ms": statistics.fmean(per_token) * 1e3 if per_token else None,
        "steps": len(steps), "decode_steps": len(decodes), "mean_batch": _mean(s.sequences for s in steps),
        "mean_decode_batch": _mean(s.sequences for s in decodes), "mean_tokens": _mean(s.tokens for s in steps),
        "host_ms_a_step": host / max(len(steps), 1) * 1e3, "host_share": host / seconds,
        "host_median_ms": statistics.median(one_each) * 1e3 if one_each else None,
        "enqueue_ms_a_step": (_mean(s.enqueue for s in steps) or 0.0) * 1e3,
        "outside_step_share": 1 - sum(spent for spent, _, _ in calls) / seconds,
    }  # fmt: skip
    return figures | idle(steps, seconds)


def idle(steps: Sequence[Step], seconds: float) -> dict[str, float | None]:
    """Shares of the time in which the GPU had nothing enqueued: at least, and at most."""
    if len(steps) < 2 or steps[0].end is None:
        return {"idle": None, "idle_most": None, "late_steps": None}
    pairs = list(itertools.pairwise(steps))
    gaps = sum(max(a.end.elapsed_time(b.begin), 0.0) for a, b in pairs) / 1e3
    late = [b for _, b in pairs if b.is_late]
    most = gaps + sum(b.enqueue for b in late)
    return {"idle": gaps / seconds, "idle_most": most / seconds, "late_steps": len(late) / len(pairs)}


def row_of(case: str, shape: str, fmt: str, kv: str, value: float, floor: float | None, more: dict[str, Any]) -> dict:
    """A row of the table: a figure beside the goal, the peers and the floor. Ratios above 1 are ahead."""
    known = floors.peers(case, shape, fmt)
    return {
        "case": case, "shape": shape, "format": fmt, "kv": kv, "value": value, "unit": known.unit, "goal": known.goal,
        "vllm": known.vllm, "tensorrt_llm": known.tensorrt_llm, "floor": floor, "note": known.note,
        "of_goal": known.ahead(value, known.goal), "of_vllm": known.ahead(value, known.vllm),
        "of_tensorrt_llm": known.ahead(value, known.tensorrt_llm),
        "of_floor": None if floor is None else (floor / value if known.is_time else value / floor), **more,
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """A row in a line."""
    text = f"{row['case']} {row['shape']} {row['format']} kv {row['kv']}: {floors.figure(row['value'])} {row['unit']}"
    for name, of in (
        ("goal", "of_goal"),
        ("vllm", "of_vllm"),
        ("tensorrt_llm", "of_tensorrt_llm"),
        ("floor", "of_floor"),
    ):
        if row[name] is not None:
            text += f"; {name.replace('_', '-')} {floors.figure(row[name])} (x{row[of]:.2f})"
    return text


def details_of(f: dict[str, Any]) -> str:
    """A run's other figures in a few lines."""
    text = (
        f"   {f['requests']} requests in {f['seconds']:.2f} s: {f['total_tok_s']:.0f} tok/s in all, "
        f"{f['requests_s']:.2f} requests/s; TTFT mean {f['ttft_mean_ms']:.1f}, median {f['ttft_median_ms']:.1f} ms; "
        f"{f['tpot_mean_ms'] or 0:.2f} ms a token\n"
        f"   {f['steps']} steps ({f['decode_steps']} of decoding only), {f['mean_batch'] or 0:.1f} sequences each; "
        f"{f['preemptions']} preemptions\n"
        f"   host {f['host_ms_a_step']:.3f} ms a step (median {f['host_median_ms'] or 0:.3f}; enqueueing "
        f"{f['enqueue_ms_a_step']:.3f}), {f['host_share']:.1%} of the time; "
        f"outside of steps {f['outside_step_share']:.1%}"
    )
    if f["idle"] is not None:
        text += f"\n   GPU without work {f['idle']:.2%} to {f['idle_most']:.2%} of the time; "
        text += f"{f['late_steps']:.1%} of the steps late"
    return text


def profile_text(profile: cProfile.Profile, rows: int = 30) -> str:
    """Where the host's time goes, the dearest first."""
    out = io.StringIO()
    pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(rows)
    return out.getvalue()


def write(script: str, rows: list[dict[str, Any]], output: str) -> None:
    """The rows as JSON, for results.py."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps({"script": script, "machine": machine(), "rows": rows}, indent=1) + "\n")


def cuda_marks(runner: Any) -> Callable[[], Any]:
    """What puts an event with a time on the runner's stream."""
    import torch

    stream = runner._device.stream

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    return mark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which engine is measured."""
    parser.add_argument("--shape", choices=floors.MODELS, default="8b")
    parser.add_argument("--format", choices=floors.FORMATS, default="bf16")
    parser.add_argument("--kv", choices=("bf16", "fp8", "int8"), default="bf16", help="the KV cache")
    parser.add_argument("--layers", type=int, help="only so many: to try a script; its figures are of another model")
    parser.add_argument("--engine-dir", type=Path, help="a real engine; say with --shape, --format and --kv what it is")
    parser.add_argument("--max-batch-size", type=int, default=1024)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument(
        "--num-blocks", type=int, help="of the KV cache; default: what the workloads need and the GPU has"
    )
    parser.add_argument("--policy", choices=("guaranteed_no_evict", "max_utilization"), default="guaranteed_no_evict")
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--no-events", action="store_true", help="do without CUDA events and the idle figures")
    parser.add_argument("--output", default="", help="JSON")


def shape_of(a: argparse.Namespace) -> str:
    """The model's name in tables."""
    return f"{a.shape}, {a.layers} layers" if a.layers else a.shape


def open_target(a: argparse.Namespace, *, longest: int, at_once: int) -> Any:
    """The engine to measure, with room for `at_once` requests of `longest` tokens, or as many as fit."""
    if a.engine_dir:
        return OnEngine(a.engine_dir, num_blocks=a.num_blocks, policy=a.policy, prefix=a.prefix_cache)
    import torch

    from benchmarks.h200.synthetic import runner_of

    model = floors.MODELS[a.shape]
    blocks = a.num_blocks
    if blocks is None:
        weights = model.linears * floors.FORMATS[a.format][0] + 2 * floors.VOCAB * model.hidden * (
            1 if model.tied else 2
        )
        room = torch.cuda.mem_get_info()[0] - weights - RESERVE
        blocks = int(min(at_once * -(-longest // a.block_size) + 8, room // (model.kv_bytes(a.kv) * a.block_size)))
    started = time.perf_counter()
    runner, limits = runner_of(
        a.shape, a.format, num_blocks=blocks, layers=a.layers, max_batch_size=a.max_batch_size,
        max_num_tokens=max(a.max_num_tokens, a.max_batch_size), max_seq_len=-(-longest // 64) * 64,
        tokens_per_block=a.block_size, kv_cache_dtype=None if a.kv == "bf16" else a.kv,
    )  # fmt: skip
    say(
        f"{a.shape} {a.format}, kv {a.kv}: {blocks} blocks of {a.block_size}, "
        f"ready in {time.perf_counter() - started:.1f} s"
    )
    leave_out_of_collection()  # as an engine's load does
    return OnExecutor(
        runner, limits, vocab_size=floors.VOCAB, num_blocks=blocks, policy=a.policy, prefix=a.prefix_cache
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(floors.WORKLOADS)}; default: all")
    add_arguments(parser)
    parser.add_argument("--requests", type=int, help="another number of requests")
    parser.add_argument("--full", action="store_true", help="as many as TensorRT-LLM's figures are of")
    parser.add_argument("--repeats", type=int, default=1, help="the median run of so many is reported")
    parser.add_argument(
        "--profile-host", action="store_true", help="cProfile of the steps of decoding; slows them down"
    )
    a = parser.parse_args()
    if unknown := set(a.workloads) - floors.WORKLOADS.keys():
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    works = {}
    for name in a.workloads or floors.WORKLOADS:
        work = floors.WORKLOADS[name]
        count = a.requests or (work.full if a.full else work.requests)
        works[name] = floors.Workload(count, work.full, work.prompt, work.output)
    longest = max(w.prompt + w.output for w in works.values())
    at_once = max(min(w.requests, a.max_batch_size) for w in works.values())
    target = open_target(a, longest=longest, at_once=at_once)
    from trtllm_cli.run.backends.cuda import GRAPH_SIZES

    probe = Probe(mark=None if a.no_events else cuda_marks(target.runner))
    if a.profile_host:
        probe.profile = cProfile.Profile()
    probe.attach(target.runner, target.executor)
    rows = []
    for name, work in works.items():
        runs = [run_workload(target, probe, work, GRAPH_SIZES) for _ in range(a.repeats)]
        figures = sorted(runs, key=lambda f: f["output_tok_s"])[len(runs) // 2]
        most = target.limits.max_batch_size
        floor = None if a.layers else floors.floor(name, a.shape, a.format, a.kv, most, work.requests)
        figures["runs_tok_s"] = [f["output_tok_s"] for f in runs]
        rows.append(row_of(name, shape_of(a), a.format, a.kv, figures["output_tok_s"], floor, figures))
        say(line_of(rows[-1]) + "\n" + details_of(figures))
    if probe.profile:
        sys.stdout.write(profile_text(probe.profile))
    target.close()
    write("serving", rows, a.output)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


if __name__ == "__main__":
    main()
