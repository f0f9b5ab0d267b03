"""Small model configs that between them use every feature of the families, and random weights for them."""

from __future__ import annotations

import torch

from trtllm_cli.graph import Graph, Weight
from trtllm_cli.model_config import ModelConfig

BASE = {
    "dtype": "float32", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "max_position_embeddings": 64,
    "position_embedding_type": "rope_gpt_neox", "norm_epsilon": 1e-5,
}  # fmt: skip
VARIANTS = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "tied": {"architecture": "LlamaForCausalLM", "share_embedding_table": True},
    "biases": {"architecture": "LlamaForCausalLM", "attn_bias": True, "dense_bias": True, "mlp_bias": True},
    "llama3-rope": {
        "architecture": "LlamaForCausalLM",
        "rotary_scaling": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 5},
    "qwen2": {
        "architecture": "Qwen2ForCausalLM", "attn_bias": True, "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_layernorm": True, "head_size": 16},
    "gelu-mha": {"architecture": "LlamaForCausalLM", "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4},
    "gptj-rope": {
        "architecture": "LlamaForCausalLM", "position_embedding_type": "rope_gptj", "rotary_embedding_dim": 4,
    },
}  # fmt: skip


def config(variant: str, **fields: object) -> ModelConfig:
    """One of VARIANTS."""
    return ModelConfig.model_validate(BASE | VARIANTS[variant] | fields)


def random_weights(graph: Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Checkpoint tensors by name, of a size that keeps activations near one; quantized ones as stored.py has them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, w in graph.weights.items():
        (part,) = w.parts
        if (quantized := _quantized(name, w, generator)) is not None:
            weights[part] = quantized
            continue
        noise = torch.randn(w.shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            weights[part] = 1 + 0.1 * noise
        else:
            weights[part] = noise / w.shape[-1] ** 0.5
    return weights


def _quantized(name: str, w: Weight, generator: torch.Generator) -> torch.Tensor | None:
    """A quantized weight, or what belongs to it; None for any other."""
    match w.dtype, name.rsplit(".", 1)[-1]:
        case "int8", _:
            return torch.randint(-127, 128, w.shape, generator=generator, dtype=torch.int8)
        case "uint8", _:
            return torch.randint(0, 256, w.shape, generator=generator, dtype=torch.uint8)
        case "float8_e4m3fn", _:
            return (100 * torch.randn(w.shape, generator=generator)).clamp(-448, 448).to(torch.float8_e4m3fn)
        case _, "perm":
            return torch.randperm(w.shape[0], generator=generator)
        case _, "zero":
            return torch.randint(0, 16, w.shape, generator=generator).float()
        case _, "per_channel_scale" | "weights_scaling_factor":
            return 0.002 * (1 + torch.rand(w.shape, generator=generator))
        case _, "weights_scaling_factor_2":
            return torch.full(w.shape, 3e-4)
        case _, "prequant_scaling_factor":
            return 0.5 + torch.rand(w.shape, generator=generator)
        case _, "activation_scaling_factor":
            return torch.full(w.shape, 0.01)
    return None
