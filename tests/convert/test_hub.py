import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.fake_hub import FakeHub, Fault, llama_files, pattern_bytes, sha256
from trtllm_cli.convert import hub as hub_module
from trtllm_cli.convert import transfer
from trtllm_cli.convert.file_selection import select
from trtllm_cli.convert.hub import DownloadOptions, download
from trtllm_cli.convert.hub_api import check_repo_id, check_token
from trtllm_cli.convert.retry import Patience, asked_wait
from trtllm_cli.convert.transfer import Progress
from trtllm_cli.errors import DownloadError, OutputExistsError, ResourceError, SnapshotError, UsageError
from trtllm_cli.snapshot import MANIFEST, Snapshot, cached_commit, repo_dir

TEMPLATE = "additional_chat_templates/tool.jinja"
USUAL = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
QUICK = Patience(timeout=10, attempts=3, first_wait=0.01, longest_wait=0.02)
IMPATIENT = dataclasses.replace(QUICK, timeout=0.5)


class Notes(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.notes = []
        self.over_network = 0
        self.here = 0

    def advance(self, name, count):
        self.over_network += count

    def skip(self, name, count):
        self.here += count

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub().running() as hub:
        yield hub


def fetch(fake, repo_id="org/model", progress=None, patience=QUICK, **options):
    return download(repo_id, DownloadOptions(endpoint=fake.endpoint, patience=patience, **options), progress)


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)


def test_a_download_takes_what_convert_reads_and_nothing_twice(fake):
    files = llama_files()
    commit = fake.add("org/model", files)
    progress = Notes()
    result = fetch(fake, progress=progress)
    assert result.path == repo_dir("org/model") / commit
    assert names(result.path) == USUAL
    assert all((result.path / n).read_bytes() == files[n] for n in USUAL)
    assert sorted(result.fetched) == USUAL
    assert progress.over_network == sum(len(files[n]) for n in USUAL)
    assert progress.notes == []


def test_the_manifest_says_what_is_there_and_what_else_the_repository_has(fake):
    files = llama_files()
    commit = fake.add("org/model", files)
    data = json.loads((fetch(fake).path / MANIFEST).read_text())
    assert data["repo_id"] == "org/model"
    assert (data["revision"], data["commit"]) == ("main", commit)
    assert data["files"]["config.json"] == {"size": 23, "sha256": sha256(files["config.json"])}
    assert data["not_fetched"]["pytorch_model.bin"] == 5000
    assert fake.endpoint not in json.dumps(data)


def test_a_second_download_fetches_nothing(fake):
    fake.add("org/model", llama_files())
    fetch(fake)
    fake.log.clear()
    result = fetch(fake)
    assert result.fetched == ()
    assert [r.path for r in fake.log] == ["/api/models/org/model/revision/main"]


def test_a_commit_that_is_here_needs_no_network(fake):
    commit = fake.add("org/model", llama_files())
    fetch(fake)
    fake.log.clear()
    assert fetch(fake, revision=commit).fetched == ()
    assert fake.log == []


def test_shards_are_fetched_side_by_side(fake):
    shards = {f"model-0000{i}-of-00004.safetensors": pattern_bytes(20_000, i) for i in range(1, 5)}
    fake.add("org/model", {"config.json": b"{}", "model.safetensors.index.json": b"{}", **shards})
    fake.rate = 50_000
    result = fetch(fake, workers=3)
    assert fake.most_at_once == 3
    assert all((result.path / n).read_bytes() == data for n, data in shards.items())


def test_bin_weights_are_taken_where_there_are_no_safetensors(fake):
    files = llama_files()
    del files["model.safetensors"]
    fake.add("org/model", {**files, "training_args.bin": b"x"})
    assert names(fetch(fake).path) == ["README.md", "config.json", "pytorch_model.bin", "tokenizer.json"]


def test_include_and_exclude(fake):
    fake.add("org/model", llama_files())
    include, exclude = ("*.json", "onnx/"), ("tokenizer*",)
    assert names(fetch(fake, include=include, exclude=exclude).path) == ["config.json", "onnx/model.onnx"]


def test_more_files_of_the_same_commit_join_the_snapshot(fake):
    fake.add("org/model", llama_files())
    fetch(fake)
    result = fetch(fake, include=("onnx/*", "config.json"))
    assert result.fetched == ("onnx/model.onnx",)
    assert names(result.path) == [*USUAL[:2], "model.safetensors", "onnx/model.onnx", "tokenizer.json"]
    Snapshot.open(result.path).verify()


