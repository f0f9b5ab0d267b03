"""KV caches in 8 bits, in native and torch engines, against the reference."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import STEPS, build_engine, runner_logits, save_checkpoint
from tests.tiny_configs import config, random_weights
from trtllm_cli.build.builder import BuildOptions, plan_build, resolve
from trtllm_cli.build.passes import run_passes
from trtllm_cli.build.passes.quantize_kv_cache import quantize_kv_cache
from trtllm_cli.errors import CheckpointError, UnsupportedError, UsageError
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model
from trtllm_cli.run.backends import load_runner
from trtllm_cli.run.communicator import SingleRank

KERNELS = ("native", "torch")
OPTIONS = {"weight_dtype": "float32"}


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def reference_logits(graph, weights):
    program = Reference(graph, weights, num_slots=256, block_size=4)
    batch = Sequences()
    return [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]


def quantized_model(algo, variant="qwen3"):
    """A model whose largest keys and values are a little more than the cache holds."""
    c = config(variant, quantization={"kv_cache_quant_algo": algo})
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    most = 448.0 if algo == "FP8" else 127.0
    for i in range(c.num_hidden_layers):
        name = f"transformer.layers.{i}.attention.kv_cache_scaling_factor"
        weights[name] = torch.tensor([2.0, 1.5 + i]) / most
    return c, graph, weights


@pytest.mark.parametrize("algo", ["FP8", "INT8"])
def test_logits_equal_the_references(tmp_path, algo):
    c, graph, weights = quantized_model(algo)
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    expected = reference_logits(graph, weights)
    plain = config("qwen3")
    whole = reference_logits(trace_model(plain, c.mapping.ranks[0]), weights)
    for kernels in KERNELS:
        engine = build_engine(checkpoint, tmp_path / kernels, kernels=kernels, **OPTIONS)
        assert engine.config.build_config.kv_cache_dtype == algo.lower()
        for got, want, unrounded in zip(runner_logits(engine), expected, whole, strict=True):
            # A key's rounding may fall the other way where its rotation differs in the last bit.
            assert relative(got, want) < 0.2 * relative(want, unrounded)


@pytest.mark.parametrize("algo", ["FP8", "INT8"])
def test_passes_keep_the_numbers(algo):
    _, graph, weights = quantized_model(algo)
    rewritten = run_passes(graph)
    joint = [n for n in rewritten.nodes if n.op == "rope_append"]
    assert len(joint) == 3
    assert all("kv_scale" in n.inputs and n.attrs["kv_quant"] == algo.lower() for n in joint)
    for got, want in zip(reference_logits(rewritten, weights), reference_logits(graph, weights), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_scale_is_for_keys_and_values(tmp_path, kernels):
    """TensorRT-LLM's checkpoints."""
    c, graph, weights = quantized_model("FP8", "llama")
    weights |= {name: torch.tensor([0.01]) for name in weights if name.endswith("kv_cache_scaling_factor")}
    short = {
        name: dataclasses.replace(w, shape=(1,)) if name.endswith("kv_cache_scaling_factor") else w
        for name, w in graph.weights.items()
    }
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, dataclasses.replace(graph, weights=short), weights)
    engine = build_engine(checkpoint, tmp_path / "engine", kernels=kernels, **OPTIONS)
    both = weights | {name: w.expand(2) for name, w in weights.items() if name.endswith("kv_cache_scaling_factor")}
    for got, want in zip(runner_logits(engine), reference_logits(graph, both), strict=True):
        assert relative(got, want) < 1e-2


@pytest.mark.parametrize("kernels", KERNELS)
def test_fp8_without_scales_has_scale_one(tmp_path, kernels):
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    options = BuildOptions(max_seq_len=64, weight_dtype="float32", kv_cache_dtype="fp8", kernels=kernels)
    assert any("scale 1" in note for note in plan_build(checkpoint, options).notes)
    engine = build_engine(checkpoint, tmp_path / "engine", kernels=kernels, kv_cache_dtype="fp8", **OPTIONS)
    expected = reference_logits(quantize_kv_cache(graph, "fp8"), weights)
    for got, want in zip(runner_logits(engine), expected, strict=True):
        assert relative(got, want) < 1e-2


