"""Rows in the dtype that is wanted, with nothing unrepresentable let through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # elements looked at or cast at once: they stay in the cache


def cast(rows: torch.Tensor, dtype: str, name: str, path: Path) -> torch.Tensor:
    """`rows` of the tensor `name` as `dtype`; the same tensor where it is that already.

    Raises SnapshotError for a NaN or an infinity, UnsupportedError for a number that `dtype` cannot hold.
    """
    import torch

    target = getattr(torch, dtype)
    out = rows.contiguous() if rows.dtype == target else torch.empty(rows.shape, dtype=target)
    for to, chunk in zip(out.flatten().split(CHUNK), rows.flatten().split(CHUNK), strict=True):
        if rows.dtype != target:
            to.copy_(chunk)
        if _is_finite(to):
            continue
        if not _is_finite(chunk):
            raise _not_finite(name, path)
        raise UnsupportedError(
            f"tensor `{name}` has {float(chunk.abs().max()):g}, more than {dtype} can hold",
            where=str(path),
            fix="pass --dtype bfloat16 or --dtype float32",
        )
    return out


def check_finite(part: torch.Tensor, name: str, path: Path) -> None:
    """Raises SnapshotError for a NaN or an infinity in a part of a quantized weight."""
    import torch

    if part.dtype == torch.float8_e4m3fn:  # has no infinity, and NaN has every bit but the sign
        part = part.view(torch.uint8)
        finite = not bool(((part & 0x7F) == 0x7F).any())
    else:
        finite = not part.is_floating_point() or _is_finite(part)
    if not finite:
        raise _not_finite(name, path)


def _not_finite(name: str, path: Path) -> SnapshotError:
    return SnapshotError(
        f"tensor `{name}` holds a NaN or an infinity",
        where=str(path),
        fix="fetch the snapshot again; if it is the same, the model itself is broken",
    )


def _is_finite(chunk: torch.Tensor) -> bool:
    """Whether every number is finite. NaN comes through a minimum and a maximum, so the two tell."""
    import torch

    if not chunk.numel():
        return True
    low, high = torch.aminmax(chunk)
    return bool(torch.isfinite(low) & torch.isfinite(high))
