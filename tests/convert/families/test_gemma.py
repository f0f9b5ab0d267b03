"""Gemma 2 and 3: what their configs say."""

import pytest
import torch
from safetensors.torch import save_file

from tests.convert.helpers import read_config
from tests.models.test_against_transformers import check_reference
from trtllm_cli.convert.pipeline import convert
from trtllm_cli.errors import SnapshotError, UnsupportedError

GEMMA = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def test_gemma_defaults_are_those_of_transformers():
    from transformers import Gemma2Config, Gemma3TextConfig

    for given, kind in ((GEMMA, Gemma2Config), (GEMMA3, Gemma3TextConfig)):
        got, theirs = read_config(given), kind(**given)
        assert got.vocab_size == theirs.vocab_size
        assert got.num_key_value_heads == theirs.num_key_value_heads
        assert got.head_size == theirs.head_dim
        assert got.max_position_embeddings == theirs.max_position_embeddings
        assert got.hidden_act == theirs.hidden_activation
        assert got.norm_epsilon == theirs.rms_norm_eps
        assert got.attention_multiplier == theirs.query_pre_attn_scalar**-0.5
        assert got.attn_logit_softcapping == theirs.attn_logit_softcapping
        assert got.final_logit_softcapping == theirs.final_logit_softcapping
        assert got.sliding_window == theirs.sliding_window
        assert got.layer_types == theirs.layer_types
        assert got.share_embedding_table == theirs.tie_word_embeddings
    assert read_config(GEMMA3).rotary_base == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert read_config(GEMMA3).rope_local_base_freq == theirs.rope_parameters["sliding_attention"]["rope_theta"]


def test_gemma3_rope():
    old = read_config(GEMMA3 | {"rope_theta": 5e5, "rope_local_base_freq": 7e3,
                         "rope_scaling": {"rope_type": "linear", "factor": 8.0}})  # fmt: skip
    tables = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
    }
    new = read_config(GEMMA3 | {"rope_parameters": tables})
    assert old == new
    assert (new.rotary_base, new.rope_local_base_freq, new.rotary_scaling.factor) == (5e5, 7e3, 8.0)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (GEMMA, "use_bidirectional_attention", True),
        (GEMMA, "a_field_from_the_future", 1),
        (GEMMA3, "attn_logit_softcapping", 50.0),
        (GEMMA3, "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        (GEMMA3, "rope_parameters", {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
        (GEMMA3, "rope_parameters", {"full_attention": {"rope_type": "proportional"}}),
        (GEMMA, "query_pre_attn_scalar", 0),
        (GEMMA, "sliding_window", None),
        (GEMMA, "hidden_activation", "quick_gelu"),
    ],
)
def test_gemma_refuses_by_name(config, field, value):
    with pytest.raises((UnsupportedError, SnapshotError), match=field.split("_")[0]) as e:
        read_config(config | {field: value})
    assert "config.json" in str(e.value)


TEXT = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def with_eyes(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "snapshot")
    return model


def test_the_text_model_of_one_with_eyes(with_eyes, tmp_path):
    report = convert(tmp_path / "snapshot", tmp_path / "ckpt")
    assert any("vision" in note for note in report.notes)
    check_reference(with_eyes, tmp_path / "ckpt")


def test_names_as_they_are_in_memory(with_eyes, tmp_path):
    """Another version of transformers, another prefix."""
    state = {n: t.contiguous() for n, t in with_eyes.state_dict().items() if n != "lm_head.weight"}
    assert any(name.startswith("model.language_model.") for name in state)
    save_file(state, tmp_path / "snapshot" / "model.safetensors")
    convert(tmp_path / "snapshot", tmp_path / "ckpt")
    check_reference(with_eyes, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"a_field_from_the_future": 1}}, "text_config.a_field_from_the_future"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"audio_config": {}}, "audio_config"),
    ],
)
def test_one_with_eyes_refuses_by_name(change, says):
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}}
    assert read_config(config).hidden_size == 2304
    with pytest.raises((UnsupportedError, SnapshotError), match=says):
        read_config(config | change)
