"""The seam between the executor and what computes: load an engine's rank file, then run steps.

`load_runner` gives the runner of the engine's backend. The executor knows block ids only; how the KV cache lies in
memory is the runner's own business. Logits cross the seam as numpy: running an engine does not need torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.machine import default_threads

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import ModelInputs


class Runner(Protocol):
    """One rank's compiled program, its weights and its KV cache."""

    @property
    def bytes_per_block(self) -> int:
        """Memory that one KV cache block takes, all of this rank's layers together."""
        ...

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Makes room for `num_blocks` blocks; called once, before the first forward."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV cache blocks, (source, destination) each, before the next forward."""
        ...

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        """Runs one step. float32 logits [num_logits, vocab_size] on the last pipeline stage, None on the others.

        The array is valid until the next call, and may be written to.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory."""
        ...


def load_runner(
    engine: Engine, rank: Rank, comm: Communicator, *, num_threads: int | None = None, local_ranks: int = 1
) -> Runner:
    """The runner for the engine's backend. Raises EngineError when this machine cannot run it.

    `num_threads` None: this rank's share of the processors, which `local_ranks` ranks of this host have among them.
    """
    match engine.config.backend:
        case "cpu":
            from trtllm_cli.run.backends.cpu import load

            return load(engine, rank, comm, num_threads or default_threads(local_ranks))
