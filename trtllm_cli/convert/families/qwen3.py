"""Qwen3, dense: a norm on each head of q and k, and a head_dim of its own."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.qwen2 import read_qwen_window


def _read(fields: Fields) -> dict[str, Any]:
    fields.integer("head_dim")  # transformers' default is 128, not hidden_size / num_attention_heads
    config = read_decoder(fields, num_kv_heads=32, max_positions=32768)
    bias = fields.flag("attention_bias", False)
    window = read_qwen_window(fields, config["num_hidden_layers"])
    return {**config, "attn_bias": bias, "dense_bias": bias, "qk_layernorm": True, **window}


FAMILY = Family("Qwen3ForCausalLM", "qwen3", _read)
