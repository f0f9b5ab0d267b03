"""`trtllm bench`, from the command line to what it prints and writes."""

import json
import subprocess
import sys

import pytest

from tests.bench.test_offline import VOCAB, make_engine
from tests.fake_runner import FakeRunner
from trtllm_cli.bench.report import Report
from trtllm_cli.bench.workload import read_dataset
from trtllm_cli.cli import call
from trtllm_cli.engine import Engine


@pytest.fixture
def engine(monkeypatch):
    """An engine at ENGINE, on a runner whose every token can be foretold."""
    monkeypatch.setattr(Engine, "open", classmethod(lambda cls, path: make_engine(path)))
    monkeypatch.setattr(Engine, "verify", lambda self, rank, *how: None)
    monkeypatch.setattr("trtllm_cli.run.load.load_runner", lambda *args, **kwargs: FakeRunner(VOCAB))


def out(capsys):
    return capsys.readouterr().out


def test_throughput_prints_and_writes_the_same(engine, capsys, tmp_path):
    files = {name: tmp_path / "new" / f"{name}.json" for name in ("report", "output", "request")}
    log = tmp_path / "steps.jsonl"
    args = [
        "bench",
        "throughput",
        "--engine-dir",
        "ENGINE",
        "--num-requests",
        "5",
        "--input-len",
        "6",
        "--output-len",
        "3",
    ]
    args += ["--report_json", files["report"], "--output_json", files["output"], "--request_json", files["request"]]
    args += ["--iteration_log", log, "--concurrency", "2", "--scheduler_policy", "max_utilization", "--json"]
    assert call([str(a) for a in args]) == 0
    printed = Report.model_validate_json(out(capsys))
    assert printed == Report.model_validate_json(files["report"].read_text())
    assert printed.command == "throughput"
    assert printed.request_info.num_requests == 5
    assert printed.request_info.concurrency == 2
    assert printed.world_info.scheduling_policy == "max_utilization"
    assert not printed.world_info.enable_prefix_cache
    assert printed.dataset.source == "random tokens, seed 0"
    assert [len(r["output_ids"]) for r in json.loads(files["output"].read_text())] == [3] * 5
    assert [r["input_tokens"] for r in json.loads(files["request"].read_text())] == [6] * 5
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(steps) == printed.steps.num_steps
    assert sum(s["new_tokens"] for s in steps) == 15


def test_what_the_gpu_is_found_to_compute_wrongly_is_told(engine, capsys, monkeypatch):
    monkeypatch.setattr("trtllm_cli.run.load.gpu_notes", lambda _: ["a kernel computes wrong numbers"])
    lengths = ["--input-len", "6", "--output-len", "2"]
    assert call(["bench", "throughput", "--engine-dir", "ENGINE", "--num-requests", "1", *lengths]) == 0
    assert "note: a kernel computes wrong numbers\n" in capsys.readouterr().err


def test_latency_is_one_after_another(engine, capsys):
    assert call(["bench", "latency", "--engine-dir", "ENGINE", "--input-len", "4", "--output-len", "3", "--json"]) == 0
    report = Report.model_validate_json(out(capsys))
    assert report.request_info.num_requests == 10
    assert report.request_info.concurrency == 1
    assert report.request_info.avg_num_concurrent_requests <= 1
    assert report.streaming_metrics is not None


def test_tables(engine, capsys):
    assert (
        call(
            ["bench", "latency", "--engine-dir", "ENGINE", "--num-requests", "2", "--output-len", "2", "--input-len=3"]
        )
        == 0
    )
    text = out(capsys)
    for words in (
        "Request Throughput (req/sec)",
        "TTFT",
        "P99",
        "(E2E - TTFT) / (N - 1)",
        "greedy, end-of-sequence ignored",
    ):
        assert words in text


