"""Holding an engine's file against its digest, beside its first request."""

import threading
from concurrent.futures import CancelledError

import pytest

from tests.run.tiny import write_engine
from trtllm_cli.engine import Engine
from trtllm_cli.errors import EngineError
from trtllm_cli.run.load import verify_aside
from trtllm_cli.run.world import current


def test_a_right_and_an_altered_file(tmp_path):
    directory = write_engine(tmp_path / "engine", None)
    assert verify_aside(Engine.open(directory), current()).result(10) is None
    (directory / "rank0.engine").write_bytes(b"Weights" + b"weights" * 999)
    with pytest.raises(EngineError, match="rank0.engine was altered: its digest is"):
        verify_aside(Engine.open(directory), current()).result(10)


def test_cancelling_stops_the_check(tmp_path, monkeypatch):
    engine = Engine.open(write_engine(tmp_path / "engine", None))
    begun, seen = threading.Event(), threading.Event()

    def verify(self, rank, threads, stopped):
        begun.set()
        while not stopped():
            pass
        seen.set()

    monkeypatch.setattr(Engine, "verify", verify)
    done = verify_aside(engine, current())
    assert begun.wait(10)
    assert done.cancel()
    assert seen.wait(10)
    with pytest.raises(CancelledError):
        done.result(0)
