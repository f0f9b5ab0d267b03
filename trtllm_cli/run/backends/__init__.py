"""The seam between the executor and what computes: load an engine's rank file, then run steps.

`load_runner` gives the runner of the engine's backend. The executor knows block ids only; how the KV cache lies in
memory is the runner's own business. Logits cross the seam as numpy: running an engine does not need torch.

A `SamplingRunner` also samples, so that the next step can be enqueued before a step's tokens are known here; on several
ranks each samples, and the same tokens. Whatever is asked of it takes effect in the order in which it was asked: a step
under way computes with its blocks and samples into its rows before a later step, a copy of blocks or a forward gets to
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from trtllm_cli.machine import default_threads

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.gpu_memory import GpuMemory
    from trtllm_cli.run.model_inputs import IntArray, ModelInputs
    from trtllm_cli.run.request import Logprob, SamplingParams
    from trtllm_cli.run.sampling_inputs import SamplingInputs


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
        """Copies whole KV cache blocks, (source, destination) each, before the next forward.

        No destination is a source, or another's destination.
        """
        ...

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        """Runs one step. float32 logits [num_logits, vocab_size] on the last pipeline stage, None on the others.

        The array is valid until the next call, and may be written to.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory."""
        ...


class PendingTokens(Protocol):
    """A step's tokens, on their way."""

    def tokens(self) -> IntArray:
        """int32 [n], in the order of the step's SamplingInputs; -1 where the logits were not finite. Blocks until the
        step is done. Asked of the steps in their order, once each, unless the runner is closed before.
        """
        ...

    def logprobs(self) -> list[list[Logprob] | None]:
        """Of each of the step's SamplingInputs what the sampler gives; None where it does not ask. Asked once, right
        after the tokens.
        """
        ...


@runtime_checkable
class SamplingRunner(Runner, Protocol):
    """A runner that samples where it computes. It keeps the token last sampled for each of `max_batch_size` rows.

    At most two steps are under way, and none while `forward` is called. After `forward` no row's token is asked for
    until a `start` has sampled it. `close` may be called with steps under way.
    """

    def samples(self, params: SamplingParams, num_banned: int) -> bool:
        """Whether it can sample for such a request all by itself: a step with one that it cannot gets `forward`.

        `num_banned`: token ids that are banned until there are `min_tokens`.
        """
        ...

    def start(self, inputs: ModelInputs, sampling: SamplingInputs) -> PendingTokens:
        """Enqueues one step, which may give no token at all. `inputs.input_ids` may be -(row + 1): the token last
        sampled for that row, by this step's predecessor. The arrays stay as they are; they need not be copied.
        """
        ...


@runtime_checkable
class GpuRunner(Runner, Protocol):
    """A runner whose weights, activations and KV cache are in a GPU's memory."""

    notes: list[str]  # for users: what is not as it should be on this GPU

    def gpu_memory(self) -> GpuMemory:
        """Where that memory goes now."""
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
        case "cuda":
            from trtllm_cli.run.backends.cuda import load as load_cuda

            return load_cuda(engine, rank, comm)
