"""Checkpoints as ModelOpt writes them, for TensorRT-LLM: they open in our layout, and build as they are."""

import json

import numpy as np
import pytest
import torch

from tests.tiny_models import save_tiny_model
from trtllm_cli.build.builder import BuildOptions, build
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import CheckpointError
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.model_config import ModelConfig, RopeScaling
from trtllm_cli.tensor_file import TensorFile, TensorFileWriter, TensorInfo

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def plain(tmp_path):
    """A plain checkpoint's directory, config and tensors."""
    save_tiny_model(tmp_path / "snapshot", "llama", dtype=torch.bfloat16, num_key_value_heads=2, **SHAPE)
    convert(tmp_path / "snapshot", tmp_path / "plain", ConvertOptions())
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    with TensorFile(tmp_path / "plain" / "rank0.safetensors") as file:
        tensors = {
            n: torch.frombuffer(file.read(n), dtype=getattr(torch, i.dtype)).view(i.shape)
            for n, i in file.tensors.items()
        }
    return config, tensors


def write(path, config, tensors, quantization):
    """A checkpoint of another producer."""
    path.mkdir()
    extra = {
        "producer": {"name": "modelopt", "version": "0.47.0"}, "rank": 0, "lm_head_bias": False,
        "rotary_pct": 1.0, "decoder": "llama", "rmsnorm": True,
        "bias": False, "residual_mlp": False, "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1},
        "quantization": {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **quantization},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, **extra}))
    infos = {n: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    with TensorFileWriter(path / "rank0.safetensors", infos, {}) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return path


def linears(tensors):
    return [n.removesuffix(".weight") for n in tensors if n.endswith(".weight") and ".layers." in n and "norm" not in n]


def opened(path):
    checkpoint = Checkpoint.open(path)
    with checkpoint.tensors(checkpoint.config.mapping.ranks[0]) as file:
        return checkpoint, {
            n: torch.frombuffer(file.read(n), dtype=getattr(torch, i.dtype)).view(i.shape)
            for n, i in file.tensors.items()
        }


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ"])
def test_int4(tmp_path, plain, algo):
    config, tensors = plain
    expected = {}
    for module in linears(tensors):
        weight = tensors.pop(f"{module}.weight").float()
        scale = weight.unflatten(1, (-1, 32)).abs().amax(2) / 7
        q = (weight / scale.repeat_interleave(32, 1)).round().clamp(-8, 7).to(torch.int8)
        expected[module] = q.float() * scale.repeat_interleave(32, 1)
        pairs = (q & 15).unflatten(0, (-1, 2))
        tensors[f"{module}.weight"] = (pairs[:, 0] | pairs[:, 1] << 4).to(torch.int8)
        tensors[f"{module}.weights_scaling_factor"] = scale
        tensors[f"{module}.prequant_scaling_factor"] = torch.full((weight.shape[1],), 0.5, dtype=torch.bfloat16)
        if algo == "W4A8_AWQ":
            tensors[f"{module}.activation_scaling_factor"] = torch.tensor([0.01])
            tensors[f"{module}.weights_scaling_factor_2"] = torch.tensor([0.001])
    quantization = {"quant_algo": algo, "group_size": 32, "has_zero_point": False, "pre_quant_scale": True}
    path = write(tmp_path / "ckpt", config, tensors, quantization)
    _, ours = opened(path)
    for module, weight in expected.items():
        got = dequantize(ours[f"{module}.weight"], "int4", ours[f"{module}.weights_scaling_factor"], group_size=32)
        assert torch.equal(got, weight)
        assert ours[f"{module}.prequant_scaling_factor"].dtype == torch.float32
        assert f"{module}.weights_scaling_factor_2" not in ours
    build(path, tmp_path / "engine", BuildOptions(kernels="torch"))


def test_smoothquant_whose_config_does_not_say_that_activations_are_scaled(tmp_path, plain):
    config, tensors = plain
    for module in linears(tensors):
        weight = tensors.pop(f"{module}.weight").float()
        scale = weight.abs().amax(1) / 127
        tensors[f"{module}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
        tensors[f"{module}.weights_scaling_factor"] = scale
        tensors[f"{module}.activation_scaling_factor"] = torch.tensor([0.02])
        tensors[f"{module}.prequant_scaling_factor"] = torch.ones(weight.shape[1], dtype=torch.bfloat16)
    path = write(tmp_path / "ckpt", config, tensors, {"quant_algo": "W8A8_SQ_PER_CHANNEL"})
    assert opened(path)[0].config.quantization.pre_quant_scale
    build(path, tmp_path / "engine", BuildOptions(kernels="torch"))


def test_int8_weight_only_has_its_scales_under_another_name(tmp_path, plain):
    config, tensors = plain
    for module in linears(tensors):
        weight = tensors.pop(f"{module}.weight").float()
        scale = weight.abs().amax(1) / 127
        tensors[f"{module}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
        tensors[f"{module}.weights_scaling_factor"] = scale
    path = write(tmp_path / "ckpt", config, tensors, {"quant_algo": "W8A16"})
    _, ours = opened(path)
    for module in linears(ours):
        assert torch.equal(ours[f"{module}.per_channel_scale"], tensors[f"{module}.weights_scaling_factor"])
    build(path, tmp_path / "engine", BuildOptions(kernels="torch"))


def test_scalars_without_dimensions_and_fp8_blocks(tmp_path, plain):
    config, tensors = plain
    for module in linears(tensors):
        weight = tensors.pop(f"{module}.weight").float()
        blocks = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
        tensors[f"{module}.weight"] = weight.to(torch.float8_e4m3fn)
        tensors[f"{module}.weights_scaling_factor"] = torch.arange(1.0, 1 + blocks[0] * blocks[1]).view(
            blocks[0], 1, blocks[1], 1
        )
    path = write(tmp_path / "ckpt", config, tensors, {"quant_algo": "fp8_pb_wo"})
    _, ours = opened(path)
    scale = ours["transformer.layers.0.attention.qkv.weights_scaling_factor"]  # [128, 64]: one block
    assert torch.equal(scale, torch.ones(128, 1))
    assert np.prod(ours["transformer.layers.0.mlp.proj.weights_scaling_factor"].shape) == 64


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path, plain):
    config, tensors = plain
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"`transformer.ln_f.weight` is float32 \[3\]"):
        build(write(tmp_path / "ckpt", config, tensors, {}), tmp_path / "engine", BuildOptions(kernels="torch"))


MIXTRAL = {
    "architecture": "MixtralForCausalLM", "dtype": "bfloat16", "vocab_size": 8, "hidden_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "silu", "intermediate_size": 24,
}  # fmt: skip


def test_tensorrt_llms_mixture_of_experts():
    moe = {"num_experts": 8, "top_k": 2, "normalization_mode": 1, "sparse_mixer_epsilon": 0.01, "tp_mode": 0}
    config = ModelConfig.model_validate({**MIXTRAL, "moe": moe})
    assert (config.moe.num_experts, config.moe.intermediate_size, config.moe.renormalize) == (8, 24, True)
    assert ModelConfig.model_validate({**MIXTRAL, "moe": {"num_experts": 0, "top_k": 0}}).moe is None
    with pytest.raises(ValueError, match=r"moe.tp_mode"):
        ModelConfig.model_validate({**MIXTRAL, "moe": {**moe, "tp_mode": 9}})


def test_the_old_name_of_a_rope_type():
    scaling = RopeScaling.model_validate({"type": "linear", "factor": 2.0})
    assert scaling.rope_type == "linear"
    with pytest.raises(ValueError, match="type"):
        RopeScaling.model_validate({"type": "linear", "rope_type": "yarn", "factor": 2.0})
