"""Whole tensors from a reader's blocks, in the dtype that is wanted, with nothing unrepresentable let through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtllm_cli.convert.reader import Reader
from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # elements looked at or cast at once, so that nothing temporary grows with the tensor


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
