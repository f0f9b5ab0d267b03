"""Graphs of every op that the native kernels compute, through native and torch engines, against the reference."""

import numpy as np
import pytest

from tests.batches import Sequences, as_torch
from tests.engines import STEPS, build_engine, runner_logits, save_checkpoint
from tests.tiny_configs import config, random_weights
from trtllm_cli import functional as F
from trtllm_cli.build.backends.cpu_native import NativeLowering
from trtllm_cli.build.passes import run_passes
from trtllm_cli.build.passes.fuse_rope_append import fuse_rope_append
from trtllm_cli.functional import trace
from trtllm_cli.kernels import reference
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import load_model_file

HEADER = """
from trtllm_cli import functional as F

def linear(x, name, out):
    return F.linear(x, F.weight(f"{name}.weight", (out, x.width), "float32"))

def vector(name, width):
    return F.weight(name, (width,), "float32")

def define(t, config, rank):
    positions = t.input("positions")
    x = F.embedding(t.input("input_ids"), F.weight("table.weight", (96, 32), "float32"))
    x = body(t, x, positions)
    x = F.gather_last(x, t.input("logits_indices"))
    return t.finish(linear(x, "lm_head", 96))
"""
BODIES = {
    "rows": """
def body(t, x, positions):
    x = F.add(x, F.embedding(positions, F.weight("positions.weight", (66, 32), "float32"), -2))
    y = F.layer_norm(x, vector("a.norm", 32), vector("a.bias", 32), 1e-5)
    y = F.act(linear(y, "fc", 48), "gelu")
    x = F.add(x, linear(y, "proj", 32))
    y = F.layer_norm(F.scale(x, 0.5), vector("b.norm", 32), None, 1e-5, num_heads=4)
    gate, up, rest = F.split(linear(y, "gate_up", 72), [24, 24, 24])
    y = F.gated_act(gate, up, "swiglu_oai")
    y = F.mul(F.add(y, rest), F.act(up, "relu"))
    y = F.softcap(F.mul(y, vector("c.norm", 24)), 3.0)
    x = F.add(x, linear(y, "down", 32))
    return F.layer_norm(x, vector("d.norm", 32), vector("d.bias", 32), 1e-5)
""",
    "experts": """
def body(t, x, positions):
    for i, activation in enumerate(("silu", "swiglu_oai")):
        y = F.rms_norm(x, vector(f"norm{i}", 32), 1e-5)
        groups = {"num_groups": 3, "top_groups": 2} if i else {}
        weights, ids = F.route(linear(y, f"router{i}", 6), 2, scoring="sigmoid" if i else "softmax",
                               renormalize=True, bias=vector(f"router{i}.bias", 6) if i else None, **groups)
        fc = F.weight(f"fc{i}.weight", (6, 40, 32), "float32")
        proj = F.weight(f"proj{i}.weight", (6, 32, 20), "float32")
        y = F.expert_linear(y, ids, fc, F.weight(f"fc{i}.bias", (6, 40), "float32") if i else None)
        x = F.add(x, F.combine(F.expert_linear(F.expert_gated_act(y, 2, activation), ids, proj), weights))
    return x
""",
    "by head": """
def body(t, x, positions):
    y = F.gather_columns(x, F.weight("order.perm", (24,), "int32"))
    up = F.head_linear(y, F.weight("up.weight", (40, 6), "float32"), 4)  # 4 * 6 -> 4 * 10
    down = F.head_linear(up, F.weight("down.weight", (40, 8), "float32"), 4, transposed=True)  # 4 * 10 -> 4 * 8
    y = F.concat(down, F.qdq(up, None, "int8"), 4)  # 4 * 18
    y = F.qdq(y, F.weight("y.scale", (1,), "float32"), "fp8")
    return F.add(x, linear(F.qdq(y, None, "fp8", 16), "proj", 32))
""",
    "unfused attention": """
def body(t, x, positions):
    # q and k are normed over their whole width, only part of a head is rotated, values have a width of their own
    rope = {"dim": 6, "base": 100.0, "layout": "gptj", "max_position_embeddings": 64}
    q, k, v = F.split(linear(x, "qkv", 4 * 10 + 2 * 10 + 2 * 12), [40, 20, 24])
    q = F.rope(F.rms_norm(q, vector("q.norm", 40), 1e-5), positions, 4, rope)
    k = F.rope(F.layer_norm(k, vector("k.norm", 20), None, 1e-5, num_heads=2), positions, 2, rope)
    sinks = F.weight("sinks", (4,), "float32")
    y = F.attention(q, k, v, layer=0, num_heads=4, num_kv_heads=2, head_dim=10, v_head_dim=12, scale=0.3, window=6,
                    softcap=2.0, sinks=sinks)
    x = F.add(x, linear(y, "o", 32))
    # rope of q only
    q, k, v = F.split(linear(x, "qkv2", 64), [32, 16, 16])
    rope = {"dim": 8, "base": 100.0, "layout": "neox", "max_position_embeddings": 64}
    y = F.attention(F.rope(q, positions, 4, rope), k, v, layer=1, num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3)
    return F.add(x, linear(y, "o2", 32))
""",
    "fused attention": """
def body(t, x, positions):
    local = {"dim": 8, "base": 100.0, "layout": "neox", "max_position_embeddings": 64}
    for i, rope in enumerate((local, {**local, "base": 1e4, "scaling": {"rope_type": "linear", "factor": 4.0}}, None)):
        q, k, v = F.split(linear(x, f"qkv{i}", 64), [32, 16, 16])
        if rope is not None:
            q = F.rms_norm(q, vector(f"q{i}.norm", 8), 1e-5, num_heads=4)
            k = F.rms_norm(k, vector(f"k{i}.norm", 8), 1e-5, num_heads=2)
            q, k = F.rope(q, positions, 4, rope), F.rope(k, positions, 2, rope)
        y = F.attention(q, k, v, layer=i, num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, softcap=2.0,
                        sinks=F.weight(f"sinks{i}", (4,), "float32"), window=None if i else 5)
        x = F.add(x, linear(y, f"o{i}", 32))
    return x
""",
}  # fmt: skip


