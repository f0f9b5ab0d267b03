"""`trtllm inspect`: every kind of artifact, drawings, and damage found by --verify."""

import json

import pytest

from tests.commands.conftest import flip


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
