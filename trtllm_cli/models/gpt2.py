"""GPT-2: learned positions, layer norms, biases everywhere (Radford et al. 2019). Its layer serves others, too."""

from __future__ import annotations

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama
from trtllm_cli.models.layers import LayerNorm, Mlp, decoder

HONOURS = frozenset(
    {"attn_bias", "dense_bias", "mlp_bias", "attention_multiplier", "scale_attn_by_inverse_layer_idx"}
)  # what models/__init__.py asks for


class DecoderLayer:
    """Attention and MLP on the normed residual stream, one after the other, or side by side: `parallel_residual`."""

    # The name of the MLP's own norm; None, side by side: it reads what attention reads.
    mlp_norm: str | None = "post_layernorm"
    parallel_mlp_norm: str | None = None
    make_attention: type[llama.Attention] = llama.Attention
    make_mlp: type[Mlp | llama.GatedMlp] = Mlp

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        c, self.parallel = config, config.parallel_residual
        mlp_norm = self.parallel_mlp_norm if self.parallel else self.mlp_norm
        self.input_layernorm = LayerNorm(c, f"{name}.input_layernorm", c.hidden_size)
        self.attention = self.make_attention(c, rank, f"{name}.attention", layer)
        self.mlp_layernorm = LayerNorm(c, f"{name}.{mlp_norm}", c.hidden_size) if mlp_norm else None
        self.mlp = self.make_mlp(c, rank, f"{name}.mlp")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        normed = self.input_layernorm(x)
        attended = F.add(x, self.attention(normed, positions))
        if self.mlp_layernorm is not None:
            normed = self.mlp_layernorm(x if self.parallel else attended)
        return F.add(attended, self.mlp(normed))


class Attention(llama.Attention):
    """Attention without rotary positions, whose scores may shrink from layer to layer."""

    rotary = False

    def __init__(self, config: ModelConfig, rank: Rank, name: str, layer: int) -> None:
        super().__init__(config, rank, name, layer)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1


class Gpt2Layer(DecoderLayer):
    """GPT-2's."""

    make_attention = Attention


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, Gpt2Layer, LayerNorm, learned_positions=True)
