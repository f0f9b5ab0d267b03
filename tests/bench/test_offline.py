"""The executor driven over a runner whose every token can be foretold."""

import json
from pathlib import Path

import pytest

from tests.fake_runner import FakeRunner, expected_tokens
from trtllm_cli.bench import offline
from trtllm_cli.bench.offline import RuntimeOptions, Session, bench
from trtllm_cli.bench.report import Report, render
from trtllm_cli.bench.workload import NormalLengths, Sample, UniformLengths, synthetic
from trtllm_cli.engine import BuildConfig, Engine, EngineConfig
from trtllm_cli.errors import RequestError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig

VOCAB = 64
GOLDEN = Path(__file__).parent / "golden_report.json"  # the report, with each value replaced by its type


def make_engine(path="engine", tp_size=1, **limits):
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="float32",
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_act="silu",
        position_embedding_type="rope_gpt_neox",
        mapping=Mapping.of(tp_size),
    )
    build = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 16, "max_input_len": 40, "tokens_per_block": 4}
    return Engine(
        Path(path),
        EngineConfig(
            format_version=1,
            version="0.1.0",
            backend="cpu",
            target={"arch": "x86-64", "kernels": "native"},
            pretrained_config=model,
            build_config=BuildConfig(weight_dtype="float32", kv_cache_dtype="float32", **(build | limits)),
            rank_files=[],
        ),
    )


@pytest.fixture
def open_session(monkeypatch):
    """Opens sessions on a fake runner; closes them."""
    opened = []

    def open_(tp_size=1, limits=None, **options):
        engine = make_engine(tp_size=tp_size, **(limits or {}))
        monkeypatch.setattr(Engine, "open", classmethod(lambda cls, path: engine))
        monkeypatch.setattr(Engine, "verify", lambda self, rank, *how: None)
        monkeypatch.setattr("trtllm_cli.run.load.load_runner", lambda *args, **kwargs: FakeRunner(VOCAB))
        opened.append(Session.open(Path("engine"), RuntimeOptions(num_threads=2, **options)))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()
        assert session.runner.closed


def test_every_request_gets_its_own_tokens_and_its_exact_length(open_session):
    session = open_session()
    samples = synthetic(9, UniformLengths(1, 20), UniformLengths(1, 12, "output"), VOCAB)
    measured = session.measure(samples)
    assert [r.task_id for r in measured.requests] == list(range(9))
    for sample, record in zip(samples, measured.requests, strict=True):
        assert record.token_ids == expected_tokens(sample.input_ids, sample.output_tokens, VOCAB)
        assert record.token_times == sorted(record.token_times)
        assert record.arrival <= record.token_times[0]
    assert sum(s.prefill_tokens for s in measured.steps) == sum(len(s.input_ids) for s in samples)
    assert sum(s.new_tokens for s in measured.steps) == sum(s.output_tokens for s in samples)
    session.executor.check_integrity()


@pytest.mark.parametrize("concurrency", [1, 2, -1])
def test_concurrency_is_a_limit(open_session, concurrency):
    session = open_session()
    measured = session.measure(synthetic(6, NormalLengths(5), NormalLengths(4), VOCAB), concurrency=concurrency)
    busiest = max(s.num_running + s.num_waiting for s in measured.steps)
    assert busiest == (6 if concurrency < 0 else concurrency)
    if concurrency == 1:  # one after another
        ends = [r.token_times[-1] for r in measured.requests]
        assert all(b.arrival >= end for end, b in zip(ends, measured.requests[1:], strict=False))


