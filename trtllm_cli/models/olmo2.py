"""OLMo 2 and 3: norms after attention and MLP instead of before, and over the whole of q and of k.

OLMo 2: arXiv 2501.00656. OLMo 3 adds sliding windows, to whose layers rotary scaling does not apply.
"""

from __future__ import annotations

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama
from trtllm_cli.models.layers import RmsNorm, decoder, refuse_repeated_kv_heads

HONOURS = llama.HONOURS | {"rope_local_base_freq"}


class WideNorm(RmsNorm):
    """A norm over all heads of q or of k, of which each rank holds a part: it gathers them, and takes its own again."""

    def __init__(self, config: ModelConfig, rank: Rank, name: str, num_heads: int) -> None:
        super().__init__(config, name, num_heads * config.head_size)
        self.rank, self.parts = rank, config.mapping.tp_size

    def __call__(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        if self.parts == 1:
            return super().__call__(x)
        whole = super().__call__(F.all_gather(x, self.rank.tp_group))
        return F.split(whole, [x.width] * self.parts)[self.rank.tp_rank]


class Attention(llama.Attention):
    """Llama's, with the wide norms."""

    def make_norms(self, config: ModelConfig, name: str) -> None:
        """The norms of q and k."""
        refuse_repeated_kv_heads(config)
        self.q_norm = WideNorm(config, self.rank, f"{name}.q_layernorm", config.num_attention_heads)
        self.k_norm = WideNorm(config, self.rank, f"{name}.k_layernorm", config.num_key_value_heads)


class DecoderLayer:
    """Attention and MLP on the residual stream itself; what they give is normed."""

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        self.attention = Attention(config, rank, f"{name}.attention", layer)
        self.post_layernorm = RmsNorm(config, f"{name}.post_layernorm", config.hidden_size)
        self.mlp = llama.GatedMlp(config, rank, f"{name}.mlp")
        self.post_feedforward_layernorm = RmsNorm(config, f"{name}.post_feedforward_layernorm", config.hidden_size)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        x = F.add(x, self.post_layernorm(self.attention(x, positions)))
        return F.add(x, self.post_feedforward_layernorm(self.mlp(x)))


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer)
