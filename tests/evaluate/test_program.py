"""The program over whole sequences computes what the reference computes step by step."""

import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.convert.helpers import read_checkpoint
from tests.tiny_configs import VARIANTS, config, random_weights
from tests.tiny_models import FAMILIES, save_tiny_model
from trtllm_cli import functional as F
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.convert.shard import cut
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.whole_model import join, program_of
from trtllm_cli.functional import trace
from trtllm_cli.graph import Weight
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.mapping import Mapping
from trtllm_cli.models import trace_model

LENGTH = 23


def ids_of(vocab_size, batch=3, length=LENGTH):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def relative(got, want):
    return float((got - want).norm() / want.norm())


@torch.inference_mode()
def reference_logits(graph, weights, ids):
    """[batch, length, vocab], all sequences in one step."""
    program = Reference(graph, weights, num_slots=256, block_size=4)
    step = Sequences().step(dict(enumerate(ids.tolist())), all_logits=True)
    return program.step(as_torch(step))[0].unflatten(0, ids.shape)


@torch.inference_mode()
def check(graph, weights, vocab_size):
    ids = ids_of(vocab_size)
    program = Program(graph, weights.__getitem__)
    want = reference_logits(graph, weights, ids)
    assert relative(program(ids), want) < 1e-5
    hidden = program.hidden(ids[:1])
    assert relative(program.head(hidden[:, 3:9]), want[:1, 3:9]) < 1e-5
    return program


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    save_tiny_model(tmp_path / "snapshot", family)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions())
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    (weights,) = read_checkpoint(checkpoint)
    graph = trace_model(checkpoint.config, checkpoint.config.mapping.ranks[0])
    program = check(graph, weights, checkpoint.config.vocab_size)
    assert sorted(program.layer_outputs) == list(range(checkpoint.config.num_hidden_layers))
    ids = ids_of(checkpoint.config.vocab_size)
    with torch.inference_mode():
        assert relative(program_of(checkpoint)(ids), program(ids)) < 1e-5
        assert relative(program_of(checkpoint, torch.bfloat16)(ids), program(ids)) < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    c = config(variant)
    graph = trace_model(c, c.mapping.ranks[0])
    check(graph, random_weights(graph), c.vocab_size)


ALGOS = {
    "W8A16": {}, "W4A16": {"group_size": 16}, "W4A16_AWQ": {"group_size": 16, "pre_quant_scale": True},
    "W4A16_GPTQ": {"group_size": 16, "has_zero_point": True, "act_order": True}, "FP8": {}, "NVFP4": {},
    "FP8_PER_CHANNEL_PER_TOKEN": {}, "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": {"pre_quant_scale": True},
}  # fmt: skip


