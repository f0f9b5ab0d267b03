"""Which rank this process is, as its launcher says in the environment: mpirun, mpiexec, srun or torchrun.

Nothing is imported or connected for it, so that every command can ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_cli.errors import ResourceError, UsageError

# Launcher -> its variables for: this rank, how many there are, this rank among those on its host, how many those are.
_VARIABLES = {
    "mpirun": (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ),
    "srun": (("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),),
    "torchrun": (("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),),
}


@dataclass(frozen=True)
class Launched:
    """A process's place among those that were started together."""

    launcher: str  # "mpirun", "srun" or "torchrun"
    rank: int
    size: int
    local_rank: int  # among those on this host
    local_size: int

    @classmethod
    def find(cls, env: Mapping[str, str] = os.environ) -> Launched | None:
        """This process's place; None where nothing has launched it.

        Within a Slurm job that has no `srun` in front, Slurm's variables are those of the job's script and do not
        count; torchrun's are torchrun's only beside the port that ranks meet at. Raises UsageError for variables that
        contradict themselves.
        """
        for launcher, kinds in _VARIABLES.items():
            for names in kinds:
                if names[0] not in env or names[1] not in env:
                    continue
                if launcher == "srun" and "SLURM_STEP_ID" not in env:
                    continue
                if launcher == "torchrun" and "MASTER_PORT" not in env:
                    continue
                launcher = "srun" if names[0] == "PMI_RANK" and "SLURM_STEP_ID" in env else launcher
                return cls._read(launcher, names, env)
        return None

    @classmethod
    def _read(cls, launcher: str, names: tuple[str, str, str, str], env: Mapping[str, str]) -> Launched:
        rank, size, local_rank, local_size = (_number(name, env) for name in names)
        assert rank is not None
        assert size is not None
        if not 0 <= rank < size:
            raise UsageError(
                f"{launcher} says that this is rank {rank} of {size}",
                where=f"{names[0]}, {names[1]}",
                fix="unset these variables, or start the ranks with mpirun",
            )
        if local_rank is None or local_size is None:
            local_rank, local_size = rank, size
        return cls(launcher, rank, size, local_rank, local_size)

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks share a host."""
        return self.local_size == self.size

    def binding_note(self, usable: int, cores: int) -> str | None:
        """What to say where this host's ranks, bound to `usable` of mpirun's `cores` each, leave half of them idle.

        Open MPI binds a rank to a core unless told otherwise.
        """
        if self.launcher != "mpirun" or 2 * usable * self.local_size > cores:
            return None
        return (
            f"mpirun lets each of {self.local_size} ranks use {usable} of {cores} processors; "
            "mpirun --bind-to none lets them share all"
        )

    def gpu(self, num_gpus: int) -> int:
        """The GPU, of those that this process sees, that is this rank's own.

        Launchers that bind GPUs show each rank one; otherwise the ranks of a host share its GPUs out. Raises
        ResourceError where there are fewer GPUs than ranks on this host.
        """
        if num_gpus == 1 and self.local_size > 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
            return 0
        local_size = max(self.local_size, self.local_rank + 1)  # srun tells us of the first host alone
        if num_gpus < local_size:
            raise ResourceError(
                f"{local_size} ranks run on this host, and it has {num_gpus} GPUs: each rank needs one of its own",
                where=f"{self.launcher}, CUDA_VISIBLE_DEVICES",
                fix="start fewer ranks a host (Open MPI: --map-by ppr:N:node; srun: --ntasks-per-node), or let the "
                "processes see more GPUs",
            )
        return self.local_rank


def _number(name: str, env: Mapping[str, str]) -> int | None:
    """A variable as a number. Slurm writes tasks per node as "2(x3),1"; the first host's count is told then."""
    text = env.get(name)
    if text is None:
        return None
    try:
        return int(text.partition("(")[0].partition(",")[0])
    except ValueError:
        raise UsageError(f"{name} is {text!r}, which is no number", where=name, fix="unset it") from None
