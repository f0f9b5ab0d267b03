"""The mixture of experts that stands where other layers have an MLP.

Each token goes to a few of the experts (functional.route), and perhaps through one that all tokens share. Tensors have
TensorRT-LLM's names; an expert's `fc` has the rows of its up projection and then those of its gate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor
from trtllm_cli.models.layers import Linear
from trtllm_cli.models.stored import StoredWeight, declare

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig, MoeConfig


class MoE:
    """Every tensor-parallel rank has a part of each expert, or with expert parallelism of some of the experts.

    What others have gives zeros here, and the ranks' parts are summed once, at the end. The router is whole on every
    rank, and a shared expert is split over all of them. With the config's `mlp_bias` the router and the experts'
    linears have biases.
    """

    def __init__(self, config: ModelConfig, rank: Rank, name: str) -> None:
        assert config.moe is not None
        self.rank, self.moe, self.activation = rank, config.moe, config.hidden_act
        self.is_split = config.mapping.tp_size > 1
        self.inner = config.moe.intermediate_size // config.mapping.moe_tp
        self.router = _Router(config, f"{name}.router")
        held, hidden = rank.experts(config.moe.num_experts), config.hidden_size
        self.first, experts = held.start, len(held)
        self.fc = declare(config, rank, f"{name}.fc", 2 * self.inner, hidden, "expert_halves", experts=experts)
        self.proj = declare(config, rank, f"{name}.proj", hidden, self.inner, "expert_columns", experts=experts)
        self.fc_bias = self.proj_bias = None
        if config.mlp_bias:
            self.fc_bias = F.weight(f"{name}.fc.bias", (experts, 2 * self.inner), config.dtype, "expert_halves")
            proj_bias = F.weight(f"{name}.proj.bias", (experts, hidden), config.dtype, "experts")
            self.proj_bias = proj_bias if rank.moe_tp_rank == 0 else None  # once in the sum over an expert's ranks
        shared = config.moe.shared_expert_intermediate_size
        self.shared = _SharedExpert(config, rank, name) if shared else None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        weights, ids = self.router(x)
        y = self._by_expert(self.fc, self.fc.prepare(x), ids, self.fc_bias)
        y = F.expert_gated_act(y, self.moe.top_k, self.activation)
        y = self._by_expert(self.proj, self.proj.prepare(y, part=self.inner), ids, self.proj_bias)
        y = F.combine(y, weights)
        if self.shared is not None:
            y = F.add(y, self.shared(x))
        return F.all_reduce(y, self.rank.tp_group) if self.is_split else y

    def _by_expert(self, stored: StoredWeight, x: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        return F.expert_linear(x, ids, stored.weight, bias, first_expert=self.first, **stored.op_args)


class _Router:
    """Which experts a token goes to. Never quantized, float32, and the same on every rank."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        assert config.moe is not None
        self.moe: MoeConfig = config.moe
        experts = self.moe.num_experts
        self.weight = F.weight(f"{name}.weight", (experts, config.hidden_size), "float32")
        self.bias = F.weight(f"{name}.bias", (experts,), "float32") if config.mlp_bias else None
        self.correction = None
        if self.moe.correction_bias:
            self.correction = F.weight(f"{name}.e_score_correction_bias", (experts,), "float32")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [num_tokens, hidden_size] to weights and ids, [num_tokens, top_k]."""
        return F.route(
            F.linear(x, self.weight, self.bias, out_dtype="float32"),
            self.moe.top_k,
            scoring=self.moe.scoring,
            renormalize=self.moe.renormalize,
            bias=self.correction,
            scaling=self.moe.routed_scaling_factor,
            num_groups=self.moe.num_groups,
            top_groups=self.moe.top_groups,
        )


class _SharedExpert:
    """A gated MLP for every token, perhaps multiplied by the sigmoid of a linear; not summed over the ranks yet."""

    def __init__(self, config: ModelConfig, rank: Rank, name: str) -> None:
        assert config.moe is not None
        hidden, width = config.hidden_size, config.moe.shared_expert_intermediate_size
        inner = width // config.mapping.tp_size
        self.activation = config.hidden_act
        self.fc = Linear(config, rank, f"{name}.shared_expert.fc", hidden, inner, shard="rows")
        self.gate = Linear(config, rank, f"{name}.shared_expert.gate", hidden, inner, shard="rows")
        self.proj = Linear(config, rank, f"{name}.shared_expert.proj", width, hidden, shard="columns", reduce=False)
        self.weight = None
        if config.moe.shared_expert_gate:
            self.weight = F.weight(f"{name}.shared_expert_gate.weight", (1, hidden), "float32")

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to this rank's part of the same."""
        y = self.proj(F.gated_act(self.fc(x), self.gate(x), self.activation))
        if self.weight is None:
            return y
        # the only expert of its own router
        score = F.linear(x, self.weight, out_dtype="float32")
        weights, _ = F.route(score, 1, scoring="sigmoid", renormalize=False)
        return F.combine(y, weights)
