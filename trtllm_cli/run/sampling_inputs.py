"""What a runner that samples needs to know of each token that a step gives, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trtllm_cli.run.sampler import GREEDY_TEMPERATURE

if TYPE_CHECKING:
    from trtllm_cli.run.model_inputs import IntArray
    from trtllm_cli.run.sequence import Request, Sequence
    from trtllm_cli.run.step_plan import StepPlan


@dataclass(frozen=True)
class SamplingInputs:
    """One entry for each token to sample, C-contiguous. The names are those of SamplingParams, and so are the meanings.

    Several entries may name the same logits: those of a prompt with n answers.
    """

    logits_rows: IntArray  # [n]: which of the step's logits
    rows: IntArray  # [n]: the sequence's row of the batch, each at most once
    seeds: npt.NDArray[np.uint64]  # [n]
    positions: IntArray  # [n]: of the token in the output: with the seed and the token's id, what noise depends on
    temperatures: npt.NDArray[np.float32]  # [n]: 0 is greedy
    top_k: IntArray  # [n]: 0 is off
    top_p: npt.NDArray[np.float32]  # [n]: 1 is off
    min_p: npt.NDArray[np.float32]  # [n]: 0 is off

    def message(self) -> IntArray:
        """All of it as one array, for other ranks."""
        return np.concatenate([getattr(self, name).view(np.int32) for name in _DTYPES])

    @classmethod
    def of_message(cls, message: IntArray, count: int) -> SamplingInputs:
        """What `message` made it from; `count` entries."""
        parts: dict[str, Any] = {}
        start = 0
        for name, dtype in _DTYPES.items():
            end = start + count * np.dtype(dtype).itemsize // 4
            parts[name] = message[start:end].view(dtype)
            start = end
        assert start == len(message), f"a message of {len(message)} numbers about {count} samples"
        return cls(**parts)


_DTYPES: dict[str, type] = {
    "logits_rows": np.int32, "rows": np.int32, "seeds": np.uint64, "positions": np.int32, "temperatures": np.float32,
    "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
}  # fmt: skip


class SamplingTable:
    """Keeps of each running sequence what does not change, by its row: a step's entries are taken from arrays."""

    def __init__(self, max_batch_size: int) -> None:
        self._num_prompt = np.zeros(max_batch_size, np.int32)
        self._seeds = np.zeros(max_batch_size, np.uint64)
        self._temperatures = np.zeros(max_batch_size, np.float32)
        self._top_k = np.zeros(max_batch_size, np.int32)
        self._top_p = np.zeros(max_batch_size, np.float32)
        self._min_p = np.zeros(max_batch_size, np.float32)

    def join(self, sequences: list[Sequence]) -> None:
        """Writes the rows of those that no plan has told of since they were given theirs."""
        for seq in sequences:
            if not seq.num_row_blocks:
                self._write(seq.row, seq.request, seq.index)

    def build(self, plan: StepPlan, sequences: list[Sequence], logits_rows: list[int] | None) -> SamplingInputs:
        """The entries of a step that samples for `sequences`. The arrays are new ones.

        `logits_rows`: which of the step's logits each samples from; None where they are theirs, one for each. Where it
        is given, some may have been forked just now.
        """
        rows, starts, lengths, wanted = plan.sequences.T
        seq_lens = starts + lengths
        if logits_rows is None and len(sequences) == len(rows):
            return self._take(np.arange(len(rows), dtype=np.int32), rows.copy(), seq_lens)
        rows, seq_lens = rows[wanted != 0], seq_lens[wanted != 0]
        if logits_rows is None:
            return self._take(np.arange(len(rows), dtype=np.int32), rows, seq_lens)
        self.join(sequences)
        rows = np.array([seq.row for seq in sequences], np.int32)
        return self._take(np.array(logits_rows, np.int32), rows, seq_lens[logits_rows])

    def _write(self, row: int, request: Request, index: int) -> None:
        params = request.params
        self._num_prompt[row] = request.num_prompt
        self._seeds[row] = (request.seed + index) % 2**64
        self._temperatures[row] = params.temperature if params.temperature >= GREEDY_TEMPERATURE else 0
        self._top_k[row] = min(params.top_k, _INT32_MAX)  # more than any vocabulary has
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p

    def _take(self, logits_rows: IntArray, rows: IntArray, seq_lens: IntArray) -> SamplingInputs:
        index = rows.astype(np.intp)  # once, not in each take
        return SamplingInputs(
            logits_rows=logits_rows,
            rows=rows,
            seeds=self._seeds.take(index),
            positions=seq_lens - self._num_prompt.take(index),
            temperatures=self._temperatures.take(index),
            top_k=self._top_k.take(index),
            top_p=self._top_p.take(index),
            min_p=self._min_p.take(index),
        )


_INT32_MAX = 2**31 - 1
