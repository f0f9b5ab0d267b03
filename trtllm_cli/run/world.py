"""The ranks that were started together: this one, how it talks to the others, and how they end together.

`join` makes the world that the launcher's variables describe. Before any model is loaded, the ranks agree that they are
as many as the engine has, that each sees the same engine, and that they run the same version. From then on they watch
over each other (watch.py): whatever happens to one of them ends all, with its message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_cli.errors import EngineError, RankError, ResourceError, UsageError
from trtllm_cli.run.communicator import Activity, Communicator, SingleRank
from trtllm_cli.run.launched import Launched
from trtllm_cli.run.watch import LAST_WORDS, SLOW, Failure, Hub, Report, Spoke
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank

TIMEOUT = 6.0  # seconds; with what ending takes, a rank that hangs ends the world in less than ten
VERIFIED = "verified"  # what a rank says when its engine file has its recorded hash


@dataclass
class World:
    """This process among the ranks. A world of one has no watch, and nobody to agree with."""

    comm: Communicator
    launched: Launched | None = None
    watch: Hub | Spoke | None = None
    hosts: Sequence[str] = ()  # of each rank
    ends_with_engine: bool = False  # was joined for one engine, and is left when that is closed

    @property
    def rank(self) -> int:
        """This process's number; 0 leads."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Ranks."""
        return self.comm.world_size

    @property
    def local_size(self) -> int:
        """Ranks on this host, which share its memory and processors."""
        return self.launched.local_size if self.launched else 1

    @property
    def ends_stdin(self) -> bool:
        """Whether rank 0 is told of the end of standard input."""
        return not getattr(self.comm, "library", "").startswith("Open MPI v5.0")

    def place(self, engine: Engine) -> Rank:
        """This process's place in the engine's mapping. Every rank calls it, before it loads anything.

        Raises UsageError where the ranks are not as many as the engine has, EngineError where the ranks see different
        engines, ResourceError where they run different versions.
        """
        mapping = engine.config.pretrained_config.mapping
        if mapping.world_size != self.size:
            raise self._wrong_size(engine)
        if self.size > 1:
            self._agree("engines", engine.digest, EngineError, "copy the same engine to every host", engine.path)
        return mapping.ranks[self.rank]

    def leave(self) -> None:
        """Returns when every rank is done."""
        if self.watch is not None:
            self.comm.finish()
            self.watch.close()
            self.watch = None

    @property
    def is_over(self) -> bool:
        """Whether the other ranks were told to stop: what rank 0 meets with from now on is its own affair."""
        return self.comm.activity.released

    def fail(self, text: str, code: int) -> None:
        """Ends every rank's process with this error, or an earlier one of another rank. Does not return."""
        assert self.watch is not None
        self.watch.fail(Failure(self.rank, text, code))
        time.sleep(LAST_WORDS)  # the hub ends us, once it has told why
        os._exit(code)

    def tell_verified(self) -> None:
        """Says that this rank's engine file is right. Of rank 0, returns when every rank has said so."""
        if self.watch is not None:
            self.watch.say(VERIFIED)
        if isinstance(self.watch, Hub):
            self.watch.wait_for(VERIFIED)

    def _agree(self, what: str, own: str, error: type[Exception], fix: str, where: Any = None) -> None:
        """Raises `error` on every rank unless all have the same."""
        every = self.comm.exchange(own)
        other = next((rank for rank, text in enumerate(every) if text != every[0]), None)
        if other is not None:
            name = f"rank 0 ({self.hosts[0]}) and rank {other} ({self.hosts[other]})"
            found = "" if len(own) > 40 else f": {every[0]} and {every[other]}"  # a digest says nothing to people
            raise error(f"{name} have different {what}{found}", where=where and str(where), fix=fix)  # type: ignore[call-arg]

    def _wrong_size(self, engine: Engine) -> UsageError:
        mapping = engine.config.pretrained_config.mapping
        split = f"(tp_size {mapping.tp_size}, pp_size {mapping.pp_size})"
        ranks = f"{mapping.world_size} rank{'s' if mapping.world_size > 1 else ''}"
        if self.launched is None:
            return UsageError(
                f"this engine is split over {ranks} {split}, and this is one process",
                where=str(engine.path),
                fix=f"mpirun -n {mapping.world_size} trtllm ..., or add --launch to have that done",
            )
        how = {
            "srun": f"srun --mpi=pmix -n {mapping.world_size}",
            "torchrun": f"torchrun --nproc-per-node {mapping.world_size}",
        }
        started = f"{self.size} rank{'s' if self.size > 1 else ''}"
        return UsageError(
            f"this engine has {ranks} {split}, {self.launched.launcher} started {started}",
            where=str(engine.path),
            fix=f"start it with {how.get(self.launched.launcher, f'mpirun -n {mapping.world_size}')}",
        )


