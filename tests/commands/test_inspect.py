"""`trtllm inspect`: every kind of artifact, drawings, and damage found by --verify."""

import json

import pytest

from tests.commands.conftest import LIMITS, flip
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize(
    ("name", "following"),
    [("snapshot", "trtllm convert"), ("checkpoint", "trtllm build"), ("engine", "trtllm run")],
)
def test_what_it_is_and_what_comes_next(tiny, trtllm, name, following):
    said = trtllm("inspect", tiny / name, "--json", "--tensors")
    assert said.code == 0
    found = json.loads(said.out)
    assert found["kind"] == name
    assert found["next_command"].startswith(following)
    assert found["tensors"]
    assert f"next: {following}" in trtllm("inspect", tiny / name).out


@pytest.mark.parametrize("name", ["snapshot", "checkpoint", "engine"])
def test_graph_and_drawing(tiny, trtllm, name, tmp_path):
    assert "embedding" in trtllm("inspect", tiny / name, "--graph").out
    assert trtllm("inspect", tiny / name, "--draw", tmp_path / "g.svg").code == 0
    assert "<svg" in (tmp_path / "g.svg").read_text()
    said = trtllm("inspect", tiny / name, "--draw", "/proc/g.svg")
    assert said.code == 6
    assert "choose another --draw" in said.err


def test_ranks_that_work_together(tmp_path, trtllm):
    """Of experts that `convert` divides among ranks, in checkpoint and engine."""
    save_tiny_model(tmp_path / "snapshot", "qwen3_moe")
    checkpoint, engine = tmp_path / "ckpt", tmp_path / "engine"
    convert = ("convert", tmp_path / "snapshot", "--output-dir", checkpoint, "--tp-size", 4)
    assert "(tp_size 4, pp_size 1, moe_tp_size 2, moe_ep_size 2)" in trtllm(*convert, "--moe-ep-size", 2).out
    report = json.loads(trtllm(*convert, "--moe_tp_size", 2, "--moe_ep_size", 2, "--force", "--json").out)
    assert (report["tp_size"], report["moe_tp_size"], report["moe_ep_size"]) == (4, 2, 2)
    built = trtllm("build", "--checkpoint-dir", checkpoint, "--output-dir", engine, "--kernels", "torch", *LIMITS)
    assert built.code == 0
    for artifact in (checkpoint, engine):
        assert json.loads(trtllm("inspect", artifact, "--json").out)["rank_groups"] == {
            "tp": [[0, 1, 2, 3]], "pp": [[0], [1], [2], [3]], "moe_tp": [[0, 2], [1, 3]], "moe_ep": [[0, 1], [2, 3]],
        }  # fmt: skip
        lines = [line.split() for line in trtllm("inspect", artifact).out.replace("│", " ").splitlines()]
        assert ["moe_tp", "2", "0,2", "1,3"] in lines
        assert ["moe_ep", "2", "0,1", "2,3"] in lines
    said = trtllm(*convert, "--force", "--moe-ep-size", 4)
    assert (said.code, "6 experts cannot be divided among 4 ranks" in said.err) == (2, True)
    assert "fix: with --tp-size 4 it can be 1, 2" in said.err


def test_ranks_without_experts(tiny, trtllm):
    found = json.loads(trtllm("inspect", tiny / "halves", "--json").out)
    assert found["rank_groups"] == {"tp": [[0, 1]], "pp": [[0], [1]]}
    assert "rank_groups" not in json.loads(trtllm("inspect", tiny / "checkpoint", "--json").out)


@pytest.mark.parametrize(("name", "file"), [("checkpoint", "rank0.safetensors"), ("engine", "rank0.engine")])
def test_verify_finds_an_altered_byte(copy, trtllm, name, file):
    artifact = copy(name)
    assert trtllm("inspect", artifact, "--verify").code == 0
    flip(artifact / file)
    assert trtllm("inspect", artifact).code == 0
    said = trtllm("inspect", artifact, "--verify")
    assert said.code == 3
    assert f"{file} was altered" in said.err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["/nowhere"], 3, "no such file or directory"),
        (["/etc/passwd"], 3, "not a .gguf"),
        (["engine", "--rank", "5"], 2, "there is no rank 5"),
    ],
)
def test_what_cannot_be_inspected(tiny, trtllm, args, code, words, monkeypatch):
    monkeypatch.chdir(tiny)
    said = trtllm("inspect", *args)
    assert said.code == code
    assert words in said.err
