"""NCCL through ctypes: what ranks on several GPUs, or hosts, exchange. The library is the one that torch brings.

NCCL API: docs.nvidia.com/deeplearning/nccl/user-guide.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trtllm_cli.errors import DeviceError, ResourceError

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.communicator import Communicator

_TYPES = {torch.float32: 7, torch.bfloat16: 9}
_SUM = 0
_NAME = "libnccl.so.2"
PATIENCE = 60.0  # seconds that the ranks have to meet: NCCL looks for networks and links first


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * 128),)


class Nccl:
    """This rank's communicators: of its tensor-parallel group, and of all ranks where there are pipeline stages.

    Made on every rank at once, the rank's GPU being the current one. Raises DeviceError where the ranks do not meet.
    """

    def __init__(self, rank: Rank, comm: Communicator) -> None:
        self._lib = _library()
        self._rank = rank
        self._comms: dict[tuple[int, ...], c_void_p] = {}
        with comm.activity.getting_on(PATIENCE):
            if rank.mapping.tp_size > 1:
                self._meet(comm, rank.tp_group)
            if rank.mapping.pp_size > 1:
                self._meet(comm, tuple(range(rank.mapping.world_size)))

    def all_reduce(self, x: torch.Tensor, y: torch.Tensor, group: Sequence[int], stream: int) -> None:
        """`y`: the sum of `x` over the group, elementwise."""
        comm = self._comms[tuple(group)]
        self._check(
            self._lib.ncclAllReduce(
                c_void_p(x.data_ptr()), c_void_p(y.data_ptr()), c_size_t(x.numel()), _TYPES[x.dtype], _SUM, comm,
                c_void_p(stream),
            )
        )  # fmt: skip

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, group: Sequence[int], stream: int) -> None:
        """`out` [ranks, ...]: every rank's `x`."""
        comm = self._comms[tuple(group)]
        self._check(
            self._lib.ncclAllGather(
                c_void_p(x.data_ptr()), c_void_p(out.data_ptr()), c_size_t(x.numel()), _TYPES[x.dtype], comm,
                c_void_p(stream),
            )
        )  # fmt: skip

    def send(self, x: torch.Tensor, to: int, stream: int) -> None:
        """Sends `x` to a rank, which must receive it."""
        self._point_to_point(self._lib.ncclSend, x, to, stream)

    def recv(self, x: torch.Tensor, source: int, stream: int) -> None:
        """Fills `x` with what a rank sends."""
        self._point_to_point(self._lib.ncclRecv, x, source, stream)

    def close(self) -> None:
        """Ends the communicators; every rank calls it, with nothing under way."""
        for comm in self._comms.values():
            self._lib.ncclCommDestroy(comm)
        self._comms.clear()

    def _point_to_point(self, function: ctypes._NamedFuncPointer, x: torch.Tensor, peer: int, stream: int) -> None:
        comm = self._comms[tuple(range(self._rank.mapping.world_size))]
        self._check(
            function(c_void_p(x.data_ptr()), c_size_t(x.numel()), _TYPES[x.dtype], peer, comm, c_void_p(stream))
        )

    def _meet(self, comm: Communicator, group: tuple[int, ...]) -> None:
        """Makes a group's communicator. Every rank of the world comes here, each with a group of its own."""
        if group in self._comms:
            return
        ident = _UniqueId()
        if comm.rank == group[0]:
            self._check(self._lib.ncclGetUniqueId(byref(ident)))
        first = comm.exchange(bytes(ident.internal).hex())[group[0]]
        ident.internal = (ctypes.c_ubyte * 128)(*bytes.fromhex(first))
        made = c_void_p()
        self._check(self._lib.ncclCommInitRank(byref(made), len(group), ident, group.index(comm.rank)))
        self._comms[group] = made

    def _check(self, code: int) -> None:
        if code:
            self._lib.ncclGetErrorString.restype = c_char_p
            text = self._lib.ncclGetErrorString(c_int(code)).decode()
            raise DeviceError(
                f"the GPUs of the ranks cannot talk to each other: NCCL says {text!r} ({code})",
                fix="see what NCCL_DEBUG=WARN prints; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 leave a broken link out",
            )


@cache
def _library() -> ctypes.CDLL:
    """NCCL as torch has loaded it, or as its package has it."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    for name in (_NAME, *(str(Path(folder) / "nccl" / "lib" / _NAME) for folder in folders)):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ResourceError(
        "NCCL is not installed, which several GPUs need to talk to each other",
        fix="install torch for CUDA, which brings it, or pip install nvidia-nccl-cu13",
    )
