"""One document for one measurement: the same numbers as JSON and as tables, with the formulas that made them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.table import Table

from trtllm_cli.artifact import human_bytes, os_errors, write_json
from trtllm_cli.bench.metrics import (
    FORMULAS,
    Distribution,
    Performance,
    RequestRecord,
    StreamingMetrics,
    average_concurrency,
    performance,
    streaming,
)
from trtllm_cli.engine import Engine
from trtllm_cli.machine import available_cores, cpu_name
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.run.gpu_memory import GpuMemory


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuMemorySection(_Section):
    """Where the GPU's memory went when the engine was loaded, in bytes."""

    gpu: str
    total: int
    weights: int
    activations: int
    scratch: int  # of kernels; the steps' inputs
    kv_cache: int
    kv_cache_blocks: int
    kv_cache_tokens: int  # that these hold
    other: int  # the driver's own for this process; other processes
    reserve: int  # left free for CUDA graphs and libraries
    free: int  # beside that

    @classmethod
    def of(cls, memory: GpuMemory, num_blocks: int, tokens_per_block: int) -> GpuMemorySection:
        """Of a GPU with a KV cache of so many blocks."""
        needs = memory.needs
        return cls(
            gpu=memory.gpu,
            total=memory.total,
            weights=needs.weights,
            activations=needs.activations,
            scratch=needs.scratch,
            kv_cache=memory.kv_cache,
            kv_cache_blocks=num_blocks,
            kv_cache_tokens=num_blocks * tokens_per_block,
            other=memory.other,
            reserve=memory.reserve,
            free=memory.free - memory.reserve,
        )


class EngineSection(_Section):
    """What was measured."""

    engine_dir: str
    version: str  # of the trtllm that built it
    backend: str
    target: dict[str, str]
    architecture: str
    dtype: str
    weight_dtype: str
    group_size: int | None
    kv_cache_dtype: str
    max_input_length: int
    max_sequence_length: int
    gpu_memory: GpuMemorySection | None  # None on a CPU

    @classmethod
    def of(cls, engine: Engine, gpu_memory: GpuMemorySection | None = None) -> EngineSection:
        """An engine's section."""
        config, build = engine.config, engine.config.build_config
        return cls(
            engine_dir=str(engine.path),
            version=config.version,
            backend=config.backend,
            target=config.target,
            architecture=config.pretrained_config.architecture,
            dtype=config.pretrained_config.dtype,
            weight_dtype=build.weight_dtype,
            group_size=build.group_size,
            kv_cache_dtype=build.kv_cache_dtype,
            max_input_length=build.max_input_len,
            max_sequence_length=build.max_seq_len,
            gpu_memory=gpu_memory,
        )


class WorldSection(_Section):
    """How it was run."""

    world_size: int
    tp_size: int
    pp_size: int
    num_threads: int
    max_batch_size: int
    max_num_tokens: int
    scheduling_policy: str
    enable_prefix_cache: bool
    enable_chunked_prefill: bool


class RequestSection(_Section):
    """What was asked."""

    num_requests: int
    warmup_requests: int
    concurrency: int  # the limit; -1: none
    avg_num_concurrent_requests: float
    avg_input_length: float
    avg_output_length: float
    sampling: str = "greedy, end-of-sequence ignored, exact output lengths"


class DatasetSection(_Section):
    """Where the requests came from."""

    source: str
    num_sequences: int
    isl_stats: Distribution  # input lengths, tokens
    osl_stats: Distribution  # output lengths, tokens
    max_sequence_length: int

    @classmethod
    def of(cls, source: str, lengths: Sequence[tuple[int, int]]) -> DatasetSection:
        """The section of requests with these (input, output) lengths; at least one."""
        isl, osl = Distribution.of(i for i, _ in lengths), Distribution.of(o for _, o in lengths)
        assert isl is not None
        assert osl is not None
        return cls(
            source=source,
            num_sequences=len(lengths),
            isl_stats=isl,
            osl_stats=osl,
            max_sequence_length=max(i + o for i, o in lengths),
        )


class KvCacheSection(_Section):
    """What the KV cache did while it was measured."""

    tokens_per_block: int
    total_blocks: int
    peak_used_blocks: int
    bytes_per_block: int
    cached_prompt_tokens: int  # found in the prefix cache
    preemptions: int

    @property
    def peak_use(self) -> float:
        """Of all blocks, the part in use at the peak."""
        return self.peak_used_blocks / self.total_blocks if self.total_blocks else 0.0


