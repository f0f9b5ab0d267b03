"""The cpu backend's two ways, native and torch, against the reference on the same weights."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import STEPS, build_engine, runner_logits, save_checkpoint
from tests.tiny_configs import VARIANTS, config, random_weights
from trtllm_cli.engine import Engine, program_digest
from trtllm_cli.errors import EngineError
from trtllm_cli.kernels.cpu import compiler
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.quantization import quantize_int4, quantize_int8
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model

WEIGHT_DTYPES = ("float32", "bfloat16", "int8", "int4")
# Largest relative error of the logits: float32 differs in the order of sums only; the others also round the KV cache
# to bfloat16, and torch's kernels round activations too.
TOLERANCE = {
    ("native", "float32"): 2e-5, ("native", "bfloat16"): 8e-3, ("native", "int8"): 8e-3, ("native", "int4"): 8e-3,
    ("torch", "float32"): 2e-5, ("torch", "bfloat16"): 3e-2, ("torch", "int8"): 3e-2, ("torch", "int4"): 3e-2,
}  # fmt: skip


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def stored(weights, graph, weight_dtype):
    """The weights as the engine's kernels see them: rounded or quantized, and back in float32."""
    out = {}
    for name, w in weights.items():
        is_vector = w.ndim == 1
        is_table = name == "transformer.vocab_embedding.weight"
        if weight_dtype == "float32" or is_vector:
            out[name] = w
        elif is_table or weight_dtype == "bfloat16":
            out[name] = w.bfloat16().float()
        else:
            is_head = name == "lm_head.weight"
            fmt = LinearFormat("int4", 16) if weight_dtype == "int4" and not is_head else LinearFormat("int8", 64)
            out[name] = fmt.dequantize(fmt.quantize(w), w.shape[1])
    return out


def reference_logits(graph, weights):
    program = Reference(graph, weights, num_slots=256, block_size=4)
    batch = Sequences()
    return [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]


@functools.cache
def model(variant):
    c = config(variant)
    graph = trace_model(c, c.mapping.ranks[0])
    return c, graph, random_weights(graph)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("variant", ["llama", "biases", "qwen2", "qwen3", "gptj-rope"])
def test_logits_equal_the_references(tmp_path, variant, kernels, weight_dtype):
    c, graph, weights = model(variant)
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    options = {"group_size": 16} if weight_dtype == "int4" else {}
    engine = build_engine(ckpt, tmp_path / "engine", kernels=kernels, weight_dtype=weight_dtype, **options)
    expected = reference_logits(graph, stored(weights, graph, weight_dtype))
    for got, want in zip(runner_logits(engine), expected, strict=True):
        assert relative(got, want) < TOLERANCE[kernels, weight_dtype]


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"llama", "biases", "qwen2", "qwen3", "gptj-rope"}))
def test_native_float32_equals_the_reference(tmp_path, variant):
    c, graph, weights = model(variant)
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    engine = build_engine(ckpt, tmp_path / "engine", kernels="native", weight_dtype="float32")
    for got, want in zip(runner_logits(engine), reference_logits(graph, weights), strict=True):
        assert relative(got, want) < TOLERANCE["native", "float32"]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("algo", ["W8A16", "W4A16"])
def test_a_quantized_checkpoint_is_kept_as_it_is(tmp_path, algo, kernels):
    """Its values reach the kernels unchanged, zero points that are no levels included."""
    q = {"quant_algo": algo, "group_size": 16, "has_zero_point": algo == "W4A16", "exclude_modules": ["lm_head"]}
    c = config("llama", quantization=q)
    graph = trace_model(c, c.mapping.ranks[0])
    plain = random_weights(trace_model(config("llama"), c.mapping.ranks[0]))
    weights = {}
    for name in plain:
        module = name.removesuffix(".weight")
        if f"{module}.per_channel_scale" in graph.weights:
            weights[name], weights[f"{module}.per_channel_scale"] = quantize_int8(plain[name])
        elif f"{module}.zero" in graph.weights:
            parts = quantize_int4(plain[name], 16)
            weights[name], weights[f"{module}.weights_scaling_factor"], weights[f"{module}.zero"] = parts
        else:
            weights[name] = plain[name]
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    engine = build_engine(ckpt, tmp_path / "engine", kernels=kernels)
    assert engine.config.build_config.weight_dtype == "float32"  # of the head, which is left plain
    for got, want in zip(runner_logits(engine), reference_logits(graph, weights), strict=True):
        assert relative(got, want) < (3e-3 if kernels == "native" else 3e-2)  # scales become float16


def test_a_row_of_logits_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(tmp_path):
    c, graph, weights = model("qwen3")
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    for weight_dtype in WEIGHT_DTYPES:
        engine = build_engine(ckpt, tmp_path / weight_dtype, kernels="native", weight_dtype=weight_dtype)
        prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
        alone = runner_logits(engine, [{0: prompt}, {0: [7]}], num_threads=1)
        crowded = runner_logits(
            engine, [{0: prompt[:4], 1: [2] * 9}, {2: [1] * 20, 0: prompt[4:]}, {1: [5], 0: [7], 2: [8]}]
        )
        assert np.array_equal(alone[0][0], crowded[1][1])
        assert np.array_equal(alone[1][0], crowded[2][1])


