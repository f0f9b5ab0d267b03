"""What llama.cpp calls each architecture's tensors and settings, and what its converter does to the numbers.

The names are those of llama.cpp's `gguf-py/gguf/constants.py`, the settings' meaning that of its `llama-model.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtllm_cli.convert.gguf_metadata import Metadata

Config = dict[str, Any]
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AFTER_NAMES = {
    **_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NAMES = {**_AFTER_NAMES, "ffn_norm": "pre_feedforward_layernorm"}
# {e} stands for each expert: the file has one tensor for all.
_EXPERT_NAMES = {
    **_NAMES,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """One of llama.cpp's architectures, as Hugging Face has it."""

    architecture: str
    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: _NAMES)  # theirs without layer -> Hugging Face's
    norm_epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")  # theirs, Hugging Face's
    permuted: bool = False  # the rows of q and k are in the order of a rotary embedding that turns neighbours
    norms_plus_one: bool = False  # norms are stored as they multiply, where Hugging Face stores them less one
    biases: Mapping[str, str] = field(default_factory=dict)  # flag of the config -> a tensor that then is there
    more: Callable[[Metadata, Config], Config] | None = None  # fields of the config that not every architecture has


def _gemma(metadata: Metadata, config: Config, *, largest: int) -> Config:
    """What Gemma 2 and 3 share. Of each, the 27B model, known by its `largest` number of layers, scales otherwise."""
    by_hidden = config["hidden_size"] // config["num_attention_heads"]
    out = {
        "query_pre_attn_scalar": by_hidden if config["num_hidden_layers"] == largest else config["head_dim"],
        "sliding_window": metadata.integer("attention.sliding_window"),
    }
    if metadata.has("final_logit_softcapping"):
        out["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return out


def _gemma2(metadata: Metadata, config: Config) -> Config:
    cap = metadata.number("attn_logit_softcapping", 50.0)
    return _gemma(metadata, config, largest=46) | {"attn_logit_softcapping": cap}


def _gemma3(metadata: Metadata, config: Config) -> Config:
    return _gemma(metadata, config, largest=62) | {
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": metadata.integer("attention.sliding_window_pattern", 6),
    }


def _granite(metadata: Metadata, _: Config) -> Config:
    names = {
        "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    }  # fmt: skip
    return {ours: metadata.number(theirs) for ours, theirs in names.items()}


def _qwen3_moe(metadata: Metadata, _: Config) -> Config:
    return {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # in llama.cpp always
    }


_ATTENTION_BIAS = {"attention_bias": "model.layers.0.self_attn.q_proj.bias"}
_ALL_BIASES = _ATTENTION_BIAS | {"mlp_bias": "model.layers.0.mlp.gate_proj.bias"}
ARCHITECTURES = {
    "llama": GgufArchitecture(
        "LlamaForCausalLM",
        "llama",
        permuted=True,
        biases=_ALL_BIASES,
    ),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", biases=_ATTENTION_BIAS),
    "qwen3moe": GgufArchitecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", _EXPERT_NAMES, biases=_ATTENTION_BIAS, more=_qwen3_moe
    ),
    "starcoder2": GgufArchitecture(
        "Starcoder2ForCausalLM",
        "starcoder2",
        {**_NAMES, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        norm_epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        biases={"use_bias": "model.layers.0.self_attn.q_proj.bias"},
    ),
    "granite": GgufArchitecture("GraniteForCausalLM", "granite", permuted=True, biases=_ALL_BIASES, more=_granite),
    "olmo2": GgufArchitecture("Olmo2ForCausalLM", "olmo2", _AFTER_NAMES, biases=_ATTENTION_BIAS),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", "gemma2", _GEMMA_NAMES, norms_plus_one=True, more=_gemma2),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", "gemma3_text", _GEMMA_NAMES, norms_plus_one=True, more=_gemma3),
}
