"""benchmarks/h200: what can be tried without a GPU, on a fake runner, and the arithmetic of reports and floors."""

import cProfile
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.h200 import (
    attention,
    floors,
    host_steps,
    real_model,
    results,
    serving,
    startup,
    step_sweep,
    synthetic,
    ttft,
)
from tests.fake_runner import FakeSamplingRunner, expected_tokens
from tests.run.tiny import fake_runners as fake_runners
from tests.run.tiny import write_engine
from trtllm_cli.engine import BuildConfig

VOCAB, BLOCK, BATCH = 64, 4, 4
WORK = floors.Workload(requests=6, full=6, prompt=5, output=4)
SIZES = (1, 2, 4, 8)
H200 = Path(floors.__file__).parent


def make_target(num_blocks=64):
    limits = BuildConfig(
        max_batch_size=BATCH, max_seq_len=64, max_num_tokens=16, max_input_len=48, tokens_per_block=BLOCK,
        weight_dtype="float32", kv_cache_dtype="float32",
    )  # fmt: skip
    runner = FakeSamplingRunner(VOCAB, BLOCK, max_batch_size=BATCH)
    runner.allocate_kv_cache(num_blocks)
    return serving.OnExecutor(
        runner, limits, vocab_size=VOCAB, num_blocks=num_blocks, policy="guaranteed_no_evict", prefix=False
    )


class Mark:
    """A CUDA event of a stream that runs what it is given at once, on a clock that each mark advances by 1 ms."""

    now = 0

    def __init__(self):
        Mark.now += 1
        self.at = Mark.now

    def query(self):
        return True

    def elapsed_time(self, later):
        return later.at - self.at


def test_a_workload_through_the_executor():
    target = make_target()
    probe = serving.Probe()
    probe.attach(target.runner, target.executor)
    figures = serving.run_workload(target, probe, WORK, SIZES)
    assert figures["requests"] == 6
    assert figures["output_tok_s"] == pytest.approx(6 * 4 / figures["seconds"])
    assert figures["total_tok_s"] == pytest.approx(6 * 9 / figures["seconds"])
    assert figures["requests_s"] == pytest.approx(6 / figures["seconds"])
    assert 0 < figures["ttft_median_ms"] < figures["seconds"] * 1e3
    assert 0 < figures["tpot_mean_ms"] < figures["seconds"] * 1e3
    assert 0 < figures["host_share"] < 1
    assert figures["host_ms_a_step"] * figures["steps"] < figures["seconds"] * 1e3
    measured = target.runner.steps[-figures["steps"] :]
    assert figures["mean_batch"] == pytest.approx(sum(s.num_seqs for s in measured) / len(measured))
    assert sum(s.num_tokens for s in measured) == 6 * (5 + 3)  # the last token of each is not computed with
    assert figures["decode_steps"] == sum(s.num_tokens == s.num_seqs for s in measured)
    assert figures["idle"] is None
    assert figures["preemptions"] == 0
    assert "6 requests" in serving.details_of(figures)


def test_tokens_come_as_the_executor_gives_them():
    target = make_target()
    prompts = serving.random_prompts(3, 5, VOCAB)
    timings = target.serve(prompts, [3, 1, 2])
    assert [t.output for t in timings] == [3, 1, 2]
    assert all(t.arrival < t.first <= t.last for t in timings)
    sampled = {int(token) for step in target.runner.steps for token in step.input_ids}
    assert set(expected_tokens(prompts[0], 2, VOCAB)) <= sampled
    assert serving.random_prompts(3, 5, VOCAB) == prompts
    assert serving.random_prompts(3, 5, VOCAB, seed=1) != prompts


def test_the_warm_up_meets_every_batch_size():
    target = make_target()
    serving.warm_up(target, WORK, SIZES)
    decodes = {step.num_seqs for step in target.runner.steps if step.num_tokens == step.num_seqs}
    assert decodes >= {1, 2, 4}


