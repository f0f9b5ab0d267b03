"""DeepSeek-V2 and V3: latent attention, and experts after the first layers.

DeepSeek-V2: arXiv 2405.04434. DeepSeek-V3 and R1: 2412.19437, 2501.12948.
"""

from __future__ import annotations

import math

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import mixtral
from trtllm_cli.models.layers import Linear, RmsNorm, decoder, kv_args

HONOURS = frozenset({"moe", "mla", "attn_bias", "dense_bias", "rotary_scaling"})


class LatentNorm(RmsNorm):
    """The norm of a latent: its epsilon is not the config's."""

    def __init__(self, config: ModelConfig, name: str, width: int) -> None:
        super().__init__(config, name, width)
        self.eps = 1e-6


class LatentAttention:
    """Attention over one latent a token, which every head projects for itself: the cache holds the latent alone.

    A head's key is a projection of the latent and, beside it, a rotated part that all heads share. Instead of making
    keys of the cache, the query is projected onto the latent (`k_b_proj`, transposed); instead of values, the average
    of latents is projected (`v_b_proj`). Section 2.1 of the paper calls the matrices absorbed. So it is attention with
    one KV head: keys [latent, rotated part], values the latent.
    """

    def __init__(self, config: ModelConfig, rank: Rank, name: str, layer: int) -> None:
        assert config.mla is not None
        c, mla = config, config.mla
        self.heads, self.mla = c.heads_per_rank, mla
        self.layer = layer - rank.layers(c.num_hidden_layers).start
        self.q_a, prefix, q_in = None, "q", c.hidden_size
        if mla.q_lora_rank is not None:
            self.q_a = Linear(c, rank, f"{name}.q_a_proj", c.hidden_size, mla.q_lora_rank, bias=c.attn_bias)
            self.q_a_norm = LatentNorm(c, f"{name}.q_a_layernorm", mla.q_lora_rank)
            prefix, q_in = "q_b", mla.q_lora_rank
        nope, rotated = self.heads * mla.qk_nope_head_dim, self.heads * mla.qk_rope_head_dim
        self.q_nope = Linear(c, rank, f"{name}.{prefix}_nope_proj", q_in, nope, shard="rows")
        self.q_rope = Linear(c, rank, f"{name}.{prefix}_rope_proj", q_in, rotated, shard="rows")
        latent = mla.kv_lora_rank
        self.kv_a = Linear(c, rank, f"{name}.kv_a_proj", c.hidden_size, latent + mla.qk_rope_head_dim, bias=c.attn_bias)
        self.kv_a_norm = LatentNorm(c, f"{name}.kv_a_layernorm", latent)
        self.k_b = F.weight(f"{name}.k_b_proj.weight", (nope, latent), c.dtype, "rows")
        values = self.heads * mla.v_head_dim
        self.v_b = F.weight(f"{name}.v_b_proj.weight", (values, latent), c.dtype, "rows")
        width = values * c.mapping.tp_size
        self.dense = Linear(c, rank, f"{name}.dense", width, c.hidden_size, bias=c.dense_bias, shard="columns")
        self.rope = RopeSpec.of(c).model_dump(mode="json", exclude_none=True)
        self.scale = attention_scale(c)
        self.kv_args = kv_args(c, name)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        latent, k_rope = F.split(self.kv_a(x), [self.mla.kv_lora_rank, self.mla.qk_rope_head_dim])
        latent = self.kv_a_norm(latent)
        k = F.concat(latent, F.rope(k_rope, positions, 1, self.rope))
        if self.q_a is not None:
            x = self.q_a_norm(self.q_a(x))
        q_rope = F.rope(self.q_rope(x), positions, self.heads, self.rope)
        q_latent = F.head_linear(self.q_nope(x), self.k_b, self.heads, transposed=True)
        y = F.attention(
            F.concat(q_latent, q_rope, self.heads),
            k,
            latent,
            layer=self.layer,
            num_heads=self.heads,
            num_kv_heads=1,
            head_dim=k.width,
            v_head_dim=latent.width,
            scale=self.scale,
            **self.kv_args,
        )
        return self.dense(F.head_linear(y, self.v_b, self.heads))


def attention_scale(config: ModelConfig) -> float:
    """The scale of the scores: that of a head's whole key, and with YaRN's `mscale_all_dim` a factor for the length."""
    assert config.mla is not None
    scale = float((config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim) ** -0.5)
    scaling = config.rotary_scaling
    if scaling is None or not scaling.mscale_all_dim or not scaling.factor or scaling.factor <= 1:
        return scale
    return scale * (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2


class DecoderLayer(mixtral.DecoderLayer):
    """Mixtral's with this attention."""

    attention_type = LatentAttention


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer)
