"""The op set: what a model is written with. Calling an op inside `trace` records a node of the Graph.

Activations are `[num_tokens, width]`: the tokens of every sequence in the step, end to end. Nothing is computed here;
`kernels/reference.py` says what each op means, in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from trtllm_cli.graph import Dim, Graph, Node, Shard, TensorType, Weight

NUM_TOKENS, NUM_SEQS, NUM_LOGITS, MAX_BLOCKS = "num_tokens", "num_seqs", "num_logits", "max_blocks"

# What the executor gives each step, int32 all; see run/model_inputs.py.
STEP_INPUTS: dict[str, TensorType] = {
    "input_ids": TensorType("int32", (NUM_TOKENS,)),
    "positions": TensorType("int32", (NUM_TOKENS,)),
    "slot_mapping": TensorType("int32", (NUM_TOKENS,)),  # each token's place in the KV cache
    "block_tables": TensorType("int32", (NUM_SEQS, MAX_BLOCKS)),
    "query_start": TensorType("int32", ("num_seqs + 1",)),  # first token of each sequence in the step, and the end
    "seq_lens": TensorType("int32", (NUM_SEQS,)),  # tokens in the cache after this step
    "logits_indices": TensorType("int32", (NUM_LOGITS,)),  # tokens whose logits are wanted
}
_CACHE_INPUTS = ("slot_mapping", "block_tables", "query_start", "seq_lens")


@dataclass(frozen=True)
class Tensor:
    """A symbolic tensor: a name and a type."""

    name: str
    type: TensorType

    @property
    def dtype(self) -> str:
        """Torch's name of the dtype."""
        return self.type.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Integers and symbols."""
        return self.type.shape

    @property
    def width(self) -> int:
        """The last dimension."""
        assert isinstance(self.shape[-1], int)
        return self.shape[-1]


class _Tracer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: dict[str, Weight] = {}
        self.nodes: list[Node] = []
        self.tensors: dict[str, TensorType] = {}

    def record(
        self, op: str, inputs: dict[str, Tensor | None], types: Sequence[TensorType], attrs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        names = tuple(f"t{len(self.tensors) + i}" for i in range(len(types)))
        operands = {role: t.name for role, t in inputs.items() if t is not None}
        self.nodes.append(Node(op, operands, names, attrs))
        self.tensors.update(zip(names, types, strict=True))
        return tuple(Tensor(n, t) for n, t in zip(names, types, strict=True))


_current: ContextVar[_Tracer] = ContextVar("tracer")


class Trace:
    """What `trace` yields: the step's inputs, and after `finish`, the graph."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def input(self, name: str) -> Tensor:
        """One of STEP_INPUTS."""
        return Tensor(name, STEP_INPUTS[name])

    def finish(self, *outputs: Tensor) -> Graph:
        """The graph of what was recorded, with these outputs."""
        t = self._tracer
        names = tuple(o.name for o in outputs)
        graph = Graph(t.name, dict(STEP_INPUTS), dict(t.weights), tuple(t.nodes), dict(t.tensors), names)
        graph.check()
        return graph


@contextmanager
def trace(name: str) -> Iterator[Trace]:
    """Records the ops called inside the block."""
    tracer = _Tracer(name)
    token = _current.set(tracer)
    try:
        yield Trace(tracer)
    finally:
        _current.reset(token)


def _op(op: str, inputs: dict[str, Tensor | None], types: Sequence[TensorType], **attrs: Any) -> tuple[Tensor, ...]:
    return _current.get().record(op, inputs, types, {k: v for k, v in attrs.items() if v is not None})


def weight(name: str, shape: Sequence[int], dtype: str, shard: Shard | None = None) -> Tensor:
    """A weight of the checkpoint, with this rank's shape."""
    w = Weight(dtype, tuple(shape), (name,), shard)
    known = _current.get().weights.setdefault(name, w)
    assert known == w, f"weight {name} is declared twice, as {known} and as {w}"
    return Tensor(name, w.type)


