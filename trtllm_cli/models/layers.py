"""What the families share. A layer is made of a name in the checkpoint; calling it records its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trtllm_cli import functional as F
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import Tensor, Trace
from trtllm_cli.graph import Graph, Shard
from trtllm_cli.models.stored import declare
from trtllm_cli.models.tensors import KV_SCALES

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig


class Linear:
    """`x @ weight.T + bias` as this rank holds it; the checkpoint's quantization decides how the weight is stored.

    With shard "columns" each rank multiplies its part of the input, and the parts are summed before the bias; without
    `reduce`, what is returned is a rank's part.
    """

    def __init__(
        self,
        config: ModelConfig,
        rank: Rank,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        shard: Shard | None = None,
        weight_name: str | None = None,
        out_dtype: str | None = None,
        reduce: bool = True,
    ) -> None:
        self.config, self.rank, self.shard, self.out_dtype, self.reduce = config, rank, shard, out_dtype, reduce
        self.out_features = out_features
        tp = config.mapping.tp_size
        rows, columns = out_features, in_features
        if shard == "columns":
            columns //= tp
        self.stored = declare(config, rank, name, rows, columns, shard, weight_name=weight_name)
        assert reduce or not bias, f"{name}: a bias belongs to the sum"
        bias_shard = None if shard == "columns" else shard
        self.bias = F.weight(f"{name}.bias", (rows,), config.dtype, bias_shard) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, in] to [num_tokens, out]; a "columns" layer's result is the same on every rank."""
        split = self.shard == "columns" and self.config.mapping.tp_size > 1
        bias = None if split else self.bias
        y = F.linear(self.stored.prepare(x), self.stored.weight, bias, out_dtype=self.out_dtype, **self.stored.op_args)
        if split and self.reduce:
            y = F.all_reduce(y, self.rank.tp_group)
            if self.bias is not None:
                y = F.add(y, self.bias)
        return y


def kv_args(config: ModelConfig, name: str) -> dict[str, Any]:
    """Keyword arguments of `functional.attention` for the attention layer `name`: how its KV cache is quantized."""
    algo = config.quantization.kv_cache_quant_algo
    if algo is None:
        return {}
    if algo == "NVFP4":
        raise UnsupportedError(
            f"a KV cache in {algo} is not supported",
            where="config.json: quantization.kv_cache_quant_algo",
            fix="quantize again with --kv-cache-dtype fp8",
        )
    return {"kv_quant": algo.lower(), "kv_scale": F.weight(f"{name}.{KV_SCALES}", (2,), "float32")}


