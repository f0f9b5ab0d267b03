"""Families with experts: which layers have them, by their configs; and what cannot be honoured."""

import json
from pathlib import Path

import pytest

from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.model_config import ModelConfig, MoeConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
PATH = Path("config.json")


def golden(name, **changes):
    """A published model's config with other values; None takes a field away."""
    config = {**json.loads((GOLDEN / f"{name}.hf.json").read_text()), **changes}
    return {k: v for k, v in config.items() if v is not None}


def read(config):
    return ModelConfig(**family_of(config, PATH).config_fields(Fields(config, PATH)), dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("mixtral-8x7b", "Mixtral"),
        ("qwen3-30b-a3b", "Qwen3Moe"),
        ("qwen1.5-moe-a2.7b", "Qwen2Moe"),
        ("gpt-oss-20b", "GptOss"),
    ],
)
def test_defaults_are_those_of_transformers(name, model_type):
    import transformers

    needed = {
        "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    }  # fmt: skip
    config = {k: v for k, v in golden(name).items() if k in needed}
    kind = getattr(transformers, f"{model_type}Config")
    assert read(config) == read(kind(**config).to_dict())


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [(1, [], []), (1, [0, 2], [0, 2]), (2, [], [0, 2, 4]), (2, [1], [0, 1, 2, 4]), (3, None, [0, 1, 3, 4])],
)
def test_layers_without_experts(step, dense, expected):
    config = read(golden("qwen3-30b-a3b", num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=dense))
    assert config.moe.dense_layers == expected
    assert [i for i in range(6) if config.moe_of(i) is None] == expected


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("qwen3-30b-a3b", {"mlp_only_layers": [48]}, SnapshotError),
        ("qwen3-30b-a3b", {"mlp_only_layers": "0"}, SnapshotError),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, UnsupportedError),
        ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 64}, UnsupportedError),
        ("qwen1.5-moe-a2.7b", {"layer_types": ["sliding_attention"] * 24}, UnsupportedError),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True, "sliding_window": 0}, SnapshotError),
        ("mixtral-8x7b", {"num_local_experts": 0}, SnapshotError),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, UnsupportedError),
        ("gpt-oss-20b", {"swiglu_alpha": 1.0}, UnsupportedError),
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, UnsupportedError),
    ],
)
def test_refuses_by_name(name, changes, error):
    with pytest.raises(error, match=next(reversed(changes))):
        read(golden(name, **changes))


def test_config_of_tensorrt_llm():
    """The fields of a Qwen2-MoE checkpoint that TensorRT-LLM's convert_checkpoint.py writes."""
    config = {
        "architecture": "Qwen2MoeForCausalLM", "dtype": "bfloat16", "vocab_size": 100, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu", "intermediate_size": 96,
        "qwen_type": "qwen2_moe", "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
        "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 0, "sparse_mixer_epsilon": 0.01, "tp_mode": 0},
    }  # fmt: skip
    assert ModelConfig.model_validate(config).moe == MoeConfig(
        num_experts=8, top_k=2, intermediate_size=32, renormalize=False,
        shared_expert_intermediate_size=48, shared_expert_gate=True,
    )  # fmt: skip
    config["moe"]["normalization_mode"] = 2
    with pytest.raises(ValueError, match="normalization_mode"):
        ModelConfig.model_validate(config)


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": 9},
        {"num_groups": 2},
        {"num_groups": 3, "top_groups": 1},
        {"num_groups": 4, "top_groups": 1, "top_k": 3},
        {"num_groups": 8, "top_groups": 4, "scoring": "sigmoid"},
    ],
)
def test_routing_that_cannot_be(bad):
    with pytest.raises(ValueError, match="top_k|num_groups|group"):
        MoeConfig(**{"num_experts": 8, "top_k": 2, "intermediate_size": 4, **bad})


def test_tensor_parallelism_divides_the_experts():
    fields = read(golden("qwen3-30b-a3b")).model_dump()
    fields["mapping"] = {"world_size": 4, "tp_size": 4}
    ModelConfig.model_validate(fields)
    fields["moe"]["intermediate_size"] = 770
    with pytest.raises(ValueError, match="experts' intermediate_size"):
        ModelConfig.model_validate(fields)