def test_the_probe_is_off_until_it_begins_and_forgets():
    target = make_target()
    probe = serving.Probe()
    probe.attach(target.runner, target.executor)
    target.serve([[1, 2]], [3])
    assert not probe.steps
    assert not probe.calls
    for _ in range(2):
        probe.begin()
        target.serve([[1, 2]], [3])
        probe.end()
        assert [(s.tokens, s.sequences) for s in probe.steps] == [(2, 1), (1, 1), (1, 1)]
        assert sum(started for _, _, started in probe.calls) == 3
        assert all(0 <= waited <= spent for spent, waited, _ in probe.calls)


def test_a_profile_is_of_steps_of_decoding():
    target = make_target()
    probe = serving.Probe(profile=cProfile.Profile())
    probe.attach(target.runner, target.executor)
    probe.begin()
    target.serve([[1, 2]], [6])
    probe.end()
    text = serving.profile_text(probe.profile)
    assert "executor.py" in text
    calls = {
        entry.code.co_name: entry.callcount for entry in probe.profile.getstats() if hasattr(entry.code, "co_name")
    }
    assert calls["_step"] == 5  # of six: the first one computes the prompt


def test_a_report_by_hand():
    timings = [serving.Timing(10, 0.0, 1.0, 3.0, 5), serving.Timing(10, 0.0, 2.0, 4.0, 3)]
    probe = serving.Probe()
    probe.steps = [serving.Step(20, 2, 0.1), serving.Step(2, 2, 0.1), serving.Step(1, 1, 0.4)]
    probe.calls = [(1.5, 1.0, 2), (1.0, 0.8, 1), (1.0, 0.9, 0)]
    r = serving.report(timings, probe)
    assert (r["seconds"], r["output_tok_s"], r["total_tok_s"], r["requests_s"]) == (4.0, 2.0, 7.0, 0.5)
    assert (r["ttft_mean_ms"], r["ttft_median_ms"]) == (1500, 1500)
    assert r["tpot_mean_ms"] == pytest.approx((2 / 4 + 2 / 2) / 2 * 1e3)
    assert (r["steps"], r["decode_steps"]) == (3, 2)
    assert r["mean_batch"] == pytest.approx(5 / 3)
    assert r["mean_decode_batch"] == 1.5
    assert r["mean_tokens"] == pytest.approx(23 / 3)
    assert r["host_ms_a_step"] == pytest.approx(0.8 / 3 * 1e3)
    assert r["host_median_ms"] == pytest.approx(200)
    assert r["host_share"] == pytest.approx(0.2)
    assert r["enqueue_ms_a_step"] == pytest.approx(200)
    assert r["outside_step_share"] == pytest.approx(1 - 3.5 / 4)


def test_idle_time_by_hand():
    def step(begin, end, enqueue, late):
        marks = SimpleNamespace(at=begin), SimpleNamespace(at=end)
        marks[1].elapsed_time = lambda later: later.at - end
        return serving.Step(1, 1, enqueue, *marks, late)

    # 100 ms each; the second is enqueued in time, the third 20 ms after the second has ended.
    steps = [step(0, 100, 0.01, False), step(100, 200, 0.01, False), step(220, 320, 0.03, True)]
    found = serving.idle(steps, 0.4)
    assert found == pytest.approx({"idle": 0.05, "idle_most": 0.125, "late_steps": 0.5})
    assert serving.idle(steps[:1], 0.4) == {"idle": None, "idle_most": None, "late_steps": None}


def test_marks_go_around_each_step():
    target = make_target()
    probe = serving.Probe(mark=Mark)
    probe.attach(target.runner, target.executor)
    probe.begin()
    target.serve([[1, 2]], [3])
    probe.end()
    assert [(s.end.at - s.begin.at) for s in probe.steps] == [1, 1, 1]
    assert [s.is_late for s in probe.steps] == [False, True, True]
    assert serving.idle(probe.steps, 1.0)["idle"] == pytest.approx(0.002)


