"""Gemma 2 and 3: norms before and after attention and MLP, scaled embeddings, soft caps, windows in some layers.

Gemma 2: arXiv 2408.00118. Gemma 3: 2503.19786; its sliding layers have a rotary base of their own, and q and k are
normed instead of capped.
"""

from __future__ import annotations

import struct

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import layers, llama

HONOURS = llama.HONOURS | {
    "attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq",
}  # fmt: skip


class RmsNorm(layers.RmsNorm):
    """Its weight is one plus what Hugging Face stores, which only float32 holds."""

    dtype = "float32"


class Attention(llama.Attention):
    """Llama's, with norms as here."""

    norm = RmsNorm


class DecoderLayer:
    """Attention and MLP, each between two norms."""

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        width = config.hidden_size
        self.input_layernorm = RmsNorm(config, f"{name}.input_layernorm", width)
        self.attention = Attention(config, rank, f"{name}.attention", layer)
        self.post_layernorm = RmsNorm(config, f"{name}.post_layernorm", width)
        self.pre_feedforward_layernorm = RmsNorm(config, f"{name}.pre_feedforward_layernorm", width)
        self.mlp = llama.GatedMlp(config, rank, f"{name}.mlp")
        self.post_feedforward_layernorm = RmsNorm(config, f"{name}.post_feedforward_layernorm", width)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        x = F.add(x, self.post_layernorm(self.attention(self.input_layernorm(x), positions)))
        return F.add(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return layers.decoder(t, config, rank, DecoderLayer, RmsNorm, embedding_multiplier=_embedding_multiplier(config))


def _embedding_multiplier(config: ModelConfig) -> float:
    """sqrt(hidden_size) in the model's dtype: the model was trained with the rounded number."""
    exact = config.hidden_size**0.5
    if config.dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", exact))[0])
    (bits,) = struct.unpack("<I", struct.pack("<f", exact))
    if config.dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # the upper half, to nearest even
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