def test_progress_counts_tokens(open_session):
    seen = []
    open_session().measure([Sample(0, 3, input_ids=(1, 2))], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_prefix_cache_is_off_unless_asked_for(open_session):
    samples = [Sample(i, 2, input_ids=tuple(range(12))) for i in range(3)]
    assert open_session().measure(samples, concurrency=1).cached_prompt_tokens == 0
    assert open_session(enable_prefix_cache=True).measure(samples, concurrency=1).cached_prompt_tokens > 0


def test_warming_up_does_not_fill_the_prefix_cache(open_session):
    samples = [Sample(i, 2, input_ids=tuple(range(i, i + 12))) for i in range(2)]
    session = open_session(enable_prefix_cache=True)
    report, _ = bench(session, samples, command="throughput", source="made up", warmup=5)
    assert report.kv_cache.cached_prompt_tokens == 0
    assert report.request_info.warmup_requests == 5


def test_preemptions_are_counted(open_session):
    # 4 sequences of up to 36 tokens take 9 blocks each; there are 17.
    session = open_session(max_num_blocks=17, scheduler_policy="max_utilization")
    samples = synthetic(4, NormalLengths(8), NormalLengths(28), VOCAB)
    report, measured = bench(session, samples, command="throughput", source="made up", warmup=0)
    assert report.kv_cache.preemptions > 0
    assert report.kv_cache.peak_used_blocks <= 17
    for sample, record in zip(samples, measured.requests, strict=True):
        assert record.token_ids == expected_tokens(sample.input_ids, 28, VOCAB)


def test_limits_can_be_lowered_and_not_raised(open_session):
    measured = open_session(max_batch_size=2, max_num_tokens=8).measure(
        synthetic(6, NormalLengths(10), NormalLengths(5), VOCAB)
    )
    assert max(s.prefill_tokens + s.decode_tokens for s in measured.steps) <= 8
    assert max(s.num_running for s in measured.steps) <= 2
    with pytest.raises(UsageError, match="built for 1 to 4"):
        open_session(max_batch_size=5)
    with pytest.raises(UsageError, match="less than max_batch_size"):
        open_session(max_num_tokens=2)


def test_what_cannot_run_is_refused_first(open_session):
    session = open_session()
    good, long = Sample(0, 4, input_ids=(1,) * 8), Sample(1, 60, input_ids=(1,) * 8)
    with pytest.raises(RequestError, match="max_seq_len is 64"):
        bench(session, [good, long], command="throughput", source="made up")
    assert session.executor.stats.steps == 0
    with pytest.raises(UsageError, match="concurrency of 0"):
        bench(session, [good], command="throughput", source="made up", concurrency=0)
    with pytest.raises(UsageError, match="split over 2 ranks"):
        open_session(tp_size=2)


def _shape(value):
    """A document with its numbers and words replaced by what they are."""
    if isinstance(value, dict):
        return {k: _shape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shape(value[0])] if value else []
    return type(value).__name__


def test_report_has_its_golden_shape_and_says_the_same_in_tables(open_session, tmp_path):
    session = open_session()
    samples = synthetic(3, NormalLengths(5), NormalLengths(4), VOCAB)
    report, measured = bench(session, samples, command="latency", source="3 random", concurrency=1)
    path = tmp_path / "new" / "report.json"
    report.write(path)
    data = json.loads(path.read_text())
    assert Report.model_validate(data) == report
    formulas = data.pop("formulas")
    assert _shape(data) == json.loads(GOLDEN.read_text())
    assert formulas["TPOT"].startswith("(E2E - TTFT) / (N - 1)")

    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        for table in render(report):
            console.print(table)
    text = capture.get()
    for heading in ("ENGINE", "WORLD + RUNTIME", "REQUEST", "PERFORMANCE", "DATASET", "MACHINE", "FORMULAS"):
        assert heading in text
    assert "off, for fairness" in text
    assert "Per Rank Output Throughput" in text
    assert f"{report.performance.system_output_throughput_tok_s:,.2f}" in text
    assert f"{report.streaming_metrics.ttft_percentiles_ms.p99:.2f}" in text

    rows = offline.request_rows(measured.requests)
    assert [r["task_id"] for r in rows] == [0, 1, 2]
    assert rows[0]["arrival_ms"] == 0
    assert [len(r["output_ids"]) for r in offline.output_rows(measured.requests)] == [4, 4, 4]
    assert offline.step_rows(measured.steps)[0]["prefill_tokens"] == 5


def test_no_streaming_and_one_token_each(open_session):
    samples = [Sample(0, 1, input_ids=(1, 2, 3))]
    without, _ = bench(open_session(), samples, command="throughput", source="one", with_streaming=False)
    assert without.streaming_metrics is None
    one, _ = bench(open_session(), samples, command="throughput", source="one")
    assert one.streaming_metrics.avg_tpot_ms is None
    assert len(list(render(without))) == len(list(render(one))) == 9