class StepSection(_Section):
    """What the executor did."""

    num_steps: int
    avg_tokens_per_step: float
    step_ms: Distribution


class MachineSection(_Section):
    """Where and when."""

    date: str  # ISO 8601, UTC
    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    load_average: float  # over the minute before the measurement
    os: str
    trtllm: str
    python: str
    numpy: str

    @classmethod
    def here(cls) -> MachineSection:
        """This machine, now."""
        import numpy as np

        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            cpu=cpu_name(),
            cores=available_cores(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            load_average=round(os.getloadavg()[0], 2),
            os=f"{platform.system()} {platform.release()} {platform.machine()}",
            trtllm=__version__,
            python=platform.python_version(),
            numpy=np.__version__,
        )


class Report(_Section):
    """The report of `trtllm bench throughput` or `latency`. Shared field names are TensorRT-LLM's."""

    report_version: Literal[1] = 1
    command: Literal["throughput", "latency"]
    engine: EngineSection
    world_info: WorldSection
    request_info: RequestSection
    performance: Performance
    streaming_metrics: StreamingMetrics | None  # None with --no-streaming
    steps: StepSection
    kv_cache: KvCacheSection
    dataset: DatasetSection
    machine: MachineSection
    formulas: dict[str, str] = FORMULAS

    def write(self, path: Path) -> None:
        """Writes the report as JSON, making the directories it needs."""
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.model_dump(mode="json"))


def build_report(
    records: Sequence[RequestRecord],
    *,
    command: Literal["throughput", "latency"],
    engine: Engine,
    world: WorldSection,
    dataset: DatasetSection,
    steps: StepSection,
    kv_cache: KvCacheSection,
    machine: MachineSection,
    warmup: int,
    concurrency: int,
    with_streaming: bool,
    gpu_memory: GpuMemorySection | None = None,
) -> Report:
    """The report of finished requests; at least one."""
    return Report(
        command=command,
        engine=EngineSection.of(engine, gpu_memory),
        world_info=world,
        request_info=RequestSection(
            num_requests=len(records),
            warmup_requests=warmup,
            concurrency=concurrency,
            avg_num_concurrent_requests=average_concurrency(records),
            avg_input_length=sum(r.input_tokens for r in records) / len(records),
            avg_output_length=sum(r.output_tokens for r in records) / len(records),
        ),
        performance=performance(records, world.world_size),
        streaming_metrics=streaming(records) if with_streaming else None,
        steps=steps,
        kv_cache=kv_cache,
        dataset=dataset,
        machine=machine,
    )


def render(report: Report) -> Iterator[RenderableType]:
    """The report as tables, for a console."""
    engine, world, request, dataset = report.engine, report.world_info, report.request_info, report.dataset
    machine, kv = report.machine, report.kv_cache
    weights = engine.weight_dtype + (f", groups of {engine.group_size}" if engine.group_size else "")
    yield _facts(
        "ENGINE",
        ("Engine", engine.engine_dir),
        ("Model", f"{engine.architecture}, {engine.dtype}"),
        ("Backend", ", ".join([engine.backend, *engine.target.values()])),
        ("Weights", weights),
        ("KV cache", engine.kv_cache_dtype),
        ("Max input / sequence length", f"{engine.max_input_length} / {engine.max_sequence_length} tokens"),
    )
    if engine.gpu_memory is not None:
        yield _facts("GPU MEMORY", *_memory_rows(engine.gpu_memory))
    yield _facts(
        "WORLD + RUNTIME",
        ("Ranks", f"{world.world_size} (tp {world.tp_size} × pp {world.pp_size})"),
        ("Threads of a rank", str(world.num_threads)),
        ("Max batch size / tokens of a step", f"{world.max_batch_size} / {world.max_num_tokens}"),
        ("Scheduling policy", world.scheduling_policy),
        ("Chunked prefill", _on(world.enable_chunked_prefill)),
        ("Prefix cache", _on(world.enable_prefix_cache) + ("" if world.enable_prefix_cache else ", for fairness")),
    )
    yield _facts(
        "REQUEST",
        ("Requests", f"{request.num_requests}, after {request.warmup_requests} to warm up"),
        ("Concurrency", "no limit" if request.concurrency < 0 else f"at most {request.concurrency}"),
        ("Average concurrency", f"{request.avg_num_concurrent_requests:.2f}"),
        ("Average input / output length", f"{request.avg_input_length:.1f} / {request.avg_output_length:.1f} tokens"),
        ("Sampling", request.sampling),
    )
    yield _facts("PERFORMANCE", *_performance_rows(report))
    yield _distributions(report)
    yield _facts(
        "STEPS + KV CACHE",
        ("Steps", f"{report.steps.num_steps}, {report.steps.avg_tokens_per_step:.1f} tokens each"),
        ("Blocks", f"{kv.total_blocks} of {kv.tokens_per_block} tokens ({human_bytes(kv.bytes_per_block)} each)"),
        ("Peak use", f"{kv.peak_used_blocks} blocks, {kv.peak_use:.1%}"),
        ("Prompt tokens from the prefix cache", str(kv.cached_prompt_tokens)),
        ("Preemptions", str(kv.preemptions)),
    )
    yield _facts(
        "DATASET",
        ("Source", dataset.source),
        ("Input length", _lengths(dataset.isl_stats)),
        ("Output length", _lengths(dataset.osl_stats)),
    )
    yield _facts(
        "MACHINE",
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {human_bytes(machine.memory_bytes)}"),
        ("Load before", f"{machine.load_average:.2f}"),
        ("Software", f"trtllm {machine.trtllm}, Python {machine.python}, numpy {machine.numpy}, {machine.os}"),
        ("Date", machine.date),
    )
    yield _facts("FORMULAS", *report.formulas.items())


