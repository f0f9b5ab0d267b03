"""Ranks that are packed side by side: the same bytes as one by one, one progress, and an error that ends them all."""

import signal
import threading
import time
from functools import partial

import pytest
import torch

from tests.commands.conftest import save_snapshot
from trtllm_cli.build import write_ranks
from trtllm_cli.build.builder import BuildOptions, build, plan_build
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import ResourceError, UsageError

RANKS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama for two stages of two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    save_snapshot(root / "snapshot")
    convert(root / "snapshot", root / "checkpoint", ConvertOptions(tp_size=2, pp_size=2))
    return root / "checkpoint"


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "options", [{"kernels": "torch"}, {"kernels": "native"}, {"kernels": "native", "weight_dtype": "int4"}]
)
def test_the_bytes_are_the_same(checkpoint, tmp_path, options):
    threads = torch.get_num_threads()
    for workers in (1, 3, 9, None):
        build(checkpoint, tmp_path / str(workers), BuildOptions(**options, workers=workers))
    one = files(tmp_path / "1")
    assert sum(path.suffix == ".engine" for path in one) == RANKS
    assert one == files(tmp_path / "3") == files(tmp_path / "9") == files(tmp_path / "None")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_is_one(checkpoint, tmp_path, workers):
    told = []
    options = BuildOptions(kernels="torch", workers=workers)
    build(checkpoint, tmp_path / "engine", options, lambda done, total: told.append((done, total)))
    lowered = plan_build(checkpoint, options).lowered
    total = sum(info.nbytes for rank in lowered for info in rank.tensors.values())
    assert {of for _, of in told} == {total}
    assert len(told) == sum(len(rank.packings) for rank in lowered)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


class Reads:
    """Stands in for `read_weight`. In rank 1's first `fails` is called; `later` counts the others from then on.

    With `together`, ranks that run beside rank 1 wait for that. Each read takes `seconds`.
    """

    def __init__(self, monkeypatch, fails, *, together=True, seconds=0.05):
        self.fails, self.together, self.failed, self.later = fails, together, threading.Event(), 0
        self.seconds = seconds
        self.real = write_ranks.read_weight
        monkeypatch.setattr(write_ranks, "read_weight", self)

    def __call__(self, source, info):
        if source.path.name.startswith("rank1.") and not self.failed.is_set():
            self.failed.set()
            self.fails()
        if self.together:
            self.failed.wait(10)
        self.later += self.failed.is_set()
        time.sleep(self.seconds)
        return self.real(source, info)


def no_room():
    raise ResourceError("no room for rank 1")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_error_ends_the_others_and_leaves_nothing(checkpoint, tmp_path, monkeypatch, workers):
    reads = Reads(monkeypatch, no_room, together=workers > 1)
    with pytest.raises(ResourceError, match="no room for rank 1"):
        build(checkpoint, tmp_path / "engine", BuildOptions(kernels="torch", workers=workers))
    assert list(tmp_path.iterdir()) == []
    assert reads.later <= 2 * workers  # what was under way


def test_the_first_ranks_error_is_raised(checkpoint, tmp_path, monkeypatch):
    both = threading.Barrier(2)

    def fail(source, info):
        both.wait(10)
        raise ResourceError(f"no room for {source.path.name}")

    monkeypatch.setattr(write_ranks, "read_weight", fail)
    with pytest.raises(ResourceError, match="no room for rank0"):
        build(checkpoint, tmp_path / "engine", BuildOptions(kernels="torch", workers=2))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_them_all(checkpoint, tmp_path, monkeypatch):
    interrupt = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    reads = Reads(monkeypatch, interrupt, seconds=2)  # the main thread may be slow to notice
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "engine", BuildOptions(kernels="torch", workers=4))
    assert list(tmp_path.iterdir()) == []
    assert reads.later <= 8
    assert not [t for t in threading.enumerate() if t.name.startswith("trtllm-build")]


def test_an_interrupt_while_threads_start_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    """`Thread.start` waits for its thread: interrupted there, the pool does not know of one that runs."""
    start, started, reads = threading.Thread.start, [], []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    def read(source, info):
        reads.append(info)
        time.sleep(0.05)
        return read_weight(source, info)

    read_weight = write_ranks.read_weight
    monkeypatch.setattr(write_ranks, "read_weight", read)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "engine", BuildOptions(kernels="torch", workers=4))
    for thread in started:
        thread.join(10)
    assert len(started) == 2
    assert reads == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, -2])
def test_workers_must_be_some(checkpoint, tmp_path, workers):
    with pytest.raises(UsageError, match=f"workers is {workers}, it must be at least 1") as raised:
        build(checkpoint, tmp_path / "engine", BuildOptions(workers=workers))
    assert raised.value.where == "--workers"
    assert list(tmp_path.iterdir()) == []
