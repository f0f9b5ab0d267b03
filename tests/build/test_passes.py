"""Each pass keeps the numbers; and does what it is for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.tiny_configs import VARIANTS, config, random_weights
from trtllm_cli import functional as F
from trtllm_cli.build.passes import CUDA_PASSES, PASSES, run_passes
from trtllm_cli.build.passes.drop_dead import drop_dead
from trtllm_cli.build.passes.fuse_add_norm import fuse_add_norm
from trtllm_cli.build.passes.fuse_gate_up import fuse_gate_up
from trtllm_cli.build.passes.gather_early import gather_early
from trtllm_cli.build.passes.join_rounded_halves import join_rounded_halves
from trtllm_cli.build.passes.plan_buffers import plan_buffers
from trtllm_cli.functional import trace
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model


def outputs(graph, weights):
    """Logits of a ragged batch in three steps: prefill, a chunk with a decode, and decodes."""
    program = Reference(graph, weights, num_slots=256, block_size=4)
    batch = Sequences()
    steps = [{0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]}, {0: [11], 1: [5, 4, 3, 2, 1, 7]}, {1: [3], 0: [4]}]
    return [program.step(as_torch(batch.step(new, all_logits=True)))[0] for new in steps]


def check_outputs(graph, weights, expected):
    for got, want in zip(outputs(graph, weights), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pass_keeps_the_numbers(variant):
    c = config(variant)
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    expected = outputs(graph, weights)
    assert all(e.isfinite().all() for e in expected)
    for rewrite in PASSES:
        graph = rewrite(graph)
        graph.check()
        check_outputs(graph, weights, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_is_seven_nodes_after_all_passes(variant):
    c = config(variant)
    ops = Counter(n.op for n in run_passes(trace_model(c, c.mapping.ranks[0])).nodes)
    layers = c.num_hidden_layers
    assert ops == {
        "embedding": 1, "rms_norm": 1, "linear": 4 * layers + 1, "rope_append": layers, "paged_attention": layers,
        "add_rms_norm": 2 * layers, "gated_act": layers, "gather_last": 2,
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_chosen_in_front_of_the_last_attention(variant):
    c = config(variant)
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    expected = outputs(graph, weights)
    early = run_passes(graph, CUDA_PASSES)
    ops = [node.op for node in early.nodes]
    gathers = [i for i, op in enumerate(ops) if op == "gather_last"]
    attention = max(i for i, op in enumerate(ops) if op in ("attention", "paged_attention"))
    assert len(gathers) > 1
    assert max(gathers) < attention
    assert early.nodes[attention].inputs["rows"] == "logits_indices"
    behind = [early.tensors[name].shape[0] for node in early.nodes[attention:] for name in node.outputs]
    assert set(behind) == {"num_logits"}
    appends = [node for node in early.nodes[attention:] if node.op in ("linear", "expert_linear")]
    assert len(appends) > 2  # the layer's and the head's
    check_outputs(early, weights, expected)


def test_some_rows_are_enough():
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    step = as_torch(Sequences().step({0: [1, 2, 3, 4, 5], 1: [9], 2: [7, 8]}))
    programs = [Reference(g, weights, num_slots=256, block_size=4) for g in (graph, gather_early(graph))]
    want, got = (program.step(step)[0] for program in programs)
    assert got.shape == (3, c.vocab_size)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_are_not_chosen_early_where_one_sum_over_ranks_would_be_left_out():
    def traced(sums):
        with trace("g") as t:
            x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
            y = F.linear(x, F.weight("w", (8, 8), "float32"))
            for _ in range(sums):
                y = F.all_reduce(y, (0, 1))
            return t.finish(F.gather_last(F.add(x, y), t.input("logits_indices")))

    odd, even = traced(1), traced(2)
    assert gather_early(odd) == odd
    assert [node.op for node in gather_early(even).nodes] == [
        "embedding", "gather_last", "linear", "all_reduce", "all_reduce", "add"
    ]  # fmt: skip


def test_inputs_of_fp8_linears_on_both_sides_stay_quantized():
    """A norm that the whole qkv and the chosen rows' MLP read."""
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        h = F.qdq(x, F.weight("scale", (1,), "float32"), "fp8")
        F.send(F.linear(h, F.weight("w1", (8, 8), "float32")), 1)
        y = F.linear(h, F.weight("w2", (8, 8), "float32"))
        graph = gather_early(t.finish(F.gather_last(F.add(x, y), t.input("logits_indices"))))
    assert [node.op for node in graph.nodes] == ["embedding", "qdq", "linear", "send", "gather_last", "qdq", "linear",
                                                 "add"]  # fmt: skip


