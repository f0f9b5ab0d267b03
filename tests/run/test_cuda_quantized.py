"""Every quantized format on the cuda backend, in Triton's interpreter, against the reference on the same weights."""

import contextlib

import numpy as np
import pytest

from tests.batches import Sequences, as_torch
from tests.build.test_quantized import ALGORITHMS, MODEL, NO_EXPERTS, checkpoint
from tests.engines import build_engine, runner_logits
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda, cuda_experts, cuda_linears, cuda_tactics
from trtllm_cli.build.backends.cuda_linears import Tactic, adapted
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.communicator import SingleRank

# Nine tokens of two experts of five each: pairs sorted into blocks. Two: each pair by itself.
# FP8 has steps of a sixteenth, and what is bfloat16 before falls on the other side of some: the reference itself, with
# its activations in bfloat16, differs by 5e-2. So too, by less, with the activations of int8.
TOLERANCE = {"FP8": 7e-2, "FP8_PER_CHANNEL_PER_TOKEN": 7e-2, "FP8_BLOCK_SCALES": 7e-2} | {
    name: 5e-2 for name in ALGORITHMS if name.startswith("W8A8")
}
STEPS = [{0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]}, {1: [3], 0: [4]}]


WAYS = cuda_tactics.LinearTactics.ways


@pytest.fixture(autouse=True)
def few_kernels(monkeypatch):
    """Nothing is compiled, and torch multiplies, as for many tokens: linears of few have tests of their own."""
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", lambda self, shape: [])


def made(tmp_path, quantization, experts=True, model=MODEL, **options):
    """An engine, its graph, and its weights as GPUs keep them: plain ones in bfloat16."""
    ckpt, graph, weights, model_file = checkpoint(tmp_path, quantization, experts, model)
    engine = build_engine(
        ckpt, tmp_path / "engine", backend="cuda", kernels="auto", model_file=model_file, tokens_per_block=16, **options
    )
    for name, weight in weights.items():
        if weight.is_floating_point() and name.endswith(("weight", "bias")) and weight.itemsize == 4:
            weights[name] = weight.bfloat16().float()
    return engine, graph, weights


def worst(engine, graph, weights):
    """The largest relative error of a step's logits."""
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], InterpreterDevice(), SingleRank())
    runner.allocate_kv_cache(8)
    reference, batch, found = Reference(graph, weights, num_slots=128, block_size=16), Sequences(block_size=16), []
    for new in STEPS:
        inputs = batch.step(new)
        got, want = runner.forward(inputs), reference.step(as_torch(inputs))[0].numpy()
        found.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    runner.close()
    return max(found)


def kernels_of(engine):
    with contextlib.closing(engine.tensors(engine.config.pretrained_config.mapping.ranks[0])) as file:
        plan = engine.plan(file)
    return [(k["source"]["function"], dict(map(tuple, k["source"]["constants"]))) for k in plan["kernels"]]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(tmp_path, name):
    quantization = {"quant_algo": name.split(" ")[0], **ALGORITHMS[name]}
    assert worst(*made(tmp_path, quantization, name not in NO_EXPERTS)) < TOLERANCE.get(name, 2e-2)


