"""Granite 3: Llama with multipliers of the embeddings, of attention's scores, of each residual and of the logits."""

from __future__ import annotations

from trtllm_cli import functional as F
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama
from trtllm_cli.models.layers import decoder

HONOURS = llama.HONOURS | {
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "output_multiplier_scale",
}  # fmt: skip


class DecoderLayer(llama.DecoderLayer):
    """Llama's, where attention and MLP add a multiple of what they compute."""

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        super().__init__(config, rank, layer, name)
        self.multiplier = config.residual_multiplier

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        x = F.add(x, F.scale(self.attention(self.input_layernorm(x), positions), self.multiplier))
        return F.add(x, F.scale(self.mlp(self.post_layernorm(x)), self.multiplier))


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    if config.attention_multiplier is None:
        raise UnsupportedError(
            "the config leaves out Granite's multipliers, without which it would be another model",
            where="config.json: attention_multiplier",
            fix="convert the Hugging Face snapshot with trtllm convert",
        )
    return decoder(t, config, rank, DecoderLayer)
