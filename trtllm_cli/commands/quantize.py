"""`trtllm quantize`: flags to QuantizeOptions, one call, and what was written and what that changed."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.commands.mapping_flags import MoeEpSize, MoeTpSize, PpSize, TpSize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_cli.convert.quantize.pipeline import QuantizeOptions, QuantizeReport


def quantize(
    model: Annotated[
        Path | None, typer.Argument(help="A Hugging Face snapshot directory, or a .gguf file.", show_default=False)
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes.")] = Path(
        "tllm_checkpoint"
    ),
    model_dir: Annotated[
        Path | None, typer.Option("--model-dir", help="The same as MODEL.", show_default=False)
    ] = None,
    qformat: Annotated[
        str | None,
        typer.Option(
            help="fp8, fp8_pc_pt, fp8_block, int8_sq, int8_sq_static, int4_awq, w4a8_awq, nvfp4, int8_wo, int4_wo"
            " or full_prec.",
            show_default=False,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Store the KV cache as fp8 or int8.", show_default="the model's dtype")
    ] = None,
    awq_block_size: Annotated[
        int | None,
        typer.Option(
            "--awq-block-size",
            "--group-size",
            help="Inputs that share a scale: 128 for the awq formats, 32 for int4_wo; or the largest that divides.",
            show_default="auto",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Layers to leave as they are, such as '*.mlp.proj'; may be repeated.", show_default=False),
    ] = None,
    quantize_lm_head: Annotated[
        bool, typer.Option("--quantize-lm-head", help="Quantize the head too; a tied one gets a table of its own.")
    ] = False,
    auto_quantize_bits: Annotated[
        float | None,
        typer.Option(help="Choose each layer's format; so many bits a weight on average.", show_default=False),
    ] = None,
    autoq_format: Annotated[
        str | None,
        typer.Option(help="What --auto-quantize-bits chooses from.", show_default="int4_awq,fp8,int8_wo"),
    ] = None,
    calib_dataset: Annotated[
        str,
        typer.Option(help="Calibration text: a .txt, .jsonl or .parquet file, or a data set of the hub."),
    ] = "calibration",
    calib_size: Annotated[int, typer.Option(help="Pieces of text to calibrate with.")] = 32,
    calib_max_seq_length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 256,
    calib_batch_size: Annotated[
        int, typer.Option("--calib-batch-size", "--batch-size", help="Pieces computed at once.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Which pieces of the text are drawn.")] = 0,
    calibrator: Annotated[
        str, typer.Option(help="trtllm, or modelopt for NVIDIA's (needs trtllm-cli[quantize]).")
    ] = "trtllm",
    tokenizer_dir: Annotated[
        Path | None, typer.Option(help="Where tokenizer.json is, if not with the model.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is not quantized: auto, float32, float16, bfloat16.")] = "auto",
    tp_size: TpSize = 1,
    pp_size: PpSize = 1,
    moe_tp_size: MoeTpSize = None,
    moe_ep_size: MoeEpSize = None,
    device: Annotated[str, typer.Option(help="Where to calibrate: auto, cpu or cuda.")] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make a snapshot plain first that is quantized already.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Compare with the source; report.json and report.png.")
    ] = True,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(help="Write nothing if perplexity rises by more: 0.05 is 5%.", show_default="0.2"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Calibrate a model on text and write a quantized checkpoint of it, with a report of what that cost.

    Examples:

        trtllm quantize snapshot --qformat fp8 --kv-cache-dtype fp8 --output-dir ckpt

        trtllm quantize snapshot --qformat int4_awq --awq-block-size 64 --output-dir ckpt

        trtllm quantize model.gguf --qformat int8_sq --calib-dataset mine.jsonl --max-ppl-increase 0.05

        trtllm quantize snapshot --auto-quantize-bits 6 --autoq-format int4_awq,fp8 --output-dir ckpt
    """
    from trtllm_cli.commands.convert import source_of
    from trtllm_cli.convert.pipeline import ConvertOptions
    from trtllm_cli.convert.quantize.pipeline import QuantizeOptions

    convert = ConvertOptions(
        dtype=dtype,  # type: ignore[arg-type]  # checked by ConvertOptions
        tp_size=tp_size,
        pp_size=pp_size,
        moe_tp_size=moe_tp_size,
        moe_ep_size=moe_ep_size,
        qformat=qformat,  # type: ignore[arg-type]
        group_size=awq_block_size,
        exclude=tuple(exclude or ()),
        quantize_lm_head=quantize_lm_head,
        kv_cache=kv_cache_dtype,  # type: ignore[arg-type]
        dequantize=dequantize,
        force=force,
    )
    options = QuantizeOptions(
        convert=convert,
        calib_dataset=calib_dataset,
        calib_size=calib_size,
        calib_max_seq_length=calib_max_seq_length,
        calib_batch_size=calib_batch_size,
        seed=seed,
        calibrator=calibrator,  # type: ignore[arg-type]  # checked by QuantizeOptions
        device=device,
        auto_quantize_bits=auto_quantize_bits,
        autoq_formats=tuple(name.strip() for name in (autoq_format or "").split(",") if name.strip()),
        tokenizer_dir=tokenizer_dir,
        report=report,
        max_ppl_increase=max_ppl_increase,
    )
    run(source_of(model, model_dir, "quantize"), output_dir, options, as_json=as_json)


def run(source: Path, output_dir: Path, options: QuantizeOptions, *, as_json: bool) -> None:
    """Quantizes with a progress bar, and prints the report; `trtllm convert` calls it for formats that calibrate."""
    from trtllm_cli.commands.console import stdout
    from trtllm_cli.convert.quantize.pipeline import quantize as quantize_source

    with _progress() as progress:
        report, accuracy = quantize_source(source, output_dir, options, progress)
    if as_json:
        import json

        print(json.dumps(report.to_json(), indent=2))
        return
    stdout().print(_summary(report), markup=False)
    if accuracy is not None:
        from trtllm_cli.evaluate.report import tables

        stdout().print(tables(accuracy))


def _summary(report: QuantizeReport) -> str:
    from dataclasses import replace

    from trtllm_cli.commands.convert import summary

    head, *rest = summary(replace(report.convert, notes=report.notes)).splitlines()
    tokens = f"{report.calibration_tokens:,} tokens" if report.calibration_tokens else "none needed"
    calibrated = f"  calibrated {tokens}, {report.calibration_seconds:.1f} s; {report.seconds:.1f} s in all"
    return "\n".join([head, calibrated, *rest])


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for each thing that is done, with the time that it has left; silent off a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from trtllm_cli.commands.console import stderr

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=stderr(), transient=True, disable=not stderr().is_terminal) as bars:

        def progress(what: str, done: int, total: int) -> None:
            key = "convert" if "." in what else what  # convert names the tensor that it wrote
            if key not in tasks:
                tasks[key] = bars.add_task(key, total=total)
            bars.update(tasks[key], completed=done, total=total)

        yield progress
