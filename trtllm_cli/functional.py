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
    quant: str | None = None,
    group_size: int | None = None,
    out_dtype: str | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, weight [out, in].

    `quant` says how the weight is stored: "int8", int8 [out, in] times `scale` [out]; "int4", uint8 [out, in / 2] with
    the even column in the low nibble, `(nibble - zero) * scale` with scale and zero [out, in / group_size] (zero 8
    where there is none).
    """
    out = TensorType(out_dtype or x.dtype, (*x.shape[:-1], weight.shape[0]))
    inputs = {"x": x, "weight": weight, "bias": bias, "scale": scale, "zero": zero}
    return _op("linear", inputs, [out], quant=quant, group_size=group_size)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_heads: int | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, over the last dimension, or over each of `num_heads` equal parts of it."""
    return _op("rms_norm", {"x": x, "weight": weight}, [x.type], eps=eps, num_heads=num_heads)[0]


def add(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`; `y` may be one row that is added to every row of x."""
    return _op("add", {"x": x, "y": y}, [x.type])[0]


def gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`; activation is one of model_config.Activation."""
    return _op("gated_act", {"gate": gate, "up": up}, [gate.type], activation=activation)[0]


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`x` cut along the last dimension."""
    assert sum(sizes) == x.width
    types = [TensorType(x.dtype, (*x.shape[:-1], size)) for size in sizes]
    return _op("split", {"x": x}, types, sizes=list(sizes))


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
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Writes k and v to this layer's paged KV cache, then causal attention of q over each sequence's cache.

    q [num_tokens, num_heads * head_dim], k and v [num_tokens, num_kv_heads * head_dim]. With `window`, a token sees
    itself and the `window - 1` before it. `layer` counts from this rank's first.
    """
    t = _current.get()
    cache: dict[str, Tensor | None] = {name: Tensor(name, STEP_INPUTS[name]) for name in _CACHE_INPUTS}
    attrs = {
        "layer": layer, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "scale": scale,
    }  # fmt: skip
    if window is not None:
        attrs["window"] = window
    return t.record("attention", {"q": q, "k": k, "v": v, **cache}, [q.type], attrs)[0]


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
