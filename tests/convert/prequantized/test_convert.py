"""Whole snapshots that are quantized already: what convert keeps, and that the model computes with those weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.batches import Sequences, as_torch
from tests.convert.prequantized import makers
from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import SnapshotError, UnsupportedError, UsageError
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model

PROMPT = [257, 72, 101, 108, 108, 111, 44, 32]
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gptq(act_order, symmetric=True):
    def make(out_features, in_features, seed, name):
        # q, k and v see the same inputs, and so have the same order
        order = {"q_proj": 1, "k_proj": 1, "v_proj": 1}.get(name, seed)
        torch.manual_seed(order)
        g_idx = torch.arange(in_features) // 32
        parts, weight = makers.gptq(
            out_features, in_features, 32, symmetric=symmetric, seed=seed,
            g_idx=g_idx[torch.randperm(in_features)] if act_order else g_idx,
        )  # fmt: skip
        return parts, weight

    return make, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": symmetric, "desc_act": act_order}


def awq():
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return lambda out, inp, seed, name: makers.awq(out, inp, 32, seed=seed), config


def packed():
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return lambda out, inp, seed, name: makers.packed(out, inp, 32, seed=seed), {**config, "ignore": ["lm_head"]}


def float8(static):
    def make(out, inp, seed, name):
        scale = torch.tensor(0.0001 * (1 + seed % 3))  # q, k and v have scales of their own
        q, weight = makers.float8(out, inp, scale, seed)
        parts = {"weight": q, "weight_scale": scale}
        return (parts | {"input_scale": torch.tensor(0.01 * (1 + seed % 2))} if static else parts), weight

    return make, {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}


FORMATS = {
    "gptq": gptq(False), "gptq-act-order": gptq(True), "gptq-zeros": gptq(False, symmetric=False), "awq": awq(),
    "pack-quantized": packed(), "fp8": float8(True), "fp8-dynamic": float8(False),
}  # fmt: skip
WEIGHT_ONLY = ("gptq", "gptq-act-order", "gptq-zeros", "awq", "pack-quantized")


def save_pair(tmp_path, name):
    """A quantized snapshot, and the plain one of the same numbers."""
    make, quantization = FORMATS[name]
    save_tiny_model(tmp_path / "plain", "llama", **SHAPE)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    quantized = {}
    for i, (key, tensor) in enumerate(list(plain.items())):
        module = key.removesuffix(".weight")
        if module.rpartition(".")[2] not in LINEARS:
            quantized[key] = tensor
            continue
        parts, weight = make(*tensor.shape, i, module.rpartition(".")[2])
        plain[key] = weight.contiguous()
        quantized |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "quantized").mkdir()
    save_file(quantized, tmp_path / "quantized" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "quantized" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def tensors(path, rank=0):
    checkpoint = Checkpoint.open(path)
    with checkpoint.tensors(checkpoint.config.mapping.ranks[rank]) as file:
        return checkpoint.config, {
            n: torch.frombuffer(file.read(n), dtype=getattr(torch, i.dtype)).view(i.shape)
            for n, i in file.tensors.items()
        }


@torch.inference_mode()
def logits(path):
    config, weights = tensors(path)
    program = Reference(trace_model(config, config.mapping.ranks[0]), weights, num_slots=256, block_size=4)
    return program.step(as_torch(Sequences().step({0: PROMPT}, all_logits=True)))[0]


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_kept_and_the_model_computes_with_them(tmp_path, name):
    save_pair(tmp_path, name)
    convert(tmp_path / "plain", tmp_path / "expected", ConvertOptions())
    report = convert(tmp_path / "quantized", tmp_path / "kept", ConvertOptions())
    assert not any("made plain" in note for note in report.notes)
    assert sum(report.rank_bytes) < 0.6 * (tmp_path / "expected" / "rank0.safetensors").stat().st_size
    tolerance = 1e-5 if name in WEIGHT_ONLY else 0.08  # fp8 rounds the activations too
    got, want = logits(tmp_path / "kept"), logits(tmp_path / "expected")
    assert float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized(tmp_path, name):
    save_pair(tmp_path, name)
    convert(tmp_path / "plain", tmp_path / "expected", ConvertOptions())
    convert(tmp_path / "quantized", tmp_path / "made-plain", ConvertOptions(dequantize=True))
    _, want = tensors(tmp_path / "expected")
    _, got = tensors(tmp_path / "made-plain")
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-7)


def test_ranks_share_what_they_can_and_the_rest_is_made_plain_with_a_word(tmp_path):
    save_pair(tmp_path, "gptq-act-order")
    report = convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions(tp_size=2))
    (note,) = [n for n in report.notes if "made plain" in n]
    assert "act_order" in note
    assert "mlp.proj" in note
    config, first = tensors(tmp_path / "ckpt")
    assert first["transformer.layers.0.attention.qkv.weight"].dtype == torch.uint8
    assert first["transformer.layers.0.mlp.proj.weight"].dtype == torch.float32
    assert config.quantization.layer_quant("transformer.layers.0.mlp.proj") is None


def test_a_scale_of_its_own_for_each_of_q_k_and_v(tmp_path):
    save_pair(tmp_path, "fp8")
    report = convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions())
    assert any("brought to the largest" in note for note in report.notes)
    _, got = tensors(tmp_path / "ckpt")
    assert got["transformer.layers.0.attention.qkv.weights_scaling_factor"].shape == (1,)


def test_a_kv_caches_scales_come_along(tmp_path):
    save_pair(tmp_path, "fp8")
    path = tmp_path / "quantized"
    weights = load_file(path / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(0.5 + layer)
        weights[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(0.25)
    save_file(weights, path / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": scheme}
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
        "kv_cache_scheme": scheme, "ignore": ["lm_head"],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    convert(path, tmp_path / "ckpt", ConvertOptions())
    config, got = tensors(tmp_path / "ckpt")
    assert config.quantization.kv_cache_quant_algo == "FP8"
    assert got["transformer.layers.1.attention.kv_cache_scaling_factor"].tolist() == [1.5, 0.25]


def test_quantizing_again_is_refused(tmp_path):
    save_pair(tmp_path, "awq")
    with pytest.raises(UsageError, match="quantized already"):
        convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions(qformat="int8_wo"))
    convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions(qformat="int8_wo", dequantize=True))
    assert tensors(tmp_path / "ckpt")[0].quantization.quant_algo == "W8A16"


def test_bitsandbytes_is_refused_before_anything_is_written(tmp_path):
    save_pair(tmp_path, "awq")
    path = tmp_path / "quantized" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedError, match="bitsandbytes") as e:
        convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions())
    assert "--qformat" in str(e.value)
    assert not (tmp_path / "ckpt").exists()


def test_a_missing_part_is_named(tmp_path):
    save_pair(tmp_path, "gptq")
    path = tmp_path / "quantized" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.scales"]
    save_file(weights, path)
    with pytest.raises(SnapshotError, match=r"layers\.1\.mlp\.up_proj\.qweight` has no scales"):
        convert(tmp_path / "quantized", tmp_path / "ckpt", ConvertOptions())