def test_first_tokens_and_decoding_alone():
    target = make_target()
    probe = serving.Probe()
    probe.attach(target.runner, target.executor)
    figures = ttft.ttft(target, 5, 4)
    assert figures["prompts"] == 4
    assert 0 < figures["least_ms"] <= figures["median_ms"] <= figures["most_ms"]
    alone = ttft.decode_alone(target, probe, 5, 8, 3)
    assert len(alone["runs_ms"]) == 3
    assert alone["ms"] == sorted(alone["runs_ms"])[1]


def test_an_engine_directory_is_served_through_llm(tmp_path, fake_runners):
    engine = write_engine(tmp_path / "engine", None)
    target = serving.OnEngine(engine, num_blocks=None, policy="guaranteed_no_evict", prefix=False)
    try:
        timings = target.serve([[1, 2, 3], [4, 5]], [4, 2])
    finally:
        target.close()
    assert [(t.prompt, t.output) for t in timings] == [(3, 4), (2, 2)]
    assert all(t.arrival < t.first < t.last for t in timings)
    assert target.vocab_size == 300


# Floors and figures.


@pytest.mark.parametrize(
    ("case", "fmt", "kv", "expected"),
    [
        ("decode-1", "bf16", "bf16", 3.49), ("decode-1", "fp8", "bf16", 1.87), ("decode-1", "int4", "bf16", 1.08),
        ("ttft-2048", "bf16", "bf16", 37.6), ("sat-128-128", "fp8", "fp8", 41_000),
        ("sat-1000-1000", "fp8", "fp8", 23_000),
    ],
)  # fmt: skip
def test_floors(case, fmt, kv, expected):
    assert floors.floor(case, "8b", fmt, kv) == pytest.approx(expected, rel=0.03)


