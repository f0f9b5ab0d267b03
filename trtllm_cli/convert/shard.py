"""How one whole tensor is divided over the tensor-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.graph import Weight

if TYPE_CHECKING:
    import torch

    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig


def split(whole: torch.Tensor, weight: Weight, config: ModelConfig, rank: Rank) -> torch.Tensor:
    """`rank`'s part of `whole`, contiguous, of the shape that `weight` declares."""
    tp_rank = rank.tp_rank
    if weight.shard is None:
        part = whole
    elif weight.shard == "rows":
        part = _rows(whole, tp_rank * weight.shape[0], weight.shape[0])
    elif weight.shard == "columns":
        width = weight.shape[1]
        part = whole[:, tp_rank * width : (tp_rank + 1) * width]
    elif weight.shard == "qkv":
        part = _qkv(whole, config, tp_rank)
    elif weight.shard == "expert_columns":
        part = whole[:, :, tp_rank * weight.shape[2] : (tp_rank + 1) * weight.shape[2]]
    elif weight.shard == "expert_rows":
        part = whole[:, tp_rank * weight.shape[1] : (tp_rank + 1) * weight.shape[1]]
    else:
        part = _expert_halves(whole, tp_rank, weight.shape[1] // 2)
    assert tuple(part.shape) == weight.shape, f"{weight.parts}: {tuple(part.shape)} made, {weight.shape} declared"
    return part.contiguous()


def _rows(whole: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Rows start..start + count; those past the end, which pad the vocabulary, are zeros."""
    part = whole[start : start + count]
    if missing := count - part.shape[0]:
        import torch

        part = torch.cat([part, part.new_zeros(missing, *whole.shape[1:])])
    return part


def _expert_halves(whole: torch.Tensor, tp_rank: int, height: int) -> torch.Tensor:
    """The rank's rows of each half of dim 1: up's, then the gate's."""
    import torch

    start = tp_rank * height
    return torch.cat([half[:, start : start + height] for half in whole.chunk(2, dim=1)], dim=1)


def _qkv(whole: torch.Tensor, config: ModelConfig, tp_rank: int) -> torch.Tensor:
    """The rows of the rank's query heads, then of its key heads, then of its value heads.

    With fewer KV heads than ranks, neighbouring ranks hold the same one.
    """
    import torch

    tp = config.mapping.tp_size
    if tp == 1:
        return whole
    size, heads, kv_heads = config.head_size, config.num_attention_heads, config.num_key_value_heads
    first_kv = tp_rank * kv_heads // tp
    spans = [
        (tp_rank * config.heads_per_rank, config.heads_per_rank),
        (heads + first_kv, config.kv_heads_per_rank),
        (heads + kv_heads + first_kv, config.kv_heads_per_rank),
    ]
    return torch.cat([whole[first * size : (first + count) * size] for first, count in spans])
