"""GPT-2 and those that came after it: what their configs and snapshots say."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.helpers import read_checkpoint, read_config
from tests.models.test_against_transformers import check_reference
from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "checkpoints"

GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
NEOX = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
GPTJ = {"architectures": ["GPTJForCausalLM"], "model_type": "gptj"}
FALCON = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
STARCODER2 = {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2"}
STABLELM = {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
NEW_FALCON = FALCON | {"new_decoder_architecture": True, "num_attention_heads": 8, "hidden_size": 64}


def converted(snapshot, out):
    convert(snapshot, out)
    (tensors,) = read_checkpoint(Checkpoint.open(out))
    return tensors


def rewrite(snapshot, change):
    """Gives the snapshot's tensors to `change`, and saves what it returns."""
    file = snapshot / "model.safetensors"
    save_file(change(load_file(file)), file)


def assert_same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_gpt2_defaults_are_those_of_transformers():
    from transformers import GPT2Config

    got, theirs = read_config(GPT2), GPT2Config()
    assert got.vocab_size == theirs.vocab_size
    assert (got.hidden_size, got.intermediate_size) == (theirs.n_embd, 4 * theirs.n_embd)
    assert (got.num_hidden_layers, got.num_attention_heads) == (theirs.n_layer, theirs.n_head)
    assert got.max_position_embeddings == theirs.n_positions
    assert got.norm_epsilon == theirs.layer_norm_epsilon
    assert got.share_embedding_table == theirs.tie_word_embeddings
    assert got.attention_multiplier is None
    assert not got.scale_attn_by_inverse_layer_idx


