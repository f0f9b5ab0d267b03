"""StarCoder 2 (arXiv 2402.19173): GPT-2's layer with rotary positions, few KV heads and a sliding window."""

from __future__ import annotations

from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.gpt2 import DecoderLayer
from trtllm_cli.models.layers import LayerNorm, decoder

HONOURS = frozenset({"attn_bias", "dense_bias", "mlp_bias", "sliding_window", "rotary_scaling"})


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer, LayerNorm)
