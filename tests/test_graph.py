"""Graphs: text, JSON, checks, pictures."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tests.tiny_configs import VARIANTS, config
from trtllm_cli import functional as F
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.functional import trace
from trtllm_cli.graph import Graph, TensorType
from trtllm_cli.graph_drawing import draw
from trtllm_cli.mapping import Mapping
from trtllm_cli.models import load_model_file, trace_model

SMALL = """\
graph small(
    input_ids: int32[num_tokens]
    positions: int32[num_tokens]
    slot_mapping: int32[num_tokens]
    block_tables: int32[num_seqs, max_blocks]
    query_start: int32[num_seqs + 1]
    seq_lens: int32[num_seqs]
    logits_indices: int32[num_logits]
):
    %t0: float32[num_tokens, 8] = embedding(ids=input_ids, weight=@table, vocab_start=0)
    %t1: float32[num_tokens, 8] = rms_norm(x=%t0, weight=@norm, eps=1e-05)
    %t2: float32[num_tokens, 8] = add(x=%t0, y=%t1)
    %t3: float32[num_logits, 8] = gather_last(x=%t2, indices=logits_indices)
    return %t3"""


def small():
    with trace("small") as t:
        x = F.embedding(t.input("input_ids"), F.weight("table", (10, 8), "float32"))
        x = F.add(x, F.rms_norm(x, F.weight("norm", (8,), "float32"), 1e-5))
        return t.finish(F.gather_last(x, t.input("logits_indices")))


def test_a_graph_prints_as_text():
    assert str(small()) == SMALL


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "mapping", [Mapping(), Mapping.of(tp_size=2), Mapping.of(pp_size=2)], ids=["one", "tp2", "pp2"]
)
def test_graphs_round_trip_through_json(variant, mapping):
    c = config(variant, mapping=mapping, share_embedding_table=False)
    for rank in mapping.ranks:
        graph = trace_model(c, rank)
        assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


def test_check_finds_what_is_read_before_it_is_made():
    graph = small()
    with pytest.raises(AssertionError, match="read before it is made"):
        replace(graph, nodes=graph.nodes[::-1]).check()
    with pytest.raises(AssertionError, match="made twice"):
        replace(graph, nodes=graph.nodes + graph.nodes[:1]).check()


def test_an_op_outside_a_trace_is_an_error():
    with pytest.raises(LookupError):
        F.add(F.Tensor("a", TensorType("float32", (1,))), F.Tensor("b", TensorType("float32", (1,))))


def test_only_the_first_stage_embeds_and_only_the_last_gives_logits():
    c = config("llama", mapping=Mapping.of(pp_size=3))
    ops = [[n.op for n in trace_model(c, rank).nodes] for rank in c.mapping.ranks]
    assert [("embedding" in o, "gather_last" in o) for o in ops] == [(True, False), (False, False), (False, True)]
    assert [(o[0] == "recv", o[-1] == "send") for o in ops] == [(False, True), (True, True), (True, False)]


def test_an_unknown_architecture_is_named():
    c = config("llama").model_copy(update={"architecture": "GrokForCausalLM"})
    with pytest.raises(UnsupportedError, match="GrokForCausalLM"):
        trace_model(c, c.mapping.ranks[0])


def test_a_model_file_from_outside(tmp_path):
    (tmp_path / "mine.py").write_text("from trtllm_cli.models.llama import define\n")
    c = config("llama").model_copy(update={"architecture": "Mine"})
    assert trace_model(c, c.mapping.ranks[0], load_model_file(tmp_path / "mine.py")).nodes
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match="no function `define"):
        load_model_file(tmp_path / "empty.py")
    with pytest.raises(UsageError, match="no such file"):
        load_model_file(tmp_path / "nothing.py")


def test_the_drawing_is_svg_with_a_box_for_every_node_of_one_layer():
    graph = trace_model(config("qwen3"), config("qwen3").mapping.ranks[0])
    picture = ET.fromstring(draw(graph))
    text = "".join(picture.itertext())
    assert "one layer of 3" in text
    boxes = [e for e in picture if e.tag.endswith("rect") and e.get("height") == "40"]
    per_layer = sum(n.inputs.get("weight", "").startswith("transformer.layers.0.") for n in graph.nodes)
    assert len(graph.nodes) > len(boxes) > per_layer
