"""Gemma 2: alternating windows, soft caps of attention scores and logits."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import (
    DECODER_TENSORS,
    Family,
    ReadRope,
    Source,
    read_decoder,
    read_windows,
)
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.rope import read_rope

_LAYER = "transformer.layers.{i}"
_THEIR_LAYER = "model.layers.{i}"
# Norms are stored as their distance from one.
GEMMA_TENSORS = {
    **DECODER_TENSORS,
    **{
        ours: Source((theirs,), plus=1.0)
        for ours, theirs in {
            f"{_LAYER}.input_layernorm.weight": f"{_THEIR_LAYER}.input_layernorm.weight",
            f"{_LAYER}.attention.q_layernorm.weight": f"{_THEIR_LAYER}.self_attn.q_norm.weight",
            f"{_LAYER}.attention.k_layernorm.weight": f"{_THEIR_LAYER}.self_attn.k_norm.weight",
            f"{_LAYER}.post_layernorm.weight": f"{_THEIR_LAYER}.post_attention_layernorm.weight",
            f"{_LAYER}.pre_feedforward_layernorm.weight": f"{_THEIR_LAYER}.pre_feedforward_layernorm.weight",
            f"{_LAYER}.post_feedforward_layernorm.weight": f"{_THEIR_LAYER}.post_feedforward_layernorm.weight",
            "transformer.ln_f.weight": "model.norm.weight",
        }.items()
    },
}


def read_gemma(fields: Fields, *, max_positions: int, rope: ReadRope = read_rope) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    fields.fill(
        {
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
            "sliding_window": 4096, "query_pre_attn_scalar": 256,
        }
    )  # fmt: skip
    # hidden_act stands beside it in old files; transformers does not read it
    fields.raw("hidden_act")
    fields.raw("cache_implementation")
    config = read_decoder(
        fields, num_kv_heads=4, max_positions=max_positions, activation="hidden_activation", rope=rope
    )
    if fields.flag("use_bidirectional_attention", False):
        raise fields.unsupported("use_bidirectional_attention", "attention is causal here")
    scalar = fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise fields.wrong("query_pre_attn_scalar", "a positive number")
    bias = fields.flag("attention_bias", False)
    return {
        **config,
        "attn_bias": bias,
        "dense_bias": bias,
        "attention_multiplier": scalar**-0.5,
        "final_logit_softcapping": fields.number("final_logit_softcapping", None),
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill({"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0})
    config = read_gemma(fields, max_positions=8192)
    return {
        **config,
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", None),
        **read_windows(fields, config["num_hidden_layers"], 2),
    }


FAMILY = Family("Gemma2ForCausalLM", "gemma2", _read, tensors=GEMMA_TENSORS)
