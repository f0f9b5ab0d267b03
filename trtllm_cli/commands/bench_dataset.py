"""`trtllm bench prepare-dataset`: the requests that a benchmark sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trtllm_cli.bench.workload import Encode, Sample

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    help="""Write a dataset: one JSON line a request, as TensorRT-LLM's.

    {"task_id": 0, "input_ids": [17, 3, 911], "output_tokens": 128}
    """,
    **SETTINGS,
)

Seed = Annotated[int, typer.Option(help="Of what is drawn.", min=0)]
VocabSize = Annotated[
    int | None, typer.Option(help="Draw tokens below this. Default: the engine's or tokenizer's.", show_default=False)
]
DatasetEngine = Annotated[
    Path | None,
    typer.Option("--engine-dir", help="Take vocabulary and tokenizer from this engine.", show_default=False),
]
TokenizerDir = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer-dir",
        "--tokenizer",
        help="A directory with a tokenizer.json: a snapshot, for one.",
        show_default=False,
    ),
]
Count = Annotated[int, typer.Option("--num-requests", help="How many requests.", min=1)]
Output = Annotated[
    Path | None, typer.Option("--output", help="The file to write. Default: standard output.", show_default=False)
]


@app.command("token-norm-dist")
def token_norm_dist(
    num_requests: Count,
    input_mean: Annotated[float, typer.Option(help="Average prompt tokens.")],
    output_mean: Annotated[float, typer.Option(help="Average output tokens.")],
    input_stdev: Annotated[float, typer.Option(help="Standard deviation of the prompt tokens.")] = 0,
    output_stdev: Annotated[float, typer.Option(help="Standard deviation of the output tokens.")] = 0,
    engine_dir: DatasetEngine = None,
    tokenizer: TokenizerDir = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Random tokens, with lengths around a mean. No length is below 1.

    Examples:

        trtllm bench prepare-dataset token-norm-dist --num-requests 100 --input-mean 128 --input-stdev 16
        --output-mean 64 --output-stdev 8 --engine-dir engine --output data.jsonl
    """
    from trtllm_cli.bench.workload import NormalLengths, synthetic

    inputs, outputs = NormalLengths(input_mean, input_stdev), NormalLengths(output_mean, output_stdev, "output")
    vocab = _vocab_size(vocab_size, engine_dir, tokenizer)
    _write_dataset(synthetic(num_requests, inputs, outputs, vocab, seed=seed), output)


