"""GPT-J 6B."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, TensorTable, module_tensors
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.gpt2 import SUMMARY, read_gpt

# transformers' defaults.
_DEFAULTS = {
    "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    for name in ("rotary", "scale_attn_weights"):  # of the model's first code
        if not fields.flag(name, True):
            raise fields.unsupported(name, "GPT-J always has it")
    return {
        **read_gpt(fields),
        "position_embedding_type": "rope_gptj",
        "rotary_embedding_dim": fields.integer("rotary_dim"),
        "lm_head_bias": True,
        "parallel_residual": True,
        "share_embedding_table": fields.flag("tie_word_embeddings", False),
    }


_LAYER = ("transformer.layers.{i}", "transformer.h.{i}")
_TENSORS: TensorTable = {
    "transformer.vocab_embedding.weight": ("transformer.wte.weight",),
    "transformer.layers.{i}.attention.qkv.weight": (
        "transformer.h.{i}.attn.q_proj.weight",
        "transformer.h.{i}.attn.k_proj.weight",
        "transformer.h.{i}.attn.v_proj.weight",
    ),
    "transformer.layers.{i}.attention.dense.weight": ("transformer.h.{i}.attn.out_proj.weight",),
    **module_tensors(*_LAYER, {"input_layernorm": "ln_1", "mlp.fc": "mlp.fc_in", "mlp.proj": "mlp.fc_out"}),
    **module_tensors("transformer", "transformer", {"ln_f": "ln_f"}),
    "lm_head.weight": ("lm_head.weight",),
    "lm_head.bias": ("lm_head.bias",),
}

FAMILY = Family(
    "GPTJForCausalLM",
    "gptj",
    _read,
    _TENSORS,
    leftovers=(  # masks, and angles
        "transformer.h.*.attn.bias",
        "transformer.h.*.attn.masked_bias",
        "transformer.h.*.attn.embed_positions",
    ),
    embedding="transformer.wte.weight",
    without_effect=frozenset(SUMMARY),
)