def test_a_prepared_dataset_is_read(engine, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    prepare = ["bench", "prepare-dataset", "token-unif-dist", "--num-requests", "4", "--engine-dir", "ENGINE"]
    lengths = ["--input-min", "2", "--input-max", "9", "--output-min", "1", "--output-max", "5"]
    assert call([*prepare, *lengths, "--output", str(data)]) == 0
    samples = read_dataset(data)
    assert max(t for s in samples for t in s.input_ids) < VOCAB
    assert call(["bench", "throughput", "--engine-dir", "ENGINE", "--dataset", str(data), "--json"]) == 0
    report = Report.model_validate_json(out(capsys))
    assert report.dataset.source == str(data)
    assert report.dataset.osl_stats.average == sum(s.output_tokens for s in samples) / 4


def test_norm_dist_to_standard_output(capsys):
    args = ["--num-requests", "3", "--input-mean", "5", "--output-mean", "7", "--vocab-size", "10"]
    assert call(["bench", "prepare-dataset", "token-norm-dist", *args]) == 0
    rows = [json.loads(line) for line in out(capsys).splitlines()]
    assert [list(row) for row in rows] == [["task_id", "input_ids", "output_tokens"]] * 3
    assert [(len(row["input_ids"]), row["output_tokens"]) for row in rows] == [(5, 7)] * 3


def test_real_text_kept_as_text(capsys, tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    real = ["bench", "prepare-dataset", "real-dataset", str(tmp_path / "t.txt"), "--output-mean", "4"]
    assert call([*real, "--keep-text"]) == 0
    assert [json.loads(line)["prompt"] for line in out(capsys).splitlines()] == ["one", "two"]
    assert call(real) == 2
    assert call([*real, "--keep-text", "--input-mean", "4"]) == 2
    assert call([*real, "--input-stdev", "4"]) == 2


def test_real_text_with_a_tokenizer(capsys, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "t.txt").write_text("a b\na a a b\n")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    real = ["bench", "prepare-dataset", "real-dataset", str(tmp_path / "t.txt"), "--output-mean", "4"]
    assert call([*real, "--tokenizer", str(tmp_path)]) == 0
    assert [json.loads(line)["input_ids"] for line in out(capsys).splitlines()] == [[0, 1], [0, 0, 0, 1]]
    assert call([*real, "--tokenizer", str(tmp_path), "--input-mean", "3"]) == 0
    assert [json.loads(line)["input_ids"] for line in out(capsys).splitlines()] == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["throughput"], 2, "give an engine or a model"),
        (["throughput", "--engine-dir", "E", "--model", "M"], 2, "not both"),
        (["throughput", "--engine-dir", "E", "--dataset", "d", "--input-len", "3"], 2, "a dataset has its own lengths"),
        (
            ["throughput", "--engine-dir", "E", "--scheduler-policy", "max_utilisation"],
            2,
            "did you mean max_utilization?",
        ),
        (["throughput", "--engine-dir", "E", "--concurrency", "0"], 2, "--concurrency"),
        (["throughput", "--engine-dir", "E", "--dataset", "none.jsonl"], 2, "no such dataset"),
        (["throughput", "--engine-dir", "E", "--input-len", "60"], 7, "the engine takes 40"),
        (
            ["prepare-dataset", "token-norm-dist", "--num-requests", "1", "--input-mean", "1", "--output-mean", "1"],
            2,
            "--vocab-size",
        ),
    ],
)
def test_errors_name_the_flag(engine, capsys, args, code, says):
    assert call(["bench", *args]) == code
    assert says in capsys.readouterr().err


def test_text_without_a_tokenizer(engine, capsys, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "Hello", "output_tokens": 2}\n')
    assert call(["bench", "throughput", "--engine-dir", str(tmp_path), "--dataset", str(data)]) == 2
    assert "carries no tokenizer" in capsys.readouterr().err


def test_what_cannot_be_written_is_said(engine, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    args = ["--num-requests", "1", "--input-mean", "1", "--output-mean", "1", "--vocab-size", "9"]
    assert call(["bench", "prepare-dataset", "token-norm-dist", *args, "--output", str(tmp_path / "file" / "x")]) == 6


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from trtllm_cli.cli import call
        call(["bench", "throughput", "--help"])
        heavy = {"torch", "numpy", "tokenizers", "transformers"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Report TTFT" in done.stdout
