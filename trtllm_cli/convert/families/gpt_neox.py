"""GPT-NeoX 20B, Pythia, and what is built like them, such as RedPajama-INCITE and Dolly v2."""

from __future__ import annotations

from functools import partial
from typing import Any

from trtllm_cli.convert.families.family import Family, TensorTable, module_tensors, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.fused_qkv import grouped_qkv_rows
from trtllm_cli.convert.families.rope import read_rope

# transformers' defaults.
_DEFAULTS = {
    "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    rope = partial(read_rope, theta="rotary_emb_base", partial="rotary_pct")
    config = read_decoder(fields, num_kv_heads=None, max_positions=2048, norm_epsilon="layer_norm_eps", rope=rope)
    # transformers 4 wrote these, too, and 5 does not look at them
    if fields.number("rope_theta", config["rotary_base"]) != config["rotary_base"]:
        raise fields.unsupported("rope_theta", "GPT-NeoX has its base in rotary_emb_base, which says something else")
    rotated = config["rotary_embedding_dim"]
    if int(config["head_size"] * fields.number("partial_rotary_factor", rotated / config["head_size"])) != rotated:
        raise fields.unsupported("partial_rotary_factor", "rotary_pct says something else")
    bias = fields.flag("attention_bias", True)
    return {
        **config,
        "attn_bias": bias,
        "dense_bias": bias,
        "mlp_bias": True,
        "parallel_residual": fields.flag("use_parallel_residual", True),
    }


_LAYER = ("transformer.layers.{i}", "gpt_neox.layers.{i}")
_TENSORS: TensorTable = {
    "transformer.vocab_embedding.weight": ("gpt_neox.embed_in.weight",),
    **module_tensors(*_LAYER, {"attention.qkv": "attention.query_key_value"}, rows=grouped_qkv_rows),
    **module_tensors(
        *_LAYER,
        {
            "input_layernorm": "input_layernorm",
            "attention.dense": "attention.dense",
            "post_attention_layernorm": "post_attention_layernorm",
            "mlp.fc": "mlp.dense_h_to_4h",
            "mlp.proj": "mlp.dense_4h_to_h",
        },
    ),
    **module_tensors("transformer", "gpt_neox", {"ln_f": "final_layer_norm"}),
    "lm_head.weight": ("embed_out.weight",),
}

FAMILY = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    _read,
    _TENSORS,
    leftovers=(  # masks, and angles
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    renames=((r"^lm_head\.", "embed_out."),),  # transformers 5's name
    without_effect=frozenset({"attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout"}),
)
