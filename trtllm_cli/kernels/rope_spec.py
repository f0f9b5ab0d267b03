"""What a table of rotary angles depends on. Without torch, so that tracing a model does not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from trtllm_cli.model_config import RopeScaling

if TYPE_CHECKING:
    from trtllm_cli.model_config import ModelConfig


class RopeSpec(BaseModel):
    """What a table of angles depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int  # how many of a head's elements are rotated
    base: float
    layout: Literal["neox", "gptj"]  # rotate halves, or pairs of neighbours
    max_position_embeddings: int
    scaling: RopeScaling | None = None

    @classmethod
    def of(cls, config: ModelConfig, layer: int | None = None) -> RopeSpec:
        """The model's, or that of one of its layers: sliding ones may have a base of their own, without scaling."""
        base, scaling = config.rotary_base, config.rotary_scaling
        local = config.rope_local_base_freq
        if local is not None and layer is not None and config.window_of(layer) is not None:
            base, scaling = local, None
        return cls(
            dim=config.rotary_embedding_dim,
            base=base,
            layout="gptj" if config.position_embedding_type == "rope_gptj" else "neox",
            max_position_embeddings=config.max_position_embeddings,
            scaling=scaling,
        )

    @property
    def max_prompt_len(self) -> int | None:
        """The longest prompt whose angles do not depend on its own length, or None where there is no such limit.

        Dynamic NTK and LongRoPE give every token of a prompt longer than this other angles than a shorter one has. A
        table indexed by position is exact up to here, and for tokens generated past it.
        """
        if self.scaling is None or self.scaling.rope_type not in ("dynamic", "longrope"):
            return None
        return self.scaling.original_max_position_embeddings or self.max_position_embeddings