def _memory_rows(memory: GpuMemorySection) -> Iterator[tuple[str, str]]:
    yield "GPU", f"{memory.gpu}, {human_bytes(memory.total)}"
    yield "Weights", human_bytes(memory.weights)
    yield "Activations", human_bytes(memory.activations)
    yield "Scratch", human_bytes(memory.scratch)
    held = f"{memory.kv_cache_blocks:,} blocks, {memory.kv_cache_tokens:,} tokens"
    yield "KV cache", f"{human_bytes(memory.kv_cache)}: {held}"
    yield "Driver, other processes", human_bytes(memory.other)
    yield "Reserve for graphs, libraries", human_bytes(memory.reserve)
    yield "Free", human_bytes(memory.free)


def _performance_rows(report: Report) -> Iterator[tuple[str, str]]:
    p, s = report.performance, report.streaming_metrics
    share = "Per GPU Output Throughput (tokens/sec/gpu)"
    if report.engine.backend == "cpu":
        share = "Per Rank Output Throughput (tokens/sec/rank)"
    yield "Request Throughput (req/sec)", _number(p.request_throughput_req_s)
    yield "Total Output Throughput (tokens/sec)", _number(p.system_output_throughput_tok_s)
    yield "Total Token Throughput (tokens/sec)", _number(p.system_total_throughput_tok_s)
    yield "Per User Output Throughput (tokens/sec/user)", _number(p.output_throughput_per_user_tok_s)
    yield share, _number(p.output_throughput_per_gpu_tok_s)
    yield "Total Latency (ms)", _number(p.total_latency_ms)
    yield "Average request latency (ms)", _number(p.avg_request_latency_ms)
    if s is not None:
        yield "Per User Output Speed [1/TPOT] (tokens/sec/user)", _number(s.token_output_speed_tok_s)
        yield "Average time-to-first-token [TTFT] (ms)", _number(s.avg_ttft_ms)
        yield "Average time-per-output-token [TPOT] (ms)", _number(s.avg_tpot_ms)
        yield "Average inter-token latency [ITL] (ms)", _number(s.avg_itl_ms)


def _distributions(report: Report) -> Table:
    rows: list[tuple[str, Distribution | None]] = []
    if (s := report.streaming_metrics) is not None:
        rows += [("TTFT", s.ttft_percentiles_ms), ("TPOT", s.tpot_percentiles_ms), ("ITL", s.itl_percentiles_ms)]
    rows += [("Latency", report.performance.request_latency_percentiles_ms), ("Step", report.steps.step_ms)]
    table = Table(title="DISTRIBUTIONS (ms)", title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    for heading in ("MIN", "MAX", "AVG", "P50", "P90", "P95", "P99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, d in rows:
        if d is None:
            table.add_row(name, *["–"] * 7)
        else:
            table.add_row(name, *map(_short, (d.minimum, d.maximum, d.average, d.p50, d.p90, d.p95, d.p99)))
    return table


def _facts(title: str, *rows: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _lengths(d: Distribution) -> str:
    if d.minimum == d.maximum:
        return f"{d.minimum:.0f} tokens each"
    return f"{d.minimum:.0f} to {d.maximum:.0f} tokens, average {d.average:.1f}, median {d.p50:.0f}"
