import json
import subprocess
import sys

import pytest

from tests.fake_hub import FakeHub, Fault, llama_files, pattern_bytes
from trtllm_cli import cli
from trtllm_cli.commands import console
from trtllm_cli.commands.download_progress import BarProgress, LineProgress, reporting, short
from trtllm_cli.convert.transfer import Progress
from trtllm_cli.snapshot import MANIFEST, repo_dir


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit = hub.add("org/model", llama_files())
        yield hub


@pytest.fixture(autouse=True)
def fresh_consoles():
    """The consoles keep the streams of the test that made them."""
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    yield
    console.stdout.cache_clear()
    console.stderr.cache_clear()


def trtllm(*args):
    return cli.call(["download", *map(str, args)])


def test_the_path_is_all_that_goes_to_stdout(fake, capsys):
    assert trtllm("org/model") == 0
    out, err = capsys.readouterr()
    assert out == f"{repo_dir('org/model') / fake.commit}\n"
    lines = err.splitlines()
    assert lines[0] == "fetching 4 files, 295.9 KiB"
    assert sorted(lines[1:5]) == [
        "README.md: 10 B, verified",
        "config.json: 23 B, verified",
        "model.safetensors: 293.0 KiB, verified",
        "tokenizer.json: 2.9 KiB, verified",
    ]
    assert lines[5] == f"org/model (main, commit {fake.commit}): 4 files, 295.9 KiB, 4 fetched"
    assert len(lines) == 6


def test_a_second_call_says_that_there_is_nothing_to_fetch(fake, capsys):
    trtllm("org/model")
    capsys.readouterr()
    assert trtllm("org/model", "--revision", fake.commit) == 0
    assert capsys.readouterr().err == f"org/model (main, commit {fake.commit}): 4 files, 295.9 KiB, nothing to fetch\n"


def test_quiet(fake, capsys, tmp_path):
    assert trtllm("org/model", "--quiet", "--output_dir", tmp_path / "out") == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out'}\n", "")


def test_json(fake, capsys):
    assert trtllm("org/model", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["commit"] == fake.commit
    assert sorted(report["fetched"]) == sorted(report["files"])
    assert report["size"] == 303_033


def test_repeated_globs(fake, capsys, tmp_path):
    flags = ("--include", "*.json", "--include", "*.bin", "--exclude", "tok*", "--output-dir", tmp_path / "out")
    assert trtllm("org/model", *flags) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MANIFEST, "config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["org/none"], 5, "check the name"),
        (["org/model", "--revision", "v9"], 5, "has no revision 'v9'"),
        (["org/model", "--include", "*.gguf"], 5, "no file of org/model"),
        (["org/other", "--offline"], 5, "run it once without --offline"),
        (["a/b/c"], 2, "ORGANIZATION/NAME"),
        (["org/model", "--workers", "0"], 2, "--workers"),
        (["org/model", "--output-dir", "/dev/null/x"], 6, "cannot write"),
        (["org/model", "--output-dir", "/proc/self"], 3, "choose another directory"),
    ],
)
def test_errors_are_one_message_and_a_code(fake, capsys, args, code, words):
    assert trtllm(*args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_gated_model_and_its_token(fake, capsys):
    fake.add("org/gated", llama_files(), gated_for="hf_x")
    assert trtllm("org/gated") == 5
    assert f"accept its licence at {fake.endpoint}/org/gated" in capsys.readouterr().err
    assert trtllm("org/gated", "--token", "hf_x") == 0


def test_retries_are_told(fake, capsys):
    fake.faults["model.safetensors"] = [Fault(cut_after=1000), Fault(status=429, headers={"Retry-After": "0"})]
    assert trtllm("org/model") == 0
    err = capsys.readouterr().err
    assert "note: model.safetensors: " in err
    assert "HTTP 429" in err


def test_importing_the_command_is_cheap():
    heavy = "{'huggingface_hub', 'rich', 'pydantic', 'torch', 'httpx2'}"
    code = f"import sys, trtllm_cli.commands.download, trtllm_cli.commands.stages; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# How progress is shown


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_lines_tell_bytes_speed_and_time_left(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr("trtllm_cli.commands.download_progress.time", clock)
    progress = LineProgress()
    progress.begin(1, 100 << 20)
    progress.start("a", 100 << 20)
    progress.skip("a", 20 << 20)
    clock.now += 5
    progress.advance("a", 10 << 20)
    clock.now += 5
    progress.advance("a", 20 << 20)
    progress.note("a stalled")
    assert capsys.readouterr().err.splitlines() == [
        "fetching 1 files, 100.0 MiB",
        "50.0 MiB of 100.0 MiB, 3.0 MiB/s, 17 s left",
        "note: a stalled",
    ]


def test_bars_for_the_whole_and_for_each_file():
    from rich.progress import Progress as Bars

    with Bars(disable=True) as bars:
        progress = BarProgress(bars)
        progress.begin(2, 150)
        progress.start("a", 100)
        progress.skip("a", 30)
        progress.advance("a", 20)
        progress.skip("a", -50)
        progress.advance("a", 60)
        assert [(t.description, t.completed, t.total) for t in bars.tasks] == [("2 files", 60, 150), ("  a", 60, 100)]
        progress.finish("a")
        assert len(bars.tasks) == 1


def test_reporting_without_a_terminal_is_lines_and_quiet_is_nothing(capsys):
    with reporting() as progress:
        assert isinstance(progress, LineProgress)
    with reporting(quiet=True) as progress:
        assert type(progress) is Progress


def test_a_long_name_is_shortened_from_the_left():
    assert short("a" * 50 + ".safetensors", 20) == "…" + "a" * 7 + ".safetensors"


def test_a_terminal_gets_bars(fake, tmp_path):
    fake.repos["org/model"].commit(llama_files(**{"model.safetensors": pattern_bytes(400_000, 9)}))
    code = (
        "import os, pty, sys\n"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'trtllm_cli', 'download', 'org/model'])))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout
    assert b"4 files" in result.stdout
    assert b"0:00:0" in result.stdout
