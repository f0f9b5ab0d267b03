"""Snapshots whose q, k and v are one tensor, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import ModelConfig


def grouped_qkv_rows(config: ModelConfig) -> torch.Tensor:
    """Source.rows of a stack that has, for each KV head, its query heads, then itself, then its value head.

    GPT-NeoX: q, k, v, q, k, v, ... Falcon 40B: 16 q, k, v, 16 q, k, v, ... Falcon 7B: 71 q, k, v.
    """
    import torch

    kv_heads, size = config.num_key_value_heads, config.head_size
    group = config.num_attention_heads // kv_heads
    rows = torch.arange(kv_heads * (group + 2) * size).view(kv_heads, group + 2, size)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])
