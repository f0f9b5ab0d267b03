"""GPT-NeoX (arXiv 2204.06745) and Pythia: partly rotated heads, attention and MLP side by side, each with its norm."""

from __future__ import annotations

from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.gpt2 import DecoderLayer
from trtllm_cli.models.layers import LayerNorm, decoder

HONOURS = frozenset({"attn_bias", "dense_bias", "mlp_bias", "parallel_residual", "rotary_scaling"})


class GptNeoxLayer(DecoderLayer):
    """Two norms, whether the MLP comes after attention or beside it."""

    mlp_norm = parallel_mlp_norm = "post_attention_layernorm"


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, GptNeoxLayer, LayerNorm)