def stored_weights(graph, seed=0):
    """Random bytes for what is quantized, sensible scales."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(graph, seed)
    for name, w in graph.weights.items():
        dtype = getattr(torch, w.dtype)
        if name.endswith("perm"):
            weights[name] = torch.randperm(w.shape[0], generator=generator).int()
        elif w.dtype in ("int8", "uint8"):
            low, high = (-127, 128) if w.dtype == "int8" else (0, 256)
            weights[name] = torch.randint(low, high, w.shape, generator=generator).to(dtype)
        elif "scal" in name or name.endswith("zero"):
            weights[name] = (0.005 + 0.01 * torch.rand(w.shape, generator=generator)).to(dtype)
            if "prequant" in name:
                weights[name] += 1
            if name.endswith("zero"):
                weights[name] += 7
            if w.dtype == "float8_e4m3fn":
                weights[name] = torch.ones(w.shape).to(dtype)
        else:
            weights[name] = weights[name].to(dtype)
    return weights


@pytest.mark.parametrize("algo", ALGOS)
def test_quantized_linears(algo):
    c = config("biases", quantization={"quant_algo": algo, **ALGOS[algo]})
    graph = trace_model(c, c.mapping.ranks[0])
    program = check(graph, stored_weights(graph), c.vocab_size)
    assert isinstance(program.linears["transformer.layers.1.mlp.proj"], torch.nn.Linear)


def decoder_graph(**attention):
    """One attention layer written by hand, with what no family may have yet."""
    with trace("hand") as t:
        x = F.embedding(t.input("input_ids"), F.weight("transformer.vocab_embedding.weight", (50, 24), "float32"))
        q = F.linear(x, F.weight("transformer.layers.0.q.weight", (32, 24), "float32"))
        k = F.linear(x, F.weight("transformer.layers.0.k.weight", (16, 24), "float32"))
        v = F.linear(x, F.weight("transformer.layers.0.v.weight", (12, 24), "float32"))
        more = {}
        if attention.pop("with_sinks", False):
            more["sinks"] = F.weight("transformer.layers.0.sinks", (4,), "float32")
        if "kv_quant" in attention:
            more["kv_scale"] = F.weight("transformer.layers.0.kv_scale", (2,), "float32")
        y = F.attention(
            q, k, v, layer=0, num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=6, scale=0.3, **attention, **more
        )
        y = F.linear(y, F.weight("transformer.layers.0.dense.weight", (24, 24), "float32"))
        x = F.gather_last(F.add(x, y), t.input("logits_indices"))
        head = F.weight("lm_head.weight", (50, 24), "float32")
        return t.finish(F.softcap(F.linear(x, head, out_dtype="float32"), 3.0))


@pytest.mark.parametrize(
    "attention",
    [
        {}, {"window": 5}, {"softcap": 2.0}, {"softcap": 2.0, "window": 4}, {"with_sinks": True},
        {"with_sinks": True, "window": 3}, {"kv_quant": "fp8"}, {"kv_quant": "int8", "window": 7},
    ],
    ids=str,
)  # fmt: skip
def test_attention(attention):
    graph = decoder_graph(**attention)
    weights = random_weights(graph)
    if "kv_quant" in attention:
        weights["transformer.layers.0.kv_scale"] = torch.tensor([0.02, 0.03])
    check(graph, weights, 50)


def expert_graph():
    """Experts as Mixtral has them, and a linear by heads."""
    with trace("experts") as t:
        x = F.embedding(t.input("input_ids"), F.weight("transformer.vocab_embedding.weight", (50, 24), "float32"))
        x = F.head_linear(x, F.weight("transformer.layers.0.by_head", (24, 8), "float32"), 3)
        name = "transformer.layers.0.mlp"
        logits = F.linear(x, F.weight(f"{name}.router.weight", (5, 24), "float32"))
        weights, ids = F.route(logits, 2, scoring="softmax", renormalize=True)
        h = F.expert_linear(x, ids, F.weight(f"{name}.fc.weight", (5, 20, 24), "float32"))
        h = F.expert_gated_act(h, 2, "silu")
        w = F.weight(f"{name}.proj.weight", (5, 24, 10), "int8")
        scale = F.weight(f"{name}.proj.per_channel_scale", (5, 24), "float32")
        h = F.expert_linear(h, ids, w, F.weight(f"{name}.proj.bias", (5, 24), "float32"), scale=scale, quant="int8")
        x = F.gather_last(F.add(x, F.combine(h, weights)), t.input("logits_indices"))
        return t.finish(F.linear(x, F.weight("lm_head.weight", (50, 24), "float32"), out_dtype="float32"))


def test_experts():
    graph = expert_graph()
    program = check(graph, stored_weights(graph), 50)
    assert list(program.expert_linears) == ["transformer.layers.0.mlp.fc", "transformer.layers.0.mlp.proj"]
    assert list(program.linears) == ["transformer.layers.0.mlp.router", "lm_head"]
    assert program.layer_outputs == {0: program.graph.nodes[-3].output}
    ids = ids_of(50)
    wide = Program(graph, stored_weights(graph).__getitem__, torch.bfloat16)
    with torch.inference_mode():
        assert relative(wide(ids), program(ids)) < 0.1


def test_modules_are_named_as_in_the_checkpoint_and_may_be_replaced():
    c = config("tied")
    graph = trace_model(c, c.mapping.ranks[0])
    program = Program(graph, random_weights(graph).__getitem__)
    names = [name for name, module in program.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(names) == sorted(program.linears)
    assert {"lm_head", "transformer.layers.2.attention.qkv", "transformer.layers.0.mlp.fc"} <= set(names)
    table = program.get_buffer("transformer.vocab_embedding.weight")
    assert program.linears["lm_head"].weight.data_ptr() == table.data_ptr()
    with torch.inference_mode():
        before = program(ids_of(c.vocab_size))
        program.get_submodule("transformer.layers.1.mlp").proj = torch.nn.Linear(48, 32)
        assert relative(program(ids_of(c.vocab_size)), before) > 1e-2


def test_outputs_are_told_as_they_are_made():
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    program = Program(graph, random_weights(graph).__getitem__)
    seen = {}
    ids = ids_of(c.vocab_size)
    hidden = program.hidden(ids, seen.__setitem__)
    assert list(program.layer_outputs) == [0, 1, 2]
    last = seen[program.layer_outputs[2]]
    assert torch.equal(last.unflatten(0, ids.shape), hidden)
    producers = graph.producers()
    assert all(producers[name].op == "add" for name in program.layer_outputs.values())


@pytest.mark.parametrize("algo", [None, "W8A16"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 2), (1, 3)])
def test_ranks_are_put_back_together(tp, pp, algo, tmp_path):
    save_tiny_model(tmp_path / "snapshot", "qwen2", num_key_value_heads=2, tokenizer=False)
    options = {"qformat": "int8_wo"} if algo else {}
    convert(tmp_path / "snapshot", tmp_path / "one", ConvertOptions(**options))
    convert(tmp_path / "snapshot", tmp_path / "many", ConvertOptions(tp_size=tp, pp_size=pp, **options))
    one, many = (Checkpoint.open(tmp_path / name) for name in ("one", "many"))
    assert many.config.mapping.world_size == tp * pp
    ids = ids_of(one.config.vocab_size)
    with torch.inference_mode():
        want, got = program_of(one)(ids), program_of(many)(ids)
    # with ranks, fewer inputs share an int8 scale
    assert relative(got, want) < (3e-2 if algo else 1e-6)


@pytest.mark.parametrize("options", [{}, {"qformat": "fp8_pc_pt"}])
def test_experts_are_put_back_together(options, tmp_path):
    """Those that only some ranks hold, and those that several ranks share; a scale for each output is cut alike."""
    save_tiny_model(tmp_path / "snapshot", "gpt_oss", tokenizer=False, num_local_experts=6)
    convert(tmp_path / "snapshot", tmp_path / "one", ConvertOptions(**options))
    convert(tmp_path / "snapshot", tmp_path / "many", ConvertOptions(tp_size=4, pp_size=3, moe_ep_size=2, **options))
    one, many = (program_of(Checkpoint.open(tmp_path / name)) for name in ("one", "many"))
    whole = dict(many.named_parameters())
    for name, parameter in one.named_parameters():
        if ".mlp." in name:
            assert torch.equal(whole[name], parameter), name
    ids = ids_of(one.vocab_size)
    with torch.inference_mode():
        assert relative(many(ids), one(ids)) < 1e-6


SHARDS = {
    "rows": (8, 6), "columns": (8, 6), "qkv": (4 * 8 + 2 * 2 * 8, 6), "expert_rows": (3, 8, 6),
    "expert_columns": (3, 8, 4), "expert_halves": (3, 8, 4),
    "experts": (3, 6),
}  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS)
def test_join_undoes_split(shard):
    c = config("llama").model_copy(update={"mapping": Mapping.of(2)})
    whole = torch.randn(SHARDS[shard])
    dim = {"columns": 1, "expert_rows": 1, "expert_columns": 2, "expert_halves": 1, "experts": None}.get(shard, 0)
    shape = tuple(n // 2 if i == dim else n for i, n in enumerate(whole.shape))
    rows, parts = whole.flatten(0, -2), []
    for rank in c.mapping.ranks:
        pieces = cut(Weight("float32", shape, ("w",), shard), len(rows), c, rank).pieces(rows, 0)
        parts.append(torch.cat([piece for _, piece in pieces]).view(shape))
    assert torch.equal(join("w", parts, shard, c), whole)


def test_ranks_that_differ_where_they_must_not_are_refused():
    with pytest.raises(UnsupportedError, match="different `x.activation_scaling_factor`"):
        join("x.activation_scaling_factor", [torch.ones(1), torch.zeros(1)], None, config("llama"))


def test_a_graph_of_one_rank_of_several_is_refused():
    c = config("llama").model_copy(update={"mapping": Mapping.of(2)})
    graph = trace_model(c, c.mapping.ranks[0])
    with pytest.raises(UnsupportedError, match="one of several ranks"):
        Program(graph, random_weights(graph).__getitem__)
