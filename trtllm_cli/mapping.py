"""Which rank does what: tensor, pipeline and expert parallel placement, in TensorRT-LLM's rank order."""

from __future__ import annotations

import re
from functools import lru_cache

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Mapping(BaseModel):
    """How `world_size` ranks split a model.

    Tensor-parallel ranks are neighbours: rank = pp_rank * tp_size + tp_rank. `cp_size` is kept because TensorRT-LLM's
    files carry it; only 1 is supported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world_size: int = Field(default=1, ge=1)
    tp_size: int = Field(default=1, ge=1)
    pp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1, le=1)
    moe_tp_size: int = Field(default=0, ge=0)  # 0: as tp_size
    moe_ep_size: int = Field(default=0, ge=0)  # 0: 1
    gpus_per_node: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _product(self) -> Mapping:
        if self.world_size != self.tp_size * self.pp_size * self.cp_size:
            raise ValueError(f"world_size {self.world_size} is not tp_size {self.tp_size} x pp_size {self.pp_size}")
        return self

    @classmethod
    def of(cls, tp_size: int = 1, pp_size: int = 1) -> Mapping:
        """The mapping of `tp_size * pp_size` ranks."""
        return cls(world_size=tp_size * pp_size, tp_size=tp_size, pp_size=pp_size)

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """Every rank's place, in order."""
        return _ranks(self)


class Rank(BaseModel):
    """One rank's place in a mapping."""

    model_config = ConfigDict(frozen=True)

    mapping: Mapping
    rank: int

    @property
    def tp_rank(self) -> int:
        """Place in its tensor-parallel group."""
        return self.rank % self.mapping.tp_size

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // self.mapping.tp_size

    @property
    def tp_group(self) -> tuple[int, ...]:
        """The ranks that share its pipeline stage."""
        first = self.pp_rank * self.mapping.tp_size
        return tuple(range(first, first + self.mapping.tp_size))

    @property
    def is_first_stage(self) -> bool:
        """Whether it embeds the tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it computes the logits."""
        return self.pp_rank == self.mapping.pp_size - 1

    @property
    def prev_stage(self) -> int:
        """The rank that sends its hidden states here."""
        return self.rank - self.mapping.tp_size

    @property
    def next_stage(self) -> int:
        """The rank that its hidden states go to."""
        return self.rank + self.mapping.tp_size

    def layers(self, num_layers: int) -> range:
        """The decoder layers of its stage; the first `num_layers % pp_size` stages have one more."""
        base, extra = divmod(num_layers, self.mapping.pp_size)
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return range(start, start + base + (self.pp_rank < extra))

    def whole_name(self, name: str, num_layers: int) -> str:
        """A module's or tensor's name in the whole model: TensorRT-LLM numbers the layers of each stage from 0."""
        first = self.layers(num_layers).start
        return _LAYER.sub(lambda m: str(int(m[0]) + first), name)


@lru_cache(maxsize=64)
def _ranks(mapping: Mapping) -> tuple[Rank, ...]:
    """Kept outside of the mapping: a mapping that held its ranks, which hold it, could not be compared."""
    return tuple(Rank(mapping=mapping, rank=r) for r in range(mapping.world_size))


_LAYER = re.compile(r"(?<=transformer\.layers\.)\d+(?=\.|$)")
