"""Falcon (arXiv 2311.16867): attention and MLP side by side on one norm or two, few KV heads."""

from __future__ import annotations

from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.gpt2 import DecoderLayer
from trtllm_cli.models.layers import LayerNorm, decoder

HONOURS = frozenset({"attn_bias", "dense_bias", "mlp_bias", "parallel_residual", "parallel_norms", "rotary_scaling"})


class TwoNormsLayer(DecoderLayer):
    """The MLP beside attention has a norm of its own."""

    parallel_mlp_norm = "mlp_layernorm"


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, TwoNormsLayer if config.parallel_norms == 2 else DecoderLayer, LayerNorm)
