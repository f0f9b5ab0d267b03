"""What every rank does with a step, and the loop of the ranks that follow rank 0."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from trtllm_cli.run.backends import SamplingRunner
from trtllm_cli.run.step_plan import StepPlan

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtllm_cli.run.backends import PendingTokens, Runner
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import ModelInputs
    from trtllm_cli.run.sampling_inputs import SamplingInputs
    from trtllm_cli.run.step_inputs import InputBuilder


def compute(runner: Runner, inputs: InputBuilder, plan: StepPlan) -> npt.NDArray[np.float32] | None:
    """This rank's part of a step; the logits where this rank has them."""
    return runner.forward(_prepare(runner, inputs, plan))


def start(runner: SamplingRunner, inputs: InputBuilder, plan: StepPlan, sampling: SamplingInputs) -> PendingTokens:
    """`compute`, for a runner that samples: the step is under way when this returns."""
    return runner.start(_prepare(runner, inputs, plan), sampling)


def _prepare(runner: Runner, inputs: InputBuilder, plan: StepPlan) -> ModelInputs:
    """Copies the blocks that the step wants copied, and gives its inputs."""
    if len(plan.copies):
        runner.copy_blocks(plan.copies.tolist())
    return inputs.build(plan)


def follow(runner: Runner, comm: Communicator, inputs: InputBuilder, logits_rank: int) -> None:
    """Computes what rank 0 schedules, until it says stop. `logits_rank` sends it the logits, also where there are none:
    so rank 0 is never more steps ahead than it has under way. Where runners sample, every rank samples the same tokens,
    for its own next step.
    """
    under_way: deque[PendingTokens] = deque()
    while len(message := comm.broadcast(None)):
        plan, sampling = StepPlan.of_message(message)
        with comm.activity.working(plan.stage):
            while len(under_way) > (sampling is not None):
                under_way.popleft().tokens()
            if sampling is not None:
                assert isinstance(runner, SamplingRunner)
                under_way.append(start(runner, inputs, plan, sampling))
                continue
            logits = compute(runner, inputs, plan)
            if comm.rank == logits_rank:
                assert logits is not None
                comm.send(logits, to=0)
    comm.activity.released = True
    for pending in under_way:
        pending.tokens()
