"""SHA-256 of files while they are written, so that nobody has to read them again from the disk.

A thread follows the part of each file that is finished from its beginning on; it finds those bytes still in memory.
What it has hashed it sends to the disk, which so works beside the conversion and has little left to do at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from threading import Event, Thread
from types import TracebackType
from typing import Self

from trtllm_cli.tensor_file import TensorFileWriter

_CHUNK = 1 << 20  # bytes hashed at once: they stay in the cache
_FLUSH = 32 << 20  # bytes sent to the disk at once
_LOOK_SECONDS = 0.01  # between looks at a tensor that is being written


class Follower:
    """Hashes the files of some writers. As a context it stops when the block ends, finished or not."""

    def __init__(self, writers: Sequence[TensorFileWriter]) -> None:
        self._files = [_File(writer) for writer in writers]
        self._wake, self._stop = Event(), False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="trtllm-sha256", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """Something was written."""
        self._wake.set()

    def digests(self) -> list[str]:
        """The files' SHA-256, once every tensor is written."""
        self.wake()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return [file.digest.hexdigest() for file in self._files]

    def _run(self) -> None:
        try:
            while not self._stop and any(not file.done for file in self._files):
                self._wake.wait(_LOOK_SECONDS)
                self._wake.clear()
                while not self._stop and sum(file.step() for file in self._files):
                    pass  # each file had a turn
        except BaseException as e:
            self._error = e


class _File:
    def __init__(self, writer: TensorFileWriter) -> None:
        self.writer, self.digest, self.position = writer, hashlib.sha256(), 0
        self._sent = 0  # bytes on their way to the disk
        self._buffer = memoryview(bytearray(_CHUNK))

    @property
    def done(self) -> bool:
        return self.position == self.writer.size

    def step(self) -> bool:
        """Hashes the next piece, if there is one."""
        size = min(_CHUNK, self.writer.finished_bytes() - self.position)
        if size <= 0:
            return False
        size = self.writer.read_back(self.position, self._buffer[:size])
        assert size, f"{self.writer.path} was cut short"
        self.digest.update(self._buffer[:size])
        self.position += size
        if self.position - self._sent >= _FLUSH:
            self.writer.begin_flush(self._sent, self.position)
            self._sent = self.position
        return True
