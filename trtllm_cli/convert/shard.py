"""Which experts, rows and columns of a whole tensor a rank holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trtllm_cli.graph import Weight

if TYPE_CHECKING:
    import torch

    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig


@dataclass(frozen=True)
class Span:
    """`count` rows: from row `whole` of the whole tensor, to row `rank` of the rank's."""

    whole: int
    rank: int
    count: int


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor. Rows are counted through all experts; those in no span are zeros."""

    spans: tuple[Span, ...]  # ascending in both
    rows: int  # of the rank's
    columns: slice | None = None  # of each row; None: all

    def pieces(self, block: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Of a block of the whole's rows, from row `start`: first row in the rank's tensor, and contiguous rows."""
        stop = start + block.shape[0]
        for span in self.spans[max(0, bisect_right(self._starts, start) - 1) :]:
            if span.whole >= stop:
                return
            low, high = max(start, span.whole), min(stop, span.whole + span.count)
            if low < high:
                piece = block[low - start : high - start]
                yield span.rank + low - span.whole, self._narrow(piece).contiguous()

    def _narrow(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.columns is None else rows[:, self.columns]

    @cached_property
    def _starts(self) -> list[int]:
        return [span.whole for span in self.spans]

    @cached_property
    def padding(self) -> int:
        """Rows at the end of the rank's part that the whole does not have."""
        return self.rows - sum(span.count for span in self.spans)


def cut(weight: Weight, whole_rows: int, config: ModelConfig, rank: Rank) -> Cut:
    """`rank`'s part, `weight`, of a tensor of `whole_rows` rows."""
    t, shape = rank.tp_rank, weight.shape
    everything = (Span(0, 0, whole_rows),)
    match weight.shard:
        case None:
            return Cut(everything, whole_rows)
        case "columns":
            return Cut(everything, whole_rows, slice(t * shape[1], (t + 1) * shape[1]))
        case "experts":
            return _joined(_experts(shape[0], whole_rows, rank))
        case "expert_columns":
            columns = slice(rank.moe_tp_rank * shape[2], (rank.moe_tp_rank + 1) * shape[2])
            return _joined(_experts(shape[0], whole_rows, rank), columns)
        case "rows":  # those past the end pad the vocabulary
            first, count = t * shape[0], shape[0]
            held = min(count, max(0, whole_rows - first))
            return Cut((Span(first, 0, held),) if held else (), count)
        case "qkv":
            return _joined([(first, count) for first, count in _qkv(config, t, whole_rows)])
        case "expert_rows":
            return _joined(_of_experts(shape[0], 1, shape[1], whole_rows, rank))
        case "expert_halves":
            return _joined(_of_experts(shape[0], 2, shape[1] // 2, whole_rows, rank))


def _joined(runs: list[tuple[int, int]], columns: slice | None = None) -> Cut:
    """Runs (first row, rows) of the whole, one after another in the rank's."""
    spans, row = [], 0
    for first, count in runs:
        spans.append(Span(first, row, count))
        row += count
    return Cut(tuple(spans), row, columns)


def _experts(experts: int, whole_rows: int, rank: Rank) -> list[tuple[int, int]]:
    """All rows of the rank's `experts`, which lie side by side."""
    count = whole_rows // rank.mapping.moe_ep
    assert count % experts == 0
    return [(rank.moe_ep_rank * count, count)]


def _of_experts(experts: int, parts: int, height: int, whole_rows: int, rank: Rank) -> list[tuple[int, int]]:
    """The rank's `height` rows of each of the `parts` (up's and the gate's, or all) of each of its `experts`."""
    ((first, count),) = _experts(experts, whole_rows, rank)
    whole = count // (experts * parts)
    return [(first + i * whole + rank.moe_tp_rank * height, height) for i in range(experts * parts)]


def _qkv(config: ModelConfig, tp_rank: int, whole_rows: int) -> list[tuple[int, int]]:
    """The rows of the rank's query heads, then of its key heads, then of its value heads.

    With fewer KV heads than ranks, neighbouring ranks hold the same one.
    """
    tp = config.mapping.tp_size
    if tp == 1:
        return [(0, whole_rows)]
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.num_key_value_heads
    first_kv = tp_rank * kv_heads // tp
    return [
        (tp_rank * config.heads_per_rank * size, config.heads_per_rank * size),
        ((heads + first_kv) * size, config.kv_heads_per_rank * size),
        ((heads + kv_heads + first_kv) * size, config.kv_heads_per_rank * size),
    ]
