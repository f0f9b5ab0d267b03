"""Reading checkpoints back, and what they should hold, worked out in another way than convert does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.graph import Shard
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model

RENAMED = {
    "model.embed_tokens": "transformer.vocab_embedding", "model.norm": "transformer.ln_f", "lm_head": "lm_head",
    "input_layernorm": "input_layernorm", "post_attention_layernorm": "post_layernorm",
    "self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
    "mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.proj",
}  # fmt: skip


def read_config(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json with these fields."""
    path = Path("config.json")
    return ModelConfig(**family_of(config, path).config_fields(Fields(config, path)), dtype="bfloat16")


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformers state dict under TensorRT-LLM's names, q, k and v in one."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        module, kind = name.rsplit(".", 1)
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            prefix, rest = f"transformer.layers.{layer[1]}.", layer[2]
            if rest == "self_attn.q_proj":
                parts = [state[f"model.layers.{layer[1]}.self_attn.{c}_proj.{kind}"] for c in "qkv"]
                out[f"{prefix}attention.qkv.{kind}"] = torch.cat(parts)
            elif rest in RENAMED:
                out[f"{prefix}{RENAMED[rest]}.{kind}"] = value
        else:
            out[f"{RENAMED[module]}.{kind}"] = value
    return out


def read_checkpoint(checkpoint: Checkpoint) -> list[dict[str, torch.Tensor]]:
    """Every rank's tensors."""
    from safetensors.torch import load_file

    return [load_file(checkpoint.rank_file(rank)) for rank in checkpoint.config.mapping.ranks]


def join_ranks(config: ModelConfig, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole model of its ranks' tensors, layers numbered through, each joined as its model's graph splits it."""
    out: dict[str, torch.Tensor] = {}
    tp = config.mapping.tp_size
    for stage in range(config.mapping.pp_size):
        shards = ranks[stage * tp : (stage + 1) * tp]
        rank = config.mapping.ranks[stage * tp]
        weights = trace_model(config, rank).weights
        assert all(set(shard) == set(weights) for shard in shards)
        for name, weight in weights.items():
            key = rank.whole_name(name, config.num_hidden_layers)
            assert key not in out
            out[key] = join(config, weight.shard, [shard[name] for shard in shards])
    assert {int(m[1]) for key in out if (m := re.match(r"transformer\.layers\.(\d+)\.", key))} == set(
        range(config.num_hidden_layers)
    )
    return out


def join(config: ModelConfig, shard: Shard | None, parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of the ranks of a stage."""
    if shard is not None and shard.startswith("expert") and len(parts) > config.mapping.moe_tp:
        ep = config.mapping.moe_ep
        return torch.cat([join(config, shard, parts[i::ep]) for i in range(ep)])
    match shard:
        case None | "experts":
            assert all(torch.equal(part, parts[0]) for part in parts)
            return parts[0]
        case "qkv":
            return join_qkv(config, parts)
        case "expert_halves":
            return torch.cat([half for i in (0, 1) for half in (part.chunk(2, dim=1)[i] for part in parts)], dim=1)
    return torch.cat(parts, dim={"rows": 0, "columns": 1, "expert_rows": 1, "expert_columns": 2}[shard])


def join_qkv(config: ModelConfig, parts: list[torch.Tensor]) -> torch.Tensor:
    """All heads of q, of k and of v; where ranks hold the same KV head, it must be the same."""
    size, kv = config.head_size, config.kv_heads_per_rank
    q, k, v = [], {}, {}
    for rank, part in enumerate(parts):
        heads = part.unflatten(0, (-1, size))
        q.append(heads[: -2 * kv])
        for i in range(kv):
            index = rank * config.num_key_value_heads // len(parts) + i
            for table, head in ((k, heads[-2 * kv + i]), (v, heads[-kv + i])):
                assert index not in table or torch.equal(table[index], head)
                table[index] = head
    whole = torch.cat([*q, torch.stack([k[i] for i in sorted(k)]), torch.stack([v[i] for i in sorted(v)])])
    return whole.flatten(0, 1)
