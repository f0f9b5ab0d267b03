"""`trtllm eval`: measure quality."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.commands.bench_dataset import SETTINGS

if TYPE_CHECKING:
    from trtllm_cli.commands.eval_models import Compute, Model
    from trtllm_cli.evaluate.accuracy import AccuracyReport
    from trtllm_cli.evaluate.scoring import Progress
    from trtllm_cli.evaluate.text import Window

app = typer.Typer(help="Measure quality: perplexity, and what quantization changed.", **SETTINGS)

_TEXT, _HOW = "Text", "How it is computed"
DEFAULT_SEQ_LEN = 512

Text = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help="A .txt, .jsonl or .parquet file. Default: text in the public domain that the package brings along.",
        show_default=False,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help="Instead: a data set on the hub, NAME[:CONFIG[:SPLIT]]; needs the `datasets` library.",
        show_default=False,
    ),
]
NumWindows = Annotated[
    int, typer.Option(rich_help_panel=_TEXT, help="Windows to measure on, evenly spread over the text.", min=1)
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_TEXT, help="Tokens of a window. Default: 512, or as many as the model can take.", min=2
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help="Overlap windows, and count only so many tokens at the end of each. Default: no overlap.",
        min=1,
    ),
]
TokenizerDir = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_TEXT, help="A tokenizer to use instead of the model's own.", show_default=False),
]
Device = Annotated[str, typer.Option(rich_help_panel=_HOW, help="For checkpoints: auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(rich_help_panel=_HOW, help="For checkpoints: float32, bfloat16 or float16.")]
NumThreads = Annotated[
    int | None,
    typer.Option("--num-threads", "--threads", rich_help_panel=_HOW, help="CPU threads. Default: the cores.", min=1),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def ppl(
    path: Annotated[Path, typer.Argument(help="A checkpoint or an engine.", show_default=False)],
    text: Text = None,
    dataset: Dataset = None,
    num_windows: NumWindows = 16,
    seq_len: SeqLen = None,
    stride: Stride = None,
    tokenizer_dir: TokenizerDir = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    num_threads: NumThreads = None,
    json_: Json = False,
) -> None:
    """Measure the perplexity of a checkpoint or an engine: exp of the mean negative log-likelihood of a token.

    Figures are comparable only for the same text, the same windows and the same tokenizer.

    Examples:

        trtllm eval ppl ckpt

        trtllm eval ppl engine --text wiki.test.txt --seq-len 2048 --num-windows 64

        trtllm eval ppl ckpt --dataset Salesforce/wikitext:wikitext-2-raw-v1:test --json
    """
    from trtllm_cli.commands.console import stdout
    from trtllm_cli.commands.eval_models import Compute, Model
    from trtllm_cli.evaluate.scoring import perplexity

    source = _source(text, dataset)
    model = Model.open(path)
    windows = _windows([model], source, num_windows, seq_len, stride, tokenizer_dir)
    with model.scorer(Compute.of(device, dtype, num_threads)) as scorer, _progress("perplexity") as progress:
        score = perplexity(scorer, windows, progress)
    _check_finite(score.perplexity, model)
    result = {
        "path": str(path), "perplexity": score.perplexity, "num_tokens": score.tokens, "num_windows": len(windows),
        "seq_len": len(windows[0].ids), "stride": stride, "text": source,
    }  # fmt: skip
    if json_:
        print(json.dumps(result, indent=2))
    else:
        stdout().print(
            f"Perplexity of {path}: {score.perplexity:.3f}\n"
            f"  over {score.tokens:,} tokens in {len(windows)} windows of {len(windows[0].ids)} ({source})",
            markup=False,
        )


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="A checkpoint or an engine: the original.", show_default=False)],
    quantized: Annotated[Path, typer.Argument(help="A checkpoint or an engine: what was made of it.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Write report.json and report.png there.")
    ] = None,
    max_ppl_increase: Annotated[
        str, typer.Option(help="Fail, with exit code 8, where perplexity rises by more than this.")
    ] = "20%",
    text: Text = None,
    dataset: Dataset = None,
    num_windows: NumWindows = 16,
    seq_len: SeqLen = None,
    stride: Stride = None,
    tokenizer_dir: TokenizerDir = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    num_threads: NumThreads = None,
    json_: Json = False,
) -> None:
    """Measure what changed between two models of the same vocabulary: perplexity, divergence, and where it comes from.

    Of two checkpoints, each linear's error is measured given the original's input, and how the errors add up along the
    layers. Engines are compared as a whole.

    Examples:

        trtllm eval compare ckpt ckpt-int4 --output-dir report

        trtllm eval compare ckpt engine --num-windows 8 --max-ppl-increase 5%

        trtllm eval compare engine-bf16 engine-fp8 --text mine.jsonl --json
    """
    from trtllm_cli.commands.console import stderr, stdout
    from trtllm_cli.commands.eval_models import Compute, Model, check_same_vocabulary
    from trtllm_cli.evaluate.report import tables, to_json

    bound, source = parse_share(max_ppl_increase), _source(text, dataset)
    models = (Model.open(reference), Model.open(quantized))
    check_same_vocabulary(*models, tokenizer_dir)
    windows = _windows(list(models), source, num_windows, seq_len, stride, tokenizer_dir)
    with _progress("compare") as progress:
        report = _compare(models, windows, Compute.of(device, dtype, num_threads), bound, progress)
    if output_dir is not None:
        _write(report, output_dir)
    if json_:
        print(json.dumps({**to_json(report), "text": source}, indent=2))
    else:
        stdout().print(tables(report))
        if not report.linears:
            why = "engines are compared as a whole" if _has_engine(models) else "the two have no layer in common"
            stderr().print(f"No errors by layer: {why}.", markup=False)
        if output_dir is not None:
            stdout().print(f"Wrote {output_dir}", markup=False)
    report.raise_if_failed()


def parse_share(value: str) -> float:
    """0.2 of "20%" or "0.2". Raises UsageError for anything else."""
    from trtllm_cli.errors import UsageError

    digits, percent, rest = value.strip().partition("%")
    try:
        share = float(digits) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if rest or not 0 <= share < math.inf:
        raise UsageError(f"{value!r} is no share", where="--max-ppl-increase", fix="give one like 20% or 0.2")
    return share


def _compare(
    models: tuple[Model, Model], windows: list[Window], compute: Compute, bound: float, progress: Progress
) -> AccuracyReport:
    from trtllm_cli.evaluate.accuracy import AccuracyReport
    from trtllm_cli.evaluate.accuracy import compare as compare_programs
    from trtllm_cli.evaluate.scoring import divergence

    before, after = models
    about: dict[str, Any] = {
        "bytes_before": before.weight_bytes, "bytes_after": after.weight_bytes, "max_ppl_increase": bound,
        "names": (before.name, after.name) if before.name != after.name else (str(before.path), str(after.path)),
    }  # fmt: skip
    if not _has_engine(models):
        return compare_programs(before.program(compute), after.program(compute), windows, progress, **about)
    with before.scorer(compute) as wanted, after.scorer(compute) as got:
        return AccuracyReport(divergence(wanted, got, windows, progress), len(windows), **about)


def _has_engine(models: tuple[Model, Model]) -> bool:
    return any(model.checkpoint is None for model in models)


def _write(report: AccuracyReport, directory: Path) -> None:
    from trtllm_cli.artifact import os_errors, write_json
    from trtllm_cli.evaluate.report import draw, to_json

    with os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "report.json", to_json(report))
    if report.linears:
        draw(report, directory / "report.png")


def _source(text: Path | None, dataset: str | None) -> str:
    from trtllm_cli.errors import UsageError

    if text is not None and dataset is not None:
        raise UsageError("--text and --dataset are both given", fix="give one of them")
    if text is not None and not text.is_file():
        raise UsageError(f"no such file: {text}", where="--text", fix="give a .txt, .jsonl or .parquet file")
    return str(text) if text is not None else dataset or "heldout"


def _windows(
    models: list[Model], source: str, num: int, seq_len: int | None, stride: int | None, tokenizer_dir: Path | None
) -> list[Window]:
    """The text in windows that all models can take."""
    from trtllm_cli.errors import UsageError
    from trtllm_cli.evaluate.text import heldout_windows, load_texts

    smallest = min(models, key=lambda model: model.longest)
    if seq_len is not None and seq_len > smallest.longest:
        raise UsageError(
            f"windows of {seq_len} tokens are more than the {smallest.longest} that {smallest.path} takes",
            where="--seq-len",
            fix=f"give at most {smallest.longest}",
        )
    length = seq_len or min(DEFAULT_SEQ_LEN, smallest.longest)
    if stride is not None and stride > length:
        raise UsageError(
            f"a stride of {stride} is more than the window's {length} tokens", where="--stride", fix=f"at most {length}"
        )
    owner = next((model for model in models if model.artifact.tokenizer_dir is not None), models[0])
    return heldout_windows(load_texts(source), owner.tokenizer(tokenizer_dir), num, length, stride)


def _check_finite(perplexity: float, model: Model) -> None:
    from trtllm_cli.errors import AccuracyError

    if not math.isfinite(perplexity):
        raise AccuracyError(
            f"the perplexity of {model.path} is {perplexity}: it computes no numbers that make sense",
            fix="make it again from its source; with --dtype float16, try float32",
        )


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A progress bar over tokens, with the time that is left."""
    from trtllm_cli.commands.console import progress_tokens

    with progress_tokens() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