@pytest.mark.parametrize(
    ("name", "quant", "x_scales"),
    [("FP8", "fp8", "one"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8", "row"), ("FP8_BLOCK_SCALES", "fp8", "none"),
     ("W8A8_SQ_PER_CHANNEL", "int8", "none"), ("W4A16", "int4", "none"), ("NVFP4", "none", "none")],
)  # fmt: skip
def test_what_experts_are_multiplied_in(tmp_path, name, quant, x_scales):
    engine, _, _ = made(tmp_path, {"quant_algo": name, **ALGORITHMS[name]})
    found = {(c["QUANT"], c["X_SCALES"]) for function, c in kernels_of(engine) if function.startswith("expert_linear")}
    assert found == {(quant, x_scales)}


@pytest.mark.parametrize(("name", "by_one"), [("FP8", 4096), ("W4A16", 0), ("FP8_PER_CHANNEL_PER_TOKEN", 0)])
def test_blocks_of_many_tokens(tmp_path, monkeypatch, name, by_one):
    """As of steps of thousands of tokens, sorted by one program and by many."""
    monkeypatch.setattr(cuda_experts, "_FEW", 1)
    monkeypatch.setattr(cuda_experts, "_SORTED_BY_ONE", by_one)
    engine, graph, weights = made(tmp_path, {"quant_algo": name, **ALGORITHMS[name]})
    assert worst(engine, graph, weights) < TOLERANCE.get(name, 2e-2)
    functions = {function for function, _ in kernels_of(engine)}
    assert {"sort_pairs", "place_pairs"} & functions == {"sort_pairs" if by_one else "place_pairs"}


@pytest.mark.parametrize("few", [False, True])
def test_fp8_with_scales_of_groups(tmp_path, monkeypatch, few):
    """Layers of whole groups of 128 inputs, which are multiplied in FP8; those of 64 above become bfloat16."""
    if few:
        monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", WAYS)
    model = MODEL.replace("64", "256").replace("96", "384").replace("(384, 256)", "(96, 256)")  # the vocabulary
    engine, graph, weights = made(tmp_path, {"quant_algo": "FP8_BLOCK_SCALES"}, False, model)
    assert worst(engine, graph, weights) < TOLERANCE["FP8_BLOCK_SCALES"]
    found = [(function, c.get("W_SCALE")) for function, c in kernels_of(engine)]
    assert ("skinny_linear", "group") in found
    quantized = {(function, c["QUANT"]) for function, c in kernels_of(engine) if "QUANT" in c}
    assert quantized >= {("quantize", "group"), ("gated_act", "group")}
    assert "qdq" not in {function for function, _ in found}


@pytest.mark.parametrize(
    ("name", "options", "tactic", "activations"),
    [
        ("", {}, Tactic("stream", (4, 2, 2, 1, 4)), {"", "silu"}),
        ("FP8", {}, Tactic("stream", (4, 2, 2, 1, 4)), {""}),  # gate and up have inputs of their own
        ("FP8_PER_CHANNEL_PER_TOKEN", {}, Tactic("stream", (8, 1, 2, 2, 4)), {""}),
        ("W4A16", {"group_size": 64}, Tactic("words", (8, 2, 1, 4)), {"", "silu"}),
        ("W4A16", {"group_size": 32}, Tactic("wide", (16, 1, 2, 1, 2, 4)), {"", "silu"}),
    ],
)
def test_streamed_weights_in_a_plan(tmp_path, monkeypatch, name, options, tactic, activations):
    def ways(self, shape):
        streamed = adapted(shape, tactic)
        return [(64, streamed)] if streamed else []

    monkeypatch.setattr(cuda_linears, "_FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", ways)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "others", lambda self, shape, most: None)
    model = MODEL.replace("64", "512").replace("96", "512").replace("(512, 512)", "(96, 512)")  # the vocabulary
    engine, graph, weights = made(tmp_path, {"quant_algo": name, **options} if name else {}, False, model)
    assert worst(engine, graph, weights) < TOLERANCE.get(name, 2e-2)
    streamed = [c for function, c in kernels_of(engine) if function in ("stream_linear", "stream_words", "wide_words")]
    assert {c["GATED"] for c in streamed} == activations
    assert {c["HAS_BIAS"] for c in streamed} == {True, False}


def test_norms_write_groups_of_inputs(tmp_path):
    """A whole model, against the same engine for the CPU; sums of two ranks are checked with their norms elsewhere."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 2}
    save_tiny_model(tmp_path / "snapshot", "llama", **sizes)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(dtype="bfloat16", qformat="fp8_block"))
    engines = {
        backend: build_engine(tmp_path / "ckpt", tmp_path / backend, backend=backend, tokens_per_block=16)
        for backend in ("cpu", "cuda")
    }
    found = kernels_of(engines["cuda"])
    assert {c["QUANT"] for function, c in found if function == "rms_norm"} == {"group", "none"}
    assert all(c["W_SCALE"] == "group" for function, c in found if function == "skinny_linear")
    rank = engines["cuda"].config.pretrained_config.mapping.ranks[0]
    runner = CudaRunner(engines["cuda"], rank, InterpreterDevice(), SingleRank())
    runner.allocate_kv_cache(64)
    batch, expected = Sequences(block_size=16), runner_logits(engines["cpu"], STEPS)
    for new, want in zip(STEPS, expected, strict=True):
        got = runner.forward(batch.step(new))
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE["FP8_BLOCK_SCALES"]
    runner.close()


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int8", "int4"])
def test_plain_weights_that_the_build_quantizes(tmp_path, weight_dtype):
    engine, graph, weights = made(tmp_path, {}, weight_dtype=weight_dtype)
    assert worst(engine, graph, weights) < {"bfloat16": 1e-2, "int8": 2e-2, "int4": 0.35}[weight_dtype]


def test_a_gpu_without_fp8_says_so(tmp_path):
    with pytest.raises(UnsupportedError, match="sm_80 has no FP8"):
        made(tmp_path, {"quant_algo": "FP8"}, arch="sm_80")
    (tmp_path / "int8").mkdir()
    assert made(tmp_path / "int8", {"quant_algo": "W8A16"}, arch="sm_80")