def test_gpt_neox_defaults_are_those_of_transformers():
    from transformers import GPTNeoXConfig

    got, theirs = read_config(NEOX), GPTNeoXConfig()
    assert got.vocab_size == theirs.vocab_size
    assert (got.hidden_size, got.intermediate_size) == (theirs.hidden_size, theirs.intermediate_size)
    assert (got.num_hidden_layers, got.num_attention_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert got.max_position_embeddings == theirs.max_position_embeddings
    assert got.norm_epsilon == theirs.layer_norm_eps
    assert got.rotary_base == theirs.rope_parameters["rope_theta"]
    assert got.rotary_embedding_dim == got.head_size * theirs.rope_parameters["partial_rotary_factor"]
    assert got.parallel_residual == theirs.use_parallel_residual
    assert got.attn_bias == got.dense_bias == theirs.attention_bias
    assert got.share_embedding_table == theirs.tie_word_embeddings


def test_gptj_defaults_are_those_of_transformers():
    from transformers import GPTJConfig

    got, theirs = read_config(GPTJ), GPTJConfig()
    assert got.vocab_size == theirs.vocab_size
    assert (got.hidden_size, got.intermediate_size) == (theirs.n_embd, 4 * theirs.n_embd)
    assert (got.num_hidden_layers, got.num_attention_heads) == (theirs.n_layer, theirs.n_head)
    assert got.max_position_embeddings == theirs.n_positions
    assert got.rotary_embedding_dim == theirs.rotary_dim
    assert got.norm_epsilon == theirs.layer_norm_epsilon
    assert got.share_embedding_table == theirs.tie_word_embeddings


def test_falcon_defaults_are_those_of_transformers():
    from transformers import FalconConfig

    got, theirs = read_config(FALCON), FalconConfig()
    assert got.vocab_size == theirs.vocab_size
    assert (got.hidden_size, got.intermediate_size) == (theirs.hidden_size, theirs.ffn_hidden_size)
    assert (got.num_hidden_layers, got.num_attention_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert got.num_key_value_heads == 1
    assert got.max_position_embeddings == theirs.max_position_embeddings
    assert got.rotary_base == theirs.rope_parameters["rope_theta"]
    assert got.norm_epsilon == theirs.layer_norm_epsilon
    assert got.parallel_residual == theirs.parallel_attn
    assert got.parallel_norms == 1
    assert got.share_embedding_table == theirs.tie_word_embeddings


def check_decoder_defaults(got, theirs):
    assert got.vocab_size == theirs.vocab_size
    assert (got.hidden_size, got.intermediate_size) == (theirs.hidden_size, theirs.intermediate_size)
    assert (got.num_hidden_layers, got.num_attention_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert got.num_key_value_heads == theirs.num_key_value_heads
    assert got.max_position_embeddings == theirs.max_position_embeddings
    assert got.rotary_base == theirs.rope_parameters["rope_theta"]
    assert got.hidden_act == theirs.hidden_act
    assert got.share_embedding_table == theirs.tie_word_embeddings


def test_starcoder2_defaults_are_those_of_transformers():
    from transformers import Starcoder2Config

    got, theirs = read_config(STARCODER2), Starcoder2Config()
    check_decoder_defaults(got, theirs)
    assert got.norm_epsilon == theirs.norm_epsilon
    assert got.attn_bias == got.dense_bias == got.mlp_bias == theirs.use_bias
    assert got.sliding_window == theirs.sliding_window


def test_stablelm_defaults_are_those_of_transformers():
    from transformers import StableLmConfig

    got, theirs = read_config(STABLELM), StableLmConfig()
    check_decoder_defaults(got, theirs)
    assert got.norm_epsilon == theirs.layer_norm_eps
    assert got.rotary_embedding_dim == got.head_size * theirs.rope_parameters["partial_rotary_factor"]
    assert got.attn_bias == theirs.use_qkv_bias
    assert got.qk_layernorm == theirs.qk_layernorm
    assert got.parallel_residual == theirs.use_parallel_residual


@pytest.mark.parametrize(("heads", "kv_heads", "hidden"), [(8, 4, 64), (6, 3, 48)])
def test_stablelm_head_norms(tmp_path, heads, kv_heads, hidden):
    """A tensor of each head in the snapshot, one of all here, divided among the ranks that have a head each."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    model = save_tiny_model(tmp_path / "snapshot", "stablelm", qk_layernorm=True, **shape)
    got = converted(tmp_path / "snapshot", tmp_path / "whole")
    attention = model.model.layers[1].self_attn
    for ours, theirs in {"q_layernorm": attention.q_layernorm, "k_layernorm": attention.k_layernorm}.items():
        want = torch.cat([norm.weight for norm in theirs.norms])
        assert torch.equal(got[f"transformer.layers.1.attention.{ours}.weight"], want)
    with pytest.raises(UnsupportedError, match="--tp-size"):
        convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(tp_size=2 * kv_heads))


def test_gpt_neox_rotary_settings_of_all_times():
    old = read_config(NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 5e5})
    assert (old.rotary_embedding_dim, old.rotary_base) == (48, 5e5)
    both = {"rotary_pct": 0.5, "rotary_emb_base": 5e5, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert read_config(NEOX | both) == old
    new = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert read_config(NEOX | {"rope_parameters": new}) == old


def test_falcon_heads_and_norms():
    def of(**fields):
        got = read_config(NEW_FALCON | fields)
        return got.num_key_value_heads, got.parallel_residual, got.parallel_norms

    assert of() == (8, True, 2)
    assert of(num_kv_heads=2) == (2, True, 2)
    assert of(num_kv_heads=2, num_ln_in_parallel_attn=1) == (2, True, 1)
    assert of(num_kv_heads=8, new_decoder_architecture=False) == (1, True, 1)
    assert of(multi_query=False, new_decoder_architecture=False, parallel_attn=False) == (8, False, 1)


def test_falcon_with_an_odd_number_of_heads(tmp_path):
    """As the 7B model, whose 71 query heads are followed by one key head and one value head."""
    model = save_tiny_model(tmp_path / "snapshot", "falcon", num_attention_heads=7, hidden_size=56)
    convert(tmp_path / "snapshot", tmp_path / "ckpt")
    check_reference(model, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.44), ("pythia-160m", 162.32), ("gpt-neox-20b", 20554.57), ("gpt-j-6b", 6050.88),
        ("falcon-7b", 6921.72), ("falcon-40b", 41303.29), ("starcoder2-3b", 3030.37), ("stablelm-2-1.6b", 1644.52),
        ("stablelm-2-12b", 12143.19),
    ],
)  # fmt: skip
def test_published_models_have_as_many_parameters_as_published(name, millions):
    config = ModelConfig.model_validate_json((GOLDEN / f"{name}.checkpoint.json").read_text())
    weights = trace_model(config, config.mapping.ranks[0]).weights.values()
    assert round(sum(math.prod(w.shape) for w in weights) / 1e6, 2) == millions


def test_masks_and_angles_are_left_over(tmp_path):
    leftovers = {
        "gpt_neox": ("gpt_neox.layers.0.attention", ("bias", "masked_bias", "rotary_emb.inv_freq")),
        "gptj": ("transformer.h.1.attn", ("bias", "masked_bias", "embed_positions")),
        "falcon": ("transformer.h.2.self_attention", ("rotary_emb.inv_freq",)),
    }
    for family, (module, names) in leftovers.items():
        snapshot, out = tmp_path / family, tmp_path / f"{family}-ckpt"
        save_tiny_model(snapshot, family)
        extra = {f"{module}.{name}": torch.ones(4) for name in names}
        rewrite(snapshot, lambda tensors, extra=extra: tensors | extra)
        assert converted(snapshot, out)


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_gpt_neox_head_has_two_names(tmp_path, name):
    save_tiny_model(tmp_path / "snapshot", "gpt_neox")
    want = converted(tmp_path / "snapshot", tmp_path / "want")

    def rename(tensors):
        return {k.replace("lm_head", name).replace("embed_out", name): v for k, v in tensors.items()}

    rewrite(tmp_path / "snapshot", rename)
    assert_same(converted(tmp_path / "snapshot", tmp_path / "got"), want)


def test_gpt2_without_the_prefix_and_with_masks(tmp_path):
    """OpenAI's snapshots: no `transformer.` before the names, and each layer's causal mask."""
    save_tiny_model(tmp_path / "snapshot", "gpt2")
    want = converted(tmp_path / "snapshot", tmp_path / "want")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(3)}
    rewrite(tmp_path / "snapshot", lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | masks)
    assert_same(converted(tmp_path / "snapshot", tmp_path / "got"), want)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (GPT2, "activation_function", "quick_gelu"),
        (GPT2, "activation_function", None),
        (GPT2, "n_embd", 770),
        (GPT2, "rope_theta", 1e4),
        (GPT2, "a_field_from_the_future", 1),
        (NEOX, "hidden_act", None),
        (NEOX, "rotary_pct", None),
        (NEOX, "rope_theta", 5e5),
        (NEOX, "partial_rotary_factor", 0.5),
        (NEOX, "rotary_pct", 0.0),
        (NEOX, "rotary_pct", 1.5),
        (NEOX, "rope_parameters", {"partial_rotary_factor": 0.01}),
        (NEOX, "sliding_window", 8),
        (GPTJ, "rotary", False),
        (GPTJ, "scale_attn_weights", False),
        (GPTJ, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (FALCON, "alibi", True),
        (FALCON, "apply_residual_connection_post_layernorm", True),
        (FALCON, "num_ln_in_parallel_attn", 2),
        (FALCON | {"multi_query": False}, "num_kv_heads", 1),
        (STARCODER2, "norm_type", "rms_norm"),
        (STARCODER2, "mlp_type", "gated"),
        (STARCODER2, "rope_scaling", {"type": "mrope"}),
        (STABLELM, "partial_rotary_factor", 0.01),
        (STABLELM, "rotary_pct", 0.5),
        (NEW_FALCON, "parallel_attn", False),
        (NEW_FALCON, "num_ln_in_parallel_attn", 3),
        (NEW_FALCON, "hidden_size", 65),
    ],
)
def test_refuses_by_name(config, field, value):
    with pytest.raises((UnsupportedError, SnapshotError), match=field.split("_")[0]) as e:
        read_config(config | {field: value})
    assert "config.json" in str(e.value)
