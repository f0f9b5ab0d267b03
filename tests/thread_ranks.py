"""A world of ranks as threads of one process: the communicator of tests."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from trtllm_cli.run.communicator import Activity

T = TypeVar("T")
PATIENCE = 60  # seconds that a rank waits for another


class ThreadRank:
    """One rank's end. Every pair of ranks has a queue in each direction."""

    def __init__(self, rank: int, world_size: int, channels: dict[tuple[int, int], queue.Queue[Any]]) -> None:
        self.rank, self.world_size, self._channels = rank, world_size, channels
        self.activity = Activity()

    def _put(self, message: Any, to: int) -> None:
        self._channels[self.rank, to].put(message)

    def _get(self, source: int) -> Any:
        return self._channels[source, self.rank].get(timeout=PATIENCE)

    def broadcast(self, message: Any) -> Any:
        if self.rank != 0:
            return self._get(0)
        for to in range(1, self.world_size):
            self._put(message, to)
        return message

    def send(self, x: np.ndarray, to: int) -> None:
        self._put(x.copy(), to)

    def recv(self, out: np.ndarray, source: int) -> None:
        out[:] = self._get(source)

    def exchange(self, text: str) -> list[str]:
        for to in range(self.world_size):
            self._put(text, to)
        return [self._get(source) for source in range(self.world_size)]

    def push(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def _exchange(self, x: np.ndarray, group: Sequence[int]) -> list[np.ndarray]:
        """Every rank's x, in the group's order."""
        assert self.rank in group
        for to in group:
            self._put(x.copy(), to)
        return [self._get(source) for source in group]

    def all_reduce(self, x: np.ndarray, group: Sequence[int]) -> None:
        x[:] = sum(self._exchange(x, group))

    def all_gather(self, x: np.ndarray, group: Sequence[int]) -> np.ndarray:
        return np.concatenate(self._exchange(x, group), axis=-1)


class TensorRank:
    """One rank's end as kernels.reference.Reference wants it."""

    def __init__(self, rank: ThreadRank) -> None:
        self._rank = rank

    def all_reduce(self, x: torch.Tensor, group: Sequence[int]) -> torch.Tensor:
        out = x.numpy().copy()
        self._rank.all_reduce(out, group)
        return torch.from_numpy(out)

    def all_gather(self, x: torch.Tensor, group: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._rank.all_gather(x.numpy(), group))

    def send(self, x: torch.Tensor, to: int) -> None:
        self._rank.send(x.numpy(), to)

    def recv(self, shape: Sequence[int], source: int) -> torch.Tensor:
        out = np.empty(tuple(shape), dtype=np.float32)
        self._rank.recv(out, source)
        return torch.from_numpy(out)


def thread_ranks(world_size: int) -> list[ThreadRank]:
    """The communicators of a world."""
    channels: dict[tuple[int, int], queue.Queue[Any]] = defaultdict(queue.Queue)
    return [ThreadRank(rank, world_size, channels) for rank in range(world_size)]


def run_ranks(world_size: int, work: Callable[[ThreadRank], T]) -> list[T]:
    """`work` on every rank at once; their results."""
    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(work, thread_ranks(world_size)))
