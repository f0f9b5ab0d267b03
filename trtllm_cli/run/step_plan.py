"""One step as rank 0 decides it, in the fixed layout that goes to the other ranks.

A plan has only what is new: the tokens, where each sequence stands, and the blocks that were added to its row since the
last step that it was in. Every rank keeps the block tables itself (`step_inputs.InputBuilder`). A decode step of eight
sequences is about 250 bytes.

A message is int32: `[num_tokens, num_sequences, num_additions, num_copies, num_samples]`, then the tokens; of each
sequence its row, start, length and whether its logits are wanted; of each addition its row and place in it, and its
block; of each copy its source and destination; then what runners that sample need to know of each sample
(SamplingInputs). num_samples is -1 where the step's logits are wanted, and not tokens. An empty message ends the loop
of the ranks that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trtllm_cli.run.model_inputs import IntArray
from trtllm_cli.run.sampling_inputs import SamplingInputs

if TYPE_CHECKING:
    from trtllm_cli.run.scheduler import Batch

_HEADER = 5
_NO_SAMPLING = -1
END: IntArray = np.empty(0, np.int32)
_NO_ADDITIONS: IntArray = np.empty((0, 3), np.int32)
_NO_COPIES: IntArray = np.empty((0, 2), np.int32)


@dataclass(frozen=True)
class StepPlan:
    """int32 all. Sequences are in the batch's order, their tokens end to end."""

    tokens: IntArray  # [num_tokens]
    sequences: IntArray  # [num_sequences, 4]: row, start, length, 1 where the logits of the last token are wanted
    additions: IntArray  # [num_additions, 3]: row, place in the row, block; place 0 clears the row first
    copies: IntArray  # [num_copies, 2]: blocks to copy before the step, (source, destination), in order

    @property
    def stage(self) -> str:
        """What it is mostly about, for people."""
        return "prefill" if len(self.tokens) > len(self.sequences) else "decode"

    @property
    def num_logits(self) -> int:
        """Sequences whose logits are wanted."""
        return int(self.sequences[:, 3].sum())

    def message(self, sampling: SamplingInputs | None = None) -> IntArray:
        """The plan as one array, with what its samples are where every rank's runner samples."""
        parts = [self.tokens, self.sequences, self.additions, self.copies]
        counts = [*map(len, parts), _NO_SAMPLING if sampling is None else len(sampling.rows)]
        if sampling is not None:
            parts.append(sampling.message())
        return np.concatenate([np.array(counts, np.int32), *(part.reshape(-1) for part in parts)])

    @classmethod
    def of_message(cls, message: IntArray) -> tuple[StepPlan, SamplingInputs | None]:
        """What `message` was made from."""
        *counts, num_samples = message[:_HEADER].tolist()
        parts, start = [], _HEADER
        for count, width in zip(counts, (1, 4, 3, 2), strict=True):
            parts.append(message[start : start + count * width])
            start += count * width
        tokens, sequences, additions, copies = parts
        plan = cls(tokens, sequences.reshape(-1, 4), additions.reshape(-1, 3), copies.reshape(-1, 2))
        if num_samples == _NO_SAMPLING:
            assert start == len(message), f"a message of {len(message)} numbers says that it has {start}"
            return plan, None
        return plan, SamplingInputs.of_message(message[start:])


def plan_step(batch: Batch) -> StepPlan:
    """The plan of a batch that is not under way yet. Notes in its sequences which blocks the plan tells of."""
    tokens: list[int] = []
    sequences: list[int] = []  # flat, of which numpy makes an array three times as fast
    additions: list[tuple[int, int, int]] = []
    for seq, length, wanted in zip(batch.sequences, batch.lengths, batch.wanted, strict=True):
        start = seq.num_computed
        told = seq.num_row_blocks
        if told < len(seq.blocks):
            additions += [(seq.row, told + i, block) for i, block in enumerate(seq.blocks[told:])]
            seq.num_row_blocks = len(seq.blocks)
        if length == 1:
            tokens.append(seq.token_ids[start])
        else:
            tokens += seq.token_ids[start : start + length]
        sequences += (seq.row, start, length, wanted)
    return StepPlan(
        np.array(tokens, np.int32),
        np.array(sequences, np.int32).reshape(-1, 4),
        np.array(additions, np.int32).reshape(-1, 3) if additions else _NO_ADDITIONS,
        np.array(batch.copies, np.int32).reshape(-1, 2) if batch.copies else _NO_COPIES,
    )
