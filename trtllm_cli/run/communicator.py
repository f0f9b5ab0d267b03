"""How ranks talk: the seam behind the graph's collectives and rank 0's messages.

`SingleRank` is the communicator of one process; `mpi.py` and `torch_distributed.py` have those of several. Arrays are
float32, C-contiguous, on the host.

A sum over ranks is made in the order of the ranks, whatever the size of the array and the number of hosts, so that a
token's result is the same bits in any company. MPI's all-reduces choose an algorithm by size, and do not promise it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from trtllm_cli.run.model_inputs import IntArray

    Array = npt.NDArray[np.float32]


_TICK = 0.5  # seconds


class Activity:
    """What a rank is doing, written by the thread that does it and read by the one that watches over it.

    It is idle until it works; while it works it may have to wait for others.
    """

    def __init__(self) -> None:
        self.stage = "start"
        self.idle = True
        self.waits = True  # idle, or for another rank: that may take any time
        self.progress = 0  # goes up with whatever gets done
        self.released = False  # rank 0 has told the others to stop
        self.kernels: Callable[[], int] | None = None  # counts up while kernels run, that tell nobody else

    def done(self) -> int:
        """What has got done, as a number that grows."""
        return self.progress + (self.kernels() if self.kernels else 0)

    def tick(self) -> None:
        """Something got done."""
        self.progress += 1

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """What is done meanwhile is up to this rank."""
        before = self.stage, self.idle, self.waits
        self.stage, self.idle, self.waits = stage, False, False
        try:
            yield
        finally:
            self.stage, self.idle, self.waits = before
            self.tick()

    @contextmanager
    def waiting(self, *, idle: bool = False) -> Iterator[None]:
        """What is done meanwhile is up to another rank, or with `idle` to nobody: there is nothing to do."""
        before = self.stage, self.idle, self.waits
        self.stage, self.idle, self.waits = "idle" if idle else self.stage, idle, True
        try:
            yield
        finally:
            self.stage, self.idle, self.waits = before
            self.tick()

    @contextmanager
    def getting_on(self, seconds: float) -> Iterator[None]:
        """What is done meanwhile tells nothing of its progress, and may take so long; then it counts as stuck."""
        done = threading.Event()

        def count() -> None:
            for _ in range(int(seconds / _TICK)):
                if done.wait(_TICK):
                    return
                self.tick()

        threading.Thread(target=count, name="trtllm-progress", daemon=True).start()
        try:
            yield
        finally:
            done.set()


class Communicator(Protocol):
    """One rank's end. `group` lists the ranks that take part, in ascending order, this one among them."""

    rank: int
    world_size: int
    activity: Activity

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, on every rank, in order. For a few words, now and then."""
        ...

    def broadcast(self, message: IntArray | None) -> IntArray:
        """Rank 0's message, on every rank; the others pass None, and may wait for it for hours."""
        ...

    def all_reduce(self, x: Array, group: Sequence[int]) -> None:
        """Sums `x` over the group, in place."""
        ...

    def all_gather(self, x: Array, group: Sequence[int]) -> Array:
        """The group's `x` side by side along the last dimension."""
        ...

    def send(self, x: Array, to: int) -> None:
        """Sends `x`, which may be reused when this returns. Does not wait for the receiver."""
        ...

    def recv(self, out: Array, source: int) -> None:
        """Fills `out` with what `source` sends."""
        ...

    def push(self) -> None:
        """Helps what is being sent on its way; call it now and then during long computations."""
        ...

    def flush(self) -> None:
        """Returns when what was sent is on its way, and needs no more help: before waiting for what others compute."""
        ...

    def finish(self) -> None:
        """Returns when every rank has called it, the last thing that it may call."""
        ...

    def abort(self, code: int) -> None:
        """Ends every rank's process where it can. May be called from any thread, and may return."""
        ...


class SingleRank:
    """The communicator of a world of one."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.activity = Activity()

    def exchange(self, text: str) -> list[str]:
        """The text itself."""
        return [text]

    def broadcast(self, message: IntArray | None) -> IntArray:
        """The message itself."""
        assert message is not None
        return message

    def all_reduce(self, x: Array, group: Sequence[int]) -> None:
        """The sum over one rank is its own."""
        assert list(group) == [0]

    def all_gather(self, x: Array, group: Sequence[int]) -> Array:
        """One rank's own."""
        assert list(group) == [0]
        return x

    def send(self, x: Array, to: int) -> None:
        """There is nobody to send to."""
        raise AssertionError("a world of one has no other rank")

    def recv(self, out: Array, source: int) -> None:
        """There is nobody to receive from."""
        raise AssertionError("a world of one has no other rank")

    def push(self) -> None:
        """There is nothing under way."""

    def flush(self) -> None:
        """There is nothing under way."""

    def finish(self) -> None:
        """There is nobody to wait for."""

    def abort(self, code: int) -> None:
        """There is nobody to end."""


def sum_in_order(parts: Array, out: Array) -> None:
    """`out = ((parts[0] + parts[1]) + parts[2]) + ...`, element by element; parts [n, *out.shape], n at least 2."""
    np.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        np.add(out, part, out=out)


def side_by_side(parts: Array) -> Array:
    """[n, rows, width] to [rows, n * width]: the n parts of each row one after another."""
    n, rows, width = parts.shape
    return parts.transpose(1, 0, 2).reshape(rows, n * width)


def shares(size: int, n: int) -> list[int]:
    """`size` things in `n` parts, as alike as can be."""
    return [(i + 1) * size // n - i * size // n for i in range(n)]
