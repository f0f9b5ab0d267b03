"""One job of a plan: the rows of a whole weight, block by block, each rank's part of them into its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.convert.plan import Job, part_of
from trtllm_cli.convert.quantize.rows import Quantized, row_quantizer
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.shard import cut
from trtllm_cli.convert.stack import Stack
from trtllm_cli.errors import SnapshotError
from trtllm_cli.tensor_file import ITEMSIZE, TensorFileWriter

if TYPE_CHECKING:
    import torch

    from trtllm_cli.convert.quantized_source import Merged
    from trtllm_cli.graph import Weight
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig

BLOCK = 1 << 18  # elements that go through at once to a rank: they stay in the cache


class _Made(Protocol):
    """What a job writes: parts in blocks of rows, and fixed ones, by the last part of their names."""

    rows: int
    rows_multiple: int  # where blocks may begin
    fixed: Mapping[str, torch.Tensor]

    def __call__(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """The parts of rows start..stop."""


class _Plain:
    """The source's numbers in the model's dtype."""

    rows_multiple = 1
    fixed: Mapping[str, torch.Tensor] = {}

    def __init__(self, stack: Stack, part: str, dtype: str) -> None:
        self.stack, self.part, self.dtype, self.rows = stack, part, dtype, stack.rows

    def __call__(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {self.part: self.stack.plain(start, stop, self.dtype)}


class _Quantized:
    """Quantized straight from the source's numbers: no rounding in between."""

    def __init__(self, stack: Stack, job: Job, quantization: Quantized) -> None:
        layer = quantization.config.layer_quant(job.module)
        assert layer is not None
        self.quantizer = row_quantizer(layer, job.weight.shape, quantization.calibration.layers.get(job.module))
        self.stack, self.rows = stack, stack.rows
        self.rows_multiple = self.quantizer.rows_multiple
        self.fixed: Mapping[str, torch.Tensor] = self.quantizer.fixed

    def __call__(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return self.quantizer(self.stack.plain(start, stop, self.stack.dtype))


class _Kept:
    """As the source has quantized it."""

    rows_multiple = 1

    def __init__(self, stack: Stack, merged: Merged) -> None:
        self.stack, self.rows, self.factors = stack, stack.rows, merged.factors
        self.fixed: Mapping[str, torch.Tensor] = merged.fixed
        self.parts = tuple(stack.weights[0].parts)

    def __call__(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {part: self.stack.part(part, start, stop, self.factors.get(part)) for part in self.parts}


def _made(job: Job, reader: Reader, config: ModelConfig, quantization: Quantized) -> _Made:
    assert job.source is not None
    stack = Stack(reader, job.source, job.weight, config)
    if job.merged is not None:
        return _Kept(stack, job.merged)
    if len(job.wholes) > 1:
        return _Quantized(stack, job, quantization)
    return _Plain(stack, part_of(job.name), job.weight.dtype)


def _kv_scales(job: Job, reader: Reader, quantization: Quantized) -> torch.Tensor:
    """float32 [2] of an attention layer: k's step and v's."""
    import torch

    scales = quantization.calibration.kv_scales.get(job.module)
    if scales is None:
        raise SnapshotError(f"the scales of the KV cache of {job.module} are missing", where=str(reader.path))
    return torch.tensor(scales, dtype=torch.float32)


class StoppedError(Exception):
    """Another job has failed, or the user wants no more."""


def run_job(
    job: Job,
    reader: Reader,
    config: ModelConfig,
    quantization: Quantized,
    writers: Mapping[Rank, TensorFileWriter],
    stopped: Callable[[], bool],
) -> None:
    """Writes every rank's part of one whole weight. Raises SnapshotError, UnsupportedError for its numbers.

    Asks before each block of rows whether it is `stopped`, and raises StoppedError if so.
    """
    if stopped():
        raise StoppedError
    if job.source is None:
        _write_fixed(job, part_of(job.name), _kv_scales(job, reader, quantization), config, writers)
    else:
        _write_rows(job, _made(job, reader, config, quantization), config, writers, stopped)


def _write_rows(
    job: Job,
    made: _Made,
    config: ModelConfig,
    writers: Mapping[Rank, TensorFileWriter],
    stopped: Callable[[], bool],
) -> None:
    missing = set(job.wholes) - set(made.fixed)
    outputs = [
        _Output(name, weight, job.wholes[part_of(name)], made.rows, config, rank, writers[rank])
        for rank, weights in job.parts.items()
        for name, weight in weights.items()
        if part_of(name) in missing
    ]
    for part, value in made.fixed.items():
        _write_fixed(job, part, value, config, writers)
    width = job.weight.shape[-1] if len(job.weight.shape) > 1 else 1
    ranks = len(job.parts) if job.weight.shard in ("columns", "expert_columns") else 1  # that a block is cut for
    step = max(1, BLOCK * ranks // width // made.rows_multiple) * made.rows_multiple
    for start in range(0, made.rows, step):
        if stopped():
            raise StoppedError
        parts = made(start, min(made.rows, start + step))
        assert set(parts) == missing, f"{job.name}: {sorted(parts)} made, {sorted(missing)} declared"
        for output in outputs:
            output.write(parts[output.part], start)
    for output in outputs:
        output.pad()


class _Output:
    """One part of a weight in one rank's file."""

    def __init__(
        self, name: str, weight: Weight, whole: Weight, rows: int, config: ModelConfig, rank: Rank,
        writer: TensorFileWriter,
    ) -> None:  # fmt: skip
        self.name, self.part, self.writer, self.dtype = name, part_of(name), writer, weight.dtype
        one_a_row = math.prod(whole.shape) == rows and (len(whole.shape) == 1 or whole.shape[-1] > 1)
        self.row_shape = () if one_a_row else (math.prod(whole.shape) // rows,)
        self.cut = cut(weight, rows, config, rank)
        self.row_bytes = math.prod(weight.shape) * ITEMSIZE[weight.dtype] // self.cut.rows

    def write(self, block: torch.Tensor, start: int) -> None:
        """Its part of the whole's rows from `start`."""
        assert str(block.dtype) == f"torch.{self.dtype}", f"{self.name}: {block.dtype} made, {self.dtype} declared"
        for row, piece in self.cut.pieces(block.reshape(len(block), *self.row_shape), start):
            self.writer.write_at(self.name, row * self.row_bytes, tensor_bytes(piece))

    def pad(self) -> None:
        """Leaves the rows that only pad it."""
        rows = self.cut.rows - self.cut.padding
        self.writer.leave_zeros(self.name, rows * self.row_bytes, self.cut.padding * self.row_bytes)


def _write_fixed(
    job: Job, part: str, value: torch.Tensor, config: ModelConfig, writers: Mapping[Rank, TensorFileWriter]
) -> None:
    import torch

    whole = job.wholes[part]
    value = value.to(getattr(torch, whole.dtype)).reshape(whole.shape)
    for rank, weights in job.parts.items():
        for name, weight in weights.items():
            if part_of(name) != part:
                continue
            ((_, piece),) = cut(weight, whole.shape[0], config, rank).pieces(value, 0)
            if part == "perm" and weight.shard == "rows":  # counted within the rank's inputs
                piece = piece - rank.tp_rank * len(piece)
            writers[rank].write(name, tensor_bytes(piece))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    return tensor.detach().flatten().view(torch.uint8).numpy().data
