"""Checkpoints of random weights: like any other, the same for the same seed, and small ones of every format run."""

import json

import numpy as np
import pytest
import torch

from tests.commands.conftest import CONFIG
from tests.convert.helpers import join_ranks, read_checkpoint
from tests.engines import build_engine, runner_logits
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert import random_weights
from trtllm_cli.convert.options import ConvertOptions, RandomWeights
from trtllm_cli.convert.pipeline import convert, read_config
from trtllm_cli.convert.random_weights import STD, RandomReader, find_shape, shape_names
from trtllm_cli.errors import UnsupportedError, UsageError

MIXTRAL = CONFIG | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
GEMMA2 = CONFIG | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
QWEN2 = CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
PARAMETERS = {  # in billions, as published
    "llama-3.1-70b": 70.6, "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.21, "mistral-7b": 7.25,
    "mixtral-8x7b": 46.7, "qwen2.5-7b": 7.62, "qwen3-8b": 8.19,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    """So that tensors here wrap around it, too."""
    monkeypatch.setattr(random_weights, "POOL", 10_007)


@pytest.fixture
def config_json(tmp_path):
    def write(config=CONFIG):
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "config.json").write_text(json.dumps(config))
        return tmp_path / "snapshot" / "config.json"

    return write


def written(source, output, *, seed=0, num_layers=None, **options):
    convert(source, output, ConvertOptions(random=RandomWeights(seed, num_layers), **options))
    checkpoint = Checkpoint.open(output)
    checkpoint.verify()
    return checkpoint


def whole(checkpoint):
    return join_ranks(checkpoint.config, read_checkpoint(checkpoint))


@pytest.mark.parametrize("name", shape_names())
def test_named_shapes_are_the_published_models(name):
    reader = RandomReader(find_shape(name), RandomWeights())
    assert read_config(reader, ConvertOptions()).config.dtype == "bfloat16"
    count = sum(np.prod(shape, dtype=np.int64) for shape in reader.weights.values())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UsageError, match="'llama-9'.*\n.*--random-weights\n.*llama-3.1-8b, llama-3.2-1b"):
        find_shape("llama-9")


def test_the_same_whatever_the_workers_the_ranks_and_the_blocks(config_json, tmp_path, monkeypatch):
    source = config_json(CONFIG | {"vocab_size": 260})  # which ranks divide: no padding
    one = written(source, tmp_path / "one", workers=1)
    many = written(source.parent, tmp_path / "many", workers=4)  # the directory is as good as the file
    assert one.sha256 == many.sha256
    ranks = written(source, tmp_path / "ranks", tp_size=2, pp_size=2)
    monkeypatch.setattr("trtllm_cli.convert.jobs.BLOCK", 100)
    blocks = written(source, tmp_path / "blocks")
    assert blocks.sha256 == one.sha256
    expected = whole(one)
    assert {name: torch.equal(value, expected[name]) for name, value in whole(ranks).items()} == dict.fromkeys(
        expected, True
    )
    assert written(source, tmp_path / "other", seed=1).sha256 != one.sha256


def test_weights_are_normal_and_norms_near_one(config_json, tmp_path):
    tensors = whole(written(config_json(QWEN2), tmp_path / "ckpt"))
    assert "transformer.layers.1.attention.qkv.bias" in tensors
    for name, value in tensors.items():
        center = 1.0 if name.endswith(("layernorm.weight", "ln_f.weight")) else 0.0
        assert float(value.mean()) == pytest.approx(center, abs=0.01), name
        assert float(value.std()) == pytest.approx(STD, rel=0.3), name
    gate, up = (tensors[f"transformer.layers.0.mlp.{n}.weight"].flatten().double() for n in ("gate", "fc"))
    assert abs(float(torch.corrcoef(torch.stack([gate, up]))[0, 1])) < 0.1


def test_norms_that_are_stored_less_one(config_json, tmp_path):
    tensors = whole(written(config_json(GEMMA2), tmp_path / "ckpt"))
    assert float(tensors["transformer.ln_f.weight"].mean()) == pytest.approx(1, abs=0.02)


def test_fewer_layers(config_json, tmp_path):
    source = config_json(QWEN2 | {"layer_types": ["full_attention"] * 2})
    assert written(source, tmp_path / "ckpt", num_layers=1).config.num_hidden_layers == 1
    with pytest.raises(UsageError, match="--num-layers is 3, and the model has 2"):
        RandomReader(source, RandomWeights(num_layers=3))


def test_a_config_of_quantized_weights_is_refused(config_json):
    with pytest.raises(UnsupportedError, match="quantization_config"):
        RandomReader(config_json(CONFIG | {"quantization_config": {"quant_method": "fp8"}}), RandomWeights())


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, CONFIG),
        ({"dtype": "bfloat16"}, CONFIG),
        ({"qformat": "fp8"}, CONFIG),
        ({"qformat": "fp8", "kv_cache": "fp8", "quantize_lm_head": True}, QWEN2),
        ({"qformat": "fp8"}, MIXTRAL),
        ({"qformat": "fp8_pc_pt"}, CONFIG),
        ({"qformat": "int8_wo"}, CONFIG),
        ({"qformat": "int4_wo"}, MIXTRAL),
        ({"qformat": "int4_wo", "group_size": 16}, CONFIG),
        ({"qformat": "int8_sq"}, CONFIG),
        ({"qformat": "int4_awq"}, CONFIG),
        ({"qformat": "nvfp4"}, CONFIG),
    ],
)
def test_every_format_builds_and_runs(config_json, tmp_path, options, config):
    written(config_json(config), tmp_path / "ckpt", **options)
    engine = build_engine(tmp_path / "ckpt", tmp_path / "engine", kernels="torch")
    (plain, *_) = runner_logits(engine, [{0: [1, 2, 3]}])
    assert np.isfinite(plain).all()
    assert plain.std() > 0.01


def test_fp8_is_near_the_plain_model(config_json, tmp_path):
    """So the assumed scales clip nothing that matters."""
    source = config_json()
    logits = []
    for qformat in (None, "fp8"):
        written(source, tmp_path / f"ckpt-{qformat}", qformat=qformat)
        engine = build_engine(tmp_path / f"ckpt-{qformat}", tmp_path / f"engine-{qformat}", kernels="torch")
        logits.append(runner_logits(engine, [{0: [1, 2, 3, 4, 5, 6]}])[0].flatten())
    assert np.corrcoef(*logits)[0, 1] > 0.99