def embedding(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """Rows of `weight` [vocab, hidden]. Ids outside this rank's rows, which begin at `vocab_start`, give zeros."""
    out = TensorType(weight.dtype, (*ids.shape, weight.width))
    return _op("embedding", {"ids": ids, "weight": weight}, [out], vocab_start=vocab_start)[0]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    global_scale: Tensor | None = None,
    quant: str | None = None,
    group_size: int | None = None,
    out_dtype: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, weight [out, in].

    `quant` says how the weight is stored, None: as plain numbers. A weight is `value * scale`, where `scale` is [1],
    [out], or with `group_size` [out, ceil(in / group_size)]:

        "int8"  int8 [out, in]; with groups, the value is less `zero` where there is one
        "fp8"   float8_e4m3fn [out, in]
        "int4"  uint8 [out, in / 2], the even column in the low nibble; the value is `nibble - zero`, zero as `scale`
                is, 8 where there is none
        "fp4"   uint8 [out, in / 2] of E2M1 nibbles; `scale` is float8_e4m3fn, times `global_scale` [1]
    """
    assert isinstance(weight.shape[0], int)
    out = TensorType(out_dtype or x.dtype, (*x.shape[:-1], weight.shape[0]))
    inputs = {"x": x, "weight": weight, "bias": bias, "scale": scale, "zero": zero, "global_scale": global_scale}
    return _op("linear", inputs, [out], quant=quant, group_size=group_size)[0]


def qdq(x: Tensor, scale: Tensor | None, fmt: str, group_size: int | None = None) -> Tensor:
    """`x` rounded to what `fmt` ("fp8": E4M3, "int8": -127..127, or "fp4": E2M1) holds, and back: activations as a
    quantized layer sees them.

    The step is `scale` [1] (where a rank's experts have one each, the largest: they see the same x), or else found for
    each token: the row's largest magnitude over 448, 127 or 6, or that of each `group_size` of its elements. fp4's
    group steps are rounded to E4M3 after division by `scale`.
    """
    return _op("qdq", {"x": x, "scale": scale}, [x.type], fmt=fmt, group_size=group_size)[0]


def head_linear(x: Tensor, weight: Tensor, num_heads: int, *, transposed: bool = False) -> Tensor:
    """Each head of `x` [num_tokens, num_heads * in] by its own rows of `weight` [num_heads * out, in].

    With `transposed` the weight is [num_heads * in, out], and is multiplied as it stands: `x_h @ weight_h`.
    """
    assert isinstance(weight.shape[0], int)
    rows = weight.shape[0] // num_heads
    assert x.width == num_heads * (rows if transposed else weight.width)
    width = num_heads * (weight.width if transposed else rows)
    inputs: dict[str, Tensor | None] = {"x": x, "weight": weight}
    return _op("head_linear", inputs, [TensorType(x.dtype, (*x.shape[:-1], width))], num_heads=num_heads,
               transposed=transposed or None)[0]  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_heads: int | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, over the last dimension, or over each of `num_heads` equal parts of it."""
    return _op("rms_norm", {"x": x, "weight": weight}, [x.type], eps=eps, num_heads=num_heads)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, num_heads: int | None = None) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias`, over the last dimension or each of `num_heads` parts of it.

    With heads, `weight` is as wide as `x`: each head has its own.
    """
    assert weight.width == x.width
    return _op("layer_norm", {"x": x, "weight": weight, "bias": bias}, [x.type], eps=eps, num_heads=num_heads)[0]


def add(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`; `y` may be one row that is added to every row of x."""
    return _op("add", {"x": x, "y": y}, [x.type])[0]


def mul(x: Tensor, y: Tensor) -> Tensor:
    """`x * y`; `y` is one row by which every row of x is multiplied, or as large as x."""
    return _op("mul", {"x": x, "y": y}, [x.type])[0]


def scale(x: Tensor, factor: float) -> Tensor:
    """`x * factor`."""
    return x if factor == 1.0 else _op("scale", {"x": x}, [x.type], factor=factor)[0]


def softcap(x: Tensor, cap: float) -> Tensor:
    """`cap * tanh(x / cap)`."""
    return _op("softcap", {"x": x}, [x.type], cap=cap)[0]


def act(x: Tensor, activation: str) -> Tensor:
    """`activation(x)`; activation is one of model_config.Activation, but for "swiglu_oai"."""
    return _op("act", {"x": x}, [x.type], activation=activation)[0]


def gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`; activation is one of model_config.Activation.

    "swiglu_oai" is gpt-oss's: `gate * sigmoid(1.702 * gate) * (up + 1)`, gate at most 7 and up within -7..7.
    """
    return _op("gated_act", {"gate": gate, "up": up}, [gate.type], activation=activation)[0]


def gather_columns(x: Tensor, indices: Tensor) -> Tensor:
    """`x[:, indices]`, indices int32 [width]."""
    assert isinstance(indices.shape[0], int)
    return _op("gather_columns", {"x": x, "indices": indices}, [TensorType(x.dtype, (x.shape[0], indices.shape[0]))])[0]


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`x` cut along the last dimension."""
    assert sum(sizes) == x.width
    types = [TensorType(x.dtype, (*x.shape[:-1], size)) for size in sizes]
    return _op("split", {"x": x}, types, sizes=list(sizes))


def concat(x: Tensor, y: Tensor, num_heads: int = 1) -> Tensor:
    """Each of `num_heads` equal parts of `x`, with the same part of `y` behind it."""
    assert x.width % num_heads == y.width % num_heads == 0
    out = TensorType(x.dtype, (*x.shape[:-1], x.width + y.width))
    return _op("concat", {"x": x, "y": y}, [out], num_heads=num_heads)[0]


def rope(x: Tensor, positions: Tensor, num_heads: int, rope: dict[str, Any]) -> Tensor:
    """Rotary embedding of each head of `x` [num_tokens, num_heads * head_dim].

    `rope` is a kernels.rope.RopeSpec as a dict: dim, base, layout ("neox" rotates halves, "gptj" pairs), scaling and
    max_position_embeddings.
    """
    return _op("rope", {"x": x, "positions": positions}, [x.type], num_heads=num_heads, rope=rope)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kv_quant: str | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Writes k and v to this layer's paged KV cache, then causal attention of q over each sequence's cache.

    q [num_tokens, num_heads * head_dim], k [num_tokens, num_kv_heads * head_dim], v [num_tokens, num_kv_heads *
    v_head_dim]; the output is as wide as num_heads * v_head_dim (by default head_dim). `layer` counts from this rank's
    first. With `window`, a token sees itself and the `window - 1` before it. A score is `scale * q.k`, with `softcap`
    then `softcap * tanh(score / softcap)`. `sinks` [num_heads] are scores of one more key whose value is zero.

    With `kv_quant` ("fp8" or "int8") the cache holds k and v divided by `kv_scale` [2] (k's, then v's; by default ones)
    in that format.
    """
    t = _current.get()
    cache: dict[str, Tensor | None] = {name: Tensor(name, STEP_INPUTS[name]) for name in _CACHE_INPUTS}
    attrs: dict[str, Any] = {
        "layer": layer, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "scale": scale,
        "v_head_dim": v_head_dim if v_head_dim != head_dim else None, "window": window, "softcap": softcap,
        "kv_quant": kv_quant,
    }  # fmt: skip
    attrs = {name: value for name, value in attrs.items() if value is not None}
    out = TensorType(q.dtype, (q.shape[0], num_heads * (v_head_dim or head_dim)))
    inputs = {"q": q, "k": k, "v": v, "sinks": sinks, "kv_scale": kv_scale, **cache}
    return t.record("attention", inputs, [out], attrs)[0]


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str,
    renormalize: bool,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    num_groups: int | None = None,
    top_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Which experts a token goes to: (weights [num_tokens, top_k], ids int32 [num_tokens, top_k]).

    `logits` [num_tokens, experts]. `scoring` "softmax" or "sigmoid" over all experts gives the scores; the `top_k`
    largest are taken (the lower id first among equals), their weights are the scores, with `renormalize` divided by
    their sum, times `scaling`. Mixtral's and gpt-oss's softmax over the chosen is "softmax" with `renormalize`.

    DeepSeek: `bias` [experts] is added to the scores for the choice only. With `num_groups`, experts come in so many
    equal groups, and only those of the `top_groups` best are chosen from; a group counts as its best score (softmax),
    or as the sum of its two best, bias included (sigmoid).
    """
    kinds = [TensorType("float32", (logits.shape[0], top_k)), TensorType("int32", (logits.shape[0], top_k))]
    weights, ids = _op(
        "route", {"logits": logits, "bias": bias}, kinds, top_k=top_k, scoring=scoring, renormalize=renormalize,
        scaling=scaling, num_groups=num_groups, top_groups=top_groups,
    )  # fmt: skip
    return weights, ids


def expert_linear(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    global_scale: Tensor | None = None,
    quant: str | None = None,
    group_size: int | None = None,
    first_expert: int = 0,
) -> Tensor:
    """Each token by each of its experts: [num_tokens, top_k * out].

    `x` is [num_tokens, in], or [num_tokens, top_k * in] with a part for each choice; `ids` as route gives them;
    `weight` [experts, out, in] and `bias` [experts, out]. Quantized as in `linear`, scales with the experts first.

    Ids outside this rank's experts, which begin at `first_expert`, give zeros.
    """
    (_, top_k), (_, out_features, _) = ids.shape, weight.shape
    assert isinstance(top_k, int)
    assert isinstance(out_features, int)
    out = TensorType(x.dtype, (*x.shape[:-1], top_k * out_features))
    inputs = {
        "x": x, "ids": ids, "weight": weight, "bias": bias, "scale": scale, "zero": zero, "global_scale": global_scale,
    }  # fmt: skip
    attrs = {"quant": quant, "group_size": group_size, "first_expert": first_expert or None}
    return _op("expert_linear", inputs, [out], **attrs)[0]


def expert_gated_act(x: Tensor, top_k: int, activation: str) -> Tensor:
    """gated_act of each of the `top_k` parts of `x`, a part being up's columns and then the gate's."""
    assert x.width % (2 * top_k) == 0
    out = TensorType(x.dtype, (*x.shape[:-1], x.width // 2))
    return _op("expert_gated_act", {"x": x}, [out], top_k=top_k, activation=activation)[0]


def combine(x: Tensor, weights: Tensor) -> Tensor:
    """`sum over j of weights[:, j] * (part j of x)`: x [num_tokens, top_k * width], weights [num_tokens, top_k]."""
    top_k = weights.width
    out = TensorType(x.dtype, (*x.shape[:-1], x.width // top_k))
    return _op("combine", {"x": x, "weights": weights}, [out])[0]


def gather_last(x: Tensor, indices: Tensor) -> Tensor:
    """The rows of `x` whose logits are wanted."""
    return _op("gather_last", {"x": x, "indices": indices}, [TensorType(x.dtype, (*indices.shape, x.width))])[0]


def all_reduce(x: Tensor, group: Sequence[int]) -> Tensor:
    """The sum of `x` over the ranks of `group`."""
    return _op("all_reduce", {"x": x}, [x.type], group=list(group))[0]


def all_gather(x: Tensor, group: Sequence[int]) -> Tensor:
    """The `x` of the ranks of `group` side by side along the last dimension."""
    out = TensorType(x.dtype, (*x.shape[:-1], x.width * len(group)))
    return _op("all_gather", {"x": x}, [out], group=list(group))[0]


def send(x: Tensor, to: int) -> None:
    """Gives `x` to the next pipeline stage's rank."""
    _op("send", {"x": x}, [], to=to)


def recv(like: Tensor, width: int, dtype: str, source: int) -> Tensor:
    """What the previous pipeline stage's rank sends: `width` elements for each row of `like`."""
    return _op("recv", {"like": like}, [TensorType(dtype, (like.shape[0], width))], source=source)[0]
