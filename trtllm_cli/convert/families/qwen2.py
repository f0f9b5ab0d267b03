"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window in the later layers where it is switched on."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder, read_layer_types, window_fields
from trtllm_cli.convert.families.fields import Fields


def read_qwen_window(fields: Fields, num_layers: int) -> dict[str, Any]:
    """The sliding window of Qwen2 and Qwen3: layers from `max_window_layers` on, or as `layer_types` says."""
    window = fields.integer("sliding_window", None if "sliding_window" in fields.data else 4096)
    first = fields.integer("max_window_layers", 28, minimum=0)
    if not fields.flag("use_sliding_window", False):
        window = None
    default = [
        "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)
    ]
    types = read_layer_types(fields, num_layers, default)
    if "sliding_attention" in types and window is None:
        raise fields.unsupported("layer_types", "it has sliding_attention, but use_sliding_window is not on")
    return window_fields(window, types)


def _read(fields: Fields) -> dict[str, Any]:
    config = read_decoder(fields, num_kv_heads=32, max_positions=32768)
    return {**config, "attn_bias": True, **read_qwen_window(fields, config["num_hidden_layers"])}


FAMILY = Family("Qwen2ForCausalLM", "qwen2", _read)
