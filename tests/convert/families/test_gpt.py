"""GPT-2 and those that came after it: what their configs and snapshots say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.helpers import read_checkpoint, read_config
from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import convert
from trtllm_cli.errors import SnapshotError, UnsupportedError

GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}


def converted(snapshot, out):
    convert(snapshot, out)
    (tensors,) = read_checkpoint(Checkpoint.open(out))
    return tensors


def rewrite(snapshot, change):
    """Gives the snapshot's tensors to `change`, and saves what it returns."""
    file = snapshot / "model.safetensors"
    save_file(change(load_file(file)), file)


def edit_config(snapshot, **fields):
    file = snapshot / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


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
        (GPT2, "n_embd", 770),
        (GPT2, "rope_theta", 1e4),
        (GPT2, "a_field_from_the_future", 1),
    ],
)
def test_refuses_by_name(config, field, value):
    with pytest.raises((UnsupportedError, SnapshotError), match=field.split("_")[0]) as e:
        read_config(config | {field: value})
    assert "config.json" in str(e.value)