def test_the_sizes_of_llama():
    model = floors.MODELS["8b"]
    assert model.linears == 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert model.linears + 2 * model.head == pytest.approx(8.03e9, rel=1e-3)  # all but the norms
    assert model.kv_bytes("bf16") == 131072
    assert model.kv_bytes("fp8") == 65536
    from benchmarks.h200.synthetic import FORMATS, SHAPES

    assert SHAPES.keys() == floors.MODELS.keys()
    assert FORMATS.keys() == floors.FORMATS.keys()
    for name, shape in SHAPES.items():
        m = floors.MODELS[name]
        assert (m.hidden, m.layers, m.heads, m.kv_heads, m.inner) == (
            shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"],
            shape["num_key_value_heads"], shape["intermediate_size"],
        )  # fmt: skip
        assert m.head_dim == shape.get("head_size", m.hidden // m.heads)
        assert m.tied == shape.get("share_embedding_table", False)


def test_a_ratio_above_one_is_ahead():
    row = serving.row_of("decode-1", "8b", "bf16", "bf16", 4.1, 3.49, {"more": 1})
    assert row["of_vllm"] == pytest.approx(4.92 / 4.1)
    assert row["of_goal"] == pytest.approx(4.0 / 4.1)
    assert row["of_floor"] == pytest.approx(3.49 / 4.1)
    assert row["tensorrt_llm"] is row["of_tensorrt_llm"] is None
    assert row["more"] == 1
    row = serving.row_of("sat-128-128", "8b", "fp8_pc_pt", "fp8", 31000, 41000, {})
    assert row["goal"] == 30000
    assert row["of_tensorrt_llm"] == pytest.approx(31000 / 29526)
    assert row["of_floor"] == pytest.approx(31 / 41)
    assert serving.line_of(row).startswith(
        "sat-128-128 8b fp8_pc_pt kv fp8: 31,000 tok/s; goal 30,000 (x1.03); vllm 23,035"
    )
    assert serving.row_of("sat-128-128", "1b", "fp8", "fp8", 31000, None, {})["goal"] is None


def test_the_notes_have_the_floors():
    assert floors.markdown() in (H200 / "NOTES.md").read_text()


# Attention's candidates; they are compiled elsewhere.


@pytest.mark.parametrize(
    ("batch", "context", "expected"),
    [(1, 128, [2]), (1, 2048, [16, 32]), (64, 2048, [1, 2, 4]), (1024, 2048, [1]), (8, 8192, [2, 4, 8, 16, 32])],
)
def test_splits(batch, context, expected):
    assert attention.splits_for(batch, context) == expected


def test_attention_by_hand():
    assert attention.decode_bytes("bf16", 2, 100) == 2 * 100 * 8 * 128 * 2 * 2
    assert attention.decode_bytes("fp8", 2, 100) == 2 * 100 * 8 * 128 * 2
    assert attention.prefill_flops(2) == 3 * 4 * 32 * 128  # three scores are seen
    names = [json.dumps(attention.name_of(s)) for s in attention.decode_candidates("fp8", 64, 1, 2048)]
    assert len(set(names)) == len(names) == 41
    names = [json.dumps(attention.name_of(s)) for s in attention.prefill_candidates("bf16", 64, 2048)]
    assert len(set(names)) == len(names) == 20


def test_candidates_name_all_arguments_of_their_kernels():
    import inspect

    from trtllm_cli.kernels.triton import cache_attention, decode_attention, prefill_attention

    for function, source in (
        (cache_attention.cache_attention, attention.ahead_source("bf16", 64, 2, 3, 32)),
        (decode_attention.decode_attention, attention.decode_source("bf16", 64, 4, 3, 64, 2)),
        (prefill_attention.prefill_attention, attention.prefill_source("bf16", 64, 2048, 128, 8, 3, 64)),
    ):
        wanted = set(inspect.signature(function.fn).parameters)
        assert dict(source.args).keys() | dict(source.constants).keys() == wanted


# The merged table.


def test_results_are_merged(tmp_path, monkeypatch, capsys):
    for name, value, date, requests in (
        ("a", 30000, "2026-01-02", 64),
        ("b", 12345, "2026-01-01", 64),
        ("c", 9, "2026-01-01", 8),
    ):
        row = serving.row_of("batch64", "8b", "fp8", "fp8", value, 20000, {"requests": requests})
        serving.write("serving", [row], str(tmp_path / f"{name}.json"))
        data = json.loads((tmp_path / f"{name}.json").read_text())
        data["machine"]["date"] = date + "T00:00:00+00:00"
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    best = {
        "kind": "decode", "kv": "fp8", "batch": 1, "context": 128, "us": 1.5, "of_floor": 0.5, "warps": 4, "stages": 3,
        "BLOCK_N": 64, "NUM_SPLITS": 2,
    }  # fmt: skip
    rate = {"kind": "prefill", "kv": "bf16", "batch": 1, "context": 2048, "us": 9.0, "tflops": 445.0, "of_goal": 0.6}
    (tmp_path / "d.json").write_text(json.dumps({**data, "script": "attention", "rows": [], "best": [best, rate]}))
    (tmp_path / "other.json").write_text("[1]")
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path), "--output", str(tmp_path / "out.md")])
    results.main()
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| batch64")]
    assert len(lines) == 2
    assert "30,000 | tok/s | 17,000 (×1.76) | 11,894 (×2.52) | 10,907 (×2.75) | 24," in lines[1]  # today's floor
    assert lines[1].endswith("| 2026-01-02 |")
    assert "12,345" not in text
    assert "batch64 fp8: TensorRT-LLM: GPT-J 6B on an H100." in text
    assert "0.50 of the floor" in text
    assert "445 TFLOP/s" in text
    assert "triton" in text


