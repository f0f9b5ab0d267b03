"""NCCL's binding, with a library that only notes what it is asked."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from tests.thread_ranks import run_ranks
from trtllm_cli.errors import DeviceError, ResourceError
from trtllm_cli.mapping import Mapping
from trtllm_cli.run.backends import nccl


class Library:
    """A communicator is made for each rank by the group's id, which its first rank draws."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails
        self.ncclGetErrorString = lambda code: b"remote process exited"

    def ncclGetUniqueId(self, ident):
        ident._obj.internal[0] = 1 + len(self.calls)
        self.calls.append(("id",))
        return 0

    def ncclCommInitRank(self, made, size, ident, rank):
        made._obj.value = 1000 * ident.internal[0] + rank
        self.calls.append(("init", size, ident.internal[0], rank))
        return 6 if self.fails == "init" else 0

    def __getattr__(self, name):
        def call(*args):
            values = [a.value if isinstance(a, ctypes._SimpleCData) else a for a in args]
            self.calls.append((name, *values))
            return 6 if self.fails == name else 0

        return call


def made(monkeypatch, mapping, fails=""):
    library = Library(fails)
    monkeypatch.setattr(nccl, "_library", lambda: library)
    return library, run_ranks(mapping.world_size, lambda comm: nccl.Nccl(mapping.ranks[comm.rank], comm))


def test_ranks_meet_in_their_groups(monkeypatch):
    library, ranks = made(monkeypatch, Mapping.of(2, 2))
    inits = sorted(call[1:] for call in library.calls if call[0] == "init")
    assert [(size, rank) for size, _, rank in inits if size == 2] == [(2, 0), (2, 1), (2, 0), (2, 1)]
    assert [(size, rank) for size, _, rank in inits if size == 4] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert [sorted(rank._comms) for rank in ranks] == [[(0, 1), (0, 1, 2, 3)]] * 2 + [[(0, 1, 2, 3), (2, 3)]] * 2
    assert sum(call == ("id",) for call in library.calls) == 3


def test_what_nccl_is_asked(monkeypatch):
    library, ranks = made(monkeypatch, Mapping.of(2))
    library.calls.clear()
    x, y = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16)
    ranks[1].all_reduce(x, y, [0, 1], 77)
    comm = ranks[1]._comms[0, 1].value
    assert library.calls == [("ncclAllReduce", x.data_ptr(), y.data_ptr(), 12, 9, 0, comm, 77)]
    library.calls.clear()
    out = torch.zeros(2, 3, 4)
    ranks[1].all_gather(out[0], out, (0, 1), 77)
    assert library.calls == [("ncclAllGather", out.data_ptr(), out.data_ptr(), 12, 7, comm, 77)]
    library.calls.clear()
    ranks[1].close()
    assert library.calls == [("ncclCommDestroy", comm)]
    ranks[1].close()
    assert len(library.calls) == 1


def test_stages_send_to_each_other(monkeypatch):
    library, ranks = made(monkeypatch, Mapping.of(1, 2))
    library.calls.clear()
    x = torch.zeros(2, 8)
    ranks[0].send(x, 1, 5)
    ranks[1].recv(x, 0, 6)
    (_, *sent), (_, *received) = library.calls
    assert sent == [x.data_ptr(), 16, 7, 1, ranks[0]._comms[0, 1].value, 5]
    assert received == [x.data_ptr(), 16, 7, 0, ranks[1]._comms[0, 1].value, 6]


@pytest.mark.parametrize("fails", ["init", "ncclAllReduce"])
def test_what_nccl_says_of_a_failure(monkeypatch, fails):
    x = torch.zeros(2, 2)
    with pytest.raises(DeviceError, match="cannot talk to each other: NCCL says 'remote process exited' .6.") as e:
        made(monkeypatch, Mapping.of(2), fails)[1][0].all_reduce(x, x, [0, 1], 0)
    assert "NCCL_DEBUG=WARN" in e.value.fix


def test_without_the_library(monkeypatch):
    def missing(name):
        raise OSError(name)

    nccl._library.cache_clear()
    monkeypatch.setattr(nccl, "ctypes", SimpleNamespace(CDLL=missing))
    with pytest.raises(ResourceError, match="NCCL is not installed") as e:
        nccl._library()
    assert "torch for CUDA" in e.value.fix
