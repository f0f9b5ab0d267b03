"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP side by side on one norm, pairs rotated, a bias on the head."""

from __future__ import annotations

from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.gpt2 import DecoderLayer
from trtllm_cli.models.layers import LayerNorm, decoder

HONOURS = frozenset({"mlp_bias", "lm_head_bias", "parallel_residual"})


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer, LayerNorm)
