"""Small GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = (
    "the quick brown fox jumps over the lazy dog, and then the other dog. "
    "def function(argument): return argument + 12345  # 2024\n\tindented\n\n    spaces "
    "Ünïcödé straße ça déjà naïve l'été don't I'll we've\n"
) * 3

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip

NORMS_AFTER = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    module, kind = name.rsplit(".", 1)
    names = NORMS_AFTER if arch.startswith(("gemma", "olmo2")) else NAMES
    if module.startswith("model.layers."):
        layer, rest = module.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[module]}.{kind}"


def module_of(name: str) -> str:
    return name.split(".")[-2]


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def quantized(weight: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """What is left of a weight after a trip through a quantization."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), kind), kind).copy())


def write_model(
    path: Path,
    model: Any,
    arch: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """A transformers model as a GGUF file. `metadata` replaces fields (None drops one), `tensors` adds some."""
    c = model.config
    head_dim = c.head_dim if hasattr(c, "head_dim") else c.hidden_size // c.num_attention_heads
    fields: dict[str, Any] = {
        f"{arch}.block_count": c.num_hidden_layers, f"{arch}.context_length": c.max_position_embeddings,
        f"{arch}.embedding_length": c.hidden_size, f"{arch}.feed_forward_length": c.intermediate_size,
        f"{arch}.attention.head_count": c.num_attention_heads,
        f"{arch}.attention.head_count_kv": c.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim,
        **norm_epsilon(c, arch),
        f"{arch}.rope.freq_base": c.rope_parameters.get("full_attention", c.rope_parameters)["rope_theta"],
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": c.vocab_size,
        **(metadata or {}),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    add_fields(writer, fields)
    add_fields(writer, tokenizer or {})
    for name, value in tensors_of(model):
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(module_of(name))
        value = permute(value, heads) if arch in ("llama", "granite") and heads else value
        value = value + 1 if arch.startswith("gemma") and module_of(name).endswith("norm") else value
        of = kind if value.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name, arch), gguf.quantize(value.float().numpy(), of), raw_dtype=of)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(value, dtype=np.float32))
    finish(writer)


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors, gate and up of all experts apart."""
    for name, value in model.state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for half, part in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up", half) + ".weight", part.contiguous()
        else:
            yield name + ".weight" if name.endswith(".experts.down_proj") else name, value


def norm_epsilon(config: Any, arch: str) -> dict[str, float]:
    """Under the key of RMS norms, or of layer norms."""
    if hasattr(config, "rms_norm_eps"):
        return {f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    return {f"{arch}.attention.layer_norm_epsilon": config.norm_epsilon}


def add_fields(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONTROL, USER_DEFINED, BYTE, UNKNOWN, NORMAL = 3, 4, 6, 2, 1


def byte_level_vocabulary(pre: str, **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special, plain = ["<|bos|>", "<|eos|>", "<|im_start|>"], ["<think>"]
    first = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens + special + plain,
        "tokenizer.ggml.token_type": [NORMAL] * first + [CONTROL] * 3 + [USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": first, "tokenizer.ggml.eos_token_id": first + 1, **more,
    }  # fmt: skip


def sentencepiece_vocabulary(**more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE tokenizer with byte fallback, trained on TEXT."""
    import json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(merge) for merge in model["merges"]]
    single = [token for token in model["vocab"] if len(token) == 1]
    pieces = list(dict.fromkeys(merged)) + single
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces, "[INST]"]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [CONTROL],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }  # fmt: skip
