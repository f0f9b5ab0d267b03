"""Steps for tests: which tokens of which sequences, as the graph's inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from trtllm_cli.run.model_inputs import ModelInputs


@dataclass
class Sequences:
    """Sequences in a paged cache whose blocks are handed out in a shuffled order."""

    block_size: int = 4
    num_blocks: int = 64
    tokens: list[list[int]] = field(default_factory=list)  # of each sequence, in the cache so far
    blocks: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(np.random.default_rng(0).permutation(self.num_blocks))

    def step(self, new: dict[int, list[int]], *, all_logits: bool = False) -> ModelInputs:
        """Appends `new[s]` to each sequence s. Logits of each one's last token, or of all."""
        ids, positions, slots, starts, lens, tables = [], [], [], [0], [], []
        for s, tokens in new.items():
            while s >= len(self.tokens):
                self.tokens.append([])
                self.blocks.append([])
            for token in tokens:
                position = len(self.tokens[s])
                if position % self.block_size == 0:
                    self.blocks[s].append(int(self._free.pop()))
                ids.append(token)
                positions.append(position)
                slots.append(self.blocks[s][-1] * self.block_size + position % self.block_size)
                self.tokens[s].append(token)
            starts.append(len(ids))
            lens.append(len(self.tokens[s]))
            tables.append(self.blocks[s])
        width = max(len(t) for t in tables)
        wanted = range(len(ids)) if all_logits else [end - 1 for end in starts[1:]]
        arrays = (ids, positions, slots, [t + [0] * (width - len(t)) for t in tables], starts, lens, list(wanted))
        return ModelInputs(*(np.ascontiguousarray(a, dtype=np.int32) for a in arrays))


def as_torch(inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """The graph's inputs as tensors."""
    return {name: torch.from_numpy(array) for name, array in vars(inputs).items()}
