"""gpt-oss: experts in every layer, biases on every linear, an attention sink for each head, windows in some layers.

arXiv 2508.10925.
"""

from __future__ import annotations

from trtllm_cli import functional as F
from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama, mixtral
from trtllm_cli.models.layers import decoder

HONOURS = mixtral.HONOURS


class Attention(llama.Attention):
    """Llama's, with a learned score for each head that takes its share of the softmax and has no value."""

    def __init__(self, config: ModelConfig, rank: Rank, name: str, layer: int) -> None:
        super().__init__(config, rank, name, layer)
        self.sinks = F.weight(f"{name}.sinks", (self.heads,), config.dtype, "rows")


class DecoderLayer(mixtral.DecoderLayer):
    """Mixtral's with this attention."""

    attention_type = Attention


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer)
