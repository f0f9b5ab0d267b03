"""Llama, and what differs from it by a setting: Mistral (sliding window), Qwen2 (qkv bias), Qwen3 (q/k norm),
Phi-3 (rotary positions in a part of each head, LongRoPE).

Llama: arXiv 2302.13971, 2307.09288, 2407.21783. Mistral: 2310.06825. Qwen2: 2407.10671. Qwen3: 2505.09388.
Phi-3: 2404.14219.
"""

from __future__ import annotations

from trtllm_cli import functional as F
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.layers import HeadLayerNorm, Linear, RmsNorm, decoder, kv_args

HONOURS = frozenset(
    {"qk_layernorm", "attn_bias", "dense_bias", "mlp_bias", "sliding_window", "rotary_scaling"}
)  # what models/__init__.py asks for


class Attention:
    """Grouped-query attention with rotary positions over the paged KV cache."""

    norm: type[RmsNorm | HeadLayerNorm] = RmsNorm  # of each head of q and k
    rotary = True

    def __init__(self, config: ModelConfig, rank: Rank, name: str, layer: int) -> None:
        c, tp, self.rank = config, config.mapping.tp_size, rank
        self.heads, self.kv_heads, self.head_dim = c.heads_per_rank, c.kv_heads_per_rank, c.head_size
        self.layer, self.window = layer - rank.layers(c.num_hidden_layers).start, c.window_of(layer)
        width = self.heads * self.head_dim
        qkv_width = width + 2 * self.kv_heads * self.head_dim
        self.qkv = Linear(c, rank, f"{name}.qkv", c.hidden_size, qkv_width, bias=c.attn_bias, shard="qkv")
        self.dense = Linear(c, rank, f"{name}.dense", width * tp, c.hidden_size, bias=c.dense_bias, shard="columns")
        self.q_norm: RmsNorm | HeadLayerNorm | None = None
        self.k_norm: RmsNorm | HeadLayerNorm | None = None
        if c.qk_layernorm:
            self.make_norms(c, name)
        self.rope = RopeSpec.of(c, layer).model_dump(mode="json", exclude_none=True)
        self.scale = self.head_dim**-0.5 if c.attention_multiplier is None else c.attention_multiplier
        self.softcap = c.attn_logit_softcapping
        self.kv_args = kv_args(c, name)
        self.sinks: Tensor | None = None

    def make_norms(self, config: ModelConfig, name: str) -> None:
        """The norms of q and k: here of each head, all heads by the same weight."""
        self.q_norm = self.norm(config, f"{name}.q_layernorm", self.head_dim, self.heads)
        self.k_norm = self.norm(config, f"{name}.k_layernorm", self.head_dim, self.kv_heads)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        kv_width = self.kv_heads * self.head_dim
        q, k, v = F.split(self.qkv(x), [self.heads * self.head_dim, kv_width, kv_width])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q = F.rope(q, positions, self.heads, self.rope)
            k = F.rope(k, positions, self.kv_heads, self.rope)
        y = F.attention(
            q,
            k,
            v,
            layer=self.layer,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            **self.kv_args,
        )
        return self.dense(y)


class GatedMlp:
    """`proj(act(fc(x)) * gate(x))`; TensorRT-LLM's `fc` is Hugging Face's gate_proj, its `gate` is up_proj."""

    def __init__(self, config: ModelConfig, rank: Rank, name: str) -> None:
        c = config
        inner = c.intermediate_size // c.mapping.tp_size
        self.activation = c.hidden_act
        self.fc = Linear(c, rank, f"{name}.fc", c.hidden_size, inner, bias=c.mlp_bias, shard="rows")
        self.gate = Linear(c, rank, f"{name}.gate", c.hidden_size, inner, bias=c.mlp_bias, shard="rows")
        self.proj = Linear(
            c, rank, f"{name}.proj", c.intermediate_size, c.hidden_size, bias=c.mlp_bias, shard="columns"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        return self.proj(F.gated_act(self.fc(x), self.gate(x), self.activation))


class DecoderLayer:
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, rank: Rank, layer: int, name: str) -> None:
        self.input_layernorm = RmsNorm(config, f"{name}.input_layernorm", config.hidden_size)
        self.attention = Attention(config, rank, f"{name}.attention", layer)
        self.post_layernorm = RmsNorm(config, f"{name}.post_layernorm", config.hidden_size)
        self.mlp = GatedMlp(config, rank, f"{name}.mlp")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        x = F.add(x, self.attention(self.input_layernorm(x), positions))
        return F.add(x, self.mlp(self.post_layernorm(x)))


def define(t: Trace, config: ModelConfig, rank: Rank) -> Graph:
    """This rank's graph."""
    return decoder(t, config, rank, DecoderLayer)
