"""StableLM (arXiv 2402.17834): layer norms, a gated MLP, partly rotated heads, perhaps a norm of each head."""

from __future__ import annotations

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import Trace
from trtllm_cli.graph import Graph
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import llama
from trtllm_cli.models.gpt2 import DecoderLayer
from trtllm_cli.models.layers import HeadLayerNorm, LayerNorm, decoder

HONOURS = frozenset({"attn_bias", "qk_layernorm", "parallel_residual", "rotary_scaling"})


class Attention(llama.Attention):
    """Each head of q and k has a layer norm of its own."""

    norm = HeadLayerNorm


class StableLmLayer(DecoderLayer):
    """Side by side, attention and MLP share a norm."""

    make_attention = Attention
    make_mlp = llama.GatedMlp


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    tp, kv_heads = config.mapping.tp_size, config.num_key_value_heads
    if config.qk_layernorm and kv_heads % tp:
        raise UnsupportedError(
            f"tp_size {tp}: the norms of the {kv_heads} key heads cannot be held by more ranks than there are heads",
            where="config.json: mapping.tp_size",
            fix=f"convert again with a --tp-size that divides {kv_heads}",
        )
    return decoder(t, config, rank, StableLmLayer, LayerNorm)
