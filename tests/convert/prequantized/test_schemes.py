"""Each format of quantized snapshots: unpacked, a weight is what its maker said."""

from pathlib import Path

import pytest
import torch

from tests.convert.prequantized import makers
from trtllm_cli.convert.prequantized import find_scheme
from trtllm_cli.convert.prequantized.scheme import part_infos
from trtllm_cli.convert.source_weight import dequantize_rows
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.tensor_file import TensorInfo

M = "model.layers.0.mlp.up_proj"
PATH = Path("snapshot")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}


def compressed(weights, activations=None, fmt="pack-quantized", **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": group}, **more}


def unpack(config, parts):
    """(the description, the parts with rows, the fixed ones) for one module with these tensors."""
    scheme, _ = find_scheme(PATH, {"quantization_config": config})
    tensors = {f"{M}.{part}": tensor for part, tensor in parts.items()}
    infos = {n: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    described = scheme.describe(M, infos, tensors.__getitem__)
    assert set(described.tensors) <= set(tensors)
    unpacked, fixed = scheme.unpack(M, described, tensors.__getitem__), {}
    if described.layer is not None:
        made = {n: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in unpacked.items()}
        assert made == part_infos(described.layer, described.shape)
        fixed = scheme.fixed(M, described, tensors.__getitem__)
    return described, unpacked, fixed


def plain(described, parts, fixed):
    """The float weight of the parts, its inputs in their own order."""
    if described.layer is None:
        return parts["weight"]
    layer = described.layer
    if "prequant_scaling_factor" in fixed:
        fixed = {**fixed, "prequant_scaling_factor": torch.ones(described.shape[1])}
    return dequantize_rows(layer, parts, fixed)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(symmetric, act_order, version):
    parts, weight = makers.gptq(40, 96, 32, symmetric=symmetric, act_order=act_order, version=version)
    stored = "gptq" if version == 1 else "gptq_v2"
    described, *got = unpack({**GPTQ, "sym": symmetric, "checkpoint_format": stored}, parts)
    assert described.shape == (40, 96)
    assert described.layer.act_order == act_order
    assert described.layer.has_zero_point == (not symmetric)
    assert torch.equal(plain(described, *got), weight)


def test_gptq_of_8_bits():
    parts, weight = makers.gptq(40, 96, 32, bits=8)
    described, *got = unpack({**GPTQ, "bits": 8}, parts)
    assert described.layer.quant_algo == "W8A16_GPTQ"
    assert torch.equal(plain(described, *got), weight)


def test_gptq_with_one_group_of_all_inputs():
    parts, weight = makers.gptq(16, 64, 64)
    described, *got = unpack({**GPTQ, "group_size": -1}, parts)
    assert described.layer.group_size == 64
    assert torch.equal(plain(described, *got), weight)


@pytest.mark.parametrize("case", ["uneven groups", "8-bit zeros"])
def test_gptq_that_cannot_be_kept_comes_dequantized(case):
    if case == "8-bit zeros":
        parts, weight = makers.gptq(16, 64, 32, bits=8, symmetric=False)
        described, *got = unpack({**GPTQ, "bits": 8, "sym": False}, parts)
    else:
        parts, _ = makers.gptq(16, 64, 32)
        parts["g_idx"][0] = 1  # 31 and 33
        g = parts["g_idx"].long()
        q = makers.integers(16, 64, 4)
        weight = (q - 8).float() * parts["scales"][g].T.float()
        described, *got = unpack(GPTQ, parts)
    assert described.layer is None
    assert described.why
    assert torch.equal(plain(described, *got), weight)


def test_gptq_whose_zeros_contradict_its_config():
    parts, _ = makers.gptq(16, 64, 32, symmetric=False)
    with pytest.raises(SnapshotError, match="not all 8, although"):
        unpack(GPTQ, parts)


def test_awq():
    parts, weight = makers.awq(48, 96, 32)
    described, *got = unpack(AWQ, parts)
    assert (described.shape, described.layer.quant_algo) == ((48, 96), "W4A16_AWQ")
    assert torch.equal(plain(described, *got), weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed(bits, symmetric):
    parts, weight = makers.packed(40, 96, 32, bits=bits, symmetric=symmetric)
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    described, *got = unpack(compressed(weights), parts)
    assert (described.layer is None) == (bits == 8 and not symmetric)
    assert torch.equal(plain(described, *got), weight)


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (40, 1))])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compressed_tensors_float8(strategy, shape, dynamic):
    scale = makers.positive(*shape).bfloat16()
    q, weight = makers.float8(40, 96, scale)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    parts = {"weight": q, "weight_scale": scale}
    if not dynamic:
        parts["input_scale"] = torch.tensor([0.25])
    described, *got = unpack(compressed(weights, activations, "float-quantized"), parts)
    wanted = {
        ("tensor", False): "FP8", ("tensor", True): "FP8_PER_CHANNEL_PER_TOKEN",
        ("channel", True): "FP8_PER_CHANNEL_PER_TOKEN",
    }.get((strategy, dynamic))  # fmt: skip
    assert (described.layer and described.layer.quant_algo) == wanted
    torch.testing.assert_close(plain(described, *got), weight)
    if wanted == "FP8":
        assert got[1]["activation_scaling_factor"].tolist() == [0.25]


