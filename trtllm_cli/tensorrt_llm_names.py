"""What TensorRT-LLM's own configs call by other names than ours, by architecture."""

from __future__ import annotations

from typing import Any


def with_our_names(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with our names for what TensorRT-LLM's own config calls otherwise or leaves unsaid.

    Raises ValueError where its fields do not go together.
    """
    rest = dict(config)
    match rest.get("architecture"):
        case "GPTJForCausalLM" if "rotary_dim" in rest:
            rest |= {"rotary_embedding_dim": rest.pop("rotary_dim"), "mlp_bias": True, "lm_head_bias": True}
            if rest.get("hidden_act") == "gelu":
                rest["hidden_act"] = "gelu_pytorch_tanh"  # what its "gelu" computes
            return {**rest, "parallel_residual": True}
        case "GPTNeoXForCausalLM" if "rotary_emb_base" in rest:
            hidden, heads, share = rest.get("hidden_size"), rest.get("num_attention_heads"), rest.pop("rotary_pct", 1.0)
            if not (isinstance(hidden, int) and isinstance(heads, int) and 0 < heads <= hidden and _is_share(share)):
                raise ValueError("rotary_pct, hidden_size and num_attention_heads do not go together")
            rest |= {"rotary_base": rest.pop("rotary_emb_base"), "rotary_embedding_dim": int(hidden // heads * share)}
            biases = dict.fromkeys(("attn_bias", "dense_bias", "mlp_bias"), True)
            return {**rest, **biases, "parallel_residual": True}
        case "FalconForCausalLM" if "parallel_attention" in rest:
            new, parallel = rest.pop("new_decoder_architecture", False), rest.pop("parallel_attention")
            biases = dict.fromkeys(("attn_bias", "dense_bias", "mlp_bias"), rest.pop("bias", False))
            return {**rest, **biases, "parallel_residual": new or parallel, "parallel_norms": 2 if new else 1}
        case "Gemma2ForCausalLM" | "Gemma3ForCausalLM" if "query_pre_attn_scalar" in rest:
            return _gemma(rest)
    return rest


def _gemma(rest: dict[str, Any]) -> dict[str, Any]:
    """Gemma 2 and 3. Of Gemma 2's windows the config says nothing: TensorRT-LLM takes them when it runs."""
    scalar, layers = rest.pop("query_pre_attn_scalar"), rest.get("num_hidden_layers")
    if not isinstance(scalar, int | float) or scalar <= 0:
        raise ValueError("query_pre_attn_scalar is no positive number")
    if rest.pop("inter_layernorms", True) is not True:
        raise ValueError("inter_layernorms is not true, as it is in each Gemma 2 and 3")
    rest["attention_multiplier"] = scalar**-0.5
    if rest["architecture"] == "Gemma3ForCausalLM":
        pattern = rest.pop("_sliding_window_pattern", 6)
        if not (isinstance(pattern, int) and pattern > 0 and isinstance(layers, int)):
            raise ValueError("_sliding_window_pattern and num_hidden_layers do not go together")
        slides = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
        rest |= {"qk_layernorm": True, "layer_types": slides}
    return rest


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
