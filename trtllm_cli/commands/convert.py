"""`trtllm convert`: flags to ConvertOptions, one call, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtllm_cli.commands import random_flags
from trtllm_cli.commands.mapping_flags import MoeEpSize, MoeTpSize, PpSize, TpSize

if TYPE_CHECKING:
    from trtllm_cli.convert.pipeline import ConvertReport


def convert(
    source: Annotated[
        Path | None, typer.Argument(help="A Hugging Face snapshot directory, or a .gguf file.", show_default=False)
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes.")] = Path(
        "tllm_checkpoint"
    ),
    model_dir: Annotated[
        Path | None, typer.Option("--model-dir", help="The same as SOURCE.", show_default=False)
    ] = None,
    random_weights: random_flags.Name = None,
    num_layers: random_flags.NumLayers = None,
    seed: random_flags.Seed = None,
    dtype: Annotated[str, typer.Option(help="auto (the source's own), float32, float16 or bfloat16.")] = "auto",
    tp_size: TpSize = 1,
    pp_size: PpSize = 1,
    moe_tp_size: MoeTpSize = None,
    moe_ep_size: MoeEpSize = None,
    qformat: Annotated[
        str | None,
        typer.Option(
            help="Quantize: int8_wo, int4_wo, fp8_pc_pt, fp8_block, or what `trtllm quantize` calibrates: fp8, int8_sq,"
            " int4_awq, w4a8_awq, nvfp4.",
            show_default="none",
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: 32 for int4_wo, 64 for int8_wo.", show_default="auto")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Store the KV cache as fp8 or int8; calibrates.", show_default="as dtype")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Layers to leave as they are, such as '*.mlp.proj'; may be repeated.", show_default=False),
    ] = None,
    quantize_lm_head: Annotated[
        bool, typer.Option("--quantize-lm-head", help="Quantize the head too; a tied one gets a table of its own.")
    ] = False,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Make the weights of a snapshot plain that is quantized already (GPTQ, ...)."
        ),
    ] = False,
    keep_quantized: Annotated[
        bool, typer.Option("--keep-quantized", help="Keep Q4_0, Q4_1 and Q8_0 weights of a GGUF file bit for bit.")
    ] = False,
    use_parallel_embedding: Annotated[
        bool, typer.Option("--use-parallel-embedding", help="Split the embedding table over the tensor-parallel ranks.")
    ] = False,
    embedding_sharding_dim: Annotated[
        int, typer.Option(help="How that split goes: 0 by tokens, 1 by hidden size.")
    ] = 0,
    use_weight_only: Annotated[
        bool, typer.Option("--use-weight-only", help="TensorRT-LLM's name for --qformat int8_wo.")
    ] = False,
    weight_only_precision: Annotated[
        str | None, typer.Option(help="With --use-weight-only: int8 or int4.", show_default="int8")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Weights worked on side by side. Each takes some memory; the result is the same.",
            show_default="1; of random weights, as many as cores",
        ),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over, instead of where an interrupted convert stopped.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a Hugging Face snapshot or a GGUF file into a checkpoint.

    The tensors stream through in blocks of rows, so memory stays small, whatever the model's size. A snapshot that is
    quantized already keeps its weights as they are. With --random-weights there is no source: a checkpoint of a model's
    shape, of random weights, shows how fast the model would run; a format that calibrates takes assumed scales then.

    Examples:

        trtllm convert snapshot --output-dir ckpt --dtype bfloat16

        trtllm convert SmolLM2-135M-Instruct.Q4_1.gguf --output-dir ckpt

        trtllm convert SmolLM2-135M-Instruct.Q4_1.gguf --output-dir ckpt --keep-quantized

        trtllm convert snapshot --output-dir ckpt --tp-size 8 --workers 4

        trtllm convert snapshot --output-dir ckpt --tp-size 4 --moe-ep-size 2

        trtllm convert snapshot --output-dir ckpt --qformat int4_wo --group-size 64

        trtllm convert snapshot-gptq --output-dir ckpt --dequantize --qformat int8_wo

        trtllm convert --random-weights llama-3.1-8b --output-dir ckpt --qformat fp8
    """
    from trtllm_cli.commands.console import progress_bytes, stdout
    from trtllm_cli.convert.pipeline import ConvertOptions
    from trtllm_cli.convert.pipeline import convert as run

    random = random_flags.RandomFlags(random_weights, num_layers, seed=seed).read(source=source, model_dir=model_dir)
    path = source_of(source, model_dir) if random is None else random[0]
    options = ConvertOptions(
        random=None if random is None else random[1],
        dtype=dtype,  # type: ignore[arg-type]  # checked by ConvertOptions
        tp_size=tp_size,
        pp_size=pp_size,
        moe_tp_size=moe_tp_size,
        moe_ep_size=moe_ep_size,
        use_parallel_embedding=use_parallel_embedding,
        embedding_sharding_dim=embedding_sharding_dim,  # type: ignore[arg-type]
        qformat=_qformat(qformat, use_weight_only, weight_only_precision),  # type: ignore[arg-type]
        group_size=group_size,
        exclude=tuple(exclude or ()),
        quantize_lm_head=quantize_lm_head,
        kv_cache=kv_cache_dtype,  # type: ignore[arg-type]
        dequantize=dequantize,
        keep_quantized=keep_quantized,
        force=force,
        workers=workers,
        resume=not no_resume,
    )
    if options.calibrates:
        from trtllm_cli.commands.quantize import run as calibrated
        from trtllm_cli.convert.quantize.pipeline import QuantizeOptions

        calibrated(path, output_dir, QuantizeOptions(options), as_json=as_json)
        return
    with progress_bytes() as bar:
        task = bar.add_task("convert", total=None)

        def progress(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        def tell(note: str) -> None:
            bar.console.print(note, markup=False)

        report = run(path, output_dir, options, progress, tell=tell)
    if as_json:
        import json

        print(json.dumps(report.to_json(), indent=2))
    else:
        stdout().print(summary(report), markup=False)


def summary(report: ConvertReport) -> str:
    """What was written, for people."""
    from trtllm_cli.artifact import human_bytes

    quantized = f", {report.quant_algo}" if report.quant_algo else ""
    if report.group_size:
        quantized += f" in groups of {report.group_size}"
    ranks = len(report.rank_bytes)
    experts = f", moe_tp_size {report.moe_tp_size}, moe_ep_size {report.moe_ep_size}" if report.moe_ep_size > 1 else ""
    lines = [
        f"Wrote {report.output_dir}: {report.architecture}, {report.num_parameters / 1e6:,.1f} M parameters,"
        f" {report.dtype}{quantized}",
        f"  weights    {human_bytes(sum(report.rank_bytes))} in {ranks} file{'s' if ranks > 1 else ''}"
        f" (tp_size {report.tp_size}, pp_size {report.pp_size}{experts})",
        f"  tokenizer  {', '.join(report.tokenizer_files) or 'none'}",
        f"  took       {report.seconds:.1f} s, at most {human_bytes(report.peak_memory_bytes)} of memory",
        *(f"  note       {note}" for note in report.notes),
        f"Next: trtllm build --checkpoint-dir {report.output_dir} --output-dir engine",
    ]
    return "\n".join(lines)


def source_of(source: Path | None, model_dir: Path | None, verb: str = "convert") -> Path:
    """The one that is given. Raises UsageError for none or two, SnapshotError for what looks like a model's name."""
    from trtllm_cli.errors import SnapshotError, UsageError

    if (source is None) == (model_dir is None):
        what = f"nothing to {verb}" if source is None else "SOURCE and --model-dir are both given"
        raise UsageError(what, fix=f"trtllm {verb} SOURCE --output-dir ckpt")
    path = source or model_dir
    assert path is not None
    if not path.exists() and path.parts and len(path.parts) == 2 and not path.is_absolute():
        raise SnapshotError(f"no such file or directory: {path}", fix=f"trtllm download {path} --output-dir snapshot")
    return path


def _qformat(qformat: str | None, use_weight_only: bool, precision: str | None) -> str | None:
    """The format that TensorRT-LLM's older flags ask for, or --qformat."""
    from trtllm_cli.errors import UsageError

    if precision is not None and not use_weight_only:
        raise UsageError("--weight-only-precision needs --use-weight-only", where="--weight-only-precision")
    if not use_weight_only:
        return qformat
    if qformat is not None:
        raise UsageError("--qformat and --use-weight-only are both given", fix="give --qformat alone")
    formats = {"int8": "int8_wo", "int4": "int4_wo"}
    if (precision or "int8") not in formats:
        raise UsageError(
            f"--weight-only-precision is {precision!r}", where="--weight-only-precision", fix="choose int8 or int4"
        )
    return formats[precision or "int8"]
