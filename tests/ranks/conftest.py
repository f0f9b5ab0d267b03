"""Starting processes under mpirun."""

import importlib.util
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands.conftest import LIMITS, save_snapshot
from trtllm_cli.cli import call
from trtllm_cli.commands.launch import Mpirun
from trtllm_cli.errors import ResourceError

ROOT = Path(__file__).parents[2]
# Of ranks: nothing here is one.
LAUNCHERS = (
    "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "PRTE_", "MPI_LOCAL", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str
    seconds: float


def run(command, timeout=60, env=None, stdin=None):
    """Runs a command in the repository's root. A variable that is None in `env` is unset; so are other launchers'."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    ours |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    ours = {name: value for name, value in {**ours, **(env or {})}.items() if value is not None}
    started = time.monotonic()
    process = subprocess.Popen(
        [str(arg) for arg in command], cwd=ROOT, env=ours, text=True, start_new_session=True,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun ends its ranks, which are in process groups of their own
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        pytest.fail(f"not done after {timeout} s: {command}\n{out}\n{err}")
    return Result(process.returncode, out, err, time.monotonic() - started)


def errors(text):
    """The messages of errors in what a command said, each with its lines."""
    text = text.replace("\0", "")  # Open MPI puts some in
    return re.findall(r"^(?:internal )?error: (.*(?:\n  .*)*)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`built(snapshot, name, *split, limits=LIMITS)`: an engine in float32, native kernels; `split` is for convert.

    `dtype` and `how` for another: the checkpoint's, and flags of build.
    """
    root = tmp_path_factory.mktemp("engines")

    def build(snapshot, name, *split, limits=LIMITS, dtype="float32", how=("--kernels", "native")):
        ckpt, engine = root / f"{name}-ckpt", root / name
        convert = ("convert", snapshot, "--output-dir", ckpt, "--dtype", dtype, *split)
        build = ("build", "--checkpoint-dir", ckpt, "--output-dir", engine, *how, *limits)
        for args in (convert, build):
            assert call([str(arg) for arg in args]) == 0
        return engine

    return build


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    save_snapshot(path)
    return path


@pytest.fixture(scope="session")
def installed_mpirun():
    """The mpirun beside this Python, or else the path's."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    try:
        return Mpirun.find()
    except ResourceError:
        pytest.skip("there is no mpirun")


@pytest.fixture(scope="session")
def mpirun(installed_mpirun):
    """`mpirun(ranks, *args, timeout=60, env=None, stdin=None)` runs a command on so many ranks of this host.

    More of mpirun's flags may come first in `args`.
    """
    flags = ["--oversubscribe", "--bind-to", "none"] if installed_mpirun.is_open_mpi else []

    def start(ranks, *args, timeout=60, env=None, stdin=None):
        return run([installed_mpirun.path, "-n", str(ranks), *flags, *args], timeout, env, stdin)

    return start
