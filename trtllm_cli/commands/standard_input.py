"""The whole of standard input, also through mpirun: Open MPI 5.0's does not tell rank 0 that it has ended.

`--launch` therefore reads it first, and hands mpirun a file of it with a mark at the end.
"""

from __future__ import annotations

import os
import sys
import tempfile

from trtllm_cli.errors import UsageError

MARKED = "TRTLLM_STDIN_MARKED"  # the variable that says that there is a mark
_MARK = b"\0"  # in no text


def read_all() -> bytes:
    """Everything up to the end, or the mark. Raises UsageError where no end would ever come."""
    from trtllm_cli.run.world import current

    if os.environ.get(MARKED):
        data = bytearray()
        while not data.endswith(_MARK) and (more := os.read(0, 1 << 16)):
            data += more
        return bytes(data).removesuffix(_MARK)
    if not current().ends_stdin:
        raise UsageError(
            "Open MPI 5.0's mpirun does not pass on the end of standard input",
            where="standard input",
            fix="give the prompt as an argument or with --input-file FILE, or let --launch start the ranks",
        )
    return sys.stdin.buffer.read()


def mark_end() -> None:
    """Reads all, and puts in its place a file of the same with a mark. For the program that this process becomes."""
    with tempfile.TemporaryFile() as file:
        file.write(sys.stdin.buffer.read() + _MARK)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    os.environ[MARKED] = "1"
