"""Two models compared layer by layer; the layer that is at fault is found."""

import dataclasses
import io
import json
import math
import sys

import pytest
import torch
from rich.console import Console

from tests.evaluate.test_program import expert_graph, stored_weights
from tests.tiny_configs import config, random_weights
from trtllm_cli.errors import AccuracyError, ResourceError
from trtllm_cli.evaluate.accuracy import AccuracyReport, LinearError, compare
from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.report import draw, tables, title, to_json
from trtllm_cli.evaluate.scoring import Divergence, Score
from trtllm_cli.evaluate.text import Window
from trtllm_cli.kernels.quantization import quantize_int8
from trtllm_cli.models import trace_model

BAD = "transformer.layers.1.mlp.proj"


def windows_of(vocab_size, count=2, length=90):
    ids = torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(3))
    return [Window(tuple(row)) for row in ids.tolist()]


def reference():
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    return c, weights, Program(graph, weights.__getitem__)


def int8_program(weights, bad=None):
    """The same model with int8 weights; one layer's scales are wrong by half."""
    c = config("llama", quantization={"quant_algo": "W8A16"})
    graph = trace_model(c, c.mapping.ranks[0])
    stored = dict(weights)
    for name in graph.weights:
        if name.endswith(".per_channel_scale"):
            module = name.removesuffix(".per_channel_scale")
            stored[f"{module}.weight"], stored[name] = quantize_int8(weights[f"{module}.weight"])
            if module == bad:
                stored[name] = stored[name] * 1.5
    return Program(graph, stored.__getitem__)


def test_a_layer_at_fault_is_found_and_no_other_is_blamed():
    c, weights, ref = reference()
    report = compare(ref, int8_program(weights, BAD), windows_of(c.vocab_size), max_ppl_increase=-1.0)
    errors = {e.module: e.error for e in report.linears}
    assert list(errors) == list(ref.layers)
    assert errors[BAD] == pytest.approx(0.5, abs=0.01)
    assert max(error for module, error in errors.items() if module != BAD) < 0.01
    assert [e.module for e in report.worst(1)] == [BAD]
    assert [e.module for e in report.outstanding] == [BAD]
    assert report.failed
    assert f"largest errors: {BAD} (50." in report.reasons[1]
    assert f"(--exclude {BAD})" in report.advice
    # The stream is good up to the layer at fault, and bad from there on.
    assert report.stream[0] < 0.02
    assert min(report.stream[1:]) > 0.05
    with pytest.raises(AccuracyError, match=f"perplexity rose by.*{BAD}") as e:
        report.raise_if_failed()
    assert e.value.exit_code == 8


def test_a_good_model_passes():
    c, weights, ref = reference()
    told = []
    report = compare(ref, int8_program(weights), windows_of(c.vocab_size), lambda *at: told.append(at))
    assert not report.failed
    assert report.reasons == []
    report.raise_if_failed()
    assert told == [(89, 178), (178, 178)]
    assert 0 < report.divergence.mean_kl < 1e-3
    assert report.divergence.top1_agreement > 0.9


def test_the_same_model_has_no_errors():
    c, _, ref = reference()
    report = compare(ref, ref, windows_of(c.vocab_size))
    assert [e.error for e in report.linears] == [0.0] * len(ref.layers)
    assert report.stream == (0.0,) * 3
    assert report.worst() == []
    assert report.divergence.mean_kl == 0


@pytest.mark.parametrize("quantization", [
    {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "pre_quant_scale": True},
    {"quant_algo": "W4A16_GPTQ", "group_size": 16, "act_order": True},
])  # fmt: skip
def test_what_happens_to_the_input_is_part_of_the_layer(quantization):
    """Fed the reference's input, the layer reorders, scales and rounds it as in its own model."""
    c = config("llama", quantization=quantization)
    graph = trace_model(c, c.mapping.ranks[0])
    program = Program(graph, stored_weights(graph).__getitem__)
    seen = {}
    program.head(program.hidden(torch.randint(96, (1, 9)), seen.__setitem__), seen.__setitem__)
    for module, linear in program.layers.items():
        assert linear.prepare or module == "lm_head"
        assert torch.equal(program.feed(module, seen[linear.root]), seen[linear.node.output])


