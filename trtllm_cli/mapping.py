"""Which rank does what: tensor, pipeline and expert parallel placement, in TensorRT-LLM's rank order."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Fields that TensorRT-LLM writes beside ours, with the values by which they say nothing; any other is refused.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "moe_cluster_size": (-1, 1),
    "attn_cp_size": (-1, 1),
    "cp_config": (None, {}),
    "pp_partition": (None,),
    "enable_attention_dp": (False,),
    "enable_lm_head_tp_in_adp": (False,),
    "auto_parallel": (False,),
}


class Mapping(BaseModel):
    """How `world_size` ranks split a model.

    Tensor-parallel ranks are neighbours: rank = pp_rank * tp_size + tp_rank. `cp_size` is kept because TensorRT-LLM's
    files carry it; only 1 is supported.

    The ranks of a stage divide the experts among `moe_ep` neighbours, each expert over `moe_tp` ranks that are moe_ep
    apart: tp_rank = moe_tp_rank * moe_ep + moe_ep_rank. In files a size that is not given is 0, or TensorRT-LLM's -1;
    the other one then says what it is. Without either, each expert is over all ranks, and both are kept as 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world_size: int = Field(default=1, ge=1)
    tp_size: int = Field(default=1, ge=1)
    pp_size: int = Field(default=1, ge=1)
    cp_size: int = Field(default=1, ge=1, le=1)
    moe_tp_size: int = Field(default=0, ge=-1)  # 0 where no experts are divided; `moe_tp` is the number
    moe_ep_size: int = Field(default=0, ge=-1)  # the same; `moe_ep` is the number
    gpus_per_node: int = Field(default=8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {**_WITHOUT_EFFECT, "attn_tp_size": (-1, data.get("tp_size", 1))}
        for name, harmless in known.items():
            if name in data and data[name] not in harmless:
                raise ValueError(f"`{name}` is {data[name]!r}, which is not supported")
        return {name: value for name, value in data.items() if name not in known}

    @model_validator(mode="after")
    def _product(self) -> Mapping:
        if self.world_size != self.tp_size * self.pp_size * self.cp_size:
            raise ValueError(f"world_size {self.world_size} is not tp_size {self.tp_size} x pp_size {self.pp_size}")
        return self

    @model_validator(mode="after")
    def _moe_product(self) -> Mapping:
        given = {"moe_tp_size": max(0, self.moe_tp_size), "moe_ep_size": max(0, self.moe_ep_size)}
        for name, size in given.items():
            if size and self.tp_size % size:
                raise ValueError(f"{name} {size} does not divide tp_size {self.tp_size}")
        moe_tp, moe_ep = given.values()
        moe_ep = moe_ep or self.tp_size // (moe_tp or self.tp_size)
        moe_tp = moe_tp or self.tp_size // moe_ep
        if moe_tp * moe_ep != self.tp_size:
            raise ValueError(f"moe_tp_size {moe_tp} x moe_ep_size {moe_ep} is not tp_size {self.tp_size}")
        # One form for each mapping, so that equal ones are equal.
        for name, size in (("moe_tp_size", moe_tp), ("moe_ep_size", moe_ep)):
            object.__setattr__(self, name, size if moe_ep > 1 else 0)  # frozen for everyone else
        return self

    @classmethod
    def of(cls, tp_size: int = 1, pp_size: int = 1, moe_tp_size: int = 0, moe_ep_size: int = 0) -> Mapping:
        """The mapping of `tp_size * pp_size` ranks. Of the experts' sizes one may be given, both, or none."""
        return cls(
            world_size=tp_size * pp_size,
            tp_size=tp_size,
            pp_size=pp_size,
            moe_tp_size=moe_tp_size,
            moe_ep_size=moe_ep_size,
        )

    @property
    def moe_tp(self) -> int:
        """Ranks that share each expert."""
        return self.moe_tp_size or self.tp_size

    @property
    def moe_ep(self) -> int:
        """Ranks among which the experts are divided."""
        return self.moe_ep_size or 1

    @property
    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The ranks that work together, of each kind: "tp", "pp", "moe_tp" and "moe_ep"."""
        kinds = ("tp", "pp", "moe_tp", "moe_ep")
        return {kind: tuple(dict.fromkeys(getattr(rank, f"{kind}_group") for rank in self.ranks)) for kind in kinds}

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
    def pp_group(self) -> tuple[int, ...]:
        """The ranks of the other stages that it exchanges hidden states with, and itself."""
        return tuple(range(self.tp_rank, self.mapping.world_size, self.mapping.tp_size))

    @property
    def moe_tp_rank(self) -> int:
        """Which part of its experts it has."""
        return self.tp_rank // self.mapping.moe_ep

    @property
    def moe_ep_rank(self) -> int:
        """Which of the experts it has a part of."""
        return self.tp_rank % self.mapping.moe_ep

    @property
    def moe_tp_group(self) -> tuple[int, ...]:
        """The ranks of its stage that have the same experts."""
        first = self.tp_group[self.moe_ep_rank]
        return tuple(range(first, self.tp_group[-1] + 1, self.mapping.moe_ep))

    @property
    def moe_ep_group(self) -> tuple[int, ...]:
        """The ranks that have the same part of all the experts."""
        first = self.tp_group[self.moe_tp_rank * self.mapping.moe_ep]
        return tuple(range(first, first + self.mapping.moe_ep))

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

    def experts(self, num_experts: int) -> range:
        """The experts that it has a part of, of `num_experts`, which the mapping's moe_ep divides."""
        count = num_experts // self.mapping.moe_ep
        return range(self.moe_ep_rank * count, (self.moe_ep_rank + 1) * count)

    def whole_name(self, name: str, num_layers: int) -> str:
        """A module's or tensor's name in the whole model: TensorRT-LLM numbers the layers of each stage from 0."""
        first = self.layers(num_layers).start
        return _LAYER.sub(lambda m: str(int(m[0]) + first), name)


@lru_cache(maxsize=64)
def _ranks(mapping: Mapping) -> tuple[Rank, ...]:
    """Kept outside of the mapping: a mapping that held its ranks, which hold it, could not be compared."""
    return tuple(Rank(mapping=mapping, rank=r) for r in range(mapping.world_size))


_LAYER = re.compile(r"(?<=transformer\.layers\.)\d+(?=\.|$)")