def test_a_gguf_repository(fake):
    fake.add("org/model-GGUF", {"README.md": b"#", "m-Q4_K_M.gguf": b"GGUF" * 1000, "m-Q8_0.gguf": b"GGUF" * 1500})
    with pytest.raises(DownloadError, match=r'--include "m-Q4_K_M.gguf"'):
        fetch(fake, "org/model-GGUF")
    result = fetch(fake, "org/model-GGUF", include=("*Q4_K_M.gguf",))
    assert result.path.name == "m-Q4_K_M.gguf"
    assert names(result.snapshot.path) == ["m-Q4_K_M.gguf"]


def test_a_pattern_that_matches_nothing_is_an_error(fake):
    fake.add("org/model", llama_files())
    with pytest.raises(DownloadError, match=r"no file .* matches '\*\.gguf'(.|\n)*model\.safetensors"):
        fetch(fake, include=("*.gguf",))
    with pytest.raises(DownloadError, match="--exclude"):
        fetch(fake, exclude=("*",))


@pytest.mark.parametrize(
    ("repo", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors", "params.json"], ["model.safetensors", "params.json"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["a.safetensors", "sub/b.safetensors", "x.gguf", "y.pth"], ["a.safetensors"]),
        (["pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.bin"], None),
        (["model.safetensors", "pytorch_model.bin.index.json"], ["model.safetensors"]),
        (["model.safetensors", TEMPLATE, "o/x.jinja"], [TEMPLATE, "model.safetensors"]),
        (["gptq_model-4bit.safetensors", "tokenizer.model"], ["gptq_model-4bit.safetensors", "tokenizer.model"]),
    ],
)
def test_the_usual_selection(repo, chosen):
    assert select(repo, (), (), "org/model") == (chosen or repo[:2])


def test_output_dir(fake, tmp_path):
    fake.add("org/model", llama_files())
    out = tmp_path / "deep" / "snapshot"
    assert fetch(fake, output_dir=out).path == out
    assert [p.name for p in out.parent.iterdir()] == ["snapshot"]
    assert cached_commit("org/model", "main") is None
    assert fetch(fake, output_dir=out).fetched == ()


def test_an_output_dir_of_another_commit_is_replaced_only_by_force(fake, tmp_path):
    old = fake.add("org/model", {**llama_files(), "vocab.txt": b"old"})
    fetch(fake, output_dir=tmp_path / "out")
    new = fake.repos["org/model"].commit(llama_files())
    with pytest.raises(OutputExistsError, match=old):
        fetch(fake, output_dir=tmp_path / "out")
    assert fetch(fake, output_dir=tmp_path / "out", force=True).manifest.commit == new
    assert names(tmp_path / "out") == USUAL
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_an_output_dir_with_other_things_in_it_is_never_touched(fake, tmp_path, force):
    fake.add("org/model", llama_files())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="did not download"):
        fetch(fake, output_dir=tmp_path / "mine", force=force)
    assert names(tmp_path / "mine") == ["config.json"]


def test_force_fetches_everything_again(fake):
    fake.add("org/model", llama_files())
    fetch(fake)
    assert sorted(fetch(fake, force=True).fetched) == USUAL


# Interrupted


