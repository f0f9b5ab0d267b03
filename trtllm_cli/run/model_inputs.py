"""One step's batch, as the arrays that the graph's inputs name (functional.STEP_INPUTS)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ModelInputs:
    """int32, C-contiguous. The tokens of sequence s are rows query_start[s] to query_start[s + 1]."""

    input_ids: IntArray  # [num_tokens]; for a runner that samples also -(row + 1): what it last sampled for that row
    positions: IntArray  # [num_tokens]
    slot_mapping: IntArray  # [num_tokens]: block * block_size + offset
    block_tables: IntArray  # [num_seqs, max_blocks]; entries past a sequence's blocks are 0 and never read
    query_start: IntArray  # [num_seqs + 1]
    seq_lens: IntArray  # [num_seqs]: tokens in the cache after this step
    logits_indices: IntArray  # [num_logits]

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        """Sequences of the step."""
        return len(self.seq_lens)
