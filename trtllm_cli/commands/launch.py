"""`--launch`: the same command again, on as many ranks as the engine has, under mpirun."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trtllm_cli.commands.standard_input import MARKED, mark_end
from trtllm_cli.errors import ResourceError, UsageError

_OWN_FLAGS = {"--launch": 0, "--hostfile": 1, "--mpirun-args": 1}  # and how many values each takes
# A line of a host file; the first group is the host, the others are its slots.
_LIMIT = r"(?:\s+max[_-]slots\s*=\s*\d+)?"  # for mpirun itself: how far it may go beyond the slots
_HOST = re.compile(rf"([\w.-]+)(?::(\d+))?{_LIMIT}(?:\s+slots\s*=\s*(\d+))?{_LIMIT}")


@dataclass(frozen=True)
class Mpirun:
    """An mpirun, and whose it is: they have the same name and other flags."""

    path: str
    is_open_mpi: bool

    @classmethod
    def find(cls) -> Mpirun:
        """The one beside this Python, or else on the path. Raises ResourceError, with the packages to install."""
        beside = Path(sys.executable).parent
        for name in ("mpirun", "mpiexec"):
            path = shutil.which(name, path=str(beside)) or shutil.which(name)
            if path is not None:
                about = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
                return cls(path, "Open MPI" in about.stdout + about.stderr)
        from trtllm_cli.run.mpi import INSTALL

        raise ResourceError(
            "mpirun is not installed",
            where="--launch",
            fix=f"{INSTALL}; or use torchrun, which comes with torch: torchrun --nproc-per-node N -m trtllm_cli ...",
        )

    def command(self, num_ranks: int, hostfile: Path | None, more: Sequence[str], args: Sequence[str]) -> list[str]:
        """The command line that starts `trtllm ARGS` on so many ranks."""
        flags = ["-n", str(num_ranks)]
        if self.is_open_mpi:
            flags += ["--bind-to", "none"]
            flags += ["--allow-run-as-root"] if os.geteuid() == 0 else []
            flags += ["--hostfile", str(hostfile)] if hostfile else ["--oversubscribe"]
        elif hostfile:
            flags += ["-f", str(hostfile)]
        return [self.path, *flags, *more, sys.executable, "-m", "trtllm_cli", *args]


def run_command(engine_dir: Path, num_ranks: int) -> str:
    """What to type to run an engine."""
    launch = " --launch" if num_ranks > 1 else ""
    return f'trtllm run --engine-dir {engine_dir}{launch} --streaming "Why is the sky blue?"'


def launch_ranks(num_ranks: int, hostfile: Path | None, mpirun_args: str, *, reads_stdin: bool = False) -> NoReturn:
    """Becomes mpirun. Raises before that for what would only fail in it."""
    mpirun = Mpirun.find()
    if hostfile is not None:
        check_hostfile(hostfile, num_ranks)
    try:
        more = shlex.split(mpirun_args)
    except ValueError as e:
        raise UsageError(
            f"--mpirun-args is {mpirun_args!r}: {e}", where="--mpirun-args", fix="quote it as a shell would"
        ) from None
    if reads_stdin and mpirun.is_open_mpi and not sys.stdin.isatty():
        mark_end()
        more += ["-x", MARKED]
    os.execv(mpirun.path, mpirun.command(num_ranks, hostfile, more, without_launch(sys.argv[1:])))  # noqa: S606


def without_launch(args: Sequence[str]) -> list[str]:
    """The command line without the flags that are for this module."""
    out: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return [*out, arg, *rest]
        flag, equals, _ = arg.partition("=")
        values = _OWN_FLAGS.get(flag.replace("_", "-"))
        if values is None:
            out.append(arg)
        elif values and not equals:
            next(rest, None)
    return out


def check_hostfile(path: Path, num_ranks: int) -> None:
    """Raises UsageError for a file that is none, and for hosts that cannot be found or have too few slots."""
    fix = "a host a line, such as `node1 slots=8` (Open MPI) or `node1:8` (MPICH)"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read the host file {path}: {e}", where="--hostfile", fix=fix) from None
    slots, limited = 0, True
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOST.fullmatch(text)
        if match is None:
            raise UsageError(f"this is no host: {text!r}", where=f"{path}, line {number}", fix=fix)
        try:
            socket.getaddrinfo(match[1], None)
        except (OSError, UnicodeError):  # UnicodeError: a name too long to be one
            raise UsageError(
                f"the host {match[1]!r} cannot be found",
                where=f"{path}, line {number}",
                fix="check the name, or give its address",
            ) from None
        count = match[2] or match[3]
        limited = limited and count is not None  # without a number it is the host's cores, or as many as are wanted
        slots += int(count or 1)
    if not slots:
        raise UsageError(f"the host file {path} names no host", where="--hostfile", fix=fix)
    if limited and slots < num_ranks:
        raise UsageError(
            f"the hosts have {slots} slots, the engine has {num_ranks} ranks",
            where=str(path),
            fix="raise slots= on some of the lines, or add hosts",
        )
