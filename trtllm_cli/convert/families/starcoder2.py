"""StarCoder 2 3B, 7B and 15B."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, module_tensors, read_decoder
from trtllm_cli.convert.families.fields import Fields

# transformers' defaults.
_DEFAULTS = {
    "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    for name, only in {"mlp_type": "default", "norm_type": "layer_norm"}.items():  # of the publisher's own code
        if fields.text(name, only) != only:
            raise fields.unsupported(name, f"transformers' StarCoder 2 has only {only!r}")
    config = read_decoder(fields, num_kv_heads=2, max_positions=4096, norm_epsilon="norm_epsilon")
    biases = dict.fromkeys(("attn_bias", "dense_bias", "mlp_bias"), fields.flag("use_bias", True))
    return {**config, **biases, "sliding_window": fields.integer("sliding_window", None)}


_LAYER = ("transformer.layers.{i}", "model.layers.{i}")
_NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}

FAMILY = Family(
    "Starcoder2ForCausalLM",
    "starcoder2",
    _read,
    {
        **DECODER_TENSORS,
        **module_tensors(*_LAYER, {**_NORMS, "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}),
        **module_tensors("transformer", "model", {"ln_f": "norm"}),
    },
    without_effect=frozenset({"residual_dropout", "embedding_dropout"}),
)
