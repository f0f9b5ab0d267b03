"""`convert`: a snapshot or GGUF file in, a checkpoint out, streamed in blocks of rows.

Memory: the source is read by offset (a `.bin` file is mapped), and each rank's part of a block is written as soon as it
is cut. So a few blocks are held, whatever the model's size; of a weight that is stored transposed, one matrix.
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from trtllm_cli.artifact import check_output, human_bytes, partial_of, writing
from trtllm_cli.checkpoint import SUMS, TOKENIZER, write_config, write_sums
from trtllm_cli.convert.decide import Decided, read_config, whole_tensor
from trtllm_cli.convert.options import ConvertOptions, ConvertReport
from trtllm_cli.convert.plan import Stage, make_plan
from trtllm_cli.convert.quantize.rows import Quantized
from trtllm_cli.convert.random_weights import RandomReader
from trtllm_cli.convert.reader import Reader, open_reader
from trtllm_cli.convert.resume import State, identity
from trtllm_cli.convert.tokenizer_files import check_tokenizer
from trtllm_cli.convert.verify import verify_aside
from trtllm_cli.convert.write_ranks import Progress, write_ranks
from trtllm_cli.errors import ResourceError, SnapshotError, UnsupportedError
from trtllm_cli.machine import available_cores, torch_threads
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.tensor_file import total_bytes

__all__ = ["ConvertOptions", "ConvertReport", "Decided", "convert", "read_config", "whole_tensor"]

SPARE_BYTES = 64 << 20  # room for the tokenizer and the file system's own needs

Check = Callable[[Path, ModelConfig], None]


def convert(
    source: Path,
    output_dir: Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    *,
    quantization: Quantized | None = None,
    check: Check | None = None,
    tell: Callable[[str], None] | None = None,
) -> ConvertReport:
    """Writes the checkpoint of `source`, a snapshot directory or .gguf file, to `output_dir`.

    With `options.random`, of a config.json or a directory with one, whose weights are made up. `quantization` is how,
    where that took calibration; `check` is called with the finished directory before it gets its name, which it never
    does if that raises; `tell` is told at once what an earlier, interrupted run has left.

    Raises SnapshotError for a damaged source, UnsupportedError for what cannot be honoured exactly, UsageError for
    options that do not fit the model, ResourceError for lack of disk, OutputExistsError.
    """
    started = time.monotonic()
    options = options or ConvertOptions()
    options.check()
    check_output(output_dir, force=options.force, source=source)
    verified = verify_aside(source, only_config=options.random is not None)
    try:
        reader = RandomReader(source, options.random) if options.random else open_reader(source)
    except (SnapshotError, UnsupportedError):
        verified.result()  # if the file was altered, this says so, and is the better explanation
        raise
    try:
        decided = read_config(reader, options, quantization)
        config, notes = decided.config, decided.notes
        stages = make_plan(reader, decided.family, config, tied=decided.tied, kept=decided.kept)
        sizes = [total_bytes(stage.tensors(rank).values()) for stage in stages for rank in stage.ranks]
        _check_space(output_dir, sum(sizes))
        state = State(partial_of(output_dir), identity(source, options, decided))
        with (
            writing(
                output_dir, force=options.force, source=source, resumes=lambda _: options.resume and state.load()
            ) as directory,
            torch_threads(1),  # the work is moving bytes; two threads only wait for each other
        ):
            if resumed := _resumed(state, stages):
                notes.append(resumed)
                if tell is not None:
                    tell(resumed)
            sums = write_ranks(reader, decided, stages, state, _workers(options), progress)
            write_sums(directory / SUMS, sums)
            files = _write_tokenizer(directory, reader, config)
            verified.result()
            write_config(directory, config)
            state.remove()
            if check is not None:
                check(directory, config)
    finally:
        reader.close()
    if options.random is not None:
        notes.append(f"the weights are random, of seed {options.random.seed}: for measuring speed, with token ids only")
    elif not files:
        notes.append("the snapshot has no tokenizer: the checkpoint works with token ids only")
    return ConvertReport(
        output_dir=str(output_dir),
        architecture=config.architecture,
        dtype=config.dtype,
        quant_algo=config.quantization.quant_algo,
        group_size=_group_size(config),
        tp_size=config.mapping.tp_size,
        pp_size=config.mapping.pp_size,
        moe_tp_size=config.mapping.moe_tp,
        moe_ep_size=config.mapping.moe_ep,
        num_parameters=_num_parameters(stages),
        num_tensors=sum(len(stage.tensors(rank)) for stage in stages for rank in stage.ranks),
        rank_bytes=sizes,
        tokenizer_files=files,
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=notes,
    )


def _workers(options: ConvertOptions) -> int:
    """Weights that are worked on side by side: random ones do not wait for a disk to be read."""
    return options.workers or (1 if options.random is None else available_cores())


def _group_size(config: ModelConfig) -> int | None:
    """Inputs that share a scale, where the format leaves a choice."""
    q = config.quantization
    return q.group_size if q.per_group or (q.quant_algo or "").startswith(("W4A16", "W4A8")) else None


def _resumed(state: State, stages: list[Stage]) -> str | None:
    """What was there already, for people."""
    if not state.ranks and not state.weights:
        return None
    ranks = sum(len(stage.ranks) for stage in stages)
    weights = f" and {len(state.weights)} weights of others" if state.weights else ""
    return f"resuming: {len(state.ranks)} of {ranks} ranks{weights} are there"


def _check_space(output_dir: Path, size: int) -> None:
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    # what an interrupted run left is used, or removed
    left = sum(f.stat().st_blocks * 512 for f in partial_of(output_dir).glob("rank*.safetensors"))
    free = shutil.disk_usage(parent).free + left
    if free < size + SPARE_BYTES:
        raise ResourceError(
            f"the checkpoint takes {human_bytes(size)}, and {parent} has {human_bytes(free)} free",
            where="--output-dir",
            fix="free some room, or choose another --output-dir",
        )


def _num_parameters(stages: list[Stage]) -> int:
    wholes = {job.source: math.prod(job.weight.shape) for stage in stages for job in stage.jobs if job.source}
    return sum(wholes.values())


def _write_tokenizer(directory: Path, reader: Reader, config: ModelConfig) -> list[str]:
    tokenizer = directory / TOKENIZER
    shutil.rmtree(tokenizer, ignore_errors=True)  # an interrupted run's
    tokenizer.mkdir()
    files = reader.write_tokenizer(tokenizer)
    if files:
        check_tokenizer(tokenizer, config.vocab_size, reader.path)
    else:
        tokenizer.rmdir()
    return files
