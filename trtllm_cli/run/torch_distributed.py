"""Ranks that torchrun started: they talk through torch.distributed (gloo), slower than MPI, and without its library."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from trtllm_cli.run.communicator import Activity, side_by_side, sum_in_order

if TYPE_CHECKING:
    from trtllm_cli.run.communicator import Array
    from trtllm_cli.run.model_inputs import IntArray

_STEP_SIZE, _STEP, _HIDDEN = 1, 2, 3  # tags
_FOR_EVER = datetime.timedelta(days=365)  # ranks are idle for hours; watch.py sees those that hang


class TorchCommunicator:
    """One rank of torch.distributed's world. Made on every rank at once; one thread at a time may use it."""

    def __init__(self, activity: Activity) -> None:
        with activity.waiting():
            dist.init_process_group("gloo", timeout=_FOR_EVER)
        self.rank, self.world_size, self.activity = dist.get_rank(), dist.get_world_size(), activity
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(self.world_size)): dist.group.WORLD}
        self._sending: list[tuple[Any, torch.Tensor]] = []  # works, and the memory that they read

    def exchange(self, text: str) -> list[str]:
        """See Communicator."""
        out: list[Any] = [None] * self.world_size
        with self.activity.waiting():
            dist.all_gather_object(out, text)
        return out

    def broadcast(self, message: IntArray | None) -> IntArray:
        """See Communicator."""
        if message is not None:
            for to in range(1, self.world_size):
                self._send(np.array([len(message)], np.int32), to, _STEP_SIZE)
                if len(message):
                    self._send(message, to, _STEP)
            return message
        size = np.empty(1, np.int32)
        with self.activity.waiting(idle=True):
            dist.recv(torch.from_numpy(size), src=0, tag=_STEP_SIZE)
        out = np.empty(size[0], np.int32)
        if len(out):
            dist.recv(torch.from_numpy(out), src=0, tag=_STEP)
        return out

    def all_reduce(self, x: Array, group: Sequence[int]) -> None:
        """See Communicator."""
        if len(group) > 1:
            sum_in_order(self._gather(x, group), x)

    def all_gather(self, x: Array, group: Sequence[int]) -> Array:
        """See Communicator."""
        return side_by_side(self._gather(x, group))

    def send(self, x: Array, to: int) -> None:
        """See Communicator."""
        if x.size:  # gloo sends nothing that is empty
            self._send(x.copy(), to, _HIDDEN)

    def recv(self, out: Array, source: int) -> None:
        """See Communicator."""
        with self.activity.waiting():
            if out.size:
                dist.recv(torch.from_numpy(out), src=source, tag=_HIDDEN)

    def push(self) -> None:
        """See Communicator. gloo's own thread does it."""
        self._sending = [(work, x) for work, x in self._sending if not work.is_completed()]

    def flush(self) -> None:
        """See Communicator. gloo's own thread does it."""

    def finish(self) -> None:
        """See Communicator."""
        with self.activity.waiting():
            for work, _ in self._sending:
                work.wait()
            dist.barrier()
            dist.destroy_process_group()

    def abort(self, code: int) -> None:
        """See Communicator. torchrun ends the others when this process has gone."""
        os._exit(code)

    def _send(self, x: np.ndarray[Any, Any], to: int, tag: int) -> None:
        self.push()
        tensor = torch.from_numpy(x)
        self._sending.append((dist.isend(tensor, dst=to, tag=tag), tensor))

    def _gather(self, x: Array, group: Sequence[int]) -> Array:
        """Every rank's x, [n, *x.shape]."""
        key = tuple(group)
        with self.activity.waiting():
            if key not in self._groups:
                self._groups[key] = dist.new_group(list(key), use_local_synchronization=True)
            parts = torch.empty((len(key), *x.shape))
            dist.all_gather(list(parts.unbind()), torch.from_numpy(x), group=self._groups[key])
        return parts.numpy()