_joined: World | None = None


def current() -> World:
    """The world that this process has joined, or else a world of one."""
    return _joined or World(SingleRank())


def join_for(engine: Engine) -> World:
    """The world to run an engine in: the one that this process has joined, or where it was launched with others and the
    engine is for several ranks, can join now.
    """
    launched = Launched.find()
    is_split = engine.config.pretrained_config.mapping.world_size > 1
    if is_split and _joined is None and launched is not None and launched.size > 1:
        join(launched).ends_with_engine = True
    return current()


def join(launched: Launched, report: Report | None = None, timeout: float | None = None) -> World:
    """Meets the other ranks. To be called once, on every rank; `current` gives it afterwards.

    `report` prints a failure; `timeout` is the seconds in which a rank must get something done. Raises ResourceError
    where the ranks cannot talk, RankError where they cannot watch over each other.
    """
    global _joined
    assert _joined is None, "joined twice"
    report = report or _print
    timeout = timeout or TIMEOUT
    with _start_timer(launched, report, timeout):
        comm = _communicator(launched)
        _joined = _connect(comm, launched, report, timeout)
    _joined._agree("versions of trtllm", __version__, ResourceError, "install the same version on every host")
    return _joined


def _communicator(launched: Launched) -> Communicator:
    activity = Activity()
    if launched.launcher == "torchrun":
        from trtllm_cli.run.torch_distributed import TorchCommunicator

        return TorchCommunicator(activity)
    from trtllm_cli.run.mpi import MpiCommunicator

    comm = MpiCommunicator(activity)
    if (comm.rank, comm.world_size) != (launched.rank, launched.size):
        raise ResourceError(
            f"{launched.launcher} started {launched.size} ranks, the MPI library that mpi4py loaded sees "
            f"{comm.world_size}: {comm.library}",
            where=launched.launcher,
            fix="srun --mpi=pmix (srun --mpi=list shows what it has)"
            if launched.launcher == "srun"
            else "use the mpirun that belongs to that library, or name the library: MPI4PY_LIBMPI=/path/to/libmpi.so",
        )
    return comm


def _connect(comm: Communicator, launched: Launched, report: Report, timeout: float) -> World:
    """The world, once every rank's watch is connected to rank 0's."""

    def end(code: int) -> None:
        sys.stderr.flush()
        killer = threading.Timer(1.0, os._exit, (code,))  # where aborting does not end us
        killer.daemon = True
        killer.start()
        comm.abort(code)
        os._exit(code)

    hub = None
    offer: dict[str, Any] = {"host": socket.gethostname()}
    if comm.rank == 0:
        hub = Hub(comm.world_size, comm.activity, timeout, report, end, local=launched.on_one_host)
        offer |= {"addresses": hub.addresses, "token": hub.token}
    offers = [json.loads(text) for text in comm.exchange(json.dumps(offer))]
    hosts = [each["host"] for each in offers]
    addresses = [(host, port) for host, port in offers[0]["addresses"]]
    watch: Hub | Spoke = hub or Spoke(comm.rank, addresses, offers[0]["token"], comm.activity, timeout, report, end)
    watch.hosts = hosts
    comm.exchange("watched")
    return World(comm, launched, watch, hosts)


@contextlib.contextmanager
def _start_timer(launched: Launched, report: Report, timeout: float) -> Iterator[None]:
    """Ends this process where the others do not come: nobody watches yet.

    Ranks of one parent process leave a mark each, so that it can be said who is missing.
    """
    done = threading.Event()

    def wait() -> None:
        # The lowest rank speaks; the launcher ends the others when it goes.
        if done.wait(timeout + 0.3 * launched.rank):
            return
        text = f"the other ranks did not start within {timeout:.0f} s{SLOW}"
        missing = [rank for rank in range(launched.size) if not _is_here(rank)]
        if missing and launched.on_one_host and _is_here(launched.rank):
            text = f"rank {missing[0]}: it did not start within {timeout:.0f} s{SLOW}"
        report(text)
        os._exit(RankError.exit_code)

    threading.Thread(target=wait, name="trtllm-start", daemon=True).start()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
            with contextlib.suppress(OSError):
                mark.bind(_mark(launched.rank))
            yield
    finally:
        done.set()


def _mark(rank: int) -> str:
    """A name for a rank of this process's parent. Of Linux's kind that is no file, and ends with its process."""
    return f"\0trtllm-{os.getuid()}-{os.getppid()}-{rank}"


def _is_here(rank: int) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(_mark(rank)) == 0


def _print(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
