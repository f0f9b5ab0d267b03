"""OLMo 2: norms after attention and MLP."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, ReadRope, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.rope import read_rope

OLMO2_TENSORS = {
    **DECODER_TENSORS,
    "transformer.layers.{i}.post_feedforward_layernorm.weight": ("model.layers.{i}.post_feedforward_layernorm.weight",),
}


def read_olmo2(fields: Fields, rope: ReadRope = read_rope) -> dict[str, Any]:
    """What OLMo 2 and 3 share."""
    fields.fill({"rms_norm_eps": 1e-5})
    config = read_decoder(fields, num_kv_heads=None, max_positions=2048, rope=rope)
    bias = fields.flag("attention_bias", False)
    return {**config, "qk_layernorm": True, "attn_bias": bias, "dense_bias": bias}


FAMILY = Family("Olmo2ForCausalLM", "olmo2", read_olmo2, tensors=OLMO2_TENSORS)
