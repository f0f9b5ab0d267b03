"""benchmarks/scaling.py: the model by hand, its limits, and that the document is current and its sentences true."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package

import scaling  # noqa: E402
from scaling_figures import Curve, InputError, Inputs, each_product  # noqa: E402
from scaling_model import Experts, Model, Plan, Split, Step, busiest, legal_splits  # noqa: E402

INPUTS = Inputs()
H200 = INPUTS.figures("NVIDIA H200")
FREE = Curve(((1, 0.0), (2, 0.0)))
# Nothing but bytes and operations: no overheads, links that cost nothing.
BARE = replace(
    H200, weight_read_share=1.0, kv_read_share=1.0, product_overhead=0.0, attention_overhead=0.0, kernel_overhead=0.0,
    step_overhead=0.0, all_reduce={2: FREE}, all_gather={2: FREE}, send_recv=FREE, nvlink_hop=0.0, network_hop=0.0,
)  # fmt: skip
MODELS = {name: Model.of(data) for name, data in INPUTS.data["models"].items()}
LLAMA_8B, LLAMA_70B = MODELS["Llama-3.1 8B"], MODELS["Llama-3.1 70B"]
CASES = {case.name: case for case in scaling.cases(INPUTS)}


def weights_in_all(model, dtype="bf16"):
    """Numbers or bytes in the layers and the two tables."""
    plan = Plan(model, Split(), H200, dtype)
    layers = sum(a * plan.layer_bytes(dense=True) + b * plan.layer_bytes(dense=False) for a, b in plan.stages)
    return layers + 2 * 2 * model.vocab * model.hidden


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.1 8B", 8.03), ("Llama-3.1 70B", 70.6), ("Llama-3.1 405B", 405.9), ("Mixtral 8x22B", 140.6),
        ("DeepSeek-V3 671B", 671.0),
    ],
)  # fmt: skip
def test_models_have_their_published_size(name, billions):
    assert weights_in_all(MODELS[name]) / 2e9 == pytest.approx(billions, rel=0.005)


def test_the_golden_configs_say_the_same():
    for name, file in (("Llama-3.1 8B", "llama-3.1-8b"), ("DeepSeek-V3 671B", "deepseek-v3")):
        config = json.loads((Path(__file__).parent / f"golden/checkpoints/{file}.checkpoint.json").read_text())
        m = MODELS[name]
        found = [m.hidden, m.inner, m.layers, m.heads, m.kv_heads, m.head_dim, m.vocab]
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        assert found == [config[f] for f in (*fields, "head_size", "vocab_size")]


def test_one_token_on_one_gpu_takes_the_reading_of_the_weights():
    plan = Plan(LLAMA_8B, Split(), BARE)
    read = weights_in_all(LLAMA_8B) - 2 * LLAMA_8B.vocab * LLAMA_8B.hidden  # but for the embedding: one row of it
    time = plan.token_time(context=0)
    assert time.products == pytest.approx(read / BARE.memory_bandwidth, rel=1e-3)  # and a few activations
    assert time.total == pytest.approx(time.products, rel=2e-3)
    assert time.total * 1e3 == pytest.approx(3.52, abs=0.01)  # the floor at 4.27 TB/s


def test_a_layer_by_hand():
    tiny = Model(hidden=8, inner=16, layers=1, heads=4, kv_heads=2, head_dim=2, vocab=32)
    figures = replace(
        BARE, memory_bandwidth=100.0, bf16_rate=1000.0, product_overhead=1.0,
        attention_overhead=2.0, attention_rate=1e9, kernel_overhead=0.5, all_reduce={2: Curve(((1, 3.0), (1e9, 3.0)))},
    )  # fmt: skip
    plan = Plan(tiny, Split(tp=2), figures)
    time = plan.layer(Step(decodes=3, context=5), dense=True)
    # A rank has 2 heads of queries and one each of keys and values, and 8 of the 16 in the middle.
    shapes = [(8, 8), (8, 4), (16, 8), (8, 8)]
    reading = [2 * (out * columns + 3 * (columns + out)) / 100 for out, columns in shapes]
    computing = [2 * 3 * out * columns / 1000 for out, columns in shapes]
    assert time.products == pytest.approx(4 + sum(map(max, reading, computing)))
    assert time.attention == pytest.approx(2 + 3 * 5 * (2 * 2 * 2) / 100)  # keys and values of one head, 2 bytes
    # two norms, the positions, the activation: of 8 numbers 8 times, of 8 twice, of 8 three times
    assert time.kernels == pytest.approx(4 * 0.5 + 3 * 2 * (8 * 8 + 2 * 8 + 3 * 8) / 100)
    assert time.links == pytest.approx(2 * 3)
    assert time.host == 0


def test_an_all_reduce_by_hand():
    two = Curve(((0, 10e-6), (100e6, 110e-6)))
    figures = replace(
        H200, all_reduce={2: two}, nvlink_hop=1e-6, network_hop=5e-6, network_bandwidth=100e9, network_share=0.5
    )

    def of(tp, figures=figures):
        return Plan(LLAMA_70B, Split(tp), figures).all_reduce(10e6) * 1e6

    assert of(1) == 0
    assert of(2) == pytest.approx(20)
    assert of(4) == pytest.approx(10 + 10 * 1.5 + 2 * 2)
    assert of(8) == pytest.approx(10 + 10 * 1.75 + 2 * 6)
    assert of(16) == pytest.approx(of(8) + 2 * 5 + 10e6 * 1 / 400e9 * 1e6)
    assert of(32) == pytest.approx(of(8) + 4 * 5 + 10e6 * 1.5 / 400e9 * 1e6)
    measured = replace(figures, all_reduce={2: two, 4: Curve(((0, 5e-6), (100e6, 35e-6)))})
    assert of(2, measured) == pytest.approx(20)
    assert of(4, measured) == pytest.approx(5 + 3)
    assert of(8, measured) == pytest.approx(5 + 3 * 1.75 / 1.5 + 2 * 4)


def test_a_curve_is_straight_between_its_points():
    curve = Curve(((1024, 10), (2048, 20), (4096, 30)))
    assert [curve(n) for n in (1, 1024, 1536, 2048, 3072, 4096, 8192)] == [10, 10, 15, 20, 25, 30, 60]


def test_pieces_fill_a_pipeline():
    figures = replace(BARE, memory_bandwidth=1e18)  # operations alone: a piece takes its share
    whole = Plan(LLAMA_8B, Split(), figures).first_token_time(4096).products
    stage = Plan(LLAMA_8B, Split(pp=4), figures).first_token_time(4096).products
    assert stage == pytest.approx(whole / 4 * (16 + 3) / 16, rel=0.01)  # 16 pieces over 4 stages


def test_stages_share_the_layers():
    assert Plan(MODELS["Llama-3.1 405B"], Split(pp=4), H200).stages == [(32, 0), (32, 0), (31, 0), (31, 0)]
    assert Plan(MODELS["DeepSeek-V3 671B"], Split(pp=2), H200).stages == [(3, 28), (0, 30)]
    assert Plan(MODELS["DeepSeek-V3 671B"], Split(pp=32), H200).stages[:2] == [(2, 0), (1, 1)]


def test_experts_are_read_when_a_token_goes_to_them():
    moe = Model(64, 64, 1, 4, 4, 16, 32, Experts(count=16, chosen=2, inner=1024))
    figures = replace(BARE, bf16_rate=1e30)
    one, all_of_them = 3 * 1024 * 64 * 2, 16 * 3 * 1024 * 64 * 2

    def read(rows):
        plan = Plan(moe, Split(), figures)
        without = Plan(replace(moe, experts=None, inner=0), Split(), figures)
        step = Step(decodes=rows)
        return (plan.layer(step, dense=False).products - without.layer(step, dense=True).products) * 4.3e12

    assert read(1) == pytest.approx(2 * one, rel=0.03)  # and activations
    assert all_of_them < read(1000)


def test_the_busiest_rank():
    assert busiest(5.0, 1, 99.0) == 5.0
    assert busiest(1.0, 8, 8.0) == pytest.approx(1 + math.sqrt(2 * math.log(8)))
    assert busiest(1.0, 8, 2.0) == 2.0
    assert busiest(1e6, 8, 1e9) == pytest.approx(1e6, rel=0.003)


@pytest.mark.parametrize("name", CASES)
def test_memory_and_divisors_are_respected(name):
    for plan in CASES[name].plans:
        m, s = plan.model, plan.split
        assert m.heads % s.tp == 0
        held = weights_in_all(m, plan.weights) / s.ranks  # at least: what is repeated comes on top
        cache = plan.kv_tokens * plan.kv_bytes * m.layers / s.pp
        assert held * 0.9 + cache < plan.figures.memory
        best = plan.saturated(1000, 1000)
        if best:
            assert best.batch * 2000 <= plan.kv_tokens
            assert best.batch / s.pp * 2 <= plan.figures.max_num_tokens


def test_what_does_not_fit_is_not_there():
    fits = {"Llama-3.1 8B": (1, 1), "Llama-3.1 70B": (1, 2), "Llama-3.1 405B": (4, 8), "DeepSeek-V3 671B": (8, 16)}
    for name, gpus in fits.items():
        for dtype, least in zip(("fp8", "bf16"), gpus, strict=True):
            case = CASES[f"{name}, {dtype}"]
            assert case.smallest == least
            assert not any(case.saturated[n] or case.alone[n] for n in scaling.COUNTS if n < least)
            assert all(case.saturated[n] for n in scaling.COUNTS if n >= least)
    small = replace(H200, memory=16e9)  # the weights alone are larger
    assert not list(legal_splits(Plan(LLAMA_8B, Split(), small), 1))
    assert list(legal_splits(Plan(LLAMA_8B, Split(), small), 2))


@pytest.mark.parametrize("name", CASES)
def test_more_is_more(name):
    case = CASES[name]
    for found in (case.saturated, case.paced):
        rates = [c.tokens_per_second for c in found.values() if c]
        assert all(
            b >= 1.8 * a for a, b in pairwise(rates)
        )  # replicas at the least; a simpler split may take their place
    alone = [c.tokens_per_second for c in case.alone.values() if c]
    assert alone == sorted(alone)
    plan = case.saturated[64].plan
    times = [plan.token_time(context).total for context in (0, 100, 1000, 10000)]
    assert times == sorted(times)
    steps = [sum(t.total for t in plan.stage_times(Step(decodes=n, context=100, logits=n))) for n in (1, 8, 64, 512)]
    assert steps == sorted(steps)
    for paced in filter(None, case.paced.values()):
        assert paced.each >= scaling.PACE
        assert paced.one.tokens_per_second <= paced.plan.saturated(1000, 1000).tokens_per_second
    faster = replace(case.base.figures, memory_bandwidth=2 * case.base.figures.memory_bandwidth)
    assert replace(plan, figures=faster).token_time(1000).total < plan.token_time(1000).total


def test_a_pace_takes_the_largest_batch_that_keeps_it():
    plan = Plan(LLAMA_8B, Split(), H200)
    most, paced = plan.saturated(1000, 1000), plan.saturated(1000, 1000, 40)
    assert paced.batch < most.batch
    assert paced.tokens_per_second / paced.batch >= 40
    step = Step(paced.batch + 1, 1500, paced.batch + 1, 500, (paced.batch + 1) * 1.001)
    assert plan.stage_times(step)[0].total > 1 / 40
    assert plan.saturated(1000, 1000, 1000) is None


def test_stages_wait_for_each_other():
    plan = Plan(LLAMA_70B, Split(pp=8), H200)
    full = replace(plan, figures=replace(H200, pipeline_share={8: 1.0}))
    part = plan.saturated(1000, 1000).tokens_per_second / full.saturated(1000, 1000).tokens_per_second
    assert part == pytest.approx(11881 / 8 / 3264, rel=0.001)


def test_the_simplest_of_those_that_are_about_as_good():
    def found(**rates):
        splits = {"TP1": Split(), "TP2": Split(2), "PP2": Split(1, 2)}
        plans = {name: Plan(LLAMA_8B, split, H200) for name, split in splits.items()}
        return [(plans[name], scaling.Throughput(rate, 10)) for name, rate in rates.items()]

    assert scaling.choose(found(PP2=215, TP1=100), 4, replicas=True).name == "4 x TP1"
    assert scaling.choose(found(PP2=225, TP1=100), 4, replicas=True).name == "2 x PP2"
    assert scaling.choose(found(PP2=225, TP1=100), 1, replicas=True).name == "TP1"
    assert scaling.choose(found(PP2=105, TP2=100), 2, replicas=True).name == "TP2"
    assert scaling.choose(found(TP2=105, TP1=100), 2, replicas=False).name == "TP1"
    assert scaling.choose([], 2, replicas=True) is None


def test_the_price_of_a_token():
    choice = scaling.Choice(Plan(LLAMA_8B, Split(2), replace(H200, price=3.6)), 4, scaling.Throughput(2000, 10))
    assert choice.tokens_per_second == 8000
    assert choice.cost == pytest.approx(2 * 3.6 / 3600 / 2000 * 1e6)  # $1.00


# Inputs


RESULT = json.loads((BENCHMARKS / "results/gpu_links_h100.json").read_text())


def test_a_measured_figure_takes_the_place_of_a_published_one(tmp_path):
    without = {i.name: i for i in Inputs(results=[]).listed("NVIDIA H200")}
    assert not any("gpu_links" in i.source for i in without.values())
    path = tmp_path / "links.json"
    path.write_text(json.dumps(RESULT))
    other = {i.name: i for i in Inputs(results=[path]).listed("NVIDIA H200")}
    assert other["fp8_rate"].source == "measured: links.json, 2 x NVIDIA H100 80GB HBM3, 2026-11-25"  # the same chip
    assert other["fp8_rate"].instead_of == "1979, published"
    assert other["memory_bandwidth"] == without["memory_bandwidth"]  # another memory
    own = {i.name: i for i in Inputs(results=[path]).listed("NVIDIA H100 80GB HBM3")}
    assert own["memory_bandwidth"].value == pytest.approx(2 * 2**32 / RESULT["copy"][str(2**32)] / 1e3)
    assert own["network_hop"] == without["network_hop"]  # nothing measured it
    figures = Inputs(results=[path]).figures("NVIDIA H200")
    assert figures.all_reduce[2](1024) == pytest.approx(RESULT["links"]["all_reduce"]["2"]["graph"]["1024"] * 1e-6)
    assert Inputs(results=[]).figures("NVIDIA H200").all_reduce[2](1024) == pytest.approx(7.8e-6)


def test_each_figure_comes_from_the_nearest_file_that_has_it(tmp_path):
    own, more = tmp_path / "own.json", tmp_path / "more.json"
    machine = {**RESULT["machine"], "gpu": "NVIDIA H200", "gpus": 1, "date": "2026-12-01"}
    own.write_text(json.dumps({**RESULT, "machine": machine, "links": None, "copy": {str(2**32): 2000.0}}))
    links = {"all_reduce": {"2": {"eager": {"1024": 9, "2048": 10}}, "8": {"graph": {"1024": 15, "2048": 16}}}}
    more.write_text(json.dumps({**RESULT, "links": links}))
    listed = {i.name: i for i in Inputs(results=[more, own]).listed("NVIDIA H200")}
    assert listed["memory_bandwidth"].value == pytest.approx(2 * 2**32 / 2000 / 1e3)
    assert "own.json" in listed["bf16_rate"].source
    assert "more.json" in listed["all_reduce"].source
    assert listed["all_reduce_8"].instead_of == "reckoned from 2 GPUs"
    assert listed["send_recv"].source.startswith("published: ")
    figures = Inputs(results=[more, own]).figures("NVIDIA H200")
    assert figures.all_reduce[2](1024) == pytest.approx(9e-6)
    assert Plan(LLAMA_70B, Split(8), figures).all_reduce(2048) == pytest.approx(16e-6)


def changed(tmp_path, change):
    """The inputs, changed, without results."""
    data = json.loads((BENCHMARKS / "scaling_inputs.json").read_text())
    change(data)
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("chip"), "inputs.json: there is no `chip`"),
        (lambda d: d.update(gpu="a toaster"), "there is no gpu `a toaster` in `gpus`"),
        (lambda d: d["known"][0]["rows"][0].update(model="9B"), "there is no model `9B` in `models`"),
        (lambda d: d["known"][0].pop("rows"), "not as the model needs it (KeyError: 'rows')"),
        (lambda d: d.update(gpus=["NVIDIA H200", "NVIDIA H100 80GB HBM3"]), "not as the model needs it"),
        (lambda d: d["chip"].pop("fp8_rate"), "the model lacks fp8_rate for NVIDIA H200"),
        (lambda d: d["chip"].update(warp=1), "the model does not know warp"),
        (lambda d: d["chip"].update(fp8_rate=1979), "fp8_rate: needs value, unit and source"),
        (lambda d: d["chip"]["fp8_rate"].update(value=-1), "fp8_rate: value must be a positive number"),
        (lambda d: d["chip"]["fp8_rate"].update(value="1979"), "fp8_rate: value must be a positive number"),
        (lambda d: d["chip"]["fp8_rate"].update(value=float("nan")), "fp8_rate: value must be a positive number"),
        (lambda d: d["chip"]["fp8_rate"].update(value=True), "fp8_rate: value must be a positive number"),
        (lambda d: d["chip"]["fp8_rate"].update(source="a friend"), "fp8_rate: source must start with"),
        (lambda d: d["chip"]["kv_read_share"].update(value=80), "kv_read_share: value is a share and at most 1"),
        (lambda d: d["chip"]["send_recv"].update(value=[]), "send_recv: the first numbers of the pairs must rise"),
        (lambda d: d["chip"]["send_recv"].update(value=[[2, 1], [1, 1]]), "send_recv: the first numbers of the pairs"),
        (lambda d: d["chip"]["send_recv"].update(value=[[1, 2, 3]]), "send_recv: value must be pairs of positive"),
        (lambda d: d["chip"]["send_recv"].update(value=5), "send_recv: value must be pairs of positive numbers"),
        (lambda d: d["chip"]["fp8_rate"].update(value=[[1, 2]]), "fp8_rate: value must be a positive number"),
        (lambda d: d["chip"]["fp8_rate"].update(unit="PFLOP/s"), "fp8_rate: unit 'PFLOP/s' is none of"),
        (lambda d: d["models"]["Llama-3.1 8B"].pop("heads"), "not a model's shape"),
        (lambda d: d["models"]["Llama-3.1 8B"].update(heads=0), "not a model's shape"),
        (lambda d: d["models"]["Mixtral 8x22B"].update(experts=8), "not a model's shape"),
    ],
)  # fmt: skip
def test_inputs_that_are_wrong_are_named(change, message, tmp_path, monkeypatch):
    out = tmp_path / "scaling.md"
    path = changed(tmp_path, change)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--inputs", str(path), "--output", str(out)])
    with pytest.raises(SystemExit) as stopped:
        scaling.main()
    assert message in stopped.value.code
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "links.json: Expecting"),
        ("[]", "links.json: not a JSON object"),
        ("{}", "links.json: not a result of gpu_links.py (KeyError: 'machine')"),
        (json.dumps({**RESULT, "copy": {}}), "links.json: not a result of gpu_links.py"),
        (json.dumps({**RESULT, "launch": {**RESULT["launch"], "kernel_in_graph": -1}}), "links.json: kernel_overhead"),
    ],
)
def test_results_that_are_wrong_are_named(text, message, tmp_path):
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        Inputs(results=[path])
    assert message in str(refused.value)


# What the document says


def test_known_points_are_near():
    ratios = [(row["what"], value / row["value"]) for _, row, value in scaling.known_points(INPUTS)]
    saturated = [r for what, r in ratios if what == "saturated"]
    assert len(saturated) >= 25
    assert min(saturated) > 0.9
    assert max(saturated) < 1.5
    assert all(0.8 < r < 1 for what, r in ratios if what == "token")


def test_products_are_near():
    fits = scaling.fits(INPUTS, INPUTS.results[0])
    assert len(fits) == len(list(each_product(RESULT)))
    assert sum(abs(r - 1) <= 0.15 for r in fits) > 0.9 * len(fits)


def test_the_document_is_current():
    assert (BENCHMARKS / "scaling.md").read_text() == scaling.document(INPUTS), "run: make scaling"


def test_writing_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "other.md"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--output", str(out)])
    monkeypatch.setattr(scaling, "document", lambda inputs: f"{inputs.data['gpu']}\n")
    scaling.main()
    assert out.read_text() == "NVIDIA H200\n"
    assert capsys.readouterr().out == "wrote other.md\n"


class TestInShort:
    """IN_SHORT, sentence by sentence."""

    def test_saturated(self):
        for name, case in CASES.items():
            best = case.saturated[64].plan.split
            assert best.ranks == case.smallest
            assert best.pp == (2 if name.startswith(("Llama-3.1 405B", "DeepSeek")) else 1)
            costs = [c.cost for c in case.saturated.values() if c]
            assert max(costs) < 1.05 * min(costs)
            if best.pp > 1:
                rivals = (
                    p.saturated(1000, 1000) for p in case.plans if p.split.ranks == best.ranks and p.split.pp == 1
                )
                gain = case.saturated[64].one.tokens_per_second / max(r.tokens_per_second for r in rivals if r)
                assert gain > 1.24 if "DeepSeek" in name else gain == pytest.approx(1.11, abs=0.01)

    def test_at_a_pace(self):
        for name, case in CASES.items():
            splits = [c.plan.split for c in case.paced.values() if c]
            assert all(s.pp == 1 for s in splits)
            if name.startswith(("Llama-3.1 405B", "DeepSeek")):
                assert all(8 <= s.tp <= 32 for s in splits)
                assert 2 < case.paced[64].cost / case.saturated[64].cost < 6
            else:
                assert all(s.ranks == case.smallest for s in splits)

    def test_batch_1(self):
        best = {name: case.alone[64].plan.split for name, case in CASES.items()}
        expected = {"8B": 4, "70B": 8, "8x22B": 8, "671B, fp8": 8, "671B, bf16": 16, "405B, fp8": 16, "405B, bf16": 32}
        for name, split in best.items():
            assert split == Split(next(tp for part, tp in expected.items() if f" {part}" in name))
        for case in CASES.values():
            time = case.alone[64].plan.token_time(scaling.CONTEXT)
            assert 0.31 < time.links / time.total < 0.53
            assert 75 < case.alone[64].cost / case.saturated[64].cost < 220

    def test_stages(self):
        assert H200.pipeline_share[8] == pytest.approx(0.46, abs=0.006)
        gains = {n: c.saturated[64].cost / c.never_idle.saturated[64].cost for n, c in CASES.items() if c.smallest > 2}
        for name, gain in gains.items():
            assert CASES[name].never_idle.saturated[64].plan.split.pp > 1
            assert gain == pytest.approx(1.25 if "405B" in name else 1.67 if "671B" in name else gain, abs=0.08)

    def test_experts(self):
        for name in ("Mixtral 8x22B", "DeepSeek-V3 671B"):
            gains = []
            for dtype in ("fp8", "bf16"):
                plans = {p.split: p for p in CASES[f"{name}, {dtype}"].plans}
                for split in (s for s in plans if s.ep > 1):
                    whole = plans[replace(split, ep=1)]
                    divided, undivided = (p.saturated(1000, 1000) for p in (plans[split], whole))
                    if divided and undivided:
                        gains.append(divided.tokens_per_second / undivided.tokens_per_second)
                    assert plans[split].token_time(1000).total > whole.token_time(1000).total
            assert max(gains) < (1.1 if name.startswith("Mixtral") else 1.18)
            assert max(gains) > (1.0 if name.startswith("Mixtral") else 1.1)

    def test_fp8(self):
        for name in MODELS:
            ratio = CASES[f"{name}, bf16"].saturated[64].cost / CASES[f"{name}, fp8"].saturated[64].cost
            assert 1.8 < ratio < 3.2