def test_two_gpus_in_tables():
    text = results.two_gpus([
        {"part": "reduce", "bytes": 8192, "all_reduce": 2.0, "all_reduce_add_rms_norm": 3.0, "nccl": 7.0},
        {"part": "reduce", "bytes": 4 << 20, "nccl": 33.0},
        {"part": "steps", "shape": "8b", "format": "fp8", "kind": "decode", "size": 1, "one_ms": 2.5, "two_ms": 1.25,
         "times": 2.0},
        {"part": "serve", "requests": 2048, "output_tok_s": 7000.0, "of_tensorrt_llm": 1.026},
    ])  # fmt: skip
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| 8 KiB | 2.0 | 3.0 | 7.0 | ×3.50 |" in lines
    assert "| 4096 KiB | – | – | 33.0 | – |" in lines
    assert "| decode 1 | 8b | fp8 | 2.50 | 1.25 | ×2.00 |" in lines
    assert "2048 requests: 7,000 tok/s, ×1.03 of TensorRT-LLM" in text


@pytest.mark.parametrize("script", sorted(path.stem for path in H200.glob("*.py")))
def test_each_script_can_be_imported(script):
    importlib.import_module(f"benchmarks.h200.{script}")


def test_how_the_first_difference_of_two_texts_is_judged():
    def text(*tokens, likely=()):
        logprobs = [[SimpleNamespace(token_id=token, logprob=p) for token, p in (likely or [(t, 0.0)])] for t in tokens]
        return SimpleNamespace(token_ids=list(tokens), logprobs=logprobs)

    cpu = [text(1, 2), text(1, 3, likely=[(3, -1.0), (4, -1.05), (1, -2.0)]), text(5, 6, likely=[(5, -0.5), (6, -3.0)])]
    row = real_model.compare("case", cpu, [text(1, 2), text(1, 4), text(7, 6)])
    assert (row["equal"], row["tokens"], row["not_near"]) == (1, 6, 1)
    assert row["gaps"] == [pytest.approx(0.05), float("inf")]


def test_no_results_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path)])
    with pytest.raises(SystemExit):
        results.main()
    assert "no results in" in capsys.readouterr().err


def test_start_up_says_what_a_command_said_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match="no such engine directory"):
        startup.run_once(tmp_path / "none")


def test_the_hosts_steps_are_timed():
    times = host_steps.step_times(floors.Workload(requests=6, full=6, prompt=5, output=4), batch=4)
    assert len(times) == 8  # four requests, then two; each a prompt's step and three more
    assert all(ms > 0 for ms in times)


def test_tactics_are_chosen_by_whole_steps():
    """One linear after another: what makes the step shorter stays, and the next one is tried beside it."""
    shapes = synthetic.linears_of("1b", "bf16", max_batch_size=8, max_num_tokens=64, max_seq_len=128)
    assert [(s.n, s.k, s.gated) for s in shapes] == [
        (3072, 2048, ""), (2048, 2048, ""), (16384, 2048, "silu"), (2048, 8192, ""), (128256, 2048, ""),
    ]  # fmt: skip
    halves = synthetic.linears_of("8b", "bf16", tp=2, max_batch_size=8, max_num_tokens=64, max_seq_len=128)
    assert [(s.n, s.k) for s in halves[:4]] == [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
    one, two = shapes[:2]
    options = {shape: step_sweep.candidates(shape, 1) for shape in (one, two)}
    start, slow = step_sweep.first_way(two, 1), 5.0
    tried = []

    def milliseconds(taken):
        tried.append(taken)
        ms = slow - (taken.get(one) == options[one][2]) - (taken == {one: options[one][2], two: options[two][1]})
        return ms + 0.5 * (taken.get(one) == options[one][0]) - 1e-4 * len(tried)  # and a drift that means nothing

    taken, best = step_sweep.descend({two: start}, options, milliseconds)
    assert taken == {one: options[one][2], two: options[two][1]}
    assert 2.9 < best < 3.0
    assert all(len(t) >= 1 for t in tried)

    tactics = step_sweep.Tried("sm_90a", tokens=1, taken=taken)
    tactics.prepare(shapes)
    assert tactics.ways(one)[0] == (1, options[one][2])
    assert tactics.ways(one)[1:] == step_sweep.LinearTactics("sm_90a").ways(one)[1:]
    assert tactics.others(two, 1) is None
