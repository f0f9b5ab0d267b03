"""Drives an engine's executor in this process, and notes when each token came."""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from trtllm_cli.bench.metrics import Distribution, RequestRecord
from trtllm_cli.bench.report import (
    DatasetSection,
    GpuMemorySection,
    KvCacheSection,
    MachineSection,
    Report,
    StepSection,
    WorldSection,
    build_report,
)
from trtllm_cli.bench.workload import Sample, check_fits
from trtllm_cli.engine import BuildConfig, Engine
from trtllm_cli.errors import UsageError
from trtllm_cli.machine import default_threads
from trtllm_cli.run.load import LoadOptions, gpu_memory, load_executor, verify_aside
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.world import current

if TYPE_CHECKING:
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.executor import Executor
    from trtllm_cli.run.scheduler import Policy

Progress = Callable[[int, int], None]  # output tokens so far, and in all


@dataclass(frozen=True)
class StepRecord:
    """One step of the executor, as the iteration log has it."""

    iteration: int
    start_ms: float  # since the measurement began
    step_ms: float
    prefill_tokens: int
    decode_tokens: int
    new_tokens: int
    num_running: int  # sequences, after the step
    num_waiting: int
    blocks_used: int
    preemptions: int  # in this step


@dataclass
class Measurement:
    """Everything that was noted."""

    requests: list[RequestRecord] = field(default_factory=list)  # in the order of the dataset
    steps: list[StepRecord] = field(default_factory=list)
    peak_blocks: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True)
class RuntimeOptions(LoadOptions):
    """How the engine is run; the prefix cache is off, so that every prompt token is computed."""

    enable_prefix_cache: bool = False
    scheduler_policy: Policy = "guaranteed_no_evict"
    max_batch_size: int | None = None
    max_num_tokens: int | None = None


class Session:
    """A loaded engine with its executor; a context manager, or `close` it. Not thread-safe."""

    def __init__(self, engine: Engine, runner: Runner, executor: Executor, options: RuntimeOptions) -> None:
        self.engine = engine
        self.runner = runner
        self.executor = executor
        self.options = options
        self._gpu_memory = gpu_memory(runner)  # before any step
        self._ids = itertools.count()

    @classmethod
    def open(cls, engine_dir: Path, options: RuntimeOptions | None = None, *, verify: bool = True) -> Session:
        """Loads the engine, on every rank of the world. `verify` False skips the check of its SHA-256."""
        options = options or RuntimeOptions()
        options.check()
        engine = Engine.open(engine_dir)
        limits, world = _runtime_limits(engine.config.build_config, options), current()
        runner, executor = load_executor(engine, world, limits, options)
        verified = verify_aside(engine, world) if verify else None
        try:
            if verified is not None:
                verified.result()
        except BaseException:
            if verified is not None:
                verified.cancel()  # of an interrupt: what is left to read is not read
            executor.close()
            runner.close()
            raise
        return cls(engine, runner, executor, options)

    def measure(
        self, samples: Sequence[Sample], *, concurrency: int = -1, progress: Progress | None = None
    ) -> Measurement:
        """Runs the requests, at most `concurrency` at a time (-1: all at once), each to its exact output length."""
        result = Measurement()
        waiting, live = deque(samples), dict[int, RequestRecord]()
        total, done = sum(s.output_tokens for s in samples), 0
        self.executor.stats.blocks_peak = 0  # the peak counts from here
        hits = self.executor.stats.prefix_hit_tokens
        start = time.perf_counter()
        while waiting or live:
            while waiting and (concurrency < 0 or len(live) < concurrency):
                request_id, record = self._submit(waiting.popleft())
                live[request_id] = record
                result.requests.append(record)
            step, finished = self._step(live, len(result.steps), start)
            result.steps.append(step)
            for request_id in finished:
                del live[request_id]
            done += step.new_tokens
            if progress is not None:
                progress(done, total)
        result.peak_blocks = self.executor.stats.blocks_peak
        result.cached_prompt_tokens = self.executor.stats.prefix_hit_tokens - hits
        return result

    def _submit(self, sample: Sample) -> tuple[int, RequestRecord]:
        request_id = next(self._ids)
        params = SamplingParams(max_tokens=sample.output_tokens, ignore_eos=True)
        record = RequestRecord(sample.task_id, len(sample.input_ids), arrival=time.perf_counter())
        self.executor.add_request(request_id, list(sample.input_ids), params)
        return request_id, record

    def _step(self, live: dict[int, RequestRecord], iteration: int, start: float) -> tuple[StepRecord, list[int]]:
        """Runs one step. Its tokens all come when it ends."""
        stats = self.executor.stats
        prefilled, decoded, preempted = stats.prefill_tokens, stats.decode_tokens, stats.preemptions
        began = time.perf_counter()
        events = self.executor.step()
        ended = time.perf_counter()
        finished = []
        for event in events:
            assert event.token_id is not None
            record = live[event.request_id]
            record.token_times.append(ended)
            record.token_ids.append(event.token_id)
            if event.finish_reason is not None:
                assert event.finish_reason == "length"
                finished.append(event.request_id)
        stats = self.executor.stats
        step = StepRecord(
            iteration=iteration,
            start_ms=(began - start) * 1e3,
            step_ms=(ended - began) * 1e3,
            prefill_tokens=stats.prefill_tokens - prefilled,
            decode_tokens=stats.decode_tokens - decoded,
            new_tokens=len(events),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            blocks_used=stats.blocks_used,
            preemptions=stats.preemptions - preempted,
        )
        return step, finished

    def world(self) -> WorldSection:
        """The report's section on how it runs."""
        mapping, limits, options = self.engine.config.pretrained_config.mapping, self.executor.config, self.options
        return WorldSection(
            world_size=mapping.world_size,
            tp_size=mapping.tp_size,
            pp_size=mapping.pp_size,
            num_threads=options.num_threads or default_threads(current().local_size),
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            scheduling_policy=options.scheduler_policy,
            enable_prefix_cache=options.enable_prefix_cache,
            enable_chunked_prefill=options.enable_chunked_prefill,
        )

    def gpu_memory(self) -> GpuMemorySection | None:
        """The report's section on the GPU's memory; None on a CPU."""
        if self._gpu_memory is None:
            return None
        tokens_per_block = self.executor.config.tokens_per_block
        return GpuMemorySection.of(self._gpu_memory, self.executor.stats.blocks_total, tokens_per_block)

    def close(self) -> None:
        """Frees the engine."""
        self.executor.close()
        self.runner.close()
        gc.unfreeze()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def bench(
    session: Session,
    samples: Sequence[Sample],
    *,
    command: Literal["throughput", "latency"],
    source: str,
    warmup: int = 2,
    concurrency: int = -1,
    with_streaming: bool = True,
    progress: Progress | None = None,
) -> tuple[Report, Measurement]:
    """Warms up, measures, and reports. `source` says where the samples are from.

    Raises RequestError, before anything runs, for a request that the engine cannot serve.
    """
    if concurrency == 0 or concurrency < -1:
        raise UsageError(f"a concurrency of {concurrency}", where="--concurrency", fix="at least 1, or -1 for no limit")
    if warmup < 0:
        raise UsageError(f"{warmup} requests to warm up", where="--warmup", fix="0 or more")
    config, limits = session.engine.config, session.executor.config
    check_fits(
        samples,
        max_input_len=limits.max_input_len,
        max_seq_len=limits.max_seq_len,
        vocab_size=config.pretrained_config.vocab_size,
    )
    machine = MachineSection.here()
    session.measure(list(_warmup_samples(samples, warmup)), concurrency=concurrency)
    measured = session.measure(samples, concurrency=concurrency, progress=progress)
    step_ms = Distribution.of(s.step_ms for s in measured.steps)
    assert step_ms is not None
    tokens = sum(s.prefill_tokens + s.decode_tokens for s in measured.steps)
    report = build_report(
        measured.requests,
        command=command,
        engine=session.engine,
        world=session.world(),
        dataset=DatasetSection.of(source, [(len(s.input_ids), s.output_tokens) for s in samples]),
        steps=StepSection(
            num_steps=len(measured.steps), avg_tokens_per_step=tokens / len(measured.steps), step_ms=step_ms
        ),
        kv_cache=KvCacheSection(
            tokens_per_block=limits.tokens_per_block,
            total_blocks=session.executor.stats.blocks_total,
            peak_used_blocks=measured.peak_blocks,
            bytes_per_block=session.runner.bytes_per_block,
            cached_prompt_tokens=measured.cached_prompt_tokens,
            preemptions=sum(s.preemptions for s in measured.steps),
        ),
        machine=machine,
        warmup=warmup,
        concurrency=concurrency,
        with_streaming=with_streaming,
        gpu_memory=session.gpu_memory(),
    )
    return report, measured


