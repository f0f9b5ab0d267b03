"""Mistral 7B and Nemo: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder, read_layer_types
from trtllm_cli.convert.families.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    config = read_decoder(fields, num_kv_heads=8, max_positions=4096 * 32)
    # a missing field is not a null one: transformers' default is 4096
    window = fields.integer("sliding_window", None if "sliding_window" in fields.data else 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    layers = config["num_hidden_layers"]
    if set(read_layer_types(fields, layers, [kind] * layers)) != {kind}:
        raise fields.unsupported("layer_types", "MistralForCausalLM gives every layer the same attention")
    return {**config, "sliding_window": window}


FAMILY = Family("MistralForCausalLM", "mistral", _read)
