"""GPT-2, and what is built like it, such as DistilGPT2 and CodeParrot."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import MAX_LAYERS, Family, TensorTable, module_tensors, read_activation
from trtllm_cli.convert.families.fields import Fields

# Settings of transformers' sequence summary, a head that language models do not have; and two more.
SUMMARY = {
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
}  # fmt: skip
_WITHOUT_EFFECT = frozenset(SUMMARY | {"n_ctx", "reorder_and_upcast_attn"})  # the latter: rounding in half precision
_DEFAULTS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def read_gpt(fields: Fields) -> dict[str, Any]:
    """What GPT-2 and GPT-J share, whose fields are named alike. The defaults must be filled in."""
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    if hidden % heads:
        raise fields.wrong("n_embd", f"a multiple of n_head = {heads}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("n_layer", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "intermediate_size": fields.integer("n_inner", 4 * hidden),
        "hidden_act": read_activation(fields, "activation_function"),
        "norm_epsilon": fields.number("layer_norm_epsilon"),
        "max_position_embeddings": fields.integer("n_positions"),
        "mlp_bias": True,
    }


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    return {
        **read_gpt(fields),
        "position_embedding_type": "learned_absolute",
        "attn_bias": True,
        "dense_bias": True,
        "attention_multiplier": None if fields.flag("scale_attn_weights", True) else 1.0,
        "scale_attn_by_inverse_layer_idx": fields.flag("scale_attn_by_inverse_layer_idx", False),
        "share_embedding_table": fields.flag("tie_word_embeddings", True),
    }


_LAYER = ("transformer.layers.{i}", "transformer.h.{i}")
_LINEARS = {
    "attention.qkv": "attn.c_attn", "attention.dense": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj",
}  # fmt: skip
_TENSORS: TensorTable = {
    "transformer.vocab_embedding.weight": ("transformer.wte.weight",),
    "transformer.position_embedding.weight": ("transformer.wpe.weight",),
    **module_tensors(*_LAYER, _LINEARS, transposed=True),  # Conv1D's weights are [in, out]
    **module_tensors(*_LAYER, {"input_layernorm": "ln_1", "post_layernorm": "ln_2"}),
    **module_tensors("transformer", "transformer", {"ln_f": "ln_f"}),
    "lm_head.weight": ("lm_head.weight",),
}

FAMILY = Family(
    "GPT2LMHeadModel",
    "gpt2",
    _read,
    _TENSORS,
    leftovers=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),  # masks
    embedding="transformer.wte.weight",
    renames=((r"^(?!transformer\.|lm_head\.)", "transformer."),),  # OpenAI's own snapshots leave it out
    without_effect=_WITHOUT_EFFECT,
)
