"""Configs: TensorRT-LLM's names and defaults, and nothing unknown."""

import json

import pytest

from trtllm_cli.checkpoint import Checkpoint, read_sums, write_config, write_sums
from trtllm_cli.engine import FORMAT_VERSION, BuildConfig, Engine, config_digest
from trtllm_cli.errors import CheckpointError, EngineError, UnsupportedError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.quant_config import LayerQuant, QuantConfig

MINIMAL = {
    "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "vocab_size": 100, "hidden_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 8, "hidden_act": "silu",
}  # fmt: skip


def checkpoint_dir(tmp_path, **fields):
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | fields))
    (tmp_path / "rank0.safetensors").write_bytes(b"")
    return tmp_path


def test_optional_fields_have_tensorrt_llms_defaults():
    c = ModelConfig.model_validate(MINIMAL)
    assert (c.num_key_value_heads, c.head_size, c.intermediate_size, c.norm_epsilon) == (8, 8, 256, 1e-5)
    assert (c.logits_dtype, c.position_embedding_type, c.rotary_embedding_dim) == ("float32", "learned_absolute", 8)
    assert c.mapping.world_size == 1
    assert not c.quantization.is_quantized


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "wide"}, "field `hidden_size`.*found 'wide'"),
        ({"vocab_size": 0}, "field `vocab_size`"),
        ({"hidden_act": "swish9"}, "field `hidden_act`"),
        ({"clip_qkv": 3.0}, "field `clip_qkv` is unknown"),
        ({"rotary_pct": 0.5}, "`rotary_pct` is 0.5, which is not supported"),
        ({"moe": {"num_experts": 2, "top_k": 3, "intermediate_size": 8}}, "top_k 3 is more than the 2 experts"),
        ({"rotary_scaling": {"rope_type": "spiral"}}, "rope_type"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "layer_types must name each"),
        ({"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 2}}, "world_size 3 is not"),
        ({"mapping": {"world_size": 3, "tp_size": 3}}, "tp_size 3 does not divide"),
        ({"mapping": {"world_size": 8, "pp_size": 8}}, "pp_size 8 is more than the 4 layers"),
        ({"quantization": {"quant_algo": "INT3"}}, "quant_algo"),
    ],
)
def test_wrong_fields_are_named_with_their_file(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message) as e:
        Checkpoint.open(checkpoint_dir(tmp_path, **fields))
    assert "config.json" in str(e.value)


@pytest.mark.parametrize("field", sorted(MINIMAL))
def test_a_missing_field_is_named(tmp_path, field):
    path = checkpoint_dir(tmp_path)
    config = dict(MINIMAL)
    del config[field]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"field `{field}` is missing"):
        Checkpoint.open(path)


def test_what_modelopt_writes_and_changes_nothing_is_taken(tmp_path):
    extra = {
        "producer": {"name": "modelopt", "version": "0.47"}, "rotary_pct": 1.0, "decoder": "llama", "rmsnorm": True,
        "bias": False, "residual_mlp": False, "use_parallel_embedding": True,
    }  # fmt: skip
    config = Checkpoint.open(checkpoint_dir(tmp_path, **extra)).config
    assert config.use_parallel_embedding


def test_a_checkpoint_config_round_trips(tmp_path):
    config = ModelConfig.model_validate(MINIMAL | {"sliding_window": 7, "mapping": {"world_size": 1}})
    write_config(tmp_path, config)
    (tmp_path / "rank0.safetensors").write_bytes(b"")
    assert Checkpoint.open(tmp_path).config == config


def test_the_wrong_artifact_says_which_command_makes_the_right_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="trtllm convert"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text('{"pretrained_config": {}}')
    with pytest.raises(CheckpointError, match="is an engine"):
        Checkpoint.open(tmp_path)


def test_a_missing_rank_file(tmp_path):
    path = checkpoint_dir(tmp_path, mapping={"world_size": 2, "tp_size": 2})
    with pytest.raises(CheckpointError, match="rank1.safetensors is missing"):
        Checkpoint.open(path)


def test_checksums_round_trip_and_refuse_paths(tmp_path):
    write_sums(tmp_path / "S", {"rank0.safetensors": "0" * 64})
    assert read_sums(tmp_path / "S") == {"rank0.safetensors": "0" * 64}
    (tmp_path / "S").write_text("0" * 64 + "  ../x\n")
    with pytest.raises(CheckpointError, match="no checksum"):
        read_sums(tmp_path / "S")


@pytest.mark.parametrize(("name", "value"), [("residual_multiplier", 0.2), ("final_logit_softcapping", 30.0)])
def test_a_setting_that_the_family_does_not_have_is_refused(tmp_path, name, value):
    config = Checkpoint.open(checkpoint_dir(tmp_path, **{name: value})).config
    with pytest.raises(UnsupportedError, match=f"`{name}`"):
        trace_model(config, config.mapping.ranks[0])