class RmsNorm:
    """Root-mean-square norm with a weight, over the whole width or over each head."""

    dtype: str | None = None  # of the weight; None: the model's

    def __init__(self, config: ModelConfig, name: str, width: int, num_heads: int | None = None) -> None:
        self.weight = F.weight(f"{name}.weight", (width,), self.dtype or config.dtype)
        self.eps, self.num_heads = config.norm_epsilon, num_heads

    def __call__(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        return F.rms_norm(x, self.weight, self.eps, self.num_heads)


class LayerNorm:
    """Layer norm with a weight, and a bias where the config's `norm_bias` says so, over the whole width."""

    def __init__(self, config: ModelConfig, name: str, width: int) -> None:
        self.weight = F.weight(f"{name}.weight", (width,), config.dtype)
        self.bias = F.weight(f"{name}.bias", (width,), config.dtype) if config.norm_bias else None
        self.eps = config.norm_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        return F.layer_norm(x, self.weight, self.bias, self.eps)


def refuse_repeated_kv_heads(config: ModelConfig) -> None:
    """Raises UnsupportedError where ranks would hold the same KV head: a norm's weights of k are not repeated so."""
    if config.mapping.tp_size > config.num_key_value_heads:
        raise UnsupportedError(
            f"the norm of k in {config.architecture} cannot repeat KV heads on several ranks",
            where="config.json: mapping.tp_size",
            fix=f"convert with a --tp-size of at most {config.num_key_value_heads}",
        )


class HeadLayerNorm:
    """A layer norm of each head, with weights of its own and no biases; the heads are split over the ranks."""

    def __init__(self, config: ModelConfig, name: str, width: int, num_heads: int) -> None:
        refuse_repeated_kv_heads(config)
        self.weight = F.weight(f"{name}.weight", (num_heads * width,), config.dtype, "rows")
        self.eps, self.num_heads = config.norm_epsilon, num_heads

    def __call__(self, x: Tensor) -> Tensor:
        """The same shape as `x`."""
        return F.layer_norm(x, self.weight, None, self.eps, self.num_heads)


class Mlp:
    """`proj(act(fc(x)))`."""

    def __init__(self, config: ModelConfig, rank: Rank, name: str) -> None:
        c, inner = config, config.intermediate_size
        self.activation = c.hidden_act
        self.fc = Linear(
            c, rank, f"{name}.fc", c.hidden_size, inner // c.mapping.tp_size, bias=c.mlp_bias, shard="rows"
        )
        self.proj = Linear(c, rank, f"{name}.proj", inner, c.hidden_size, bias=c.mlp_bias, shard="columns")

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_tokens, hidden_size] to the same."""
        return self.proj(F.act(self.fc(x), self.activation))


class Embedding:
    """The token table, whole on each rank, or split by `use_parallel_embedding`."""

    NAME = "transformer.vocab_embedding"

    def __init__(self, config: ModelConfig, rank: Rank) -> None:
        self.config, self.rank = config, rank
        tp = config.mapping.tp_size
        self.split = config.use_parallel_embedding and tp > 1
        rows, width = config.vocab_size, config.hidden_size
        shard: Shard | None = None
        if self.split and config.embedding_sharding_dim == 0:
            rows, shard = config.padded_vocab_size // tp, "rows"
        elif self.split:
            width, shard = width // tp, "columns"
        self.weight = F.weight(f"{self.NAME}.weight", (rows, width), config.dtype, shard)

    def __call__(self, ids: Tensor) -> Tensor:
        """`ids` [num_tokens] to [num_tokens, hidden_size]."""
        if not self.split:
            return F.embedding(ids, self.weight)
        if self.config.embedding_sharding_dim == 0:
            start = self.rank.tp_rank * self.config.padded_vocab_size // self.config.mapping.tp_size
            return F.all_reduce(F.embedding(ids, self.weight, start), self.rank.tp_group)
        return F.all_gather(F.embedding(ids, self.weight), self.rank.tp_group)


class PositionEmbedding:
    """The table of learned positions, whole on each rank."""

    def __init__(self, config: ModelConfig) -> None:
        shape = (config.max_position_embeddings, config.hidden_size)
        self.weight = F.weight("transformer.position_embedding.weight", shape, config.dtype)

    def __call__(self, positions: Tensor) -> Tensor:
        """`positions` [num_tokens] to [num_tokens, hidden_size]."""
        return F.embedding(positions, self.weight)


class LmHead:
    """Hidden states to logits over the whole vocabulary, float32."""

    def __init__(self, config: ModelConfig, rank: Rank) -> None:
        self.config, self.rank = config, rank
        self.split = config.mapping.tp_size > 1
        shared = config.share_embedding_table
        self.linear = Linear(
            config,
            rank,
            "lm_head",
            config.hidden_size,
            config.padded_vocab_size // config.mapping.tp_size,
            shard=None if shared else "rows",
            bias=config.lm_head_bias,
            weight_name=f"{Embedding.NAME}.weight" if shared else None,
            out_dtype="float32",
        )

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [num_logits, hidden_size] to [num_logits, padded vocab_size]."""
        logits = self.linear(x)
        return F.all_gather(logits, self.rank.tp_group) if self.split else logits


# What a family's layer is to `decoder`: made of (config, rank, layer, name in the checkpoint), called with the hidden
# states [num_tokens, hidden_size] and the positions.
MakeLayer = Callable[["ModelConfig", "Rank", int, str], Callable[[Tensor, Tensor], Tensor]]
MakeNorm = Callable[["ModelConfig", str, int], Callable[[Tensor], Tensor]]


def decoder(
    t: Trace,
    config: ModelConfig,
    rank: Rank,
    make_layer: MakeLayer,
    make_norm: MakeNorm = RmsNorm,
    *,
    embedding_multiplier: float | None = None,
    learned_positions: bool = False,
) -> Graph:
    """This rank's part of a decoder: the first stage embeds, the last gives logits, each hands hidden states on.

    The config's multipliers and soft cap of the logits apply; `embedding_multiplier` stands for the config's.
    """
    positions = t.input("positions")
    if rank.is_first_stage:
        multiplier = config.embedding_multiplier if embedding_multiplier is None else embedding_multiplier
        x = F.scale(Embedding(config, rank)(t.input("input_ids")), multiplier)
        if learned_positions:
            x = F.add(x, PositionEmbedding(config)(positions))
    else:
        x = F.recv(positions, config.hidden_size, config.dtype, rank.prev_stage)
    for i, layer in enumerate(rank.layers(config.num_hidden_layers)):
        # TensorRT-LLM numbers the layers of each stage from 0.
        x = make_layer(config, rank, layer, f"transformer.layers.{i}")(x, positions)
    if not rank.is_last_stage:
        F.send(x, rank.next_stage)
        return t.finish()
    x = F.gather_last(x, t.input("logits_indices"))
    x = make_norm(config, "transformer.ln_f", config.hidden_size)(x)
    logits = F.scale(LmHead(config, rank)(x), config.output_multiplier_scale)
    if config.final_logit_softcapping is not None:
        logits = F.softcap(logits, config.final_logit_softcapping)
    return t.finish(logits)
