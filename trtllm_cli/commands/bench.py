"""`trtllm bench`: measure an engine, and make the datasets for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trtllm_cli.commands import bench_dataset, launch_flags, memory_flags, model_flags, random_flags
from trtllm_cli.commands.launch_flags import LaunchFlags
from trtllm_cli.commands.model_flags import ModelFlags
from trtllm_cli.commands.random_flags import RandomFlags

if TYPE_CHECKING:
    from trtllm_cli.bench.offline import Measurement, Progress, RuntimeOptions, Session
    from trtllm_cli.bench.report import Report
    from trtllm_cli.bench.workload import Encode, Sample

app = typer.Typer(help="Measure an engine: throughput, latency, and the datasets for them.", **bench_dataset.SETTINGS)
app.add_typer(bench_dataset.app, name="prepare-dataset")

DEFAULT_INPUT_LEN = DEFAULT_OUTPUT_LEN = 128
DEFAULT_REQUESTS = {"throughput": 32, "latency": 10}

_ENGINE, _REQUESTS, _RUNTIME, _REPORT = "Engine", "Requests", "Runtime", "Report"

EngineDir = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_ENGINE, help="The engine, as `trtllm build` writes it.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        rich_help_panel=_ENGINE,
        help="Instead of an engine: a hub id, snapshot, .gguf file or checkpoint; its engine is made and cached.",
        show_default=False,
    ),
]
Dataset = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_REQUESTS, help="The requests, as prepare-dataset writes them.", show_default=False),
]
NumRequests = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_REQUESTS,
        help="How many requests. Default: the whole dataset; 32 random ones (latency: 10).",
        min=1,
    ),
]
InputLen = Annotated[
    int | None,
    typer.Option(
        "--input-len",
        "--target-input-len",
        rich_help_panel=_REQUESTS,
        help="Without a dataset: prompt tokens of each request. Default: 128.",
        min=1,
    ),
]
OutputLen = Annotated[
    int | None,
    typer.Option(
        "--output-len",
        "--target-output-len",
        rich_help_panel=_REQUESTS,
        help="Without a dataset: output tokens of each request. Default: 128.",
        min=1,
    ),
]
Seed = Annotated[int, typer.Option(rich_help_panel=_REQUESTS, help="Of the random requests.", min=0)]
Warmup = Annotated[int, typer.Option(rich_help_panel=_REQUESTS, help="Requests to run before, unmeasured.", min=0)]
Streaming = Annotated[
    bool, typer.Option("--streaming/--no-streaming", rich_help_panel=_REPORT, help="Report TTFT, TPOT and ITL.")
]
SchedulerPolicy = Annotated[
    str,
    typer.Option(
        rich_help_panel=_RUNTIME,
        help="guaranteed_no_evict starts a request when it is sure to end unpreempted; max_utilization: when it fits.",
    ),
]
MaxBatchSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_RUNTIME,
        help="Most sequences in a step. Default, and most: as the engine was built. With --model, it is built so.",
        min=1,
    ),
]
MaxNumTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_RUNTIME, help="Most tokens in a step. Default, and most: as the engine was built.", min=1
    ),
]
NumThreads = Annotated[
    int | None,
    typer.Option(
        "--num-threads",
        "--threads",
        rich_help_panel=_RUNTIME,
        help="CPU threads, of an engine for CPUs. Default: all cores.",
        min=1,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        rich_help_panel=_RUNTIME,
        help="Reuse the KV cache of prompts that begin alike. Off, so that every prompt token is computed.",
    ),
]
ChunkedPrefill = Annotated[
    bool,
    typer.Option(
        "--chunked-prefill/--no-chunked-prefill",
        rich_help_panel=_RUNTIME,
        help="Compute long prompts over several steps.",
    ),
]
ReportJson = Annotated[
    Path | None, typer.Option(rich_help_panel=_REPORT, help="Write the report to this file.", show_default=False)
]
OutputJson = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_REPORT, help="Write what each request generated, as token ids.", show_default=False),
]
RequestJson = Annotated[
    Path | None, typer.Option(rich_help_panel=_REPORT, help="Write each request's own times.", show_default=False)
]
IterationLog = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_REPORT, help="Write a JSON line for each step of the executor.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=_REPORT, help="Print the report as JSON.")]


@app.command()
def throughput(
    engine_dir: EngineDir = None,
    model: Model = None,
    random_weights: random_flags.Name = None,
    num_layers: random_flags.NumLayers = None,
    qformat: random_flags.QFormat = None,
    revision: model_flags.Revision = None,
    offline: model_flags.Offline = False,
    token: model_flags.Token = None,
    dtype: model_flags.Dtype = None,
    weight_dtype: model_flags.WeightDtype = None,
    max_seq_len: model_flags.MaxSeqLen = None,
    dataset: Dataset = None,
    num_requests: NumRequests = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    seed: Seed = 0,
    warmup: Warmup = 2,
    concurrency: Annotated[
        int,
        typer.Option(
            rich_help_panel=_REQUESTS, help="Most requests in flight; a new one starts when one ends. -1: all at once."
        ),
    ] = -1,
    streaming: Streaming = True,
    scheduler_policy: SchedulerPolicy = "guaranteed_no_evict",
    max_batch_size: MaxBatchSize = None,
    max_num_tokens: MaxNumTokens = None,
    num_threads: NumThreads = None,
    kv_cache_memory: memory_flags.KvCacheMemory = None,
    kv_cache_free_gpu_memory_fraction: memory_flags.GpuMemoryFraction = None,
    max_gpu_memory: memory_flags.MaxGpuMemory = None,
    max_num_blocks: memory_flags.MaxNumBlocks = None,
    prefix_cache: PrefixCache = False,
    chunked_prefill: ChunkedPrefill = True,
    report_json: ReportJson = None,
    output_json: OutputJson = None,
    request_json: RequestJson = None,
    iteration_log: IterationLog = None,
    json_: Json = False,
    launch: launch_flags.Launch = False,
    hostfile: launch_flags.Hostfile = None,
    mpirun_args: launch_flags.MpirunArgs = "",
) -> None:
    """Measure how much an engine generates in a given time, many requests together.

    Greedy, past end-of-sequence, each request to its exact output length; the prefix cache is off, for fairness. The
    report's fields are TensorRT-LLM's, and it prints its formulas.

    Examples:

        trtllm bench throughput --engine-dir engine --num-requests 32 --input-len 128 --output-len 64

        trtllm bench throughput --engine-dir engine --dataset data.jsonl --concurrency 8 --report-json report.json

        trtllm bench throughput --random-weights llama-3.1-8b --qformat fp8 --max-seq-len 2048

        mpirun -n 4 trtllm bench throughput --engine-dir engine_tp2_pp2
    """
    _measure(
        "throughput",
        engine_dir,
        model,
        RandomFlags(random_weights, num_layers, qformat),
        ModelFlags(revision, offline, token, dtype, weight_dtype, max_seq_len, None if engine_dir else max_batch_size),
        _Workload(dataset, num_requests, input_len, output_len, seed),
        _runtime(
            num_threads=num_threads,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            scheduler_policy=scheduler_policy,
            enable_prefix_cache=prefix_cache,
            enable_chunked_prefill=chunked_prefill,
            kv_cache_memory=kv_cache_memory,
            max_num_blocks=max_num_blocks,
            kv_cache_free_gpu_memory_fraction=kv_cache_free_gpu_memory_fraction,
            max_gpu_memory=max_gpu_memory,
        ),
        _Outputs(report_json, output_json, request_json, iteration_log, json_),
        LaunchFlags(launch, hostfile, mpirun_args),
        warmup=warmup,
        concurrency=concurrency,
        with_streaming=streaming,
    )


@app.command()
def latency(
    engine_dir: EngineDir = None,
    model: Model = None,
    random_weights: random_flags.Name = None,
    num_layers: random_flags.NumLayers = None,
    qformat: random_flags.QFormat = None,
    revision: model_flags.Revision = None,
    offline: model_flags.Offline = False,
    token: model_flags.Token = None,
    dtype: model_flags.Dtype = None,
    weight_dtype: model_flags.WeightDtype = None,
    max_seq_len: model_flags.MaxSeqLen = None,
    dataset: Dataset = None,
    num_requests: NumRequests = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    seed: Seed = 0,
    warmup: Warmup = 2,
    num_threads: NumThreads = None,
    kv_cache_memory: memory_flags.KvCacheMemory = None,
    kv_cache_free_gpu_memory_fraction: memory_flags.GpuMemoryFraction = None,
    max_gpu_memory: memory_flags.MaxGpuMemory = None,
    prefix_cache: PrefixCache = False,
    report_json: ReportJson = None,
    output_json: OutputJson = None,
    request_json: RequestJson = None,
    iteration_log: IterationLog = None,
    json_: Json = False,
    launch: launch_flags.Launch = False,
    hostfile: launch_flags.Hostfile = None,
    mpirun_args: launch_flags.MpirunArgs = "",
) -> None:
    """Measure how fast an engine answers one user: one request after another, alone.

    Examples:

        trtllm bench latency --engine-dir engine --num-requests 10 --input-len 128 --output-len 64

        trtllm bench latency --engine-dir engine --dataset data.jsonl --report-json report.json

        trtllm bench latency --random-weights llama-3.2-1b --weight-dtype int8
    """
    _measure(
        "latency",
        engine_dir,
        model,
        RandomFlags(random_weights, num_layers, qformat),
        ModelFlags(revision, offline, token, dtype, weight_dtype, max_seq_len),
        _Workload(dataset, num_requests, input_len, output_len, seed),
        _runtime(
            num_threads=num_threads,
            kv_cache_memory=kv_cache_memory,
            kv_cache_free_gpu_memory_fraction=kv_cache_free_gpu_memory_fraction,
            max_gpu_memory=max_gpu_memory,
            enable_prefix_cache=prefix_cache,
        ),
        _Outputs(report_json, output_json, request_json, iteration_log, json_),
        LaunchFlags(launch, hostfile, mpirun_args),
        warmup=warmup,
        concurrency=1,
        with_streaming=True,
    )


@dataclass(frozen=True)
class _Workload:
    """Where the requests come from: a dataset, or lengths."""

    dataset: Path | None
    num_requests: int | None
    input_len: int | None
    output_len: int | None
    seed: int

    def check(self) -> None:
        """Raises UsageError for both at once."""
        from trtllm_cli.errors import UsageError

        if self.dataset is not None and (self.input_len is not None or self.output_len is not None):
            raise UsageError(
                "a dataset has its own lengths",
                where="--dataset",
                fix="leave out --input-len and --output-len, or the dataset",
            )

    def samples(self, command: str, session: Session) -> tuple[list[Sample], str]:
        """The requests for an engine, and where they are from."""
        from trtllm_cli.bench.workload import NormalLengths, read_dataset, synthetic, tokenize

        if self.dataset is None:
            vocab = session.engine.config.pretrained_config.vocab_size
            count = self.num_requests or DEFAULT_REQUESTS[command]
            inputs = NormalLengths(self.input_len or DEFAULT_INPUT_LEN)
            outputs = NormalLengths(self.output_len or DEFAULT_OUTPUT_LEN, what="output")
            return synthetic(count, inputs, outputs, vocab, seed=self.seed), f"random tokens, seed {self.seed}"
        samples = read_dataset(self.dataset, num_requests=self.num_requests)
        encode: Encode | None = None
        if any(s.prompt is not None for s in samples) and session.engine.tokenizer_dir is not None:
            encode = bench_dataset.encoder(session.engine.path, None)
        return tokenize(samples, encode), str(self.dataset)


@dataclass(frozen=True)
class _Outputs:
    """What is written, and where."""

    report: Path | None
    outputs: Path | None
    requests: Path | None
    iterations: Path | None
    as_json: bool

    def write(self, report: Report, measured: Measurement) -> None:
        """Prints the report, and writes the files that were asked for."""
        from trtllm_cli.bench import offline
        from trtllm_cli.bench.report import render
        from trtllm_cli.commands.console import stderr, stdout

        if self.report is not None:
            report.write(self.report)
        if self.outputs is not None:
            _write_json(self.outputs, offline.output_rows(measured.requests))
        if self.requests is not None:
            _write_json(self.requests, offline.request_rows(measured.requests))
        if self.iterations is not None:
            _write_lines(self.iterations, offline.step_rows(measured.steps))
        if self.as_json:
            stdout().print_json(data=report.model_dump(mode="json"))
            return
        for table in render(report):
            stdout().print(table)
            stdout().print()
        for path in (self.report, self.outputs, self.requests, self.iterations):
            if path is not None:
                stderr().print(f"wrote {path}", markup=False)


def _measure(
    command: Literal["throughput", "latency"],
    engine_dir: Path | None,
    model: str | None,
    random: RandomFlags,
    how: ModelFlags,
    workload: _Workload,
    options: RuntimeOptions,
    outputs: _Outputs,
    ranks: LaunchFlags,
    *,
    warmup: int,
    concurrency: int,
    with_streaming: bool,
) -> None:
    from trtllm_cli.bench.offline import Session, bench
    from trtllm_cli.commands.console import tell
    from trtllm_cli.run.load import gpu_notes

    workload.check()
    if (shape := random.read(engine_dir=engine_dir, model=model)) is not None:
        model, how = str(shape[0]), replace(how, random=shape[1], qformat=random.qformat)
    how.check(engine_dir, model)
    if ranks.start_or_follow(engine_dir, _load_options(options)):
        return
    if engine_dir is None:
        assert model is not None
        engine_dir = how.engine(model)
    with Session.open(engine_dir, options) as session:
        tell(gpu_notes(session.runner))
        samples, source = workload.samples(command, session)
        with _progress(command) as progress:
            report, measured = bench(
                session,
                samples,
                command=command,
                source=source,
                warmup=warmup,
                concurrency=concurrency,
                with_streaming=with_streaming,
                progress=progress,
            )
    outputs.write(report, measured)


def _load_options(options: RuntimeOptions) -> dict[str, Any]:
    """What every rank needs to know of them."""
    from dataclasses import fields

    from trtllm_cli.run.load import LoadOptions

    return {field.name: getattr(options, field.name) for field in fields(LoadOptions)}


def _runtime(*, scheduler_policy: str = "guaranteed_no_evict", **options: Any) -> RuntimeOptions:
    from trtllm_cli.bench.offline import RuntimeOptions
    from trtllm_cli.commands.choices import choice
    from trtllm_cli.run.scheduler import Policy

    return RuntimeOptions(scheduler_policy=choice(scheduler_policy, Policy, "--scheduler-policy"), **options)


@contextlib.contextmanager
def _progress(command: str) -> Iterator[Progress]:
    """A bar over output tokens, on stderr; silent off a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from trtllm_cli.commands.console import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=stderr(),
        transient=True,
        refresh_per_second=2,  # drawing takes time from what is measured
        disable=not stderr().is_terminal,
    ) as bar:
        task = bar.add_task(f"{command}: warming up", total=None)
        yield lambda done, total: bar.update(task, description=command, completed=done, total=total)


def _write_json(path: Path, rows: list[Any]) -> None:
    import json

    with bench_dataset.new_file(path) as file:
        file.write(json.dumps(rows, indent=2) + "\n")


def _write_lines(path: Path, rows: list[Any]) -> None:
    import json

    with bench_dataset.new_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
