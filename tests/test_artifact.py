"""Artifacts appear whole or not at all."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading

import pytest

from trtllm_cli import artifact
from trtllm_cli.artifact import detect, os_errors, read_json, tree_sha256, writing
from trtllm_cli.errors import ArtifactError, OutputExistsError, ResourceError


def finished(path, text='{"architecture": "X"}'):
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def test_the_output_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "a" / "out"
    with writing(out) as partial:
        (partial / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out") as partial:
        (partial / "x").write_text("1")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_kept_without_force_and_replaced_with_it(tmp_path):
    out = finished(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force"), writing(out):
        pass
    with pytest.raises(RuntimeError), writing(out, force=True):
        raise RuntimeError
    assert (out / "config.json").exists()  # a failed replacement keeps the old one
    with writing(out, force=True) as partial:
        (partial / "new").write_text("1")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["new"]


def test_force_never_replaces_what_trtllm_did_not_write(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputExistsError, match="not something that trtllm wrote"),
        writing(tmp_path / "home", force=True),
    ):
        pass
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_a_killed_writer_leaves_nothing_that_looks_finished_and_the_next_one_starts_clean(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from trtllm_cli.artifact import writing\n"
        "with writing(Path(sys.argv[1])) as p:\n"
        "    (p / 'half').write_text('x'); (p / 'config.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == [".out.partial"]
    with writing(tmp_path / "out") as partial:
        assert os.listdir(partial) == []
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_of_one_output(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    held = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ResourceError, match="another process is writing"), writing(tmp_path / "out"):
        pass
    os.close(held)
    assert (tmp_path / ".out.partial").exists()  # it is the other's


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot write"), (errno.EACCES, "cannot write")],
)
def test_the_systems_word_becomes_ours(tmp_path, number, message):
    with pytest.raises(ResourceError, match=message), os_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"), writing(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": '{"model_type": "llama"}'}, "snapshot"),
        ({"config.json": '{"architecture": "LlamaForCausalLM"}'}, "checkpoint"),
        ({"config.json": '{"pretrained_config": {}}'}, "engine"),
    ],
)
def test_detect_directories(tmp_path, files, kind):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert detect(tmp_path) == kind


def test_detect_says_what_is_wrong(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    assert detect(tmp_path / "m.gguf") == "gguf"
    with pytest.raises(ArtifactError, match="give the .gguf file itself|directory of .gguf"):
        detect(tmp_path)
    with pytest.raises(ArtifactError, match="no such file"):
        detect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="has no config.json"):
        detect(tmp_path / "empty")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ArtifactError, match="not a .gguf"):
        detect(tmp_path / "x.txt")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, '"x"'])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match="config.json"):
        read_json(tmp_path / "config.json", ArtifactError)


def hash_threads():
    return [thread for thread in threading.enumerate() if thread.name == "trtllm-sha256"]


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 4567])
def test_a_tree_digest_is_that_of_the_digests_of_the_pieces(tmp_path, monkeypatch, threads, size):
    monkeypatch.setattr(artifact, "PIECE", 1000)
    monkeypatch.setattr(artifact, "_PIECE_CHUNK", 300)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    pieces = [data[i : i + 1000] for i in range(0, size, 1000)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()
    assert tree_sha256(tmp_path / "file", threads) == expected
    assert not hash_threads()


def test_a_piece_is_64_mib():
    """Engines that are there were written with it."""
    assert artifact.PIECE == 64 * 1024 * 1024


def test_hashing_stops_when_it_is_told_to(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    asked = []

    def stopped():
        asked.append(all(thread.daemon for thread in hash_threads()))
        return len(asked) > 3

    assert tree_sha256(tmp_path / "file", 1, stopped) is None
    assert all(asked)
    assert len(asked) == 5  # the thread, and what waits for it
    assert not hash_threads()


def test_an_error_of_a_hashing_thread_is_raised(tmp_path, monkeypatch):
    def preadv(*args):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output"):
        tree_sha256(tmp_path / "file", 2)
