"""Several workers, and a convert that was killed: the same bytes as ever, and nothing done twice."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.tiny_models import save_tiny_model
from trtllm_cli import cli
from trtllm_cli.convert import resume
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import ArtifactError, SnapshotError
from trtllm_cli.tensor_file import TensorFile

OPTIONS = {"tp_size": 2, "pp_size": 3}
RANKS = [f"rank{i}.safetensors" for i in range(6)]
KILLED_AT = "transformer.layers.1.mlp.fc.weight"  # of the second stage's nine weights


@pytest.fixture
def snapshot(tmp_path):
    save_tiny_model(tmp_path / "snapshot", "qwen3", dtype=torch.bfloat16)
    return tmp_path / "snapshot"


@pytest.fixture
def clean(snapshot, tmp_path):
    """What comes of it without a break."""
    convert(snapshot, tmp_path / "clean", ConvertOptions(**OPTIONS))
    return files(tmp_path / "clean")


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def kill(tmp_path, options=OPTIONS, commit_seconds=0):
    """A convert that is killed once the weight KILLED_AT is written."""
    script = f"""
        import os, signal
        from pathlib import Path
        from trtllm_cli.convert import resume
        from trtllm_cli.convert.pipeline import ConvertOptions, convert
        resume.COMMIT_SECONDS = {commit_seconds}
        def progress(name, done, total):
            if name == {KILLED_AT!r}:
                os.kill(os.getpid(), signal.SIGKILL)
        convert(Path("snapshot"), Path("ckpt"), ConvertOptions(**{options}), progress)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "ckpt").exists()
    return tmp_path / ".ckpt.partial"


def written(snapshot, tmp_path, **options):
    """Converts; the weights that were written, and the report."""
    names = []
    report = convert(
        snapshot, tmp_path / "ckpt", ConvertOptions(**{**OPTIONS, **options}), lambda name, *_: names.append(name)
    )
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    return names, report


@pytest.mark.parametrize("more", [{}, {"workers": 3}])
def test_only_what_is_missing_is_written(snapshot, clean, tmp_path, more):
    partial = kill(tmp_path)
    before = {name: os.stat(partial / name) for name in RANKS[:2]}
    names, report = written(snapshot, tmp_path, **more)
    assert files(tmp_path / "ckpt") == clean
    assert names
    assert KILLED_AT not in names
    assert not any("layers.0." in name or "vocab_embedding" in name for name in names)
    assert "transformer.layers.1.mlp.proj.weight" in names
    assert "lm_head.weight" in names
    for name, stat in before.items():
        after = os.stat(tmp_path / "ckpt" / name)
        assert (after.st_ino, after.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    (note,) = [note for note in report.notes if "resuming" in note]
    assert note.startswith("resuming: 2 of 6 ranks and ")
    assert note.endswith(" weights of others are there")


def test_whole_stages_are_found_again(snapshot, clean, tmp_path):
    kill(tmp_path, commit_seconds=1000)
    names, report = written(snapshot, tmp_path)
    assert files(tmp_path / "ckpt") == clean
    assert "resuming: 2 of 6 ranks are there" in report.notes
    assert KILLED_AT in names


@pytest.mark.parametrize("what", ["options", "source", "version", "no resume"])
def test_another_conversion_starts_clean(snapshot, clean, tmp_path, what, monkeypatch):
    kill(tmp_path)
    options = {}
    if what == "options":
        options = {"dtype": "float32"}
    elif what == "source":
        os.utime(snapshot / "model.safetensors", ns=(1, 1))
    elif what == "version":
        monkeypatch.setattr(resume, "__version__", "0.0.0")
    else:
        options = {"resume": False}
    names, report = written(snapshot, tmp_path, **options)
    assert "transformer.vocab_embedding.weight" in names
    assert not any("resuming" in note for note in report.notes)
    if what != "options":
        assert {n: b for n, b in files(tmp_path / "ckpt").items() if n in RANKS} == {n: clean[n] for n in RANKS}


def test_interrupted_at_the_keyboard(snapshot, clean, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "COMMIT_SECONDS", 0)

    def progress(name, done, total):
        if name == KILLED_AT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(snapshot, tmp_path / "ckpt", ConvertOptions(**OPTIONS), progress)
    names, _ = written(snapshot, tmp_path)
    assert KILLED_AT not in names
    assert files(tmp_path / "ckpt") == clean


def test_what_was_left_is_damaged(snapshot, tmp_path):
    partial = kill(tmp_path)
    with (partial / RANKS[2]).open("r+b") as f:
        f.truncate(1000)
    with pytest.raises(ArtifactError, match="not what the interrupted run wrote") as e:
        written(snapshot, tmp_path)
    assert "--no-resume" in str(e.value)
    kill(tmp_path)
    (partial / resume.STATE).write_text("{")
    names, _ = written(snapshot, tmp_path)
    assert "transformer.vocab_embedding.weight" in names


def test_the_command_tells_of_it(snapshot, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["convert", "snapshot", "--output-dir", "ckpt", "--pp-size", "2", "--workers", "2"]
    kill(tmp_path, {"pp_size": 2})
    assert cli.call(args) == 0
    assert "resuming: 0 of 2 ranks and " in capsys.readouterr().err
    (tmp_path / "ckpt").rename(tmp_path / "other")
    kill(tmp_path, {"pp_size": 2})
    assert cli.call([*args, "--no-resume"]) == 0
    assert "resuming" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"tp_size": 2}, {"pp_size": 2, "qformat": "int4_wo"}, {"tp_size": 2, "qformat": "fp8_pc_pt"}]
)
def test_workers_write_the_same_bytes(snapshot, tmp_path, options):
    for workers in (1, 4):
        convert(snapshot, tmp_path / str(workers), ConvertOptions(**options, workers=workers))
    assert files(tmp_path / "1") == files(tmp_path / "4")


def test_the_first_error_is_told(snapshot, tmp_path):
    """Of several weights that are broken, the model's first."""
    with TensorFile(snapshot / "model.safetensors") as file:
        places = {n: file._data_start + file._offsets[n] for n in file.tensors if n.endswith("up_proj.weight")}
    with (snapshot / "model.safetensors").open("r+b") as f:
        for place in places.values():
            f.seek(place)
            f.write(b"\xff\xff" * 8)
    for workers in (1, 3):
        with pytest.raises(SnapshotError, match=r"layers\.0\.mlp\.up_proj.* NaN"):
            convert(snapshot, tmp_path / "ckpt", ConvertOptions(workers=workers))
        assert [p.name for p in tmp_path.iterdir()] == ["snapshot"]