def start_download(fake, out, *more):
    environment = {**os.environ, "HF_ENDPOINT": fake.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    command = [sys.executable, "-m", "trtllm_cli", "download", "org/model", "--output-dir", str(out), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_bytes(path, count, seconds=20):
    end = time.monotonic() + seconds
    while not (path.is_file() and path.stat().st_size >= count):
        assert time.monotonic() < end, f"{path} never had {count} bytes"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_where_it_stopped(fake, tmp_path, how):
    files = llama_files(**{"model.safetensors": pattern_bytes(2_000_000)})
    fake.add("org/model", files)
    fake.rate = 1_000_000
    out = tmp_path / "out"
    part = tmp_path / ".out.partial" / "model.safetensors.incomplete"
    with start_download(fake, out) as process:
        wait_for_bytes(part, 300_000)
        process.send_signal(how)
        process.communicate(timeout=20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert not out.exists()
    have = part.stat().st_size
    assert 300_000 <= have < 2_000_000
    fake.rate = None
    with start_download(fake, out, "--json") as process:
        stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert [r.start for r in fake.requests("model.safetensors")] == [0, have]
    assert json.loads(stdout)["files"]["model.safetensors"]["sha256"] == sha256(files["model.safetensors"])
    assert names(out) == USUAL
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def interrupted(fake, out, at=100_000, name="model.safetensors"):
    """Leaves the partial directory of a download that broke in the middle of `name`."""
    fake.faults[name] = [Fault(cut_after=at), *[Fault(status=503)] * 3]
    with pytest.raises(DownloadError, match=f"goes on from {at} bytes"):
        fetch(fake, output_dir=out)
    fake.log.clear()
    fake.faults.clear()
    return out.with_name(f".{out.name}.partial") / f"{name}.incomplete"


def test_a_resumed_download_asks_only_for_the_rest(fake, tmp_path):
    files = llama_files()
    fake.add("org/model", files)
    part = interrupted(fake, tmp_path / "out")
    assert json.loads(part.with_name(part.name + ".json").read_text()) == {
        "oid": sha256(files["model.safetensors"]),
        "size": 300_000,
        "etag": sha256(files["model.safetensors"]),
    }
    progress = Notes()
    result = fetch(fake, output_dir=tmp_path / "out", progress=progress)
    assert [r.start for r in fake.requests("model.safetensors")] == [100_000]
    assert (result.path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert progress.over_network + progress.here == result.manifest.size


def test_a_part_that_was_altered_is_noticed_and_fetched_again(fake, tmp_path):
    files = llama_files()
    fake.add("org/model", files)
    part = interrupted(fake, tmp_path / "out")
    data = bytearray(part.read_bytes())
    data[5000] ^= 1
    part.write_bytes(data)
    progress = Notes()
    result = fetch(fake, output_dir=tmp_path / "out", progress=progress)
    assert (result.path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [r.start for r in fake.requests("model.safetensors")] == [100_000, 0]
    assert any("altered" in n for n in progress.notes)


def test_a_whole_file_that_was_altered_between_runs_is_noticed(fake, tmp_path):
    fake.add("org/model", llama_files())
    part = interrupted(fake, tmp_path / "out")
    (part.parent / "tokenizer.json").write_bytes(pattern_bytes(3000, 99))
    progress = Notes()
    result = fetch(fake, output_dir=tmp_path / "out", progress=progress)
    assert any("tokenizer.json" in n and "altered" in n for n in progress.notes)
    result.snapshot.verify()


def test_a_part_longer_than_the_file_is_thrown_away(fake, tmp_path):
    fake.add("org/model", llama_files())
    part = interrupted(fake, tmp_path / "out")
    part.write_bytes(bytes(400_000))
    fetch(fake, output_dir=tmp_path / "out").snapshot.verify()


def test_a_part_of_another_version_is_thrown_away(fake, tmp_path):
    fake.add("org/model", llama_files())
    interrupted(fake, tmp_path / "out")
    files = llama_files(**{"model.safetensors": pattern_bytes(300_000, 77)})
    fake.repos["org/model"].commit(files)
    progress = Notes()
    result = fetch(fake, output_dir=tmp_path / "out", progress=progress)
    assert (result.path / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert [r.start for r in fake.requests("model.safetensors")] == [0]
    assert any("another version" in n for n in progress.notes)


def test_a_changed_etag_starts_the_file_over(fake, tmp_path):
    fake.add("org/model", llama_files())
    interrupted(fake, tmp_path / "out")
    fake.repos["org/model"].etags["model.safetensors"] = "another"
    progress = Notes()
    fetch(fake, output_dir=tmp_path / "out", progress=progress).snapshot.verify()
    assert [r.start for r in fake.requests("model.safetensors")] == [100_000, 0]
    assert any("ETag" in n for n in progress.notes)


def test_files_of_an_earlier_selection_do_not_stay_in_the_snapshot(fake, tmp_path):
    fake.add("org/model", llama_files())
    interrupted(fake, tmp_path / "out")
    result = fetch(fake, output_dir=tmp_path / "out", include=("onnx/*",))
    assert names(result.path) == ["onnx/model.onnx"]


def test_a_broken_connection_is_taken_up_within_the_run(fake):
    fake.add("org/model", llama_files())
    fake.faults["model.safetensors"] = [Fault(cut_after=n) for n in (70_000, 60_000, 50_000, 40_000)]
    result = fetch(fake)  # four breaks and three tries: only breaks without progress count
    assert [r.start for r in fake.requests("model.safetensors")] == [0, 70_000, 130_000, 180_000, 220_000]
    result.snapshot.verify()


def test_a_server_without_ranges_sends_the_whole_again(fake):
    fake.add("org/model", llama_files())
    fake.faults["model.safetensors"] = [Fault(cut_after=70_000), Fault(ignore_range=True)]
    progress = Notes()
    fetch(fake, progress=progress).snapshot.verify()
    assert any("only whole" in n for n in progress.notes)


def test_a_stalled_connection_times_out_and_is_taken_up(fake):
    fake.add("org/model", llama_files())
    fake.faults["model.safetensors"] = [Fault(cut_after=70_000, stall=1.5)]
    progress = Notes()
    fetch(fake, progress=progress, patience=IMPATIENT).snapshot.verify()
    assert any("stalled" in n for n in progress.notes)
    assert [r.start for r in fake.requests("model.safetensors")][:2] == [0, 70_000]


def test_a_stalled_hub_times_out(fake):
    fake.add("org/model", llama_files())
    fake.faults["api"] = [Fault(stall=1.5)]
    progress = Notes()
    fetch(fake, progress=progress, patience=IMPATIENT)
    assert any("trying again" in n for n in progress.notes)


def test_a_large_file_is_asked_for_in_segments(fake, monkeypatch):
    monkeypatch.setattr(transfer, "SEGMENT", 120_000)
    fake.add("org/model", llama_files())
    progress = Notes()
    fetch(fake, progress=progress).snapshot.verify()
    ranges = ["bytes=0-119999", "bytes=120000-239999", "bytes=240000-299999"]
    assert [r.range for r in fake.requests("model.safetensors")] == ranges
    assert progress.notes == []


def test_an_empty_file(fake):
    fake.add("org/model", llama_files(**{"vocab.txt": b""}))
    result = fetch(fake)
    assert (result.path / "vocab.txt").read_bytes() == b""


# Damage


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_altered_bytes_of_the_same_size_are_refused(fake, name):
    files = llama_files()
    fake.add("org/model", files)
    wrong = bytes([files[name][0] ^ 1]) + files[name][1:]
    fake.faults[name] = [Fault(body=wrong)]
    with pytest.raises(DownloadError, match=f"{name} is damaged: its bytes are not") as caught:
        fetch(fake)
    assert sha256(wrong) in str(caught.value) or "git blob" in str(caught.value)
    assert not list(repo_dir("org/model").glob("[0-9a-f]*"))
    fetch(fake).snapshot.verify()


def test_more_bytes_than_listed_are_refused(fake):
    fake.add("org/model", llama_files())
    fake.faults["config.json"] = [Fault(body=bytes(24))]
    with pytest.raises(DownloadError, match="sends 24 bytes or more, the repository lists 23"):
        fetch(fake)


def test_a_server_that_ends_early_for_good_is_an_error(fake):
    fake.add("org/model", llama_files())
    fake.faults["model.safetensors"] = [Fault(body=bytes(1000))] * 9
    with pytest.raises(DownloadError, match="tries without progress"):
        fetch(fake)


def test_verify_finds_bytes_altered_later_and_fetches_them_again(fake):
    fake.add("org/model", llama_files())
    path = fetch(fake).path
    (path / "tokenizer.json").write_bytes(pattern_bytes(3000, 99))
    assert fetch(fake).fetched == ()  # by size alone it looks right
    with pytest.raises(SnapshotError, match=r"tokenizer\.json has the right size, but"):
        fetch(fake, offline=True, verify=True)
    progress = Notes()
    assert fetch(fake, verify=True, progress=progress).fetched == ("tokenizer.json",)
    assert any("tokenizer.json" in n and "altered" in n for n in progress.notes)
    Snapshot.open(path).verify()


def test_a_missing_or_short_file_is_fetched_again(fake):
    commit = fake.add("org/model", llama_files())
    path = fetch(fake).path
    (path / "tokenizer.json").write_bytes(b"short")
    (path / "README.md").unlink()
    with pytest.raises(SnapshotError, match=r"README\.md is missing; tokenizer\.json has 5 B"):
        fetch(fake, offline=True)
    assert sorted(fetch(fake, revision=commit).fetched) == ["README.md", "tokenizer.json"]


# Refusals


def test_a_gated_repository_says_where_to_accept_the_licence(fake):
    fake.add("org/model", llama_files(), gated_for="hf_right")
    with pytest.raises(DownloadError, match=f"gated(.|\n)*{fake.endpoint}/org/model, then pass --token"):
        fetch(fake)
    with pytest.raises(DownloadError, match=r"gated(.|\n)*account that the token is of"):
        fetch(fake, token="hf_wrong")
    assert names(fetch(fake, token=" hf_right\n").path) == USUAL


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(fake, monkeypatch):
    fake.add("org/model", llama_files(), gated_for="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    path = fetch(fake).path
    assert {r.token for r in fake.log if r.path.startswith("/cdn/")} == {None}
    assert {r.token for r in fake.log if not r.path.startswith("/cdn/")} == {"hf_right"}
    assert "hf_right" not in (path / MANIFEST).read_text()


def test_a_missing_repository(fake):
    with pytest.raises(DownloadError, match=r"has no model org/model, or it is private(.|\n)*check the name; if it is"):
        fetch(fake)
    with pytest.raises(DownloadError, match=r"check the name$"):
        fetch(fake, token="hf_x")


def test_a_missing_revision(fake):
    fake.add("org/model", llama_files())
    with pytest.raises(DownloadError, match=r"org/model has no revision 'v9'(.|\n)*/org/model/tree/main"):
        fetch(fake, revision="v9")


def test_a_revision_is_a_branch_a_tag_or_a_commit(fake):
    first = fake.add("org/model", llama_files())
    second = fake.repos["org/model"].commit(llama_files(**{"vocab.txt": b"x"}), "refs/pr/1")
    assert fetch(fake, revision="refs/pr/1").manifest.commit == second
    assert fetch(fake, revision=first).manifest.commit == first
    assert cached_commit("org/model", "refs/pr/1") == second


def test_no_network(fake):
    endpoint = "http://127.0.0.1:9"
    with pytest.raises(DownloadError, match=f"{endpoint} cannot be reached(.|\n)*--offline"):
        download("org/model", DownloadOptions(endpoint=endpoint, patience=QUICK))


def test_something_that_is_no_hub(fake):
    fake.add("org/model", llama_files())
    fake.faults["api"] = [Fault(body=b"<html>log in here</html>")]
    with pytest.raises(DownloadError, match="did not answer as the Hugging Face hub does"):
        fetch(fake)


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/../../evil", "a//b", "c:evil", "a\\..\\evil", "x\n.json"]
)
def test_file_names_that_lead_out_of_the_snapshot_are_refused(fake, name):
    fake.add("org/model", {**llama_files(), name: b"evil"})
    with pytest.raises(DownloadError, match="leads out of the snapshot"):
        fetch(fake)
    assert not any(r.path.endswith("evil") for r in fake.log)


def test_a_repository_cannot_bring_its_own_manifest(fake):
    fake.add("org/model", {**llama_files(), MANIFEST: b"{}", "config.json.incomplete": b"x"})
    result = fetch(fake, include=("*",))
    assert result.manifest.repo_id == "org/model"
    assert "config.json.incomplete" not in result.manifest.names


def test_a_rate_limit_is_waited_for(fake):
    fake.add("org/model", llama_files())
    fake.faults["api"] = [Fault(status=429, headers={"Retry-After": "1"})]
    fake.faults["config.json"] = [Fault(status=429, headers={"ratelimit": '"resolvers";r=0;t=1'})]
    progress = Notes()
    started = time.monotonic()
    fetch(fake, progress=progress)
    assert time.monotonic() - started > 2
    assert sum("trying again in 1 s" in n for n in progress.notes) == 2


def test_a_rate_limit_that_is_too_long_is_an_error_that_says_when(fake):
    fake.add("org/model", llama_files())
    fake.faults["config.json"] = [Fault(status=429, headers={"Retry-After": "7200"})]
    with pytest.raises(DownloadError, match=r"HTTP 429(.|\n)*in 7200 s"):
        fetch(fake)


@pytest.mark.parametrize("where", ["api", "config.json", "model.safetensors"])
def test_server_errors_are_tried_again(fake, where):
    fake.add("org/model", llama_files())
    fake.faults[where] = [Fault(status=500), Fault(status=503)]
    assert sorted(fetch(fake).fetched) == USUAL


@pytest.mark.parametrize("where", ["api", "config.json"])
def test_server_errors_that_stay_are_an_error(fake, where):
    fake.add("org/model", llama_files())
    fake.faults[where] = [Fault(status=502)] * 9
    with pytest.raises(DownloadError, match="HTTP 502"):
        fetch(fake)


def test_an_expired_cdn_link_is_renewed(fake):
    fake.add("org/model", llama_files())
    fake.faults["model.safetensors"] = [Fault(cut_after=1000), Fault(status=403)]
    fetch(fake).snapshot.verify()


def test_one_failure_stops_the_other_files(fake):
    fake.add("org/model", llama_files(**{"model.safetensors": pattern_bytes(2_000_000)}))
    fake.rate = 200_000
    fake.faults["config.json"] = [Fault(status=404)]
    started = time.monotonic()
    with pytest.raises(DownloadError, match="HTTP 404"):
        fetch(fake)
    assert time.monotonic() - started < 5  # the whole would take 10 s


# Offline


def test_offline_finds_what_was_fetched(fake, monkeypatch):
    commit = fake.add("org/model", llama_files())
    path = fetch(fake).path
    fake.log.clear()
    assert fetch(fake, offline=True).path == path
    assert fetch(fake, offline=True, revision=commit).path == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(fake).path == path
    assert fake.log == []


def test_offline_and_not_here(fake, tmp_path):
    fake.add("org/model", llama_files())
    with pytest.raises(DownloadError, match=r"not on this machine(.|\n)*without --offline"):
        fetch(fake, offline=True)
    fetch(fake)
    with pytest.raises(DownloadError, match=r"revision v2 is not on this machine(.|\n)*revision that is here: main"):
        fetch(fake, offline=True, revision="v2")
    with pytest.raises(DownloadError, match=r"has not all the files(.|\n)*onnx/model\.onnx"):
        fetch(fake, offline=True, include=("onnx/*",))
    with pytest.raises(DownloadError, match="not on this machine"):
        fetch(fake, offline=True, output_dir=tmp_path / "none")
    with pytest.raises(UsageError, match="--force"):
        fetch(fake, offline=True, force=True)


# The machine


def test_too_little_room_is_said_before_anything_is_fetched(fake, monkeypatch):
    fake.add("org/model", llama_files())
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: usage(1 << 20))
    with pytest.raises(ResourceError, match=r"needs 295\.9 KiB, and 1\.0 MiB are free"):
        fetch(fake)
    assert len(fake.log) == 1


def test_a_full_disk(fake, monkeypatch):
    class Full(transfer.Transfer):
        def _append(self, out, chunk):
            with open("/dev/full", "wb", buffering=0) as full:
                super()._append(full, chunk)

    fake.add("org/model", llama_files())
    monkeypatch.setattr(hub_module, "Transfer", Full)
    with pytest.raises(ResourceError, match="the disk is full"):
        fetch(fake)


def test_an_output_dir_that_cannot_be_written(fake, tmp_path):
    fake.add("org/model", llama_files())
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        fetch(fake, output_dir=tmp_path / "file" / "out")
    with pytest.raises(OutputExistsError, match="is a file"):
        fetch(fake, output_dir=tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_dir_that_may_not_be_written(fake, tmp_path):
    fake.add("org/model", llama_files())
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match=r"cannot write(.|\n)*permissions"):
        fetch(fake, output_dir=tmp_path / "out")


def test_two_downloads_to_the_same_place(fake, tmp_path):
    fake.add("org/model", llama_files())
    fake.rate = 300_000
    first = threading.Thread(target=fetch, args=(fake,), kwargs={"output_dir": tmp_path / "out"})
    first.start()
    wait_for_bytes(tmp_path / ".out.partial" / "model.safetensors.incomplete", 1)
    with pytest.raises(ResourceError, match="another process"):
        fetch(fake, output_dir=tmp_path / "out")
    first.join()
    assert names(tmp_path / "out") == USUAL


# Arguments


def test_repository_ids():
    assert check_repo_id("https://huggingface.co/org/name/") == "org/name"
    for wrong in ("", "a/b/c", "../x", "org/na me", "./local"):
        with pytest.raises(UsageError, match="no repository id"):
            check_repo_id(wrong)


def test_tokens(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert check_token(None) is None
    assert check_token(" hf_x ") == "hf_x"
    with pytest.raises(UsageError, match="token"):
        check_token("hf_\x00x")


def test_workers_must_be_positive(fake):
    with pytest.raises(UsageError, match="--workers"):
        fetch(fake, workers=0)


def test_patience(monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "2.5")
    assert Patience.from_environment().timeout == 2.5
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "soon")
    assert Patience.from_environment().timeout == 10
    assert [Patience().wait(n, None) for n in (1, 2, 3, 9)] == [1, 2, 4, 30]


def test_what_the_hub_asks_to_wait():
    assert asked_wait({"retry-after": "7"}) == 7
    assert asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked_wait({"ratelimit": '"api";r=0;t=55'}) == 55
    assert asked_wait({"ratelimit": '"api";r=3;t=55'}) is None
    assert asked_wait({}) is None
