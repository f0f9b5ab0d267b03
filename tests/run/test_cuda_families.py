"""The families on the cuda backend, in Triton's interpreter, against the reference: small models that between them have
every op and every shape of attention and experts.
"""

import contextlib

import numpy as np
import pytest

from tests.batches import Sequences, as_torch
from tests.engines import build_engine, save_checkpoint
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_configs import random_weights
from trtllm_cli.build.backends import cuda, cuda_attention, cuda_tactics
from trtllm_cli.engine import KERNELS
from trtllm_cli.kernels.cuda.compiler import compile_kernels
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.models.tensors import KV_SCALES
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.communicator import SingleRank

BASE = {
    "dtype": "bfloat16", "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "max_position_embeddings": 64,
    "position_embedding_type": "rope_gpt_neox",
}  # fmt: skip
ROTATED = {"rotary_embedding_dim": 4}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**WINDOWS, "head_size": 16, "hidden_act": "gelu_pytorch_tanh", "share_embedding_table": True}
BIASES = {"attn_bias": True, "dense_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts": 8, "top_k": 2, "intermediate_size": 24}
GROUPS = {"num_groups": 4, "top_groups": 2}
MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10}
DEEPSEEK = {"num_key_value_heads": 4, "head_size": 18, "rotary_embedding_dim": 6,
            "position_embedding_type": "rope_gptj"}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 2.0, "truncate": False}
FAMILIES = {
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention_multiplier": 0.2},
    "Gemma3": {**GEMMA, "qk_layernorm": True, "rope_local_base_freq": 2e3},
    "GPT2LMHeadModel": {
        **BIASES, "position_embedding_type": "learned_absolute", "hidden_act": "gelu", "num_key_value_heads": 4,
        "scale_attn_by_inverse_layer_idx": True, "share_embedding_table": True,
    },
    "GPTJ": {
        **ROTATED, "position_embedding_type": "rope_gptj", "parallel_residual": True, "lm_head_bias": True,
        "mlp_bias": True, "hidden_act": "relu", "num_key_value_heads": 4, "num_hidden_layers": 1,
    },
    "GPTNeoX": {
        **BIASES, **ROTATED, "parallel_residual": True, "hidden_act": "gelu", "num_attention_heads": 3,
        "num_key_value_heads": 3, "head_size": 12, "num_hidden_layers": 1,
    },
    "Falcon": {"parallel_residual": True, "parallel_norms": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
               "head_size": 20, "hidden_act": "gelu"},
    "DeepseekV2": {**DEEPSEEK, "mla": MLA, "rotary_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
                   "moe": {**EXPERTS, **GROUPS, "renormalize": False, "routed_scaling_factor": 3.0,
                           "shared_expert_intermediate_size": 40, "dense_layers": [0]}},
    "DeepseekV3": {**DEEPSEEK, "num_hidden_layers": 1, "attn_bias": True, "mla": {**MLA, "q_lora_rank": 20},
                   "moe": {**EXPERTS, **GROUPS, "top_k": 3, "scoring": "sigmoid", "correction_bias": True,
                           "routed_scaling_factor": 2.5, "shared_expert_intermediate_size": 24}},
    "GptOss": {**BIASES, **WINDOWS, "head_size": 16, "hidden_act": "swiglu_oai", "rotary_scaling": YARN,
               "moe": {**EXPERTS, "num_experts": 5, "top_k": 3}},
    "Qwen2Moe": {"attn_bias": True, "moe": {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 40,
                                            "shared_expert_gate": True, "renormalize": False, "dense_layers": [1]}},
    "Cohere": {"qk_layernorm": True, "norm_bias": False, "parallel_residual": True, "output_multiplier_scale": 0.3,
               "num_hidden_layers": 1, "position_embedding_type": "rope_gptj"},
    "Cohere2": {**WINDOWS, "norm_bias": False, "parallel_residual": True, "share_embedding_table": True},
    "StableLm": {**ROTATED, "qk_layernorm": True, "attn_bias": True, "num_hidden_layers": 1},
    "Olmo2": {"qk_layernorm": True, "num_hidden_layers": 1},
    "Granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                "output_multiplier_scale": 0.2, "num_hidden_layers": 1, **BIASES},
    "Llama": {"num_hidden_layers": 1, "num_attention_heads": 12, "num_key_value_heads": 3, "head_size": 80},
}  # fmt: skip
# A prompt beside a token alone, and tokens out of order, which are padded to four.
STEPS = [{0: [1, 2, 3, 4, 5, 6], 1: [9]}, {1: [11], 0: [5], 2: [7]}]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Linears by torch, and no more programs than need be: both kernels and their splits have tests of their own."""
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", lambda self, shape: [])
    monkeypatch.setattr(cuda_attention, "_DECODE", ((None, 1, 4, 64),))
    monkeypatch.setattr(cuda_attention, "_FEW", 0)


def model(architecture, **fields):
    name = architecture if architecture.endswith("Model") else f"{architecture}ForCausalLM"
    config = ModelConfig.model_validate({**BASE, "architecture": name, **fields})
    return config, trace_model(config, config.mapping.ranks[0])


def errors(tmp_path, config, graph, seed=0, **options):
    """The relative error of each step's logits."""
    weights = random_weights(graph, seed)
    for name, weight in weights.items():
        if graph.weights[name].dtype == "bfloat16" or name.endswith("router.weight"):
            weights[name] = weight.bfloat16().float()
        if name.endswith(KV_SCALES):
            weights[name] = weight.new_tensor([0.02, 0.03])
    checkpoint = save_checkpoint(tmp_path / "ckpt", config, graph, weights)
    options = {"tokens_per_block": 16, "kernels": "auto", **options}
    engine = build_engine(checkpoint, tmp_path / "engine", backend="cuda", **options)
    runner = CudaRunner(engine, config.mapping.ranks[0], InterpreterDevice(), SingleRank())
    runner.allocate_kv_cache(8)
    reference = Reference(graph, weights, num_slots=8 * 16, block_size=16)
    batch, found = Sequences(block_size=16, num_blocks=8), []
    for new in STEPS:
        inputs = batch.step(new)
        got, want = runner.forward(inputs), reference.step(as_torch(inputs))[0].numpy()
        found.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    runner.close()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_references(tmp_path, family):
    config, graph = model(family, **FAMILIES[family])
    assert max(errors(tmp_path, config, graph)) < 2e-2