@pytest.mark.parametrize("dynamic", [True, False])
def test_compressed_tensors_int8(dynamic):
    q, scale = (makers.integers(40, 96, 8) - 128).to(torch.int8), makers.positive(40, 1).bfloat16()
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    activations = {"num_bits": 8, "type": "int", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    parts = {"weight": q, "weight_scale": scale, **({} if dynamic else {"input_scale": torch.tensor(0.5)})}
    described, *got = unpack(compressed(weights, activations, "int-quantized"), parts)
    algo = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN" if dynamic else "W8A8_SQ_PER_CHANNEL"
    assert described.layer.quant_algo == algo
    torch.testing.assert_close(plain(described, *got), q.float() * scale.float())


def test_float8_blocks():
    blocks = makers.positive(2, 3).float()
    wide = blocks.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    q, weight = makers.float8(200, 300, wide)
    described, *got = unpack(FP8, {"weight": q, "weight_scale_inv": blocks})
    assert described.layer.quant_algo == "FP8_BLOCK_SCALES"
    assert got[0]["weights_scaling_factor"].shape == (200, 3)
    torch.testing.assert_close(plain(described, *got), weight)


def modelopt(algo, **more):
    return {"quant_method": "modelopt", "quant_algo": algo, "producer": {"name": "modelopt"}, **more}


def test_modelopt_int4():
    q = makers.integers(40, 96, 4) - 8
    scale = makers.positive(40, 3).float()
    pairs = (q & 15).to(torch.uint8).unflatten(0, (-1, 2))
    parts = {"weight": pairs[:, 0] | pairs[:, 1] << 4, "weight_scale": scale, "pre_quant_scale": torch.ones(96)}
    described, *got = unpack(modelopt("W4A16_AWQ", group_size=32, has_zero_point=False, pre_quant_scale=True), parts)
    assert described.shape == (40, 96)
    assert described.layer.pre_quant_scale
    torch.testing.assert_close(plain(described, *got), q.float() * scale.repeat_interleave(32, 1))


def test_modelopt_nvfp4():
    nibbles = makers.integers(40, 96, 4).to(torch.uint8)
    scale = makers.positive(40, 6).float().mul(100).to(torch.float8_e4m3fn)
    parts = {
        "weight": nibbles[:, 0::2] | nibbles[:, 1::2] << 4, "weight_scale": scale,
        "weight_scale_2": torch.tensor(0.5), "input_scale": torch.tensor(0.1),
    }  # fmt: skip
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[nibbles.long()]
    described, *got = unpack(modelopt("NVFP4", group_size=16), parts)
    assert described.layer.quant_algo == "NVFP4"
    torch.testing.assert_close(plain(described, *got), values * scale.float().repeat_interleave(16, 1) * 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({}, "unnamed"),
        ({**GPTQ, "bits": 3}, "4 and 8 bits"),
        ({**AWQ, "version": "gemv"}, "version"),
        ({**AWQ, "zero_point": False}, "zero_point"),
        ({**FP8, "weight_block_size": [64, 64]}, "weight_block_size"),
        (compressed({"num_bits": 2, "type": "int"}), "4 or 8 bits"),
        (compressed({"num_bits": 4, "type": "int"}, sparsity_config={"format": "sparse"}), "sparsity_config"),
        (modelopt("FANCY"), "quant_algo"),
        ({**GPTQ, "rotate": True}, "rotate"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(config, message):
    with pytest.raises(UnsupportedError, match=message):
        find_scheme(PATH, {"quantization_config": config})


def test_a_plain_snapshot_has_no_scheme():
    assert find_scheme(PATH, {"quantization_config": None}) is None
