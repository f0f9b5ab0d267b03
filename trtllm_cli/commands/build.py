"""`trtllm build`: a checkpoint becomes an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trtllm_cli.build.builder import BuildPlan


def build(
    checkpoint_dir: Annotated[
        Path, typer.Option(help="The checkpoint, as `trtllm convert` writes it.", show_default=False)
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the engine goes.")] = Path(
        "engine_outputs"
    ),
    backend: Annotated[
        str | None,
        typer.Option(
            help="What the engine runs on: cpu or cuda. Default: cuda where there is an NVIDIA GPU, else cpu."
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU to compile for: sm_90a (H100, H200), sm_80, sm_89, sm_100a or sm_120a. Default: this machine's, "
            "else sm_90a."
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Most sequences in a step.", show_default="8 on a CPU, 256 on a GPU")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of a request, prompt and output. Default: what the model allows, up to 4096."),
    ] = None,
    max_num_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a step; longer prompts are prefilled in chunks.",
            show_default="512 on a CPU, 8192 on a GPU",
        ),
    ] = None,
    max_input_len: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt. Default: as --max-seq-len.")
    ] = None,
    tokens_per_block: Annotated[
        int | None,
        typer.Option(help="Tokens in a block of the KV cache.", show_default="32 on a CPU, 64 on a GPU"),
    ] = None,
    weight_dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, int8 or int4 (weight-only). Default: as the checkpoint has them."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights of a row that share a scale. Default: 64 for int8 (0: the whole row), 32 for int4."),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, int8 or fp8. Default: what the checkpoint has scales for, else float32 in a "
            "float32 engine, else bfloat16."
        ),
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(help="auto, native (our C++, compiled now) or torch. auto times both where both are possible."),
    ] = "auto",
    model_file: Annotated[
        Path | None, typer.Option(help="A Python file whose `define(t, config, rank)` is the model. It is run.")
    ] = None,
    input_timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="For a GPU: a file of kernels' times, by which tactics are chosen. What it lacks is timed where there "
            "is such a GPU.",
            show_default=False,
        ),
    ] = None,
    output_timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="For a GPU: where the times go that the build read and took; added to a timing cache that is there.",
            show_default=False,
        ),
    ] = None,
    fixed_tactics: Annotated[
        bool,
        typer.Option(
            "--fixed-tactics",
            help="For a GPU that is not here: take what was measured on an H200, and cuBLASLt's own choices. Else, "
            "where no times decide, the engine holds several kernels, and its first load on a GPU takes the fastest.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ranks packed side by side; each holds its largest weight in memory, the result is the same.",
            show_default="as many as cores",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its memory; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine that is there.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compile a checkpoint into an engine.

    The model is traced to a graph, rewritten, lowered to kernels, and its weights are packed the way those kernels read
    them: for this machine's CPU, or for an NVIDIA GPU, which need not be in this machine. The engine needs no model
    code and no compiler to run.

    Examples:

        trtllm build --checkpoint-dir ckpt --output-dir engine --max-batch-size 8 --max-seq-len 2048

        trtllm build --checkpoint-dir ckpt --output-dir engine-int4 --weight-dtype int4

        trtllm build --checkpoint-dir ckpt --output-dir engine-h200 --backend cuda --arch sm_90a

        trtllm build --checkpoint-dir ckpt --backend cuda --input-timing-cache h200.json --output-timing-cache h200.json

        trtllm build --checkpoint-dir ckpt-tp8 --output-dir engine-tp8 --workers 2

        trtllm build --checkpoint-dir ckpt --dry-run
    """
    from trtllm_cli.build import builder
    from trtllm_cli.commands.choices import choice
    from trtllm_cli.commands.console import StageBar, progress_bytes, stdout
    from trtllm_cli.engine import Backend, KvCacheDType, WeightDType
    from trtllm_cli.errors import UsageError

    options = builder.BuildOptions(
        backend=choice(backend, Backend, "--backend"),
        arch=arch,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        max_input_len=max_input_len,
        tokens_per_block=tokens_per_block,
        weight_dtype=choice(weight_dtype, WeightDType, "--weight-dtype"),
        group_size=group_size,
        kv_cache_dtype=choice(kv_cache_dtype, KvCacheDType, "--kv-cache-dtype"),
        kernels=choice(kernels, ("auto", "native", "torch"), "--kernels"),
        model_file=model_file,
        input_timing_cache=input_timing_cache,
        output_timing_cache=output_timing_cache,
        fixed_tactics=fixed_tactics,
        workers=workers,
        force=force,
    )
    if dry_run:
        if output_timing_cache is not None:
            raise UsageError("--dry-run writes nothing, so no timing cache either", where="--output-timing-cache")
        plan = builder.plan_build(checkpoint_dir, options)
        if json_:
            stdout().print_json(data=_plan_json(plan))
        else:
            _print_plan(plan)
        return
    with progress_bytes() as bars:
        bar = StageBar(bars, "packing weights")
        report = builder.build(checkpoint_dir, output_dir, options, bar, bar.working)
    if json_:
        result = {
            "engine_dir": str(report.output_dir),
            "engine_bytes": report.engine_bytes,
            "seconds": round(report.seconds, 3),
            **_plan_json(report.plan),
        }
        stdout().print_json(data=result)
        return
    from trtllm_cli.artifact import human_bytes
    from trtllm_cli.commands.launch import run_command

    _print_plan(report.plan)
    size, out = human_bytes(report.engine_bytes), report.output_dir
    stdout().print(f"engine of {size} built in {report.seconds:.1f} s: {out}", markup=False)
    stdout().print(f"next: {run_command(out, len(report.plan.graphs))}", markup=False)


def _plan_json(plan: BuildPlan) -> dict[str, Any]:
    memory = [
        {
            "weights": m.memory.weights,
            "activations": m.memory.activations,
            "kv_cache_per_block": m.memory.kv_block,
            "kv_cache_full": m.memory.kv_full,
        }
        for m in plan.lowered
    ]
    return {
        "build_config": plan.build_config.model_dump(exclude_none=True),
        "target": plan.lowered[0].target,
        "steps_per_forward": [len(m.plan["steps"]) for m in plan.lowered],
        "memory_bytes": memory,
        "notes": plan.notes,
        "choices": plan.lowered[0].notes,
    }


def _print_plan(plan: BuildPlan) -> None:
    """The limits, the target and the memory, as tables."""
    from rich.table import Table

    from trtllm_cli.artifact import human_bytes
    from trtllm_cli.commands.console import stdout, tell

    out = stdout()
    limits = Table(title="engine", show_header=False, title_justify="left")
    for key, value in plan.build_config.model_dump(exclude_none=True).items():
        limits.add_row(key, str(value))
    for key, value in plan.lowered[0].target.items():
        limits.add_row(f"target {key}", value)
    out.print(limits)
    memory = Table(title="memory a rank", title_justify="left")
    for heading in ("rank", "steps", "weights", "activations", "KV cache, a block", "KV cache, full", "in all"):
        memory.add_column(heading, justify="right")
    for rank, lowered in enumerate(plan.lowered):
        m = lowered.memory
        memory.add_row(
            str(rank),
            str(len(lowered.plan["steps"])),
            *(human_bytes(n) for n in (m.weights, m.activations, m.kv_block, m.kv_full)),
            human_bytes(m.weights + m.activations + m.kv_full),
        )
    out.print(memory)
    tell(plan.notes)
