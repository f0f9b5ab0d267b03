"""Reading checkpoints back, and what they should hold, worked out in another way than convert does."""

from __future__ import annotations

import re

import torch

from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.model_config import ModelConfig

RENAMED = {
    "model.embed_tokens": "transformer.vocab_embedding", "model.norm": "transformer.ln_f", "lm_head": "lm_head",
    "input_layernorm": "input_layernorm", "post_attention_layernorm": "post_layernorm",
    "self_attn.o_proj": "attention.dense", "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
    "mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate", "mlp.down_proj": "mlp.proj",
}  # fmt: skip


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
    """The whole model of its ranks' tensors, layers numbered through."""
    out: dict[str, torch.Tensor] = {}
    tp, first_layer = config.mapping.tp_size, 0
    for stage in range(config.mapping.pp_size):
        shards = ranks[stage * tp : (stage + 1) * tp]
        layers = set()
        for name in shards[0]:
            assert all(set(shard) == set(shards[0]) for shard in shards)
            key = name
            if found := re.match(r"transformer\.layers\.(\d+)\.", name):
                layers.add(int(found[1]))
                key = name.replace(f".{found[1]}.", f".{int(found[1]) + first_layer}.", 1)
            assert key not in out
            out[key] = join(config, name, [shard[name] for shard in shards])
        assert layers == set(range(len(layers)))
        first_layer += len(layers)
    assert first_layer == config.num_hidden_layers
    return out


def join(config: ModelConfig, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of the ranks of a stage."""
    module, kind = name.rsplit(".", 1)
    if module.endswith(".qkv"):
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
    if module.endswith((".fc", ".gate")) or module == "lm_head":
        return torch.cat(parts)
    if module.endswith((".dense", ".proj")) and kind in ("weight", "weights_scaling_factor", "zero"):
        return torch.cat(parts, dim=1)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]
