"""Whatever happens to one rank ends all, soon, with its message and its number."""

import itertools
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.conftest import errors
from trtllm_cli.errors import INTERNAL, RankError

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

FAULTY = Path(__file__).with_name("faulty.py")
TIMEOUT = "2.5"  # seconds, for most; one test has the default
SAID = {
    "raise": "RuntimeError: a fault that was planted",
    "kill": "its process ended without a word: it was killed, or crashed",
    "stop": "not heard of for",
    "hang": "it hangs: nothing got done for",
}

CODES = {
    "raise": [INTERNAL],
    "kill": [RankError.exit_code, 128 + signal.SIGKILL],  # the second is the launcher's
    "stop": [RankError.exit_code],
    "hang": [RankError.exit_code],
}


@pytest.fixture(scope="module")
def engines(snapshot, built):
    """Engines of two tensor-parallel ranks, and of two stages of two ranks."""
    return {2 * stages: built(snapshot, str(stages), "--tp-size", 2, "--pp-size", stages) for stages in (1, 2)}


@pytest.fixture
def fail(mpirun, engines):
    """Runs an engine with a fault; the one message, the exit code, and the seconds from the fault to the end."""

    def start(ranks, kind, stage, rank, *flags):
        ask = ("--interactive",) if stage == "idle" else ("--max-output-len", "20", "--ignore-eos", "abcdefgh")
        run = ("run", "--engine-dir", engines[ranks], *flags, *ask)
        done = mpirun(ranks, sys.executable, FAULTY, kind, stage, rank, *run)
        ended = time.time()
        assert done.code != 0
        struck = re.search(r"struck at ([\d.]+)", done.err)
        assert struck, done.err
        assert "Traceback" not in done.err
        messages = errors(done.err)
        if kind == "kill" and not messages:  # the launcher was faster than the other ranks
            noticed = re.search(r"noticed that process rank (\d) .*\n?.*signal 9", done.err)
            messages = [f"rank {noticed.group(1)}: {SAID['kill']}"] if noticed else []
        assert len(messages) == 1, done.err
        return messages[0], done.code, ended - float(struck.group(1))

    return start


KINDS = [
    (kind, stage)
    for kind, stage in itertools.product(SAID, ("start", "load", "prefill", "decode", "idle"))
    if (kind, stage) != ("hang", "idle")  # with nothing to do, nobody can tell, and nothing is lost
]


def check(kind, stage, rank, message, code, seconds):
    if (kind, stage, rank) != ("raise", "idle", 0):  # the others have been told to end: it is the command's own error
        assert message.startswith(f"rank {rank}: ")
    if stage == "start" and kind in ("stop", "hang"):
        assert "it did not start within" in message
    else:
        assert SAID[kind] in message
    assert code in CODES[kind]
    assert seconds < float(TIMEOUT) + 4


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_a_fault_ends_all(fail, kind, stage, rank):
    check(kind, stage, rank, *fail(2, kind, stage, rank, "--rank-timeout", TIMEOUT))


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_fault_in_two_stages_ends_all(fail, kind, rank):
    check(kind, "decode", rank, *fail(4, kind, "decode", rank, "--rank-timeout", TIMEOUT))


@pytest.mark.parametrize("rank", [0, 1])
def test_it_takes_less_than_ten_seconds(fail, rank):
    message, _, seconds = fail(2, "hang", "decode", rank)
    assert message.startswith(f"rank {rank}: it hangs")
    assert seconds < 10
