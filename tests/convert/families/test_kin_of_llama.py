"""Granite, OLMo 2 and 3, Cohere and Cohere 2, Phi-3: what their configs say."""

import pytest

from tests.convert.helpers import read_config
from tests.tiny_models import save_tiny_model
from trtllm_cli.convert.pipeline import convert
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.mapping import Mapping
from trtllm_cli.models import trace_model

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 99}
KINDS = {
    "granite": "GraniteForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
    "cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM",
}  # fmt: skip


def config(kind, **fields):
    return {"architectures": [KINDS[kind]], "model_type": kind, **SHAPE, **fields}


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(kind):
    import transformers

    theirs = getattr(transformers, KINDS[kind].replace("ForCausalLM", "Config"))(**config(kind))
    got = read_config(config(kind))
    assert got.num_key_value_heads == theirs.num_key_value_heads == 8
    assert got.head_size == 8
    assert got.max_position_embeddings == theirs.max_position_embeddings
    assert got.norm_epsilon == (theirs.layer_norm_eps if "cohere" in kind else theirs.rms_norm_eps)
    assert got.share_embedding_table == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    assert got.rotary_base == rope.get("full_attention", rope)["rope_theta"]
    if kind in ("olmo3", "cohere2"):
        assert got.sliding_window == theirs.sliding_window
        assert got.layer_types == theirs.layer_types
    if kind == "granite":
        assert got.attention_multiplier == theirs.attention_multiplier
    if "cohere" in kind:
        assert got.output_multiplier_scale == theirs.logit_scale


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("granite", "logits_scaling", 0),
        ("granite", "sliding_window", 8),
        ("granite", "a_field_from_the_future", 1),
        ("olmo2", "clip_qkv", 8.0),
        ("olmo2", "sliding_window", 8),
        ("olmo3", "rope_local_base_freq", 1e4),
        ("olmo3", "sliding_window", None),
        ("cohere2", "use_qk_norm", True),
        ("cohere", "layer_types", ["full_attention"] * 4),
        ("cohere2", "sliding_window_pattern", 0),
        ("cohere2", "logits_scaling", 2.0),
    ],
)
def test_refuses_by_name(kind, field, value):
    with pytest.raises((UnsupportedError, SnapshotError), match=field) as e:
        read_config(config(kind, **{field: value}))
    assert "config.json" in str(e.value)


def test_granite_without_multipliers_is_refused():
    got = read_config(config("granite")).model_copy(update={"attention_multiplier": None})
    with pytest.raises(UnsupportedError, match="multipliers"):
        trace_model(got, got.mapping.ranks[0])


def test_olmo_does_not_repeat_kv_heads():
    got = read_config(config("olmo2", num_key_value_heads=2)).model_copy(update={"mapping": Mapping.of(4, 1)})
    with pytest.raises(UnsupportedError, match="KV heads"):
        trace_model(got, got.mapping.ranks[0])


PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **SHAPE}
LONGROPE = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


def test_phi3():
    from transformers import Phi3Config

    got, theirs = read_config(PHI3), Phi3Config(**PHI3)
    assert (got.norm_epsilon, got.max_position_embeddings) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (got.num_key_value_heads, got.sliding_window, got.rotary_scaling) == (8, None, None)
    scaled = [
        read_config(PHI3 | {"partial_rotary_factor": 0.75, "rope_scaling": {"type": kind, **LONGROPE}})
        for kind in ("longrope", "su", "yarn")
    ]
    assert scaled[0] == scaled[1] == scaled[2]
    assert scaled[0].rotary_embedding_dim == 6
    assert scaled[0].rotary_scaling.rope_type == "longrope"
    assert scaled[0].rotary_scaling.original_max_position_embeddings == 4096


def test_a_tensor_that_makes_two_is_counted_whole(tmp_path):
    model = save_tiny_model(tmp_path / "snapshot", "phi3", tie_word_embeddings=True)
    report = convert(tmp_path / "snapshot", tmp_path / "ckpt")
    assert report.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lm_head_bias", True),
        ("interpolate_factor", 2),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope", **LONGROPE}),  # too few for whole heads
        ("partial_rotary_factor", 2.0),
        ("layer_types", ["full_attention"] * 4),
    ],
)
def test_phi3_refuses_by_name(field, value):
    with pytest.raises((UnsupportedError, SnapshotError), match=field):
        read_config(PHI3 | {field: value})
