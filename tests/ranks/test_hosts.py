"""Ranks on several hosts: network namespaces with addresses and names of their own, and an agent in place of ssh."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks.conftest import errors, run
from trtllm_cli.commands.launch import Mpirun
from trtllm_cli.errors import INTERNAL

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

FAULTY = Path(__file__).with_name("faulty.py")
LIMITS = ("--max-seq-len", "256", "--max-input-len", "32", "--max-batch-size", "4", "--tokens-per-block", "8")
NAMES = ("first", "second")
AGENT = """#!/bin/sh
# Called as ssh is: options, a host, a command.
while case $1 in -*) true ;; *) false ;; esac; do shift; done
host=$1
shift
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec ip netns exec "PREFIX-$host" unshare --uts sh -c "hostname $host; $*"
"""
PROMPT = ("--max-output-len", "20", "--ignore-eos", "abcdefgh")


@dataclass(frozen=True)
class Hosts:
    """Two hosts: commands start on the first."""

    prefix: str  # of their namespaces' names
    mpirun: Mpirun
    agent: Path
    hostfile: Path

    @property
    def agent_flags(self):
        """For mpirun: how to reach the other host."""
        return ["--mca", "plm_rsh_agent", str(self.agent)]  # Open MPI 5 knows this name of 4's as well

    @property
    def enter(self):
        """What to put before a command that runs on the first host."""
        inside = 'hostname first; exec "$@"'
        return ["ip", "netns", "exec", f"{self.prefix}-first", "unshare", "--uts", "sh", "-c", inside, "sh"]

    def start(self, *args):
        """The command line that runs `python ARGS` on a rank of each host."""
        flags = [*self.agent_flags, "-n", "2", "--bind-to", "none", "--hostfile", self.hostfile]
        return [*self.enter, self.mpirun.path, *flags, sys.executable, *args]

    def link(self, state):
        """Connects the second host to the network, or not: "up" or "down"."""
        ip("-n", f"{self.prefix}-second", "link", "set", "eth0", state)

    def pids(self):
        """Every process on a host."""
        return [int(pid) for name in NAMES for pid in ip("netns", "pids", f"{self.prefix}-{name}").split()]

    def ranks(self):
        """The processes that are ranks, and not a launcher's."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it has ended
                program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
                found += [pid] if Path(os.fsdecode(program)).name.startswith("python") else []
        return found

    def wait_until_empty(self, find, seconds):
        """The seconds until `find` finds no process."""
        started = time.monotonic()
        while left := find():
            assert time.monotonic() - started < seconds, left
            time.sleep(0.05)
        return time.monotonic() - started

    def kill(self):
        """Ends whatever is left on the hosts."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, installed_mpirun):
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("network namespaces are Linux's, and root's to make")
    if missing := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if not installed_mpirun.is_open_mpi:
        pytest.skip("the agent is given as Open MPI wants it")
    root = tmp_path_factory.mktemp("hosts")
    prefix = f"trtllm-{os.getpid()}"
    made = Hosts(prefix, installed_mpirun, root / "agent", root / "hosts")
    made.agent.write_text(AGENT.replace("PREFIX", prefix))
    made.agent.chmod(0o755)
    made.hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    first, second = (f"{prefix}-{name}" for name in NAMES)
    with contextlib.ExitStack() as stack:
        for name in (first, second):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as e:
                pytest.skip(f"no network namespaces here: {e.stderr.strip()}")
            stack.callback(ip, "netns", "del", name)
            etc = Path("/etc/netns", name)  # its files stand in for those of /etc
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            (etc / "hosts").write_text("127.0.0.1 localhost\n10.213.7.1 first\n10.213.7.2 second\n")
        stack.callback(made.kill)
        ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate((first, second), 1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield made


@pytest.fixture(scope="module")
def engines(snapshot, built):
    """Engines of one rank and of two."""
    return {ranks: built(snapshot, str(ranks), "--tp-size", ranks, limits=LIMITS) for ranks in (1, 2)}


def test_two_hosts_say_what_one_rank_says(hosts, engines):
    trtllm = (sys.executable, "-m", "trtllm_cli", "run", *PROMPT, "--engine-dir")
    alone = run([*trtllm, engines[1]])
    launch = ("--launch", "--hostfile", hosts.hostfile, "--mpirun-args", " ".join(hosts.agent_flags))
    both = run([*hosts.enter, *trtllm, engines[2], *launch])
    assert (alone.code, both.code) == (0, 0), both.err
    assert alone.out.strip()
    assert both.out == alone.out
    assert not errors(both.err)
    hosts.wait_until_empty(hosts.pids, 5)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raise", "RuntimeError: a fault that was planted"),
        ("kill", "its process ended without a word: it was killed, or crashed"),
        ("stop", "not heard of for"),
        ("hang", "it hangs: nothing got done for"),
    ],
)
def test_a_fault_on_the_other_host_ends_both(hosts, engines, kind, said):
    faulty = (FAULTY, kind, "decode", 1, "run", "--engine-dir", engines[2], "--rank-timeout", "2", *PROMPT)
    done = run(hosts.start(*faulty), timeout=30)
    ended = time.time()
    messages = errors(done.err)
    noticed = re.search(r"rank 1 .*on node second\s+exited on\s+signal 9", done.err)
    if kind == "kill" and not messages and noticed:  # MPI was faster to end the first rank than that was to tell
        messages = [f"rank 1 on second: {said}"]
    assert len(messages) == 1, done.err
    assert messages[0].startswith(f"rank 1 on second: {said}")
    assert done.code == INTERNAL if kind == "raise" else done.code != 0
    assert ended - float(re.search(r"struck at ([\d.]+)", done.err)[1]) < 10
    hosts.wait_until_empty(hosts.pids, 5)


def test_a_link_that_is_cut_ends_the_ranks_of_both_hosts(hosts, engines, tmp_path):
    chat = ("-m", "trtllm_cli", "run", "--engine-dir", engines[2], "--rank-timeout", "2", "--interactive")
    command = [str(arg) for arg in hosts.start(*chat)]
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    said = tmp_path / "err"
    with said.open("w") as err, (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env)
        try:
            deadline = time.monotonic() + 30
            while len(hosts.ranks()) < 2:
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
            time.sleep(3)  # until they wait for a prompt
            assert process.poll() is None, said.read_text()
            hosts.link("down")
            hosts.wait_until_empty(hosts.ranks, 10)
        finally:
            hosts.kill()  # mpirun would wait for the other host for as long as TCP does
            process.stdin.close()
            process.wait(10)
            hosts.link("up")
    first = "rank 1 on second: not heard of for"
    assert any(message.startswith(first) for message in errors(said.read_text())), said.read_text()
