"""Mixtral, Qwen2-MoE and Qwen3-MoE: Llama with experts in place of the MLP, in all layers or in some.

Mixtral: arXiv 2401.04088. Qwen2-MoE: 2407.10671; its shared expert has a gate. Qwen3-MoE: 2505.09388.
"""

from __future__ import annotations

from collections.abc import Callable

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama
from trtllm_cli.models.layers import RmsNorm, decoder
from trtllm_cli.models.moe import MoE

MakeAttention = Callable[[ModelConfig, Rank, str, int], Callable[[Tensor, Tensor], Tensor]]
HONOURS = llama.HONOURS | {"moe"}


class DecoderLayer:
    """Attention, and experts or an MLP, each on the normed residual stream."""

    attention_type: MakeAttention = llama.Attention

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        self.input_layernorm = RmsNorm(config, f"{name}.input_layernorm", config.hidden_size)
        self.attention = self.attention_type(config, rank, f"{name}.attention", layer)
        self.post_layernorm = RmsNorm(config, f"{name}.post_layernorm", config.hidden_size)
        make_mlp = llama.GatedMlp if config.moe_of(layer) is None else MoE
        self.mlp = make_mlp(config, rank, f"{name}.mlp")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        x = F.add(x, self.attention(self.input_layernorm(x), positions))
        return F.add(x, self.mlp(self.post_layernorm(x)))


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer)
