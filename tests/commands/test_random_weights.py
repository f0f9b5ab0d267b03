"""`--random-weights` of convert and bench, and an engine of such weights, which has no tokenizer."""

import json

import pytest

from tests.commands.conftest import CONFIG
from trtllm_cli.bench.report import Report
from trtllm_cli.convert import random_weights
from trtllm_cli.errors import UsageError

SMALL = ("--num-requests", "2", "--input-len", "4", "--output-len", "3", "--warmup", "0", "--max-seq-len", "32")


@pytest.fixture
def shape(tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights, "POOL", 10_007)
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    return tmp_path / "tiny.json"


def test_convert_build_and_run_with_token_ids(trtllm, shape, tmp_path):
    ckpt, engine = tmp_path / "ckpt", tmp_path / "engine"
    said = trtllm("convert", "--random-weights", shape, "-o", ckpt, "--qformat", "fp8", "--num-layers", 1, "--seed", 3)
    assert said.code == 0
    assert "the weights are random, of seed 3" in said.out
    assert {p.name for p in ckpt.iterdir()} == {"config.json", "SHA256SUMS", "rank0.safetensors"}
    assert trtllm("build", "--checkpoint-dir", ckpt, "--output-dir", engine, "--max-seq-len", 32).code == 0
    said = trtllm("run", "--engine-dir", engine, "--input-token-ids", "1,2,3", "--max-tokens", 4, "--ignore-eos")
    assert said.code == 0
    assert len([int(token) for token in said.out.split()]) == 4
    assert trtllm("bench", "latency", "--engine-dir", engine, *SMALL[:-2]).code == 0


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_bench_makes_an_engine_once(trtllm, shape, tmp_path, command):
    args = ("bench", command, "--random-weights", shape, "--num-layers", 1, "--qformat", "int8_wo", *SMALL, "--json")
    said = trtllm(*args)
    assert said.code == 0
    assert "convert: " in said.err
    assert Report.model_validate_json(said.out).request_info.num_requests == 2
    (engine,) = (tmp_path / "cache" / "engines" / "tiny-random").iterdir()
    config = json.loads((engine / "config.json").read_text())["pretrained_config"]
    assert (config["num_hidden_layers"], config["quantization"]["quant_algo"]) == (1, "W8A16")
    again = trtllm(*args)
    assert again.code == 0
    assert "convert: " not in again.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert", "snapshot", "--random-weights", "llama-3.1-8b"), "--random-weights and SOURCE are both given"),
        (("convert", "snapshot", "--seed", "1"), "--seed is for --random-weights"),
        (("convert", "--random-weights", "llama-3.1-8b", "--num-layers", "99"), "is 99, and the model has 32"),
        (("convert", "--random-weights", "llama-3.1-8b", "--seed", "-1"), "--seed is -1"),
        (("convert", "--random-weights", "llama"), "llama-3.1-8b, llama-3.2-1b"),
        (("bench", "latency", "--random-weights", "llama"), "llama-3.1-8b, llama-3.2-1b"),
        (("bench", "latency", "--random-weights", "qwen3-8b", "--model", "x"), "--random-weights and --model are both"),
        (("bench", "latency", "--engine-dir", "x", "--qformat", "fp8"), "--qformat is for --random-weights"),
        (("bench", "latency", "--random-weights", "qwen3-8b", "--offline"), "--offline is chosen when a model is"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(trtllm, shape, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    said = trtllm(*args)
    assert said.code == UsageError.exit_code
    assert message in said.err