def test_copied_blocks_hold_the_same(tmp_path):
    from trtllm_cli.run.backends import load_runner
    from trtllm_cli.run.communicator import SingleRank

    c, graph, weights = model("llama")
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    for kernels in ("native", "torch"):
        engine = build_engine(ckpt, tmp_path / kernels, kernels=kernels)
        runner = load_runner(engine, c.mapping.ranks[0], SingleRank())
        runner.allocate_kv_cache(64)
        batch = Sequences()
        runner.forward(batch.step({0: [1, 2, 3, 4, 5, 6]}))
        batch.tokens.append(list(batch.tokens[0]))
        batch.blocks.append([int(batch._free.pop()) for _ in batch.blocks[0]])
        runner.copy_blocks(list(zip(batch.blocks[0], batch.blocks[1], strict=True)))
        logits = runner.forward(batch.step({0: [7], 1: [7]}))
        assert np.array_equal(logits[0], logits[1]), kernels
        runner.close()


def test_an_engine_for_another_processor_says_what_it_needs(tmp_path):
    from trtllm_cli.run.backends import load_runner
    from trtllm_cli.run.communicator import SingleRank

    c, graph, weights = model("llama")
    engine = build_engine(save_checkpoint(tmp_path / "ckpt", c, graph, weights), tmp_path / "engine", kernels="native")
    for target, message in (
        ({"arch": "riscv64"}, "compiled for riscv64, this machine is"),
        ({"features": "avx2 avx9000"}, "this one has no .*avx9000"),
    ):
        changed = engine.config.model_copy(update={"target": engine.config.target | target})
        other = dataclasses.replace(engine, config=changed)
        with pytest.raises(EngineError, match=message) as e:
            load_runner(other, c.mapping.ranks[0], SingleRank())
        assert "trtllm build" in str(e.value)


def test_a_plan_that_names_no_tensor_is_refused(tmp_path):
    """An engine put together by hand from two builds."""
    from trtllm_cli.tensor_file import TensorFile, TensorFileWriter

    c, graph, weights = model("llama")
    engine = build_engine(save_checkpoint(tmp_path / "ckpt", c, graph, weights), tmp_path / "engine", kernels="native")
    path = tmp_path / "engine" / "rank0.engine"
    with TensorFile(path) as f:
        plan = json.loads(f.metadata["plan"])
        plan["steps"][1]["args"]["weight"] = "w:nothing"
        keep = {n: i for n, i in f.tensors.items() if not n.startswith("__pad")}
        with TensorFileWriter(tmp_path / "new", keep, f.metadata | {"plan": json.dumps(plan)}, alignment=64) as out:
            for name in keep:
                out.write(name, f.read(name))
    (tmp_path / "new").replace(path)
    with TensorFile(path) as f:
        changed = {"size": path.stat().st_size, "program_sha256": program_digest(f)}
    entry = engine.config.rank_files[0].model_copy(update=changed)
    engine = dataclasses.replace(engine, config=engine.config.model_copy(update={"rank_files": [entry]}))
    with pytest.raises(EngineError, match="has no tensor `nothing`"):
        runner_logits(engine)


def test_no_compiler_falls_back_to_torch_and_says_so_when_native_is_asked_for(tmp_path, monkeypatch):
    from trtllm_cli.errors import ResourceError

    c, graph, weights = model("llama")
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    engine = build_engine(ckpt, tmp_path / "engine", kernels="auto")
    assert engine.config.target["kernels"] == "torch"
    assert "no C++ compiler" in engine.config.notes["kernels"]
    assert all(np.isfinite(x).all() for x in runner_logits(Engine.open(tmp_path / "engine")))
    with pytest.raises(ResourceError, match="compiler"):
        build_engine(ckpt, tmp_path / "native", kernels="native")
    assert not (tmp_path / "native").exists()


def test_torch_is_not_imported_to_run_a_native_engine(tmp_path):
    import subprocess
    import sys

    c, graph, weights = model("llama")
    engine = build_engine(save_checkpoint(tmp_path / "ckpt", c, graph, weights), tmp_path / "engine", kernels="native")
    code = (
        "import sys; from pathlib import Path\n"
        "from trtllm_cli import LLM, SamplingParams\n"
        "with LLM(Path(sys.argv[1])) as llm: print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4)))\n"
        "heavy = {'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(engine.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_float32_native_and_torch_give_the_same_text(tmp_path):
    c, graph, weights = model("tied")
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    picks = []
    for kernels in ("native", "torch"):
        engine = build_engine(ckpt, tmp_path / kernels, kernels=kernels, weight_dtype="float32")
        picks.append([x.argmax(-1).tolist() for x in runner_logits(engine)])
    assert picks[0] == picks[1]
    assert torch.get_default_dtype() == torch.float32
