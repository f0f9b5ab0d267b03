"""Command-R (Cohere) and Command-R7B (Cohere 2): attention and MLP side by side on one norm without bias.

Cohere 2 has sliding windows, and rotary positions in no other layers.
"""

from __future__ import annotations

from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import gpt2, llama
from trtllm_cli.models.layers import HeadLayerNorm, LayerNorm, decoder

HONOURS = frozenset(
    {
        "attn_bias", "dense_bias", "norm_bias", "parallel_residual", "output_multiplier_scale", "sliding_window",
        "rotary_scaling", "qk_layernorm",
    }
)  # fmt: skip


class Attention(llama.Attention):
    """Llama's, but that Cohere 2 gives positions to sliding layers only; Command-R+ norms each head of q and k."""

    norm = HeadLayerNorm

    def __init__(self, config: ModelConfig, rank: Rank, name: str, layer: int) -> None:
        super().__init__(config, rank, name, layer)
        self.rotary = config.architecture == "CohereForCausalLM" or self.window is not None


class DecoderLayer(gpt2.DecoderLayer):
    """Side by side, the MLP without a norm of its own."""

    make_attention = Attention
    make_mlp = llama.GatedMlp


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer, LayerNorm)
