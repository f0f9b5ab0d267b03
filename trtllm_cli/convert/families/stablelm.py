"""StableLM 3B, 2 1.6B and 2 12B, Zephyr and Code."""

from __future__ import annotations

from functools import partial
from typing import Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, Source, module_tensors, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.rope import read_rope

# transformers' defaults.
_DEFAULTS = {
    "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
    "num_attention_heads": 32, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    rope = partial(read_rope, partial="partial_rotary_factor")
    config = read_decoder(fields, num_kv_heads=32, max_positions=4096, norm_epsilon="layer_norm_eps", rope=rope)
    return {
        **config,
        "attn_bias": fields.flag("use_qkv_bias", False),
        "qk_layernorm": fields.flag("qk_layernorm", False),
        "parallel_residual": fields.flag("use_parallel_residual", False),
    }


_LAYER = ("transformer.layers.{i}", "model.layers.{i}")


def _head_norms(name: str) -> Source:
    """A vector of each head."""
    return Source((f"model.layers.{{i}}.self_attn.{name}.weight",), heights=lambda config: (config.head_size,))


FAMILY = Family(
    "StableLmForCausalLM",
    "stablelm",
    _read,
    {
        **DECODER_TENSORS,
        **module_tensors(*_LAYER, {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}),
        **module_tensors("transformer", "model", {"ln_f": "norm"}),
        "transformer.layers.{i}.attention.q_layernorm.weight": _head_norms("q_layernorm.norms.{q}"),
        "transformer.layers.{i}.attention.k_layernorm.weight": _head_norms("k_layernorm.norms.{k}"),
    },
)
