"""`trtllm build`: what it prints."""

import json


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
