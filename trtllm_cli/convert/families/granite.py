"""Granite 3, dense: Llama with multipliers."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder
from trtllm_cli.convert.families.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    config = read_decoder(fields, num_kv_heads=None, max_positions=2048)
    bias = fields.flag("attention_bias", False)
    divisor = fields.number("logits_scaling", 1.0)
    if divisor == 0:
        raise fields.wrong("logits_scaling", "a number that one can divide by")
    return {
        **config,
        "attn_bias": bias,
        "dense_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
        "embedding_multiplier": fields.number("embedding_multiplier", 1.0),
        "attention_multiplier": fields.number("attention_multiplier", 1.0),
        "residual_multiplier": fields.number("residual_multiplier", 1.0),
        "output_multiplier_scale": 1 / divisor,
    }


FAMILY = Family("GraniteForCausalLM", "granite", _read)
