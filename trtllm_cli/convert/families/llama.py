"""Llama 2, 3, 3.1, 3.2, and what is built like it, such as SmolLM2."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder, read_layer_types
from trtllm_cli.convert.families.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    config = read_decoder(fields, num_kv_heads=None, max_positions=2048)
    bias = fields.flag("attention_bias", False)
    if fields.raw("sliding_window") is not None:
        raise fields.unsupported("sliding_window", "LlamaForCausalLM has no sliding window")
    layers = config["num_hidden_layers"]
    if "sliding_attention" in read_layer_types(fields, layers, ["full_attention"] * layers):
        raise fields.unsupported("layer_types", "LlamaForCausalLM has no sliding window")
    return {**config, "attn_bias": bias, "dense_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


FAMILY = Family("LlamaForCausalLM", "llama", _read)