def test_experts_are_compared_with_the_reference_s_routing():
    graph = expert_graph()
    weights = stored_weights(graph)
    worse = dict(weights)
    name = "transformer.layers.0.mlp.fc.weight"
    worse[name] = weights[name] * 1.25
    programs = [Program(graph, w.__getitem__) for w in (weights, worse)]
    errors = {e.module: e.error for e in compare(*programs, windows_of(50)).linears}
    assert errors.pop("transformer.layers.0.mlp.fc") == pytest.approx(0.25)
    assert set(errors.values()) == {0.0}


def test_models_of_another_structure_are_compared_as_a_whole():
    c, _, ref = reference()
    other = config("llama", hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    graph = trace_model(other, other.mapping.ranks[0])
    report = compare(ref, Program(graph, random_weights(graph).__getitem__), windows_of(c.vocab_size))
    assert {e.module for e in report.linears} <= {"lm_head"} | {
        f"transformer.layers.{i}.mlp.{kind}" for i in (0, 1) for kind in ("fc", "gate")
    }
    assert report.stream == ()
    assert report.divergence.mean_kl > 0.01


def made_report(after=6.0, **fields):
    linears = tuple(
        LinearError(f"transformer.layers.{i}.{kind}", 0.02 * (1 + i))
        for i in range(4)
        for kind in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    )
    divergence = Divergence(Score(math.log(5.0) * 10, 10), Score(math.log(after) * 10, 10), 0.5, 8)
    values = {
        "divergence": divergence, "num_windows": 2, "linears": (*linears, LinearError("lm_head", 0.0)),
        "stream": (0.1, 0.2, 0.3, 0.4), "bytes_before": 4096, "bytes_after": 1024,
    }  # fmt: skip
    return AccuracyReport(**{**values, **fields})


def test_bounds():
    assert not made_report(after=5.99).failed
    assert made_report(after=6.01).failed
    assert not made_report(after=6.01, max_ppl_increase=0.3).failed
    assert not made_report(after=4.0).failed
    assert "no single layer stands out" in made_report(after=9).advice
    nothing = made_report(after=9, linears=(), stream=())
    assert nothing.failed
    assert nothing.advice


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_model_that_computes_nonsense_fails(nll):
    d = Divergence(Score(10.0, 10), Score(nll, 10), nll, 0)
    broken = LinearError("transformer.layers.0.mlp.fc", math.nan)
    report = made_report(divergence=d, linears=(broken, LinearError("lm_head", 0.1)))
    assert report.failed
    assert "no numbers that make sense" in report.reasons[0]
    assert report.worst(1) == [broken]
    assert report.outstanding == [broken]
    other_way = made_report(divergence=Divergence(Score(nll, 10), Score(10.0, 10), nll, 0))
    assert "perplexity of reference is" in other_way.reasons[0]
    assert json.loads(json.dumps(to_json(report), allow_nan=False))["quantized"]["perplexity"] is None


def test_json():
    data = to_json(made_report(after=7.0, names=("a", "b")))
    assert data["reference"] == {"name": "a", "perplexity": pytest.approx(5), "bytes": 4096}
    assert data["quantized"] == {"name": "b", "perplexity": pytest.approx(7), "bytes": 1024}
    assert data["perplexity_increase"] == pytest.approx(0.4)
    assert (data["mean_kl"], data["top1_agreement"], data["num_tokens"]) == (0.05, 0.8, 10)
    assert data["linears"]["transformer.layers.3.mlp.proj"] == pytest.approx(0.08)
    assert data["stream"] == [0.1, 0.2, 0.3, 0.4]
    assert data["failed"] is True
    assert data["reasons"][0].startswith("perplexity rose by 40.0%")


def printed(renderable):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_table():
    text = printed(tables(made_report()))
    assert "+20.00%" in text
    assert "-75.0%" in text
    assert "transformer.layers.3.mlp.proj" in text
    assert "lm_head" not in text
    assert "transformer.layers.0" not in text
    assert "relative error" not in printed(tables(made_report(linears=())))


def test_picture(tmp_path):
    file = tmp_path / "report.png"
    for report in (made_report(), made_report(linears=(), stream=()), made_report(linears=(LinearError("x", 0.1),))):
        draw(report, file)
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") == 1300
    assert "perplexity 5.00 → 6.00 (+20.0%)" in title(made_report())
    assert title(made_report()).startswith("reference (4.0 KiB) → quantized (1.0 KiB)\n")
    assert "→ quantized\n" in title(dataclasses.replace(made_report(), bytes_after=None))


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match="needs matplotlib"):
        draw(made_report(), tmp_path / "report.png")
