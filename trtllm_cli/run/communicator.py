"""How ranks talk: the seam behind the graph's collectives and the executor's broadcast.

`SingleRank` is the communicator of one process. MPI and NCCL ones take its place when there are several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]


class Communicator(Protocol):
    """One rank's end. `group` lists the ranks that take part, this one among them."""

    rank: int
    world_size: int

    def broadcast(self, message: Any) -> Any:
        """Rank 0's message, on every rank; the others pass None."""
        ...

    def all_reduce(self, x: Array, group: Sequence[int]) -> None:
        """Sums `x` over the group, in place."""
        ...

    def all_gather(self, x: Array, group: Sequence[int]) -> Array:
        """The group's `x` side by side along the last dimension."""
        ...

    def send(self, x: Array, to: int) -> None:
        """Sends `x`, which may be reused when this returns."""
        ...

    def recv(self, out: Array, source: int) -> None:
        """Fills `out` with what `source` sends."""
        ...


class SingleRank:
    """The communicator of a world of one."""

    rank = 0
    world_size = 1

    def broadcast(self, message: Any) -> Any:
        """The message itself."""
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
