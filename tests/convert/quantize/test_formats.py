"""What a checkpoint's `quantization` says for each format, and what is left out of it."""

import pytest

from tests.tiny_configs import config
from trtllm_cli.convert.quantize import formats
from trtllm_cli.convert.quantize.formats import linears, qformat_named, quant_config
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.mapping import Mapping

WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}


def test_linears_of_all_stages():
    c = config("llama", mapping=Mapping.of(2, 2))
    found = linears(c)
    assert len(found) == 3 * 5 + 1
    assert (found["transformer.layers.2.mlp.proj"].rows, found["transformer.layers.2.mlp.proj"].columns) == (32, 24)
    assert "lm_head" not in linears(config("tied"))


@pytest.mark.parametrize(
    ("qformat", "algo", "group", "zero", "smooth"),
    [
        ("int8_wo", "W8A16", 64, False, False), ("int4_wo", "W4A16", 32, True, False),
        ("fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN", 128, False, False),
        ("fp8_block", "FP8_BLOCK_SCALES", 128, False, False), ("fp8", "FP8", 128, False, False),
        ("int8_sq", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", 128, False, True),
        ("int8_sq_static", "W8A8_SQ_PER_CHANNEL", 128, False, True),
        ("int4_awq", "W4A16_AWQ", 64, True, True), ("w4a8_awq", "W4A8_AWQ", 64, True, True),
        ("nvfp4", "NVFP4", 16, False, False),
    ],
)  # fmt: skip
def test_formats(qformat, algo, group, zero, smooth):
    got, notes = quant_config(qformat, None, config("llama", **WIDE))
    assert got.quant_algo == algo
    assert (got.group_size, got.has_zero_point, got.pre_quant_scale) == (group, zero, smooth)
    assert got.exclude_modules == ["lm_head"]
    assert got.per_group == (qformat == "int8_wo")
    assert bool(notes) == (qformat in ("int4_awq", "w4a8_awq"))  # 128 does not divide 192


def test_a_narrow_layer_is_left_out():
    """20 inputs of mlp.proj on each rank suit no group of 8 or more."""
    c = config("llama", **(WIDE | {"intermediate_size": 40}), mapping=Mapping.of(2))
    for qformat in ("int4_wo", "nvfp4", "fp8_block"):
        got, notes = quant_config(qformat, None, c)
        assert "transformer.layers.1.mlp.proj" in got.exclude_modules, qformat
        assert "not quantized" in " ".join(notes)
        assert got.layer_quant("transformer.layers.0.mlp.fc") is not None
    assert quant_config("fp8", None, c)[0].exclude_modules == ["lm_head"]


def test_exclude_head_and_cache():
    c = config("llama", **WIDE)
    got, _ = quant_config("fp8", None, c, exclude=["*.attention.*"], quantize_lm_head=True, kv_cache="int8")
    assert got.layer_quant("lm_head") is not None
    assert got.layer_quant("transformer.layers.0.attention.qkv") is None
    assert got.kv_cache_quant_algo == "INT8"
    assert quant_config("full_prec", None, c, kv_cache="fp8")[0].kv_cache_quant_algo == "FP8"
    assert not quant_config(None, None, c)[0].is_quantized
    with pytest.raises(UsageError, match="no layer's name matches"):
        quant_config("fp8", None, c, exclude=["*.attn"])
    with pytest.raises(UnsupportedError, match="no layer"):
        quant_config("fp8", None, c, exclude=["*"])


def test_spellings():
    assert qformat_named("FP8-rowwise") == "fp8_pc_pt"
    assert qformat_named("int4-awq") == "int4_awq"
    with pytest.raises(UsageError, match="did you mean int8_sq"):
        qformat_named("int8_sqq")


def test_int8_without_groups():
    """7 inputs suit no group: a scale for each output."""
    got, notes = formats.fit("int8_wo", None, {"a": formats.Linear(8, 7, None)})[0::2]
    assert got == {"quant_algo": "W8A16"}
    assert "one scale for each output" in notes[0]
