"""`trtllm quantize`, and `trtllm convert` with formats that calibrate."""

import json

import pytest

from tests.tiny_models import save_tiny_model
from trtllm_cli import cli
from trtllm_cli.checkpoint import Checkpoint

FEW = ["--calib-size", "4", "--calib-max-seq-length", "32"]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "snapshot"
    save_tiny_model(path, "llama")
    return str(path)


def test_quantize(snapshot, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.call(["quantize", snapshot, "--qformat", "fp8", "--output_dir", "a", "--kv_cache_dtype", "fp8", *FEW]) == 0
    )
    out = capsys.readouterr().out
    for words in ("Wrote a: LlamaForCausalLM", "FP8", "calibrated 128 tokens", "perplexity", "relative error"):
        assert words in out
    assert Checkpoint.open(tmp_path / "a").config.quantization.kv_cache_quant_algo == "FP8"
    args = [
        "--qformat",
        "int4_awq",
        "--awq_block_size",
        "16",
        "--exclude",
        "*.proj",
        "--no-report",
        "--json",
        "-o",
        "b",
    ]
    assert cli.call(["quantize", "--model_dir", snapshot, *args, *FEW]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["convert"]["quant_algo"], said["convert"]["group_size"]) == ("W4A16_AWQ", 16)
    assert said["accuracy"] is None
    assert not (tmp_path / "b" / "report.json").exists()


def test_auto(snapshot, tmp_path, capsys):
    args = ["--auto-quantize-bits", "7", "--autoq-format", "int4_awq, fp8", "--no-report", "-o", str(tmp_path / "c")]
    assert cli.call(["quantize", snapshot, *args, *FEW]) == 0
    assert "bits a weight on average" in capsys.readouterr().out


def test_convert_calibrates(snapshot, tmp_path, capsys):
    assert cli.call(["convert", snapshot, "--qformat", "int8_sq", "-o", str(tmp_path / "c")]) == 0
    assert "calibrated" in capsys.readouterr().out
    assert (tmp_path / "c" / "report.png").is_file()


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "nothing to quantize"),
        (["SNAPSHOT"], 2, "no format is given"),
        (["SNAPSHOT", "--qformat", "fp7"], 2, "did you mean fp8"),
        (["SNAPSHOT", "--qformat", "fp8", "--kv-cache-dtype", "fp4"], 2, "--kv-cache-dtype"),
        (["SNAPSHOT", "--qformat", "fp8", "--calib-dataset", "gone.txt"], 2, "gone.txt"),
        (["SNAPSHOT", "--qformat", "fp8", "--max-ppl-increase", "-1", *FEW], 8, "perplexity rose"),
        (["org/model", "--qformat", "fp8"], 3, "trtllm download org/model"),
    ],
)
def test_errors(snapshot, tmp_path, capsys, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    assert cli.call(["quantize", *(snapshot if a == "SNAPSHOT" else a for a in args)]) == code
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