def relative(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def reference_logits(graph, weights):
    program = Reference(graph, weights, num_slots=256, block_size=4)
    batch = Sequences()
    return [program.step(as_torch(batch.step(new)))[0].numpy() for new in STEPS]


@pytest.mark.parametrize("name", BODIES)
def test_native_and_torch_engines_compute_what_the_reference_does(tmp_path, name):
    model_file = tmp_path / "model.py"
    model_file.write_text(BODIES[name] + HEADER)
    c = config("llama")
    with trace("g") as t:
        graph = load_model_file(model_file)(t, c, c.mapping.ranks[0])
    fused = {"fused attention": 3}.get(name, 0)
    assert sum(n.op == "rope_append" for n in run_passes(graph).nodes) == fused
    weights = random_weights(graph)
    checkpoint = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    expected = reference_logits(graph, weights)
    assert all(np.isfinite(e).all() for e in expected)
    for kernels in ("native", "torch"):
        engine = build_engine(
            checkpoint, tmp_path / kernels, kernels=kernels, weight_dtype="float32", model_file=model_file
        )
        for got, want in zip(runner_logits(engine), expected, strict=True):
            assert relative(got, want) < 2e-5, kernels


def test_every_op_has_a_native_step():
    only_on_gpus = ["quantize"]  # made by a pass of the cuda backend
    assert [op for op in reference.OPS if not hasattr(NativeLowering, f"_{op}")] == only_on_gpus


@pytest.mark.parametrize("name", BODIES)
def test_every_pass_keeps_the_numbers(tmp_path, name):
    model_file = tmp_path / "model.py"
    model_file.write_text(BODIES[name] + HEADER)
    c = config("llama")
    with trace("g") as t:
        graph = load_model_file(model_file)(t, c, c.mapping.ranks[0])
    weights = random_weights(graph)
    for got, want in zip(reference_logits(run_passes(graph), weights), reference_logits(graph, weights), strict=True):
        assert relative(got, want) < 1e-5


def test_what_else_reads_between_the_projection_and_attention_keeps_it_apart():
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 16), "float32"))
        q, k, v = F.split(x, [8, 4, 4])
        y = F.attention(q, k, v, layer=0, num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5)
        graph = t.finish(F.add(y, q))
    assert fuse_rope_append(graph) == graph
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 12), "float32"))
        k, q, v = F.split(x, [4, 4, 4])
        graph = t.finish(F.attention(q, k, v, layer=0, num_heads=1, num_kv_heads=1, head_dim=4, scale=0.5))
    assert fuse_rope_append(graph) == graph


def test_a_residual_sum_and_its_layer_norm_become_one_node():
    from trtllm_cli.build.passes.fuse_add_norm import fuse_add_norm

    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        x = F.add(x, F.act(x, "silu"))
        y = F.layer_norm(x, F.weight("norm", (8,), "float32"), F.weight("bias", (8,), "float32"), 1e-5)
        graph = fuse_add_norm(t.finish(F.add(x, y)))
    assert [n.op for n in graph.nodes] == ["embedding", "act", "add_layer_norm", "add"]
    assert graph.nodes[2].inputs.keys() == {"x", "residual", "weight", "bias"}