def test_the_cache_takes_a_quarter_of_float32s_memory(tmp_path):
    c, graph, weights = quantized_model("INT8", "llama")
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    plain = config("llama")
    bare = trace_model(plain, c.mapping.ranks[0])
    other = save_checkpoint(tmp_path / "plain", plain, bare, weights)
    for kernels in KERNELS:
        small = build_engine(checkpoint, tmp_path / f"{kernels}-int8", kernels=kernels, **OPTIONS)
        large = build_engine(other, tmp_path / f"{kernels}-float32", kernels=kernels, **OPTIONS)
        runners = [load_runner(e, c.mapping.ranks[0], SingleRank(), num_threads=1) for e in (small, large)]
        assert 4 * runners[0].bytes_per_block == runners[1].bytes_per_block
        for runner in runners:
            runner.close()


def test_a_row_of_logits_is_the_same_bits_in_any_batch(tmp_path):
    for algo in ("FP8", "INT8"):
        c, graph, weights = quantized_model(algo)
        checkpoint = save_checkpoint(tmp_path / algo, c, graph, weights)
        engine = build_engine(checkpoint, tmp_path / f"{algo}-engine", **OPTIONS)
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
        alone = runner_logits(engine, [{0: prompt}, {0: [7]}], num_threads=1)
        crowded = runner_logits(
            engine, [{0: prompt[:4], 1: [2] * 9}, {2: [1] * 20, 0: prompt[4:]}, {1: [5], 0: [7], 2: [8]}]
        )
        assert np.array_equal(alone[0][0], crowded[1][1])
        assert np.array_equal(alone[1][0], crowded[2][1])


def test_what_contradicts_the_checkpoint_is_refused():
    c = config("llama", quantization={"kv_cache_quant_algo": "INT8"})
    assert resolve(c, BuildOptions(kv_cache_dtype="int8"), []).kv_cache_dtype == "int8"
    with pytest.raises(UsageError, match=r"is int8 .*INT8.*, not bfloat16") as e:
        resolve(c, BuildOptions(kv_cache_dtype="bfloat16"), [])
    assert "--kv-cache-dtype" in str(e.value)


def test_int8_needs_scales():
    with pytest.raises(UsageError, match="needs scales") as e:
        resolve(config("llama"), BuildOptions(kv_cache_dtype="int8"), [])
    assert "quantize with --kv-cache-dtype int8" in str(e.value)


def test_nvfp4_is_refused_by_name():
    c = config("llama", quantization={"kv_cache_quant_algo": "NVFP4"})
    with pytest.raises(UnsupportedError, match="NVFP4"):
        resolve(c, BuildOptions(), [])
    with pytest.raises(UnsupportedError, match="NVFP4"):
        trace_model(c, c.mapping.ranks[0])


def test_a_checkpoint_without_the_scales_that_it_announces(tmp_path):
    c, _, weights = quantized_model("FP8", "llama")
    bare = trace_model(config("llama"), c.mapping.ranks[0])
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, bare, weights)
    with pytest.raises(CheckpointError, match="kv_cache_scaling_factor` is missing"):
        plan_build(checkpoint, BuildOptions(max_seq_len=64))


def test_a_model_file_that_quantizes_by_itself_is_refused():
    """Its cache would not be what the engine's config says."""
    _, graph, _ = quantized_model("FP8", "llama")
    with pytest.raises(UnsupportedError, match="layer 0 in fp8, its checkpoint does not"):
        quantize_kv_cache(graph, None)
    assert quantize_kv_cache(graph, "fp8") == graph