def request_rows(records: Sequence[RequestRecord]) -> list[dict[str, float | int | None]]:
    """Each request's own numbers, for --request-json."""
    first = min(r.arrival for r in records)
    return [
        {
            "task_id": r.task_id,
            "input_tokens": r.input_tokens,
            "output_tokens": r.output_tokens,
            "arrival_ms": (r.arrival - first) * 1e3,
            "ttft_ms": r.ttft * 1e3,
            "tpot_ms": None if r.tpot is None else r.tpot * 1e3,
            "latency_ms": r.e2e * 1e3,
        }
        for r in records
    ]


def output_rows(records: Sequence[RequestRecord]) -> list[dict[str, int | list[int]]]:
    """What each request generated, for --output-json."""
    return [{"task_id": r.task_id, "output_ids": r.token_ids} for r in records]


def step_rows(steps: Sequence[StepRecord]) -> list[dict[str, float | int]]:
    """Each step, for --iteration-log."""
    return [asdict(step) for step in steps]


def _warmup_samples(samples: Sequence[Sample], n: int) -> Iterator[Sample]:
    """The first samples, around again if need be. Reversed, so that no prefix of a prompt is in the cache already."""
    for sample in itertools.islice(itertools.cycle(samples), n):
        yield Sample(sample.task_id, sample.output_tokens, input_ids=sample.input_ids[::-1])


def _runtime_limits(built: BuildConfig, options: RuntimeOptions) -> BuildConfig:
    """The engine's limits, lowered where the options say so."""
    lowered: dict[str, int] = {}
    for name, flag in (("max_batch_size", "--max-batch-size"), ("max_num_tokens", "--max-num-tokens")):
        wanted, limit = getattr(options, name), getattr(built, name)
        if wanted is None:
            continue
        if not 1 <= wanted <= limit:
            raise UsageError(
                f"{name} is {wanted}; this engine was built for 1 to {limit}",
                where=flag,
                fix=f"ask for at most {limit}, or rebuild the engine with {flag} {wanted}",
            )
        lowered[name] = wanted
    limits = built.model_copy(update=lowered)
    if limits.max_num_tokens < limits.max_batch_size:
        raise UsageError(
            f"max_num_tokens {limits.max_num_tokens} is less than max_batch_size {limits.max_batch_size}",
            where="--max-num-tokens",
            fix="a step must hold one token of each request: lower --max-batch-size too",
        )
    return limits
