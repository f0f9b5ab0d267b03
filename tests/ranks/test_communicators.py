"""The communicators of several processes: MPI's under mpirun, torch's as torchrun would start them.

What is checked is in collectives.py, which every rank runs.
"""

import functools
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ranks.conftest import ROOT, run

# Open MPI as in containers where no process may read another's memory: its sender has to help a large message along.
NO_SINGLE_COPY = {
    "OMPI_MCA_smsc": "^cma,xpmem,knem", "OMPI_MCA_btl_sm_use_cma": "0",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}  # fmt: skip
PROGRAM = ROOT / "tests" / "ranks" / "collectives.py"


def bits(world_size, out):
    """The hashes that every rank has printed, which are the same."""
    ranks = [json.loads(line) for line in out.splitlines()]
    assert sorted(rank["rank"] for rank in ranks) == list(range(world_size))
    assert all(rank["bits"] == ranks[0]["bits"] for rank in ranks)
    return ranks[0]["bits"]


@functools.cache
def torch_bits(world_size):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start(rank):
        env = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank}
        env = {name: str(value) for name, value in env.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return run([sys.executable, "-W", "error", PROGRAM, "torch"], timeout=60, env=env)

    with ThreadPoolExecutor(world_size) as threads:
        results = list(threads.map(start, range(world_size)))
    assert [result.code for result in results] == [0] * world_size, "\n".join(result.err for result in results)
    return bits(world_size, "".join(result.out for result in results))


@pytest.fixture(scope="module")
def mpi_bits(mpirun):
    @functools.cache
    def start(world_size):
        result = mpirun(world_size, sys.executable, "-W", "error", PROGRAM, "mpi", env=NO_SINGLE_COPY)
        assert result.code == 0, result.err
        return bits(world_size, result.out)

    return start


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_mpi_ranks_tell_each_other_what_numpy_says(mpi_bits, world_size):
    mpi_bits(world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_torch_ranks_tell_each_other_what_numpy_says(world_size):
    torch_bits(world_size)


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [2, 4])
def test_torch_and_mpi_give_the_same_bits(mpi_bits, world_size):
    assert torch_bits(world_size) == mpi_bits(world_size)


@pytest.mark.mpi
def test_a_rank_that_gets_something_else_is_found_out(mpirun):
    """The program itself: it fails where one rank's numbers are not those that the others expect."""
    other = f"""
import runpy, sys, numpy as np
from trtllm_cli.run.mpi import MpiCommunicator
was = MpiCommunicator.all_reduce
def wrong(self, x, group):
    was(self, x, group)
    x.flat[-1] = np.nextafter(x.flat[-1], np.float32(np.inf)) if self.rank == 1 else x.flat[-1]
MpiCommunicator.all_reduce = wrong
sys.argv = ["collectives.py", "mpi"]
runpy.run_path({str(PROGRAM)!r}, run_name="__main__")
"""
    result = mpirun(2, sys.executable, "-c", other)
    assert result.code != 0
    assert "Arrays are not equal" in result.err
