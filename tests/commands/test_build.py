"""`trtllm build`: what it prints."""

import json

from tests.commands.conftest import LIMITS


def test_a_dry_run_writes_nothing(tiny, trtllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = trtllm("build", "--checkpoint-dir", tiny / "checkpoint", "--dry-run", "--kernels", "torch", "--json")
    assert said.code == 0
    plan = json.loads(said.out)
    assert plan["build_config"]["max_seq_len"] == 256
    assert plan["memory_bytes"][0]["kv_cache_full"] > 0
    assert not list(tmp_path.iterdir())


def test_the_next_command_is_said(tiny, trtllm, tmp_path):
    out = tmp_path / "engine"
    args = ("--checkpoint_dir", tiny / "checkpoint", "--output_dir", out, "--kernels", "torch", "--max_batch_size", "2")
    said = trtllm("build", *args)
    assert said.code == 0
    assert f"next: trtllm run --engine-dir {out}" in said.out
    assert json.loads((out / "config.json").read_text())["build_config"]["max_batch_size"] == 2


def test_workers(tiny, trtllm, tmp_path):
    args = ("build", "--checkpoint-dir", tiny / "halves", "--kernels", "torch", *LIMITS)
    built = trtllm(*args, "--output-dir", tmp_path / "engine", "--workers", "2")
    assert built.code == 0
    assert f"next: trtllm run --engine-dir {tmp_path / 'engine'} --launch" in built.out
    for name in ("rank0.engine", "rank1.engine", "config.json"):
        assert (tmp_path / "engine" / name).read_bytes() == (tiny / "two-ranks" / name).read_bytes()
    said = trtllm(*args, "--output-dir", tmp_path / "none", "--workers", "0")
    assert said.code == 2
    assert "workers is 0, it must be at least 1" in said.err
    assert "in:  --workers" in said.err
    assert "fix: give 1 or more" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
