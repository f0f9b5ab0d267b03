"""Configs as TensorRT-LLM's own conversion scripts write them, where its names differ from ours."""

import pytest
from pydantic import ValidationError

from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model

SHAPE = {
    "dtype": "float16", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "hidden_act": "gelu", "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
}  # fmt: skip
GPTJ = SHAPE | {"architecture": "GPTJForCausalLM", "position_embedding_type": "rope_gptj", "rotary_dim": 8}
NEOX = SHAPE | {"architecture": "GPTNeoXForCausalLM", "rotary_emb_base": 20000, "rotary_pct": 0.25}
FALCON = SHAPE | {
    "architecture": "FalconForCausalLM", "position_embedding_type": "rope_gpt_neox", "num_key_value_heads": 1,
    "bias": False, "parallel_attention": True, "new_decoder_architecture": False,
}  # fmt: skip
OF_A_LAYER = {
    "GPTJForCausalLM": {
        "input_layernorm.weight", "input_layernorm.bias", "attention.qkv.weight", "attention.dense.weight",
        "mlp.fc.weight", "mlp.fc.bias", "mlp.proj.weight", "mlp.proj.bias",
    },
    "GPTNeoXForCausalLM": {
        f"{module}.{kind}" for kind in ("weight", "bias")
        for module in ("input_layernorm", "post_attention_layernorm", "attention.qkv", "attention.dense", "mlp.fc",
                       "mlp.proj")
    },
    "FalconForCausalLM": {
        "input_layernorm.weight", "input_layernorm.bias", "attention.qkv.weight", "attention.dense.weight",
        "mlp.fc.weight", "mlp.proj.weight",
    },
}  # fmt: skip


def read(data):
    return ModelConfig.model_validate(data)


@pytest.mark.parametrize("data", [GPTJ, NEOX, FALCON], ids=lambda data: data["architecture"])
def test_the_model_has_the_tensors_of_theirs(data):
    config = read(data)
    assert config.mapping == Mapping()
    weights = trace_model(config, config.mapping.ranks[0]).weights
    layer = "transformer.layers.1."
    assert {w.removeprefix(layer) for w in weights if w.startswith(layer)} == OF_A_LAYER[config.architecture]
    assert ("lm_head.bias" in weights) == (config.architecture == "GPTJForCausalLM")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_what_their_fields_mean():
    assert (read(GPTJ).rotary_embedding_dim, read(GPTJ).hidden_act) == (8, "gelu_pytorch_tanh")
    assert (read(NEOX).rotary_embedding_dim, read(NEOX).rotary_base) == (4, 20000.0)
    new = read(FALCON | {"new_decoder_architecture": True, "num_key_value_heads": 2, "bias": True})
    assert (new.parallel_residual, new.parallel_norms, new.mlp_bias) == (True, 2, True)
    old = read(FALCON | {"parallel_attention": False})
    assert (old.parallel_residual, old.parallel_norms, old.mlp_bias) == (False, 1, False)


@pytest.mark.parametrize("bad", [{"rotary_pct": 2}, {"rotary_pct": "x"}, {"hidden_size": "64"}, {"hidden_size": None},
                                 {"num_attention_heads": 0}, {"rotary_pct": float("nan")}])  # fmt: skip
def test_nonsense_is_a_validation_error(bad):
    with pytest.raises(ValidationError):
        read(NEOX | bad)


GEMMA2 = SHAPE | {
    "architecture": "Gemma2ForCausalLM", "position_embedding_type": "rope_gpt_neox", "head_size": 24,
    "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "rotary_base": 10000.0, "rotary_scaling": None,
    "attn_bias": False, "mlp_bias": False, "share_embedding_table": True, "inter_layernorms": True,
    "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
GEMMA3 = {name: value for name, value in GEMMA2.items() if name != "attn_logit_softcapping"} | {
    "architecture": "Gemma3ForCausalLM", "final_logit_softcapping": None, "_sliding_window_pattern": 2,
    "rope_local_base_freq": 9000, "sliding_window": 512,
}  # fmt: skip


def test_gemma():
    two, three = read(GEMMA2), read(GEMMA3)
    assert (two.attention_multiplier, two.attn_logit_softcapping, two.final_logit_softcapping) == (1 / 16, 50.0, 30.0)
    assert three.layer_types == ["sliding_attention", "full_attention"]
    assert (three.rope_local_base_freq, three.qk_layernorm) == (9000.0, True)
    for config in (two, three):
        weights = trace_model(config, config.mapping.ranks[0]).weights
        norms = {w.removeprefix("transformer.layers.1.") for w in weights if "layers.1" in w and "layernorm" in w}
        around = ("input_layernorm", "post_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
        of_heads = ("attention.q_layernorm", "attention.k_layernorm") if config is three else ()
        assert norms == {f"{name}.weight" for name in (*around, *of_heads)}


@pytest.mark.parametrize(
    "change", [{"inter_layernorms": False}, {"query_pre_attn_scalar": 0}, {"_sliding_window_pattern": 0}]
)
def test_gemma_that_does_not_go_together(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        read(GEMMA3 | change)
