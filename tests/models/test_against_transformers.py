"""Every family, from a Hugging Face snapshot through convert, to logits equal to transformers'."""

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import build_engine, runner_logits
from tests.tiny_models import FAMILIES, save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_DEEPSEEK_YARN = {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "rope_theta": 1e3}
# What a family can be told beyond its defaults.
SETTINGS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "head_dim": ("llama", {"head_dim": 20}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "phi3-window-mha": ("phi3", {"num_key_value_heads": 8, "sliding_window": 6, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 3.0],
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2-groups": ("olmo2", {"num_key_value_heads": 2, "attention_bias": True}),
    "olmo3-scaled": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {**_YARN, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
            }
        },
    ),
    "cohere-norms": ("cohere", {"use_qk_norm": True}),
    "cohere-biases": ("cohere", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3-cap": ("gemma3", {"final_logit_softcapping": 3.0, "num_key_value_heads": 1}),
    "gemma3-scaled": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
            }
        },
    ),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 80}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gptj-tied": ("gptj", {"tie_word_embeddings": True, "rotary_dim": 8, "activation_function": "gelu"}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_neox-scaled": ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_act": "gelu_fast"}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-two-norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "bias": True}),
    "falcon-one-norm": (
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 80,
            "tie_word_embeddings": False,
            "rope_theta": 5e5,
        },
    ),
    "deepseek-v2-groups": (
        "deepseek_v2",
        {"q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
         "routed_scaling_factor": 3.0, "attention_bias": True, "rope_parameters": _DEEPSEEK_YARN},
    ),
    "deepseek-v3-halves": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False, "first_k_dense_replace": 0, "rope_parameters": _DEEPSEEK_YARN},
    ),
    "gpt-oss-full": (
        "gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True}
    ),
    "mixtral-window": ("mixtral", {"sliding_window": 5, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2-moe-window": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "norm_topk_prob": True,
         "qkv_bias": False, "mlp_only_layers": []},
    ),
    "qwen3-moe-sparse": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True, "use_sliding_window": True,
         "sliding_window": 6},
    ),
    "starcoder2-window": ("starcoder2", {"sliding_window": 5, "use_bias": False, "tie_word_embeddings": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm-head-norms": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": _YARN,
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.1] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
PROMPT = [257, 72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 258, 10, 49, 50, 51, 52, 53, 54, 55]
TOLERANCE = 1e-4  # relative


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def checkpoint_of(tmp_path, family, settings):
    model = save_tiny_model(tmp_path / "snapshot", family, **settings)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions())
    return model, tmp_path / "ckpt"


@torch.inference_mode()
def check_reference(model, ckpt):
    checkpoint = Checkpoint.open(ckpt)
    rank = checkpoint.config.mapping.ranks[0]
    with checkpoint.tensors(rank) as file:
        weights = {
            name: torch.frombuffer(file.read(name), dtype=getattr(torch, info.dtype)).view(info.shape)
            for name, info in file.tensors.items()
        }
    program = Reference(trace_model(checkpoint.config, rank), weights, num_slots=256, block_size=4)
    got = program.step(as_torch(Sequences().step({0: PROMPT}, all_logits=True)))[0]
    assert relative(got.numpy(), model(torch.tensor([PROMPT])).logits[0].numpy()) < TOLERANCE


@torch.inference_mode()
def check_engine(model, ckpt, tmp_path):
    """A prompt in two chunks, then tokens one at a time; by torch where the native kernels lack an op."""
    try:
        engine = build_engine(ckpt, tmp_path / "engine", weight_dtype="float32")
    except UnsupportedError:
        engine = build_engine(ckpt, tmp_path / "engine", weight_dtype="float32", kernels="torch")
    chunks = [PROMPT[:9], PROMPT[9:20], *([t] for t in PROMPT[20:])]
    got = runner_logits(engine, [{0: chunk} for chunk in chunks])
    want = model(torch.tensor([PROMPT])).logits[0].numpy()
    ends = np.cumsum([len(c) for c in chunks]) - 1
    for logits, end in zip(got, ends, strict=True):
        assert relative(logits[0], want[end]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path, family):
    model, ckpt = checkpoint_of(tmp_path, family, {})
    check_reference(model, ckpt)
    check_engine(model, ckpt, tmp_path)


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(tmp_path, name):
    family, settings = SETTINGS[name]
    model, ckpt = checkpoint_of(tmp_path, family, settings)
    check_reference(model, ckpt)
    check_engine(model, ckpt, tmp_path)


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(tmp_path, name):
    model, ckpt = checkpoint_of(tmp_path, "llama", {"rope_parameters": {"rope_theta": 10000.0, **ROPES[name]}})
    check_reference(model, ckpt)
    check_engine(model, ckpt, tmp_path)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@torch.inference_mode()
def test_generation_past_the_original_length_has_the_longer_angles(tmp_path, name):
    """transformers, fed with its cache as in generation, changes angles once a sequence outgrows that length."""
    original = 16
    scaling = {**ROPES[name], "original_max_position_embeddings": original}
    limits = {"max_position_embeddings": original if name == "dynamic" else 4 * original}
    settings = {"rope_parameters": {"rope_theta": 10000.0, **scaling}, **limits}
    model, ckpt = checkpoint_of(tmp_path, "llama", settings)
    engine = build_engine(ckpt, tmp_path / "engine", weight_dtype="float32", max_seq_len=2 * original)
    assert engine.config.build_config.max_input_len == original
    prompt, rest = PROMPT[:14], PROMPT[14:]
    got = runner_logits(engine, [{0: prompt}, *({0: [t]} for t in rest)])
    out = model(torch.tensor([prompt]), use_cache=True)
    want = [out.logits[0, -1]]
    for t in rest:
        out = model(torch.tensor([[t]]), past_key_values=out.past_key_values, use_cache=True)
        want.append(out.logits[0, -1])
    for logits, w in zip(got, want, strict=True):
        assert relative(logits[0], w.numpy()) < TOLERANCE
