"""Each family: config.json to ModelConfig, exactly; and every tensor where it belongs, on any number of ranks."""

import json
from pathlib import Path

import pytest
import torch

from tests.convert.helpers import join_ranks, read_checkpoint, stacked
from tests.convert.helpers import read_config as read
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.families import FAMILIES as REGISTRY
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import SnapshotError, UnsupportedError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import MODELS

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"


def test_every_family_has_a_model():
    assert set(REGISTRY) <= set(MODELS)


@pytest.mark.parametrize("name", sorted(p.name.removesuffix(".hf.json") for p in GOLDEN.glob("*.hf.json")))
def test_golden(name):
    config = json.loads((GOLDEN / f"{name}.hf.json").read_text())
    expected = json.loads((GOLDEN / f"{name}.checkpoint.json").read_text())
    got = read(config)
    assert got.model_dump(mode="json", exclude_none=True) == expected
    assert ModelConfig.model_validate(expected) == got


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5,
}  # fmt: skip


def llama(**changes):
    config = {**LLAMA, **changes}
    return {k: v for k, v in config.items() if v != "absent"}


def test_defaults_are_those_of_transformers():
    from transformers import LlamaConfig

    got, theirs = read(LLAMA), LlamaConfig(**LLAMA)
    assert got.num_key_value_heads == theirs.num_key_value_heads == 4
    assert got.head_size == theirs.head_dim
    assert got.max_position_embeddings == theirs.max_position_embeddings
    assert got.rotary_base == theirs.rope_parameters["rope_theta"]
    assert got.share_embedding_table == theirs.tie_word_embeddings
    assert read(llama(rms_norm_eps="absent")).norm_epsilon == LlamaConfig().rms_norm_eps


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "quick_gelu"),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 30.0),
        ("logits_scaling", 8.0),
        ("sliding_window", 128),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("a_field_from_the_future", 1),
        ("rope_scaling", {"type": "mrope"}),
        ("rope_scaling", {"rope_type": "proportional"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "surprise": 1}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1.0}}),
        ("architectures", ["MambaForCausalLM"]),
        ("model_type", "mistral"),
    ],
)
def test_refuses_by_name(field, value):
    with pytest.raises(UnsupportedError) as e:
        read(llama(**{field: value}))
    assert field.split("_")[0] in str(e.value)
    assert "config.json" in str(e.value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hidden_size", "absent", "`hidden_size` is missing"),
        ("hidden_size", "64", "an integer"),
        ("hidden_size", True, "an integer"),
        ("hidden_size", 0, "at least 1"),
        ("num_hidden_layers", 10**9, "up to 10000"),
        ("rms_norm_eps", float("nan"), "a number"),
        ("hidden_size", 65, "multiple of num_attention_heads"),
        ("rms_norm_eps", [1], "a number"),
        ("attention_bias", 1, "true or false"),
        ("hidden_act", 3, "a string"),
        ("rope_scaling", "linear", "an object"),
        ("rope_scaling", {"rope_type": "linear"}, "`rope_scaling.factor` is missing"),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "short_factor"),
        ("layer_types", ["full_attention"], "num_hidden_layers"),
        ("architectures", "LlamaForCausalLM", "list of one name"),
        ("architectures", [], "list of one name"),
    ],
)
def test_wrong_fields_are_named(field, value, says):
    with pytest.raises(SnapshotError, match=r"config\.json") as e:
        read(llama(**{field: value}))
    assert says in str(e.value)
    assert field in str(e.value)


def test_without_architectures_the_model_type_tells():
    assert read(llama(architectures="absent")).architecture == "LlamaForCausalLM"
    with pytest.raises(SnapshotError, match="architectures"):
        read(llama(architectures="absent", model_type="bert"))


def test_neutral_values_pass():
    read(llama(partial_rotary_factor=1.0, quantization_config=None, pretraining_tp=4, attention_dropout=0.1, new=None))


