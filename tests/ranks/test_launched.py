"""Which rank this process is, in each launcher's words."""

import pytest

from trtllm_cli.errors import ResourceError, UsageError
from trtllm_cli.run.launched import Launched

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
LAUNCHERS = [("mpirun", OPEN_MPI), ("mpirun", MPICH), ("srun", SRUN), ("torchrun", TORCHRUN)]


@pytest.mark.parametrize(("launcher", "env"), LAUNCHERS)
def test_each_launcher_says_which_rank_this_is(launcher, env):
    found = Launched.find({"PATH": "/usr/bin", **env})
    assert found == Launched(launcher, rank=5, size=8, local_rank=1, local_size=4)
    assert not found.on_one_host


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OMPI_COMM_WORLD_RANK": "0"},  # no size
        {"WORLD_SIZE": "8", "MASTER_PORT": "29500"},
        {"RANK": "5", "WORLD_SIZE": "8"},  # set by hand, for something else
        BATCH_SCRIPT,
    ],
)
def test_nothing_has_launched_a_process_on_its_own(env):
    assert Launched.find(env) is None


def test_a_batch_script_is_no_rank_also_where_it_inherits_a_count():
    assert Launched.find(BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_mpirun_and_torchrun_count_within_a_slurm_job():
    assert Launched.find(SRUN | OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}).rank == 2
    assert Launched.find(BATCH_SCRIPT | TORCHRUN).launcher == "torchrun"


def test_srun_may_speak_as_pmi():
    assert Launched.find(SRUN | MPICH).launcher == "srun"


@pytest.mark.parametrize(
    ("text", "local_size"), [("4", 4), ("4(x2)", 4), ("4,3", 4), ("2(x3),1", 2), ("16(x2),8(x1)", 16)]
)
def test_slurm_counts_tasks_of_each_host(text, local_size):
    assert Launched.find(SRUN | {"SLURM_STEP_TASKS_PER_NODE": text}).local_size == local_size


def test_ranks_share_a_host_where_the_launcher_does_not_say():
    env = {"PMI_RANK": "1", "PMI_SIZE": "4"}
    found = Launched.find(env)
    assert found == Launched("mpirun", 1, 4, 1, 4)
    assert found.on_one_host


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0"), ("0", "-2")])
@pytest.mark.parametrize(("launcher", "env"), LAUNCHERS)
def test_a_rank_beyond_the_others_is_refused(launcher, env, rank, size):
    names = list(next(names for names in NAMES if names[0] in env))
    with pytest.raises(UsageError, match=f"{launcher} says that this is rank {rank} of {size}") as raised:
        Launched.find(env | dict(zip(names, (rank, size), strict=True)))
    assert names[0] in str(raised.value)
    assert "unset" in raised.value.fix


NAMES = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("RANK", "WORLD_SIZE"),
]


@pytest.mark.parametrize("garbage", ["", "two", "0x2", "1.5", "(x2)"])
@pytest.mark.parametrize("env", [env for _, env in LAUNCHERS])
def test_a_variable_that_is_no_number_is_named(env, garbage):
    name = next(names[1] for names in NAMES if names[0] in env)
    with pytest.raises(UsageError, match=f"{name} is '") as raised:
        Launched.find(env | {name: garbage})
    assert raised.value.where == name


def rank(local_rank, local_size):
    return Launched("mpirun", local_rank, local_size, local_rank, local_size)


@pytest.fixture(autouse=True)
def no_gpus_are_chosen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_ranks_of_a_host_share_its_gpus_out():
    assert [rank(i, 4).gpu(4) for i in range(4)] == [0, 1, 2, 3]
    assert [rank(i, 4).gpu(8) for i in range(4)] == [0, 1, 2, 3]
    assert Launched("mpirun", rank=6, size=8, local_rank=2, local_size=4).gpu(4) == 2


def test_a_rank_that_is_shown_one_gpu_takes_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert [rank(i, 4).gpu(1) for i in range(4)] == [0] * 4


def test_one_rank_takes_the_first_gpu():
    assert rank(0, 1).gpu(1) == 0
    assert rank(0, 1).gpu(8) == 0


@pytest.mark.parametrize(("num_gpus", "visible"), [(1, None), (0, None), (3, None), (0, ""), (2, "0,1")])
def test_more_ranks_than_gpus_are_refused(monkeypatch, num_gpus, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ResourceError, match=f"4 ranks run on this host, and it has {num_gpus} GPUs") as raised:
        rank(1, 4).gpu(num_gpus)
    assert "ppr" in raised.value.fix


def test_srun_may_start_more_ranks_on_a_later_host_than_on_the_first():
    third = Launched.find(SRUN | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "1,3"})
    assert third.gpu(3) == 2
    with pytest.raises(ResourceError, match="3 ranks run on this host, and it has 2 GPUs"):
        third.gpu(2)


def test_a_binding_that_leaves_processors_idle_is_told():
    four = Launched.find(OPEN_MPI)  # on this host
    assert "each of 4 ranks use 1 of 64 processors" in four.binding_note(1, 64)
    assert "--bind-to none" in four.binding_note(1, 8)
    assert four.binding_note(2, 8) is None
    assert four.binding_note(64, 64) is None
    assert Launched.find(SRUN).binding_note(1, 64) is None
