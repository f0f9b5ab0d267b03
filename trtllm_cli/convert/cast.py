"""Rows in the dtype that is wanted, with nothing unrepresentable let through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # elements cast at once: they stay in the cache
_INFINITY = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "bfloat16": 0xFF << 7, "float16": 0x1F << 10}  # as bits


def cast(rows: torch.Tensor, dtype: str, name: str, path: Path) -> torch.Tensor:
    """`rows` of the tensor `name` as `dtype`; the same tensor where it is that already.

    Raises SnapshotError for a NaN or an infinity, UnsupportedError for a number that `dtype` cannot hold.
    """
    import torch

    target = getattr(torch, dtype)
    if rows.dtype == target:
        if not _is_finite(rows := rows.contiguous()):
            raise _not_finite(name, path)
        return rows
    out = torch.empty(rows.shape, dtype=target)
    for to, chunk in zip(out.flatten().split(CHUNK), rows.flatten().split(CHUNK), strict=True):
        if _is_finite(to.copy_(chunk)):
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
        finite = not part.is_floating_point() or _is_finite(part.contiguous())
    if not finite:
        raise _not_finite(name, path)


def _not_finite(name: str, path: Path) -> SnapshotError:
    return SnapshotError(
        f"tensor `{name}` holds a NaN or an infinity",
        where=str(path),
        fix="fetch the snapshot again; if it is the same, the model itself is broken",
    )


def _is_finite(chunk: torch.Tensor) -> bool:
    """Whether every number of a contiguous tensor is finite.

    IEEE 754 orders numbers of one sign as their bits, infinities and NaNs last, so the greatest bits of each sign tell;
    and the processor compares integers several times faster than half precision numbers.
    """
    import torch

    if not chunk.numel():
        return True
    infinity = _INFINITY[str(chunk.dtype).removeprefix("torch.")]
    bits = chunk.detach().view(getattr(torch, f"int{8 * chunk.itemsize}")).numpy()
    negative = bits.view(f"uint{8 * chunk.itemsize}")  # the sign is the highest bit: where there are any, they are last
    return bool(bits.max() < infinity) and bool(negative.max() < infinity + (1 << (8 * chunk.itemsize - 1)))
