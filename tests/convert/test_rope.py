"""Every rotary scaling of transformers, read from each form of config.json, gives transformers' angles."""

from pathlib import Path

import pytest
import torch

from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.kernels.rope import RopeSpec, cos_sin_table
from trtllm_cli.model_config import ModelConfig

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 128,
}  # fmt: skip
DIM, ORIGINAL, PAST = 16, 32, 80
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
    "long_factor": [1.0 + 0.5 * i for i in range(DIM // 2)], "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn-without-original": {"rope_type": "yarn", "factor": 4.0},
    "yarn-factor-null": {**YARN, "factor": None},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-no-truncate": {**YARN, "truncate": False},
    "longrope": {**LONGROPE, "factor": 4.0},
    "longrope-by-ratio": LONGROPE,
    "longrope-attention-factor": {**LONGROPE, "attention_factor": 1.2},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def table(config, num_positions):
    read = ModelConfig(**family_of(config, Path("c")).config_fields(Fields(config, Path("c"))), dtype="float32")
    return cos_sin_table(RopeSpec.of(read), num_positions)


def transformers_table(config, num_positions):
    """float32 [num_positions, dim] as transformers has it when the sequence is `num_positions` long."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(LlamaConfig(**config))
    cos, sin = rope(torch.zeros(1), torch.arange(num_positions)[None])
    return torch.cat([cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]], dim=1)


def forms(scaling):
    """The same setting in every form that a config.json may have it."""
    theta = {"rope_theta": 5000.0}
    if scaling is None:
        return [theta, {**theta, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", **theta}}]
    old = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    new = {"rope_parameters": {**scaling, **theta}}
    return [{**theta, "rope_scaling": old}, {**theta, "rope_scaling": scaling}, new]


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_within_the_original_length(name):
    for form in forms(SCALINGS[name]):
        torch.testing.assert_close(table({**BASE, **form}, ORIGINAL), transformers_table({**BASE, **form}, ORIGINAL))


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_past_it(name):
    config = {**BASE, **forms(SCALINGS[name])[2]}
    ours, positions = table(config, 200), range(ORIGINAL, 200)
    if name == "dynamic" or name.startswith("longrope"):
        # transformers gives every token of a longer sequence other angles; ours are those of the newest token
        for p in (ORIGINAL - 1, ORIGINAL, PAST, 127, 128, 199):
            torch.testing.assert_close(ours[p], transformers_table(config, p + 1)[p])
    else:
        torch.testing.assert_close(ours[list(positions)], transformers_table(config, 200)[list(positions)])


def test_original_length_beside_the_table():
    """Phi's way: transformers prefers the outer field."""
    config = {**BASE, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
    torch.testing.assert_close(table(config, 65)[64], transformers_table(config, 65)[64])
    torch.testing.assert_close(table(config, 60), transformers_table(config, 60))


def test_default_theta():
    torch.testing.assert_close(table(BASE, 9), transformers_table(BASE, 9))
    config = {**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}}
    torch.testing.assert_close(table(config, 9), transformers_table(config, 9))