def test_rank_order_and_layers_are_tensorrt_llms():
    mapping = Mapping.of(tp_size=2, pp_size=3)
    assert [(r.pp_rank, r.tp_rank) for r in mapping.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert mapping.ranks[3].tp_group == (2, 3)
    assert (mapping.ranks[2].prev_stage, mapping.ranks[2].next_stage) == (0, 4)
    assert [list(mapping.ranks[r].layers(8)) for r in (0, 2, 4)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_configs_that_were_used_are_still_equal(tmp_path):
    a, b = (Checkpoint.open(checkpoint_dir(tmp_path)).config for _ in range(2))
    assert a.mapping.ranks
    assert b.mapping.ranks
    assert a == b


def test_excluded_modules_are_not_quantized():
    q = QuantConfig(quant_algo="W8A16", exclude_modules=["lm_head", "*.mlp.*"])
    assert q.layer_quant("lm_head") is None
    assert q.layer_quant("transformer.layers.3.mlp.fc") is None
    assert q.layer_quant("transformer.layers.3.attention.qkv") == LayerQuant(quant_algo="W8A16")


def test_a_mixed_checkpoint_says_how_each_layer_is_stored():
    name, int4 = "transformer.layers.3.mlp.fc", LayerQuant(quant_algo="W4A16", group_size=32)
    q = QuantConfig(quant_algo="MIXED_PRECISION", quantized_layers={name: int4})
    assert q.layer_quant(name) == int4
    assert q.layer_quant("transformer.layers.4.mlp.fc") is None
    with pytest.raises(ValueError, match="belong together"):
        QuantConfig(quant_algo="MIXED_PRECISION")


def test_a_stages_layers_have_their_numbers_in_the_whole_model():
    rank = Mapping.of(pp_size=3).ranks[1]
    assert rank.whole_name("transformer.layers.0.mlp.fc", 8) == "transformer.layers.3.mlp.fc"
    assert rank.whole_name("transformer.layers.2", 8) == "transformer.layers.5"
    assert rank.whole_name("transformer.ln_f.weight", 8) == "transformer.ln_f.weight"


ENGINE = {
    "format_version": FORMAT_VERSION, "version": "0.1.0", "backend": "cpu", "target": {"arch": "x86_64"},
    "pretrained_config": MINIMAL,
    "rank_files": [{"name": "rank0.engine", "size": 3, "tree_sha256": "0" * 64, "program_sha256": "0" * 64}],
    "build_config": {"max_seq_len": 64, "max_input_len": 64, "weight_dtype": "int8", "kv_cache_dtype": "bfloat16"},
}  # fmt: skip


def engine_dir(tmp_path, data=b"abc", **fields):
    config = ENGINE | fields
    (tmp_path / "config.json").write_text(json.dumps({**config, "sha256": config_digest(config)}))
    (tmp_path / "rank0.engine").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({"format_version": 99}, b"abc", r"engine format version 99 .*reads version 4\n.*\n.*trtllm build"),
        ({"format_version": 1}, b"abc", r"format version 1 .built by trtllm 0.1.0.; .*version 4\n.*\n.*--force"),
        ({"backend": "abacus"}, b"abc", r"backend 'abacus'; this trtllm runs cpu, cuda\n.*\n.*trtllm build"),
        ({}, b"ab", r"rank0.engine is damaged: 2 B .*built with 3 bytes"),
        ({"rank_files": []}, b"abc", "lists 0 rank files for 1 ranks"),
        ({"surprise": 1}, b"abc", "field `surprise` is unknown"),
        ({"build_config": {}}, b"abc", "field `build_config.max_seq_len` is missing"),
    ],
)
def test_engines_that_cannot_be_opened_say_why(tmp_path, fields, data, message):
    with pytest.raises(EngineError, match=message):
        Engine.open(engine_dir(tmp_path, data, **fields))


def test_an_engine_of_tensorrt_llm_is_explained(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"version": "0.17.0", "pretrained_config": {}, "build_config": {}})
    )
    with pytest.raises(EngineError, match=r"built by TensorRT-LLM 0.17.0"):
        Engine.open(tmp_path)


def test_an_altered_engine_is_found(tmp_path):
    engine = Engine.open(engine_dir(tmp_path))
    with pytest.raises(EngineError, match="rank0.engine was altered"):
        engine.verify(engine.config.pretrained_config.mapping.ranks[0])


def test_build_limits_must_agree():
    ok = {"max_seq_len": 64, "max_input_len": 64, "weight_dtype": "int8", "kv_cache_dtype": "bfloat16"}
    BuildConfig.model_validate(ok)
    with pytest.raises(ValueError, match="max_input_len 65 is more than"):
        BuildConfig.model_validate(ok | {"max_input_len": 65})
    with pytest.raises(ValueError, match="less than max_batch_size"):
        BuildConfig.model_validate(ok | {"max_batch_size": 9, "max_num_tokens": 8})
