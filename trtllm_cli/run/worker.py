"""What every rank does with a step, and the loop of the ranks that follow rank 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import ModelInputs


@dataclass(frozen=True)
class Step:
    """Rank 0's broadcast: one step's work. None in its place ends the loop."""

    inputs: ModelInputs
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination), in order, before the forward
    logits_rank: int = 0  # who sends its logits to rank 0, where it is not rank 0 itself


def compute(runner: Runner, step: Step) -> npt.NDArray[np.float32] | None:
    """This rank's part of a step; the logits where this rank has them."""
    if step.copies:
        runner.copy_blocks(step.copies)
    return runner.forward(step.inputs)


def follow(runner: Runner, comm: Communicator) -> None:
    """Computes what rank 0 schedules, until it says stop."""
    while (step := comm.broadcast(None)) is not None:
        logits = compute(runner, step)
        if comm.rank == step.logits_rank and len(step.inputs.logits_indices):
            assert logits is not None
            comm.send(logits, to=0)