@pytest.mark.parametrize("algo", ["FP8", "INT8"])
@pytest.mark.parametrize("family", ["Llama", "DeepseekV2"])
def test_quantized_kv_caches(tmp_path, family, algo):
    """Whose scales the checkpoint has."""
    fields = {**FAMILIES[family], "num_hidden_layers": 1, "head_size": 18}
    config, graph = model(family, **fields, quantization={"kv_cache_quant_algo": algo})
    assert max(errors(tmp_path, config, graph)) < 5e-2


@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_head_sizes(tmp_path, head_size):
    config, graph = model("Llama", num_hidden_layers=1, head_size=head_size)
    assert max(errors(tmp_path, config, graph)) < 2e-2


def test_a_mixture_of_experts_compiles(tmp_path, monkeypatch):
    """For an H100, truly: every kernel of a plan."""
    monkeypatch.setattr(cuda, "compile_kernels", compile_kernels)
    config, graph = model("Mixtral", num_hidden_layers=1, hidden_size=128, moe={**EXPERTS, "intermediate_size": 128})
    checkpoint = save_checkpoint(tmp_path / "ckpt", config, graph, random_weights(graph))
    engine = build_engine(
        checkpoint, tmp_path / "engine", backend="cuda", kernels="auto", arch="sm_90a", tokens_per_block=16
    )
    with contextlib.closing(engine.tensors(config.mapping.ranks[0])) as file:
        kernels = engine.plan(file)["kernels"]
        image = file.read(KERNELS)
    assert {"route", "sort_pairs", "expert_linear", "expert_linear_pairs"} <= {k["source"]["function"] for k in kernels}
    assert all(image[k["offset"] : k["offset"] + 4] == b"\x7fELF" for k in kernels)
