"""Rows of one of our whole weights, read from the source's weights that it is stacked of."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.convert.cast import cast, check_finite
from trtllm_cli.convert.families.family import Source
from trtllm_cli.convert.source_weight import SourceWeight, num_rows

if TYPE_CHECKING:
    import torch

    from trtllm_cli.convert.reader import Reader
    from trtllm_cli.graph import Weight
    from trtllm_cli.model_config import ModelConfig

NEAR = 4  # rows: nearer ones are read with what lies between them


def row_layout(weight: Weight) -> tuple[int, tuple[int, ...]]:
    """How many rows a plain weight has, and the shape of one: () for vectors, [out] and [experts, out]."""
    if len(weight.shape) == 2 and weight.shard in ("expert_halves", "expert_rows"):
        return weight.shape[0] * weight.shape[1], ()
    return num_rows(weight.shape), weight.shape[1:] and weight.shape[-1:]


@dataclass(frozen=True)
class _Piece:
    """Rows first..stop of the `index`-th weight, and which of them, if not all as they are."""

    index: int
    first: int
    stop: int
    pick: torch.Tensor | None = None


class Stack:
    """What `source` says of our weight: its rows, counted through all experts, in any blocks.

    Casting raises SnapshotError for a NaN or an infinity, UnsupportedError for a number that a dtype cannot hold.
    """

    def __init__(self, reader: Reader, source: Source, weight: Weight, config: ModelConfig) -> None:
        self.path, self.plus = reader.path, source.plus
        self.rows, self.row_shape = row_layout(weight)
        self.weights: Sequence[SourceWeight] = [reader.weight(name) for name in source.names]
        self._plain = [_plain_rows(w, source, self.row_shape) for w in self.weights]
        heights = [plain.rows for plain in self._plain]
        self._starts = list(itertools.accumulate(heights, initial=0))
        self._order = source.rows(config) if source.rows is not None else None
        assert self.rows == (self._starts[-1] if self._order is None else len(self._order)), source.names

    @property
    def dtype(self) -> str:
        """The source's, if its weights have one in common, else float32."""
        dtypes = {weight.dtype for weight in self.weights}
        return dtypes.pop() if len(dtypes) == 1 and not self.plus else "float32"

    def plain(self, start: int, stop: int, dtype: str) -> torch.Tensor:
        """Rows start..stop as `dtype`: [n, width], or [n]."""
        import torch

        read_as = "float32" if self.plus else dtype
        blocks = []
        for piece in self._pieces(start, stop):
            rows = self._plain[piece.index].read(piece.first, piece.stop)
            rows = rows if piece.pick is None else rows[piece.pick]
            blocks.append(cast(rows, read_as, self.weights[piece.index].name, self.path))
        block = torch.cat(blocks) if len(blocks) != 1 else blocks[0]
        return (block + self.plus).to(getattr(torch, dtype)) if self.plus else block

    def part(self, part: str, start: int, stop: int, factors: Mapping[int, float] | None = None) -> torch.Tensor:
        """Rows start..stop of a quantized weight's part; those of weight i multiplied by factors[i], where it is."""
        import torch

        blocks = []
        for piece in self._pieces(start, stop):
            weight = self.weights[piece.index]
            rows = weight.part_rows(part, piece.first, piece.stop)
            rows = rows if piece.pick is None else rows[piece.pick]
            check_finite(rows, weight.name, self.path)
            if factors and (factor := factors.get(piece.index, 1.0)) != 1.0:
                rows = _times(rows, factor)
            blocks.append(rows)
        return torch.cat(blocks) if len(blocks) != 1 else blocks[0]

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        import torch

        if self._order is None:
            yield from self._contiguous(start, stop)
            return
        rows = self._order[start:stop]
        owners = torch.bucketize(rows, torch.tensor(self._starts[1:]), right=True)
        cuts = ((rows.diff().abs() > NEAR) | (owners.diff() != 0)).nonzero().flatten() + 1
        for near, owner in zip(rows.tensor_split(cuts), owners.tensor_split(cuts), strict=True):
            index, first, last = int(owner[0]), int(near.min()), int(near.max()) + 1
            begin, in_order = self._starts[index], bool((near.diff() == 1).all())
            yield _Piece(index, first - begin, last - begin, None if in_order else near - first)

    def _contiguous(self, start: int, stop: int) -> Iterator[_Piece]:
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[index + 1])
            if start < end:
                yield _Piece(index, start - self._starts[index], end - self._starts[index])
            start, index = end, index + 1


def _times(rows: torch.Tensor, factor: float) -> torch.Tensor:
    """Quantized numbers or scales, times a factor below 1, rounded to their own format again."""
    import torch

    product = rows.float() * factor
    return (product if rows.dtype != torch.int8 else product.round()).to(rows.dtype)


class _Rows:
    """A weight's plain rows, as they are."""

    def __init__(self, weight: SourceWeight) -> None:
        self.weight, self.rows = weight, num_rows(weight.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.weight.plain_rows(start, stop)


class _Numbers(_Rows):
    """Each number of a matrix as a row of its own: vectors of experts, [experts, out]."""

    def __init__(self, weight: SourceWeight) -> None:
        super().__init__(weight)
        self.width = weight.shape[-1]
        self.rows *= self.width

    def read(self, start: int, stop: int) -> torch.Tensor:
        first = start // self.width
        rows = self.weight.plain_rows(first, -(-stop // self.width))
        return rows.flatten()[start - first * self.width : stop - first * self.width]


class _Transposed(_Rows):
    """The columns of [in, out], or of one of [experts, in, out] after another; one matrix is held at a time."""

    def __init__(self, weight: SourceWeight) -> None:
        super().__init__(weight)
        self.height, self.width = weight.shape[-2:]
        self.rows = self.rows // self.height * self.width
        self._held: tuple[int, torch.Tensor] | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        blocks = []
        while start < stop:
            expert, column = divmod(start, self.width)
            end = min(stop, (expert + 1) * self.width)
            blocks.append(self._matrix(expert)[:, column : column + end - start].T)
            start = end
        return torch.cat(blocks)

    def _matrix(self, expert: int) -> torch.Tensor:
        if self._held is None or self._held[0] != expert:
            self._held = None  # before the next is read
            matrix = self.weight.plain_rows(expert * self.height, (expert + 1) * self.height)
            self._held = (expert, matrix)
        return self._held[1]


def _plain_rows(weight: SourceWeight, source: Source, row_shape: tuple[int, ...]) -> _Rows:
    if source.transposed:
        return _Transposed(weight)
    if not row_shape and len(weight.shape) > 1:
        return _Numbers(weight)
    return _Rows(weight)
