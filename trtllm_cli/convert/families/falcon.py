"""Falcon 7B, 40B, 180B and 2 11B."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import MAX_LAYERS, Family, TensorTable, module_tensors, read_activation
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.fused_qkv import grouped_qkv_rows
from trtllm_cli.convert.families.rope import read_rope

# transformers' defaults.
_DEFAULTS = {
    "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
    "activation": "gelu", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    if fields.flag("alibi", False):
        raise fields.unsupported("alibi", "attention with linear biases is not supported; rotary positions are")
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise fields.unsupported("apply_residual_connection_post_layernorm", "transformers has no such Falcon")
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if hidden % heads:
        raise fields.wrong("hidden_size", f"a multiple of num_attention_heads = {heads}")
    bias, positions = fields.flag("bias", False), fields.integer("max_position_embeddings")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(fields, heads),
        "intermediate_size": fields.integer("ffn_hidden_size", 4 * hidden),
        "hidden_act": read_activation(fields, "activation"),
        "norm_epsilon": fields.number("layer_norm_epsilon"),
        "max_position_embeddings": positions,
        "position_embedding_type": "rope_gpt_neox",
        "attn_bias": bias,
        "dense_bias": bias,
        "mlp_bias": bias,
        "share_embedding_table": fields.flag("tie_word_embeddings", True),
        **_read_layer(fields),
        **read_rope(fields, hidden // heads, positions),
    }


def _kv_heads(fields: Fields, heads: int) -> int:
    """One, as many as query heads, or in the new architecture any number."""
    given, multi_query = fields.integer("num_kv_heads", heads), fields.flag("multi_query", True)
    if fields.flag("new_decoder_architecture", False):
        return int(given)
    if multi_query:
        return 1
    if given != heads:
        raise fields.unsupported("num_kv_heads", "only new_decoder_architecture has groups of query heads")
    return heads


def _read_layer(fields: Fields) -> dict[str, Any]:
    """Whether attention and MLP are side by side, and on how many norms."""
    new, parallel = fields.flag("new_decoder_architecture", False), fields.flag("parallel_attn", True)
    norms = fields.integer("num_ln_in_parallel_attn", 2 if new else 1)
    if new and not parallel:
        raise fields.unsupported("parallel_attn", "new_decoder_architecture always has it")
    if norms > (2 if new else 1):
        raise fields.unsupported("num_ln_in_parallel_attn", "one norm, or two with new_decoder_architecture")
    return {"parallel_residual": parallel, "parallel_norms": norms if parallel else 1}


_LAYER = ("transformer.layers.{i}", "transformer.h.{i}")
_LINEARS = {
    "attention.dense": "self_attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h",
}  # fmt: skip
_TENSORS: TensorTable = {
    "transformer.vocab_embedding.weight": ("transformer.word_embeddings.weight",),
    **module_tensors(*_LAYER, {"attention.qkv": "self_attention.query_key_value"}, rows=grouped_qkv_rows),
    **module_tensors(*_LAYER, _LINEARS),
    **module_tensors(
        *_LAYER,
        {
            "input_layernorm": "input_layernorm",
            "mlp_layernorm": "ln_mlp",
            "post_layernorm": "post_attention_layernorm",
        },
    ),
    **module_tensors("transformer", "transformer", {"ln_f": "ln_f"}),
    "lm_head.weight": ("lm_head.weight",),
}

FAMILY = Family(
    "FalconForCausalLM",
    "falcon",
    _read,
    _TENSORS,
    leftovers=("transformer.h.*.self_attention.rotary_emb.inv_freq", "transformer.h.*.self_attention.rotary.inv_freq"),
    embedding="transformer.word_embeddings.weight",
    renames=((r"\.ln_attn\.", ".input_layernorm."),),  # what it is called beside ln_mlp
    without_effect=frozenset({"ff_factor"}),  # said again, by ffn_hidden_size
)
