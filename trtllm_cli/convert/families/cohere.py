"""Command-R: attention and MLP side by side, layer norms without bias, scaled logits."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder
from trtllm_cli.convert.families.fields import Fields


def read_cohere(fields: Fields) -> dict[str, Any]:
    """What Cohere and Cohere 2 share."""
    fields.fill({"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625})
    config = read_decoder(fields, num_kv_heads=None, max_positions=8192, norm_epsilon="layer_norm_eps")
    bias = fields.flag("attention_bias", False)
    return {
        **config,
        "position_embedding_type": "rope_gptj",
        "attn_bias": bias,
        "dense_bias": bias,
        "norm_bias": False,
        "parallel_residual": True,
        "output_multiplier_scale": fields.number("logit_scale"),
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill({"rope_theta": 500_000.0})
    return {**read_cohere(fields), "qk_layernorm": fields.flag("use_qk_norm", False)}


# What Cohere's own files say beside transformers' fields: how the model is, always.
COHERE_WITHOUT_EFFECT = frozenset(
    {
        "model_max_length", "cache_implementation", "position_embedding_type", "layer_switch",
        "order_of_interleaved_layers", "use_embedding_sharing", "use_gated_activation", "use_parallel_block",
        "use_parallel_embedding",
    }
)  # fmt: skip
FAMILY = Family("CohereForCausalLM", "cohere", _read, without_effect=COHERE_WITHOUT_EFFECT)
