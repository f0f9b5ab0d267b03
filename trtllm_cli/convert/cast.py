"""Whole tensors from a reader's blocks, in the dtype that is wanted, with nothing unrepresentable let through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtllm_cli.convert.families.family import Source
from trtllm_cli.convert.plan import source_shapes
from trtllm_cli.convert.reader import Reader
from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import ModelConfig

CHUNK = 1 << 20  # elements looked at or cast at once, so that nothing temporary grows with the tensor


def load_source(
    reader: Reader, source: Source, shape: tuple[int, ...], config: ModelConfig, dtype: str
) -> torch.Tensor:
    """What `source` makes, whole: `shape`, as `dtype`."""
    import torch

    shapes = [allowed[0] for allowed in source_shapes(source, shape, config)]
    stacked = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(source.names) > 1 else shapes[0]
    if not source.plus and not source.transposed and source.rows is None:
        return load(reader, source.names, stacked, dtype).reshape(shape)
    stack = load(reader, source.names, stacked, "float32" if source.plus else dtype)
    if source.transposed:
        stack = stack.transpose(-1, -2).reshape(-1, shape[-1])
    if source.rows is not None:
        stack = stack.reshape(-1, *(shape[-1:] if len(shape) > 1 else ()))[source.rows(config)]
    return (stack + source.plus if source.plus else stack).to(getattr(torch, dtype)).reshape(shape).contiguous()


def load(reader: Reader, names: Sequence[str], shape: Sequence[int], dtype: str) -> torch.Tensor:
    """The tensors `names` of the source, stacked on dim 0, as `dtype`.

    Raises SnapshotError for a NaN or an infinity, UnsupportedError for a number that `dtype` cannot hold.
    """
    import torch

    target = getattr(torch, dtype)
    out: torch.Tensor | None = None
    row = 0
    for name in names:
        for block in reader.blocks(name):
            if out is None and block.dtype == target and tuple(block.shape) == tuple(shape):
                _cast_into(block, block, name, reader)
                return block
            if out is None:
                out = torch.empty(tuple(shape), dtype=target)
            _cast_into(out[row : row + block.shape[0]], block, name, reader)
            row += block.shape[0]
    assert out is not None
    assert row == shape[0]
    return out


def _cast_into(out: torch.Tensor, block: torch.Tensor, name: str, reader: Reader) -> None:
    for to, chunk in zip(out.flatten().split(CHUNK), block.flatten().split(CHUNK), strict=True):
        if out is not block:
            to.copy_(chunk)
        if _is_finite(to):
            continue
        if not _is_finite(chunk):
            raise SnapshotError(
                f"tensor `{name}` holds a NaN or an infinity",
                where=str(reader.path),
                fix="fetch the snapshot again; if it is the same, the model itself is broken",
            )
        dtype = str(to.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"tensor `{name}` has {float(chunk.abs().max()):g}, more than {dtype} can hold",
            where=str(reader.path),
            fix="pass --dtype bfloat16 or --dtype float32",
        )


def _is_finite(chunk: torch.Tensor) -> bool:
    """Whether every number is finite. NaN comes through a minimum and a maximum, so the two tell."""
    import torch

    if not chunk.numel():
        return True
    low, high = torch.aminmax(chunk)
    return bool(torch.isfinite(low) & torch.isfinite(high))
