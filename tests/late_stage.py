"""A pipeline whose last stage computes as late as it may: when rank 0 waits for its logits."""

from __future__ import annotations

from collections import deque

import numpy as np

from trtllm_cli.engine import BuildConfig
from trtllm_cli.run.backends import Runner
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.step_plan import StepPlan
from trtllm_cli.run.worker import compute


class LateStage(SingleRank):
    """Rank 0's communicator; rank 1 is the other stage, and lives here."""

    world_size = 2

    def __init__(self, runner: Runner, config: BuildConfig) -> None:
        super().__init__()
        self.runner, self.inputs = runner, InputBuilder.of(config)
        self.messages: deque[np.ndarray] = deque()
        self.most = 0  # steps under way at a time

    def broadcast(self, message: np.ndarray) -> np.ndarray:
        if len(message):
            self.messages.append(message.copy())
            self.most = max(self.most, len(self.messages))
        else:
            assert not self.messages, "told to stop before all is received"
        return message

    def recv(self, out: np.ndarray, source: int) -> None:
        assert source == 1
        logits = compute(self.runner, self.inputs, StepPlan.of_message(self.messages.popleft())[0])
        assert logits is not None
        out[:] = logits