@pytest.mark.parametrize("bad", [{"sliding_window": 8, "layer_types": ["full_attention"] * 2}, {"head_dim": 0}])
def test_mistral_refuses(bad):
    config = llama(architectures=["MistralForCausalLM"], model_type="mistral", **bad)
    with pytest.raises((UnsupportedError, SnapshotError)):
        read(config)


def test_qwen_windows():
    config = llama(architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_key_value_heads=2)
    assert read(config).sliding_window is None
    on = config | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    assert read(on).layer_types == ["full_attention", "sliding_attention"]
    assert [read(on).window_of(i) for i in (0, 1)] == [None, 32]
    assert read(on | {"max_window_layers": 0}).layer_types is None
    assert read(on | {"max_window_layers": 0}).sliding_window == 32
    assert read(on | {"max_window_layers": 2}).sliding_window is None
    with pytest.raises(UnsupportedError):
        read(config | {"layer_types": ["full_attention", "sliding_attention"]})


# Those with Llama's names, which `stacked` knows; the others' logits are held against transformers' in tests/models.
LLAMA_LIKE = {
    "llama-bias-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3")},
}
VARIANTS = {**LLAMA_LIKE, **{family: (family, {}) for family in FAMILIES}}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            family, overrides = VARIANTS[name]
            path = tmp_path_factory.mktemp(name)
            made[name] = path, save_tiny_model(path, family, **overrides)
        return made[name]

    return get


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_every_tensor_is_the_models(name, snapshots, tmp_path):
    path, model = snapshots(name)
    report = convert(path, tmp_path / "ckpt")
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    (tensors,) = read_checkpoint(checkpoint)
    expected = stacked(model.state_dict())
    if checkpoint.config.share_embedding_table:
        expected.pop("lm_head.weight")
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        assert torch.equal(tensors[key], value), key
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.config.dtype == report.dtype == "float32"
    assert sorted(report.tokenizer_files) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (8, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_shards_put_together_are_the_whole(name, tp, pp, snapshots, tmp_path):
    path, _ = snapshots(name)
    convert(path, tmp_path / "whole")
    (expected,) = read_checkpoint(Checkpoint.open(tmp_path / "whole"))
    expected.setdefault("lm_head.weight", expected["transformer.vocab_embedding.weight"])  # tied
    convert(path, tmp_path / "ckpt", ConvertOptions(tp_size=tp, pp_size=pp))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    config = checkpoint.config
    assert config.mapping == Mapping.of(tp, pp)
    assert not config.share_embedding_table
    joined = join_ranks(config, read_checkpoint(checkpoint))
    assert set(joined) == set(expected)
    for key, value in expected.items():
        got = joined[key]
        if key.startswith("lm_head."):
            assert got.shape[0] == config.padded_vocab_size
            assert not got[VOCAB_SIZE:].any()
            got = got[:VOCAB_SIZE]
        assert torch.equal(got, value), key


@pytest.mark.parametrize("dim", [0, 1])
def test_parallel_embedding(dim, snapshots, tmp_path):
    path, model = snapshots("llama")
    options = ConvertOptions(tp_size=2, use_parallel_embedding=True, embedding_sharding_dim=dim)
    convert(path, tmp_path / "ckpt", options)
    parts = [t["transformer.vocab_embedding.weight"] for t in read_checkpoint(Checkpoint.open(tmp_path / "ckpt"))]
    whole = torch.cat(parts, dim=dim)
    assert torch.equal(whole[:VOCAB_SIZE], model.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize("options", [ConvertOptions(tp_size=3), ConvertOptions(pp_size=4), ConvertOptions(tp_size=0)])
def test_sizes_that_do_not_divide(options, snapshots, tmp_path):
    path, _ = snapshots("llama")
    with pytest.raises(UsageError, match="size"):
        convert(path, tmp_path / "ckpt", options)
    assert not list(tmp_path.iterdir())
