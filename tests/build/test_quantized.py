"""Checkpoints in every format of models/stored.py: native and torch engines compute what the reference does."""

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import STEPS, build_engine, runner_logits, save_checkpoint
from tests.tiny_configs import config, random_weights
from trtllm_cli import functional as F
from trtllm_cli.build.passes.fuse_gate_up import fuse_gate_up
from trtllm_cli.errors import UsageError
from trtllm_cli.functional import trace
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import load_model_file

# A layer of every kind that can be quantized; stored.declare says what each is made of.
MODEL = """
from trtllm_cli import functional as F
from trtllm_cli.models.layers import Linear
from trtllm_cli.models.stored import declare

def define(t, config, rank):
    x = F.embedding(t.input("input_ids"), F.weight("table.weight", (96, 64), "float32"))
    gate, up = (Linear(config, rank, f"transformer.layers.0.mlp.{n}", 64, 96, bias=True) for n in ("fc", "gate"))
    y = F.gated_act(gate(x), up(x), "silu")
    x = F.add(x, Linear(config, rank, "transformer.layers.0.mlp.proj", 96, 64)(y))
    x = F.rms_norm(x, F.weight("norm.weight", (64,), "float32"), 1e-5)
    if EXPERTS:
        weights, ids = F.route(F.linear(x, F.weight("router.weight", (5, 64), "float32")), 2, scoring="softmax",
                               renormalize=True)
        fc = declare(config, rank, "transformer.layers.1.mlp.experts.fc", 64, 64, None, experts=5)
        proj = declare(config, rank, "transformer.layers.1.mlp.experts.proj", 64, 32, None, experts=5)
        y = F.expert_linear(fc.prepare(x), ids, fc.weight, **fc.op_args)
        y = F.expert_gated_act(y, 2, "silu")
        y = F.expert_linear(proj.prepare(y, 32), ids, proj.weight, **proj.op_args)
        x = F.add(x, F.combine(y, weights))
    x = F.gather_last(x, t.input("logits_indices"))
    return t.finish(F.linear(x, F.weight("lm_head.weight", (96, 64), "float32")))
"""
GROUPS = {"group_size": 32}
ALGORITHMS = {
    "W8A16": {},
    "W8A16 groups": {"per_group": True, **GROUPS},
    "W8A16_GPTQ": {"has_zero_point": True, **GROUPS},
    "W4A16": {"has_zero_point": True, **GROUPS},
    "W4A16 symmetric": GROUPS,
    "W4A16_GPTQ": {"act_order": True, "has_zero_point": True, **GROUPS},
    "W4A16_AWQ": {"pre_quant_scale": True, "has_zero_point": True, **GROUPS},
    "W4A8_AWQ": {"pre_quant_scale": True, **GROUPS},
    "FP8": {},
    "FP8_PER_CHANNEL_PER_TOKEN": {},
    "FP8_BLOCK_SCALES": {},
    "W8A8_SQ_PER_CHANNEL": {},
    "W8A8_SQ_PER_TENSOR_PLUGIN": {},
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {"pre_quant_scale": True},
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": {},
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": {},
    "NVFP4": {},
}
NO_EXPERTS = {"W4A16_GPTQ", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"}  # numbers for each input


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def checkpoint(tmp_path, quantization, experts, model=MODEL):
    """A random checkpoint, its graph and weights, and the model's file."""
    model_file = tmp_path / "model.py"
    model_file.write_text(f"EXPERTS = {experts}\n{model}")
    c = config("llama", quantization=quantization)
    with trace("g") as t:
        graph = load_model_file(model_file)(t, c, c.mapping.ranks[0])
    weights = random_weights(graph)
    return save_checkpoint(tmp_path / "ckpt", c, graph, weights), graph, weights, model_file


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(tmp_path, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")  # torch keeps all in float32
    quantization = {"quant_algo": name.split(" ")[0], **ALGORITHMS[name]}
    ckpt, graph, weights, model_file = checkpoint(tmp_path, quantization, name not in NO_EXPERTS)
    program, batch = Reference(graph, weights, num_slots=256, block_size=4), Sequences()
    expected = [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]
    assert all(np.isfinite(e).all() for e in expected)
    for kernels in ("native", "torch"):
        engine = build_engine(ckpt, tmp_path / kernels, kernels=kernels, model_file=model_file)
        assert engine.config.build_config.weight_dtype == "float32"
        assert engine.config.notes.get("fp4", "").endswith("stored as bfloat16") == (name == "NVFP4")
        # Scales become float16, and an activation that is rounded may fall on the other side of a tie.
        for got, want in zip(runner_logits(engine), expected, strict=True):
            assert relative(got, want) < 5e-3, kernels
    assert build_engine(ckpt, tmp_path / "auto", kernels="auto", model_file=model_file).config.notes["linears_ms"]


def test_layers_that_differ(tmp_path):
    layers = {
        "transformer.layers.0.mlp.fc": {"quant_algo": "FP8"},
        "transformer.layers.0.mlp.gate": {"quant_algo": "W4A16_AWQ", **GROUPS},
        "transformer.layers.1.mlp.experts.proj": {"quant_algo": "NVFP4"},
    }
    quantization = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    ckpt, graph, weights, model_file = checkpoint(tmp_path, quantization, True)
    program, batch = Reference(graph, weights, num_slots=256, block_size=4), Sequences()
    expected = [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]
    engine = build_engine(ckpt, tmp_path / "engine", model_file=model_file)
    for got, want in zip(runner_logits(engine), expected, strict=True):
        assert relative(got, want) < 5e-3
    with pytest.raises(UsageError, match="quantized already"):
        build_engine(ckpt, tmp_path / "int8", model_file=model_file, weight_dtype="int8")


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8", "int4"])
def test_plain_experts_are_quantized_by_the_build_one_after_another(tmp_path, weight_dtype):
    ckpt, graph, weights, model_file = checkpoint(tmp_path, {}, True)
    program, batch = Reference(graph, weights, num_slots=256, block_size=4), Sequences()
    expected = [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]
    for kernels in ("native", "torch"):
        engine = build_engine(
            ckpt, tmp_path / kernels, kernels=kernels, model_file=model_file, weight_dtype=weight_dtype
        )
        for got, want in zip(runner_logits(engine), expected, strict=True):
            assert relative(got, want) < {"bfloat16": 1e-2, "int8": 2e-2, "int4": 0.35}[weight_dtype]


def test_a_token_of_experts_has_the_same_bits_in_any_batch(tmp_path):
    ckpt, _, _, model_file = checkpoint(tmp_path, {"quant_algo": "FP8_BLOCK_SCALES"}, True)
    engine = build_engine(ckpt, tmp_path / "engine", model_file=model_file)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    alone = runner_logits(engine, [{0: prompt}, {0: [7]}], num_threads=1)
    crowded = runner_logits(engine, [{0: prompt[:4], 1: [2] * 9}, {2: [1] * 20, 0: prompt[4:]}, {1: [5], 0: [7]}])
    assert np.array_equal(alone[0][0], crowded[1][1])
    assert np.array_equal(alone[1][0], crowded[2][1])


def test_linears_with_one_scale_each_are_not_merged():
    def graph(scale_rows):
        with trace("g") as t:
            x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
            gate, up = (
                F.linear(
                    x, F.weight(f"m.{n}.weight", (8, 8), "int8"), quant="int8",
                    scale=F.weight(f"m.{n}.scale", (scale_rows,), "float32"),
                )
                for n in ("a", "b")
            )  # fmt: skip
            return t.finish(F.gated_act(gate, up, "silu"))

    assert fuse_gate_up(graph(1)) == graph(1)
    merged = fuse_gate_up(graph(8))
    assert [n.op for n in merged.nodes] == ["embedding", "linear", "gated_act"]
    assert torch.Size(merged.weights["m.a.scale+b"].shape) == (16,)


def test_groups_of_int8(tmp_path):
    """64 unless --group-size says otherwise; 0 is a scale for each output."""
    ckpt, _, _, model_file = checkpoint(tmp_path, {}, False)
    sizes = []
    for i, asked in enumerate((None, 32, 0)):
        engine = build_engine(ckpt, tmp_path / str(i), model_file=model_file, weight_dtype="int8", group_size=asked)
        sizes.append(engine.config.build_config.group_size)
        assert all(np.isfinite(x).all() for x in runner_logits(engine))
    assert sizes == [64, 32, None]


def test_logits_in_another_dtype_are_noted(tmp_path):
    from trtllm_cli.build.builder import BuildOptions, resolve

    notes: list[str] = []
    resolve(config("llama", logits_dtype="float16"), BuildOptions(), notes)
    assert any("logits are float32" in note for note in notes)