@app.command("token-unif-dist")
def token_unif_dist(
    num_requests: Count,
    input_min: Annotated[int, typer.Option(help="Least prompt tokens.")],
    input_max: Annotated[int, typer.Option(help="Most prompt tokens.")],
    output_min: Annotated[int, typer.Option(help="Least output tokens.")],
    output_max: Annotated[int, typer.Option(help="Most output tokens.")],
    engine_dir: DatasetEngine = None,
    tokenizer: TokenizerDir = None,
    vocab_size: VocabSize = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Random tokens, with every length between two equally likely.

    Examples:

        trtllm bench prepare-dataset token-unif-dist --num-requests 100 --input-min 64 --input-max 192
        --output-min 16 --output-max 64 --vocab-size 49152 --output data.jsonl
    """
    from trtllm_cli.bench.workload import UniformLengths, synthetic

    inputs, outputs = UniformLengths(input_min, input_max), UniformLengths(output_min, output_max, "output")
    vocab = _vocab_size(vocab_size, engine_dir, tokenizer)
    _write_dataset(synthetic(num_requests, inputs, outputs, vocab, seed=seed), output)


@app.command("real-dataset")
def real_dataset(
    file: Annotated[Path, typer.Argument(help="Text, or JSON Lines with a field such as prompt or text.")],
    output_mean: Annotated[float, typer.Option(help="Average output tokens. A line's own output_tokens wins.")],
    output_stdev: Annotated[float, typer.Option(help="Standard deviation of the output tokens.")] = 0,
    input_mean: Annotated[
        float | None,
        typer.Option(help="Cut the running text into prompts of about so many tokens. Default: a line is a prompt."),
    ] = None,
    input_stdev: Annotated[float, typer.Option(help="Standard deviation of the prompt tokens.")] = 0,
    num_requests: Annotated[
        int | None, typer.Option(help="How many requests. Default: as many as the text gives.", min=1)
    ] = None,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Write prompts as text; whoever reads them tokenizes.")
    ] = False,
    engine_dir: DatasetEngine = None,
    tokenizer: TokenizerDir = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Prompts of real text, from a local file.

    Examples:

        trtllm bench prepare-dataset real-dataset book.txt --input-mean 128 --output-mean 64 --engine-dir engine

        trtllm bench prepare-dataset real-dataset prompts.jsonl --output-mean 64 --tokenizer-dir snapshot
    """
    from trtllm_cli.bench.workload import NormalLengths, from_lines, from_running_text
    from trtllm_cli.errors import UsageError

    outputs = NormalLengths(output_mean, output_stdev, "output")
    if input_mean is None:
        if input_stdev:
            raise UsageError("a deviation needs a mean", where="--input-stdev", fix="give --input-mean too")
        encode = None if keep_text else encoder(engine_dir, tokenizer)
        samples = from_lines(file, encode, outputs, num_requests=num_requests, seed=seed)
    else:
        if keep_text:
            raise UsageError(
                "text that is cut by tokens is kept as tokens", where="--keep-text", fix="leave out --input-mean"
            )
        inputs, encode = NormalLengths(input_mean, input_stdev), encoder(engine_dir, tokenizer)
        samples = from_running_text(file, encode, inputs, outputs, num_requests=num_requests, seed=seed)
    _write_dataset(samples, output)


def _vocab_size(vocab_size: int | None, engine_dir: Path | None, tokenizer: Path | None) -> int:
    if vocab_size is not None:
        return vocab_size
    if engine_dir is not None:
        from trtllm_cli.engine import Engine

        return Engine.open(engine_dir).config.pretrained_config.vocab_size
    if tokenizer is not None:
        from trtllm_cli.run.tokenizer import Tokenizer

        return Tokenizer.load(tokenizer).backend.get_vocab_size()
    from trtllm_cli.errors import UsageError

    raise UsageError(
        "how many tokens the vocabulary has is not known",
        where="--vocab-size",
        fix="give --engine-dir, --tokenizer-dir or --vocab-size",
    )


def encoder(engine_dir: Path | None, tokenizer: Path | None) -> Encode:
    """Text to token ids, as the engine's tokenizer has it, or the one in `tokenizer`."""
    from trtllm_cli.errors import UsageError
    from trtllm_cli.run.tokenizer import Tokenizer

    if tokenizer is None and engine_dir is not None:
        from trtllm_cli.engine import Engine

        tokenizer = Engine.open(engine_dir).tokenizer_dir
        if tokenizer is None:
            raise UsageError(
                f"{engine_dir} carries no tokenizer", where="--engine-dir", fix="give --tokenizer-dir DIR instead"
            )
    if tokenizer is None:
        raise UsageError(
            "text needs a tokenizer",
            where="--tokenizer-dir",
            fix="give --engine-dir, --tokenizer-dir DIR or --keep-text",
        )
    return Tokenizer.load(tokenizer).encode


def _write_dataset(samples: Sequence[Sample], output: Path | None) -> None:
    from trtllm_cli.bench.workload import write_dataset

    if output is None:
        import sys

        write_dataset(samples, sys.stdout)
        return
    from trtllm_cli.commands.console import stderr

    with new_file(output) as file:
        write_dataset(samples, file)
    stderr().print(f"wrote {len(samples)} requests to {output}", markup=False)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """A text file to write, in directories that are made if need be."""
    from trtllm_cli.artifact import os_errors

    with os_errors(path, "file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            yield file
