import json

import pytest

from trtllm_cli import artifact
from trtllm_cli.errors import SnapshotError
from trtllm_cli.snapshot import (
    MANIFEST,
    FileEntry,
    Manifest,
    Snapshot,
    cache_dir,
    cached_commit,
    is_safe_name,
    read_manifest,
    remember_commit,
    repo_dir,
    write_manifest,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path):
    path = tmp_path / "snapshot"
    (path / "sub").mkdir(parents=True)
    files = {"config.json": b'{"model_type": "llama"}', "sub/weights.bin": b"weights"}
    entries = {}
    for name, data in files.items():
        (path / name).write_bytes(data)
        entries[name] = FileEntry(size=len(data), sha256=artifact.sha256(path / name))
    write_manifest(
        path, Manifest(repo_id="org/model", revision="main", commit=COMMIT, files=entries, not_fetched={"x.gguf": 7})
    )
    return path


def test_a_manifest_reads_back_as_written(snapshot):
    manifest = Snapshot.open(snapshot).manifest
    assert manifest == read_manifest(snapshot)
    assert manifest.names == ["config.json", "sub/weights.bin", "x.gguf"]
    assert manifest.size == 30
    assert sorted(json.loads((snapshot / MANIFEST).read_text())) == [
        "commit", "files", "format_version", "not_fetched", "repo_id", "revision",
    ]  # fmt: skip
    assert artifact.detect(snapshot) == "snapshot"


def test_a_whole_snapshot_verifies(snapshot):
    Snapshot.open(snapshot).verify()


def test_verify_names_each_damaged_file_and_the_command_that_mends_it(snapshot):
    (snapshot / "config.json").write_bytes(b'{"model_type": "lLama"}')
    (snapshot / "sub" / "weights.bin").unlink()
    Snapshot.open(snapshot)
    with pytest.raises(SnapshotError, match=r"damaged: sub/weights\.bin is missing\n") as caught:
        Snapshot.open(snapshot).verify(hashes=False)
    assert f"trtllm download org/model --revision {COMMIT} --verify --output-dir {snapshot}" == caught.value.fix
    with pytest.raises(SnapshotError, match=r"config\.json has the right size, but its bytes were altered; sub/weigh"):
        Snapshot.open(snapshot).verify()


def test_a_directory_without_a_manifest_is_a_snapshot_that_cannot_be_verified(snapshot):
    (snapshot / MANIFEST).unlink()
    found = Snapshot.open(snapshot)
    assert found.manifest is None
    assert found.model_path == snapshot
    with pytest.raises(SnapshotError, match="nothing to verify it against"):
        found.verify()


def test_a_missing_directory(tmp_path):
    with pytest.raises(SnapshotError, match="no such snapshot directory"):
        Snapshot.open(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "main"}, "field `commit`"),
        ({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, "leads out of the snapshot"),
        ({"files": {"x": {"size": -1, "sha256": "0" * 64}}}, "size"),
        ({"format_version": 2}, "format_version"),
        ({"token": "x"}, "field `token` is unknown"),
    ],
)
def test_a_damaged_manifest_is_refused(snapshot, change, message):
    data = json.loads((snapshot / MANIFEST).read_text())
    (snapshot / MANIFEST).write_text(json.dumps({**data, **change}))
    with pytest.raises(SnapshotError, match=message):
        Snapshot.open(snapshot)


def test_the_model_path_of_a_gguf_snapshot_is_the_file(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert Snapshot(tmp_path, None).model_path == tmp_path / "a.gguf"


@pytest.mark.parametrize("name", ["a", "a/b.c", ".hidden", "ü.json", "a b"])
def test_names_that_stay_inside(name):
    assert is_safe_name(name)


@pytest.mark.parametrize("name", ["", "/a", "..", "a/..", "a/./b", "a//b", "a/", "C:x", "a\\b", "a\0b", "a\nb"])
def test_names_that_lead_out(name):
    assert not is_safe_name(name)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TRTLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "trtllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "trtllm"


def test_the_cache_remembers_which_commit_a_revision_was(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path))
    assert cached_commit("org/model", None) is None
    remember_commit("org/model", "main", COMMIT)
    remember_commit("org/model", "v1", COMMIT[::-1])
    assert cached_commit("org/model", None) == COMMIT
    assert cached_commit("org/model", "v1") == COMMIT[::-1]
    assert cached_commit("org/model", "f" * 40) == "f" * 40
    assert [p.name for p in repo_dir("org/model").iterdir()] == ["refs.json"]
