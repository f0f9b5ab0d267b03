"""Gemma 3, the text model: five sliding layers, with a rotary base of their own, to each one that is not."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_windows
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.gemma2 import GEMMA_TENSORS, read_gemma
from trtllm_cli.convert.families.rope import read_layered_rope

# Those of transformers' Gemma3TextConfig: the text_config of published models leaves most of them out.
_DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}  # fmt: skip


def read_gemma3(fields: Fields) -> dict[str, Any]:
    """The text model's fields."""
    fields.fill(_DEFAULTS)
    fields.raw("_sliding_window_pattern")  # a copy of what layer_types says
    config = read_gemma(fields, max_positions=131_072, rope=read_layered_rope)
    pattern = fields.integer("sliding_window_pattern")
    return {**config, "qk_layernorm": True, **read_windows(fields, config["num_hidden_layers"], pattern)}


FAMILY = Family("Gemma3ForCausalLM", "gemma3_text", read_gemma3, tensors=GEMMA_TENSORS)