def test_linears_that_are_read_twice_are_not_merged():
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        gate, up = (F.linear(x, F.weight(f"m.{n}.weight", (8, 8), "float32")) for n in ("a", "b"))
        graph = t.finish(F.add(F.gated_act(gate, up, "silu"), gate))
    assert fuse_gate_up(graph) == graph


def test_a_bias_is_no_residual():
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        x = F.add(x, F.weight("bias", (8,), "float32"))
        graph = t.finish(F.rms_norm(x, F.weight("norm", (8,), "float32"), 1e-5))
    assert fuse_add_norm(graph) == graph


def test_dead_nodes_and_their_weights_go():
    with trace("g") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        F.linear(x, F.weight("unused", (8, 8), "float32"))
        graph = drop_dead(t.finish(x))
    assert [n.op for n in graph.nodes] == ["embedding"]
    assert graph.weights.keys() == {"table"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_buffer_is_written_while_something_in_it_is_still_to_be_read(variant):
    c = config(variant)
    for graph in (trace_model(c, c.mapping.ranks[0]), run_passes(trace_model(c, c.mapping.ranks[0]))):
        plan = plan_buffers(graph)
        holds: dict[int, str] = {}
        for node in graph.nodes:
            for name in node.inputs.values():
                if name in graph.tensors:
                    assert holds[plan.of[name]] == name, (
                        f"{node.op} reads {name}, overwritten by {holds[plan.of[name]]}"
                    )
            operands = {plan.of[n] for n in node.inputs.values() if n in graph.tensors}
            for name in node.outputs:
                kind, buffer = graph.tensors[name], plan.buffers[plan.of[name]]
                assert buffer.rows == kind.shape[0]
                assert buffer.width >= kind.shape[-1]
                if plan.of[name] in operands:  # in place: only what reads each element before it writes it
                    assert node.op in ("add", "add_rms_norm", "gated_act", "rope")
                holds[plan.of[name]] = name
        for name in graph.outputs:
            assert holds[plan.of[name]] == name
        assert len(plan.buffers) <= 8


@pytest.mark.parametrize("algo", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_passes_for_fp8_on_a_gpu_keep_the_numbers(algo):
    c = config("llama", quantization={"quant_algo": algo})
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    for name in [n for n in weights if n.endswith("mlp.gate.activation_scaling_factor")]:
        weights[name] = weights[name.replace("mlp.gate", "mlp.fc")]  # both see the same input
    expected = outputs(graph, weights)
    for rewrite in CUDA_PASSES:
        graph = rewrite(graph)
        graph.check()
        check_outputs(graph, weights, expected)
    ops = Counter(n.op for n in graph.nodes)
    assert ops["qdq"] == 0
    assert ops["linear"] == 4 * c.num_hidden_layers + 1  # gate and up are one
    quantizing = [n.op for n in graph.nodes if n.attrs.get("out_quant")]
    # By token, attention's heads are in several programs: none of them sees the whole row.
    assert quantizing.count("quantize") == (0 if algo == "FP8" else c.num_hidden_layers)
    assert all("x_scale" in n.inputs for n in graph.nodes if n.op == "linear" and n.attrs.get("quant"))


def test_gate_and_up_that_read_another_input_stay_two():
    c = config("llama", quantization={"quant_algo": "FP8"})
    graph = trace_model(c, c.mapping.ranks[0])
    first = next(n for n in graph.nodes if n.op == "gated_act")
    up = graph.producers()[first.inputs["up"]]
    rounded = graph.producers()[up.inputs["x"]]
    nodes = [replace(n, inputs={**n.inputs, "x": graph.nodes[0].output}) if n is rounded else n for n in graph.nodes]
    changed = replace(graph, nodes=tuple(nodes))
    joined = sum("+" in name for name in join_rounded_halves(changed).weights)
    assert joined == sum("+" in name for name in join_rounded_halves(graph).weights) - 3
