"""`trtllm build`: what it prints."""

import json

import pytest

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


# Timing caches.


@pytest.fixture
def timer(monkeypatch, tmp_path):
    """A GPU, and no compiler."""
    pytest.importorskip("triton")
    from tests.fake_timer import FakeTimer
    from tests.interpreter_device import fake_compile
    from trtllm_cli.build.backends import cuda, cuda_timing

    fake = FakeTimer()
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_timing, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_timing, "find_timer", lambda arch: fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return fake


def test_timing_caches(tiny, trtllm, tmp_path, timer):
    cache, engine = tmp_path / "cache.json", tmp_path / "engine"
    args = ("build", "--checkpoint-dir", tiny / "checkpoint", "--backend", "cuda", "--arch", "sm_90a", *LIMITS)
    said = trtllm(*args, "--output-dir", engine, "--output-timing-cache", cache)
    assert said.code == 0
    assert "note: linears: " in said.err
    assert " shapes timed on NVIDIA H200 in " in said.err
    timed = len(timer.calls)
    said = trtllm(*args, "--output-dir", tmp_path / "second", "--input_timing_cache", cache, "--json")
    assert said.code == 0
    assert len(timer.calls) == timed
    report = json.loads(said.out)
    tactics = report["choices"]["linear_tactics"]
    assert tactics["from"] == {"timing cache": len(tactics["shapes"])}
    assert not any("timed" in note for note in report["notes"])
    inspected = trtllm("inspect", tmp_path / "second")
    assert '"linear_tactics"' in inspected.out
    assert json.loads(trtllm("inspect", tmp_path / "second", "--json").out)["choices"] == report["choices"]
    for name in ("engine", "second"):
        assert (tmp_path / name / "rank0.engine").read_bytes() == (engine / "rank0.engine").read_bytes()


def test_a_note_where_quantized_weights_become_bfloat16(tiny, trtllm):
    args = (
        "build",
        "--checkpoint-dir",
        tiny / "checkpoint",
        "--backend",
        "cuda",
        "--weight-dtype",
        "int4",
        "--dry-run",
    )
    said = trtllm(*args, "--group-size", "16", "--json")
    assert said.code == 0, said.err
    notes = [note for note in json.loads(said.out)["notes"] if "become bfloat16" in note]
    assert notes[0].endswith("no GPU kernel for int4 in groups of 16: convert again with --group-size 64")
    for size in ("32", "64"):
        said = trtllm(*args, "--group-size", size, "--json")
        assert said.code == 0, said.err
        notes = [note for note in json.loads(said.out)["notes"] if "become bfloat16" in note]
        assert all(note.endswith(" inputs") for note in notes)  # of layers that have no whole groups


def test_fixed_tactics_are_for_gpus(tiny, trtllm, tmp_path):
    args = ("build", "--checkpoint-dir", tiny / "checkpoint", "--output-dir", tmp_path / "engine", "--fixed-tactics")
    said = trtllm(*args, "--backend", "cpu")
    assert said.code == 2
    assert "--fixed-tactics is for GPUs, and this engine is for the CPU" in said.err
    said = trtllm(*args, "--backend", "cuda", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert not json.loads(said.out)["choices"]["linear_tactics"]["settled_at_first_load"]


@pytest.mark.parametrize("flag", ["--input-timing-cache", "--output-timing-cache"])
def test_timing_caches_are_for_gpus(tiny, trtllm, tmp_path, flag):
    args = ("build", "--checkpoint-dir", tiny / "checkpoint", "--output-dir", tmp_path / "engine", flag, tmp_path / "t")
    said = trtllm(*args, "--backend", "cpu")
    assert said.code == 2
    assert f"{flag} is for GPUs, and this engine is for the CPU" in said.err
    assert f"in:  {flag}" in said.err
    assert "fix: add --backend cuda" in said.err
    (tmp_path / "t").write_text('{"format_version": 1, "linears": [NaN]}')
    said = trtllm(*args, "--backend", "cuda")
    assert said.code == 3
    assert "field `linears.0`" in said.err
    assert f"in:  {tmp_path / 't'}" in said.err
    assert "fix: give a file that trtllm build --output-timing-cache wrote, or leave the flag out" in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_dry_run_writes_no_timing_cache(tiny, trtllm, tmp_path):
    args = ("--checkpoint-dir", tiny / "checkpoint", "--backend", "cuda", "--dry-run")
    said = trtllm("build", *args, "--output-timing-cache", tmp_path / "t")
    assert said.code == 2
    assert "--dry-run writes nothing" in said.err
    assert not list(tmp_path.iterdir())
