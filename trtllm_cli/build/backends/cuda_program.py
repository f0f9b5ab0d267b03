"""What a cuda plan is made of, and the bookkeeping of a lowering: kernels, launches, scratch memory, weights.

A plan is JSON:

    kernels   entry, params and so on of each, and where its cubin lies in the tensor KERNELS
    buffers   bytes of a row, and which symbol counts the rows
    scratch   name -> bytes, zero at first
    kv        bytes of a block: of each layer's k, then v
    copy      launches that copy blocks in all layers: the scratch "copy pairs" says which, "copy parts" where each k
              and v begins, "copy words" how many words of 4 bytes a block of it has
    exchange  name -> bytes, zero at first: memory that the other ranks of the group write to
    peers     references to what they write to; every rank of the group has as many, in the same order; the scratch
              "deltas" says how far the others' is, int64 [peers, ranks]
    steps     {"op", "by", "ways": [[most, launches], ...]}: the first way whose `most` (None: any) is at least the
              symbol `by`; a launch with "when": "mixed" is left out of steps in which every sequence has one token, one
              with "decode" of the others;
              "without_peers": the launches where ranks do not see each other's memory; "others": of each of the first
              ways what may take the place of its launches, which the first load on a GPU settles; "instead": how many
              steps that follow have no launches where this one has any, as it computes them: up to the `most` of their
              first way
    splits    {"tokens", "most", "above", "sequences"}, or None: in a step of more than `above` and up to `sequences`
              sequences the symbol "num_splits" is one for each `tokens` of the longest, rounded up to a power of two,
              at most `most`; else it is 1
    fixed_tactics    whether the first load times nothing: no others, nor algorithms of cuBLASLt's for "mm", "scaled_mm"
    sampling  such steps by name, which follow where they are asked for: penalties, bans, plain, filtered, logprobs
    token_counts, most_logprobs    the dtype of the scratch "token counts"; how many likely tokens "logprobs" gives

Symbols count a step's tokens, sequences, logits, and (cuda_attention.py) prompts, sequences of one token alone, splits.
A launch is {"kernel", "grid", "args"}, args in the kernel's order, {"call": "mm" | "scaled_mm", ...}: torch's, or
{"call": "all_reduce" | "all_gather" | "send" | "recv", ...}: NCCL's. In a grid, [symbol, per] is ceil(symbol / per),
and [symbol, per, other, times] (symbol // per + other) * times; `other` is a symbol or a number, `times` may be left
out, and a symbol may be "SYMBOL*8". An argument is a number, None (no pointer), or a reference:

    "b:N"  buffer     "w:NAME"  weight     "i:NAME"  step input     "s:NAME"  scratch     "n:SYMBOL"  a count
    "k:L" "v:L"  a layer's cache           "last"  the tokens last sampled, by batch row
    "e:NAME"  exchange memory              "d:N"  a row of deltas
    "x:NAME"  an input of penalties, bans or logprobs
    ["n", DIM]  a number as in a grid
    ["b:N", SYMBOL, BYTES]  so many bytes for each of SYMBOL behind it
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trtllm_cli.build.backends.weights import Lowering
from trtllm_cli.build.passes.plan_buffers import BufferPlan, plan_buffers
from trtllm_cli.functional import NUM_TOKENS
from trtllm_cli.graph import Graph, Node, TensorType
from trtllm_cli.kernels.cuda.kernel import KernelSource, stages_that_fit
from trtllm_cli.tensor_file import TensorInfo

Dim = int | Sequence[Any]
Launch = dict[str, Any]

TYPES = {
    "float32": "*fp32", "bfloat16": "*bf16", "float8_e4m3fn": "*fp8e4nv", "int8": "*i8", "uint8": "*u8",
    "int16": "*i16", "int32": "*i32",
}  # fmt: skip
_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "int32": 4}
# Pairs of ops that may be one kernel: which input of the one that of the other comes from, and what it reads itself.
_JOINED = {
    ("linear", "gated_act"): ("x", "x"), ("all_reduce", "add_rms_norm"): ("x", "x"),
    ("rope_append", "paged_attention"): ("q", "qkv"), ("linear", "add_rms_norm"): ("x", "x"),
    ("linear", "all_reduce"): ("x", "x"), ("add_rms_norm", "linear"): ("x", "x"),
}  # fmt: skip
RESIDUAL = "float32"  # the sum over the layers is kept in
# In steps with prompts of more tokens than this it is bfloat16, where no op but these touches it: there norms take as
# long as their bytes, and such steps up to 2% less on an H200. Norms that linears compute (for fewer) want float32.
_MOST_WIDE = 512
_NARROW_OPS = {"embedding", "rms_norm", "add_rms_norm", "gather_last"}


@dataclass
class CudaLowering(Lowering):
    """The bookkeeping; what each op becomes is in the classes that derive from it."""

    arch: str = "sm_90a"
    rank: int = 0
    vocab_size: int = 0  # of which the logits may have more, to be cut alike for all ranks
    kernels: dict[KernelSource, int] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    scratch: dict[str, int] = field(default_factory=dict)
    exchange: dict[str, int] = field(default_factory=dict)
    peers: list[str] = field(default_factory=list)
    kv: list[tuple[int, int]] = field(default_factory=list)
    copy: list[Launch] = field(default_factory=list)
    _is_narrowed: bool = False

    def prepare(self) -> None:
        """Decides every tensor's dtype, and where it lives."""
        self.residuals = _residuals(self.graph)
        self.graph = _cast_inputs(self.graph, self.residuals)
        self.narrow = _narrow(self.graph, self.residuals) if self.build_config.max_num_tokens > _MOST_WIDE else set()
        self.consumers = self.graph.consumers()
        self.producers = self.graph.producers()
        nodes = self.graph.nodes
        self.following = {name: after for node, after in itertools.pairwise(nodes) for name in node.outputs}
        self.buffers: BufferPlan = plan_buffers(_held(self.graph), self.bytes_of, gathers_in_place=True)

    def dtype(self, name: str) -> str:
        """Torch's name of what an activation is kept in: bfloat16 but for the residual stream, logits and numbers."""
        if name in self.logits:
            return "float32"
        kind = self.graph.tensors[name].dtype
        if kind in ("int32", "float8_e4m3fn"):
            return kind
        if name in self.residuals:
            return RESIDUAL
        return "float32" if name in self._routed or self._is_step(name) else "bfloat16"

    def bytes_of(self, name: str) -> int:
        """Of an element of an activation."""
        return _BYTES[self.dtype(name)]

    def _is_step(self, name: str) -> bool:
        """Whether it is the steps of quantized rows, or the weights of a token's experts."""
        maker = self.producers[name]
        return (maker.attrs.get("out_quant") == "token" and name == maker.outputs[-1]) or maker.op == "route"

    def width(self, name: str) -> int:
        """Elements of a row."""
        width = self.graph.type_of(name).shape[-1]
        assert isinstance(width, int)
        return width

    def rows(self, name: str) -> str:
        """The symbol that counts a tensor's rows."""
        return str(self.graph.type_of(name).shape[0])

    def ref(self, name: str) -> str:
        """A step input's or an activation's reference."""
        return f"i:{name}" if name in self.graph.inputs else f"b:{self.buffers.of[name]}"

    def type_of(self, name: str) -> str:
        """Triton's type of a pointer to a step input or an activation, in the steps that launches are made for."""
        if name in self.graph.inputs:
            return "*i32"
        return TYPES["bfloat16" if self._is_narrowed and name in self.narrow else self.dtype(name)]

    @contextlib.contextmanager
    def _narrowed(self) -> Iterator[None]:
        """Here launches have the residual stream in bfloat16, in the front half of its buffers."""
        self._is_narrowed = True
        try:
            yield
        finally:
            self._is_narrowed = False

    def residual_ways(self, node: Node, make: Callable[[str], list[Launch]]) -> list[tuple[int | None, list[Launch]]]:
        """Of a node's launches, by tokens: where it touches the residual stream, those that have it in bfloat16 too.

        `make` is given which steps they are for: "", all, "decode" or "mixed".
        """
        if not self.narrow.intersection((*node.inputs.values(), *node.outputs)):
            return [(None, make(""))]
        few, decode = make(""), make("decode")
        with self._narrowed():
            return [(_MOST_WIDE, few), (None, [*decode, *make("mixed")])]

    def whole(self, name: str) -> str:
        """What rows were gathered from, or the tensor itself."""
        maker = self.producers.get(name)
        return maker.inputs["x"] if maker is not None and maker.op == "gather_last" else name

    def only_reader(self, name: str, op: str) -> Node | None:
        """The next node, where it alone reads this as x, and is such an op."""
        readers, follower = self.consumers.get(name, []), self.following.get(name)
        if len(readers) != 1 or readers[0] is not follower or name in self.graph.outputs:
            return None
        return follower if follower.op == op and follower.inputs["x"] == name else None

    def plain(self, weight: str) -> tuple[str, str]:
        """A weight as it is, but floats in bfloat16: its reference, and Triton's type of a pointer to it."""
        w = self.graph.weights[weight]
        dtype = "int32" if w.dtype == "int32" else "bfloat16"
        torch_dtype = getattr(torch, dtype)
        return self.add(weight, TensorInfo(dtype, w.shape), lambda read: read(weight).to(torch_dtype)), TYPES[dtype]

    def vector(self, weight: str) -> tuple[str, str]:
        """A norm's weight, a bias, factors: Triton's type of a pointer to it, and its reference. float32 stays so."""
        if self.graph.weights[weight].dtype == "float32":
            return "*fp32", self.floats(weight)
        return self.plain(weight)[::-1]

    def floats(self, weight: str) -> str:
        """A weight in float32: scales and the like."""
        name, w = f"{weight}.float32", self.graph.weights[weight]
        return self.add(name, TensorInfo("float32", w.shape), lambda read: read(weight).float())

    def largest(self, weight: str) -> str:
        """The one step of a qdq: the largest where there are several."""
        name = f"{weight}.largest"
        return self.add(name, TensorInfo("float32", (1,)), lambda read: read(weight).float().amax().reshape(1))

    def steps_of_input(self, node: Node) -> str | None:
        """The steps of a linear's quantized input: one, or one a row."""
        name = node.inputs.get("x_scale")
        if name is None:
            return None
        return self.largest(name) if name in self.graph.weights else self.ref(name)

    def ones(self, count: int) -> str:
        """Float32 ones: scales of what has none."""
        return self.add(f"ones.{count}", TensorInfo("float32", (count,)), lambda _: torch.ones(count))

    def stages(self, most: int, tiles: int) -> int:
        """Of a kernel's pipeline: as many as shared memory has room for, each `tiles` bytes."""
        return stages_that_fit(self.arch, most, tiles)

    def room(self, name: str, nbytes: int) -> str:
        """Scratch memory of at least so many bytes, shared by those who name it alike."""
        self.scratch[name] = max(self.scratch.get(name, 0), nbytes)
        return f"s:{name}"

    def exchanged(self, name: str, nbytes: int) -> str:
        """`room` that the other ranks write to."""
        self.exchange[name] = max(self.exchange.get(name, 0), nbytes)
        return f"e:{name}"

    def deltas(self, ref: str, ranks: int) -> tuple[str, str]:
        """Of a buffer or exchange memory, how far the others' is: Triton's type, and the reference."""
        if not ref.startswith("e:") or ref not in self.peers:  # another rank may have another tensor in a buffer
            self.peers.append(ref)
            self.room("deltas", len(self.peers) * ranks * 8)
            return "*i64", f"d:{len(self.peers) - 1}"
        return "*i64", f"d:{self.peers.index(ref)}"

    def launch(
        self, module: str, function: str, grid: Sequence[Dim], args: dict[str, tuple[str, Any]], *, num_warps: int = 4,
        num_stages: int = 3, when: str = "", **constants: Any,
    ) -> Launch:  # fmt: skip
        """A kernel's launch; `args` by name: Triton's type, and the value or reference."""
        kinds = {name: kind for name, (kind, _) in args.items()}
        source = KernelSource.of(
            module, function, kinds, num_warps=num_warps, num_stages=num_stages, PDL=True, **constants
        )
        return self.launch_source(source, grid, {name: value for name, (_, value) in args.items()}, when=when)

    def launch_source(
        self, source: KernelSource, grid: Sequence[Dim], values: dict[str, Any], *, when: str = ""
    ) -> Launch:
        """A launch of a source that is made elsewhere; `values` by the arguments' names."""
        index = self.kernels.setdefault(source.on(self.arch), len(self.kernels))
        made: Launch = {"kernel": index, "grid": [*grid, 1, 1][:3], "args": values}
        return {**made, "when": when} if when else made

    def step(self, op: str, launches: list[Launch]) -> None:
        """A node that is computed in one way."""
        self.ways(op, NUM_TOKENS, [(None, launches)])

    def ways(
        self, op: str, by: str, ways: Sequence[tuple[int | None, list[Launch]]],
        without_peers: list[Launch] | None = None, others: Sequence[list[list[Launch]]] = (), instead: int = 0,
    ) -> None:  # fmt: skip
        """A node that is computed in one of several ways. `others`: of the first of them, what may be in its place.

        `instead`: how many steps that follow it may take the place of.
        """
        step: dict[str, Any] = {"op": op, "by": by, "ways": [[most, launches] for most, launches in ways]}
        if without_peers is not None:
            step["without_peers"] = without_peers
        if any(others):
            step["others"] = others
        if instead:
            step["instead"] = instead
        self.steps.append(step)


def _held(graph: Graph) -> Graph:
    """The graph in which the second of each joined pair also reads what the first one reads.

    Both may be one kernel, whose output must not lie where its input is.
    """
    nodes: list[Node] = []
    makers: dict[str, Node] = {}
    for node in graph.nodes:
        held = {}
        for (first, second), (passed, read) in _JOINED.items():
            maker = makers.get(node.inputs.get(passed, ""))
            if maker is not None and maker.op == "gather_last":  # in place, and in decode steps nothing at all
                maker = makers.get(maker.inputs["x"])
            if node.op == second and maker is not None and maker.op == first:
                held["held"] = maker.inputs[read]
                if node.op == "gated_act" and "held" in maker.inputs:  # a norm, a linear and its activation as one
                    held["held for long"] = maker.inputs["held"]
        nodes.append(replace(node, inputs={**node.inputs, **held}))
        makers.update(dict.fromkeys(node.outputs, nodes[-1]))
    return graph.with_nodes(nodes)


def _residuals(graph: Graph) -> set[str]:
    """Tensors of the residual stream: the embedding, and what is made of it by adding and scaling."""
    found: set[str] = set()
    for node in graph.nodes:
        match node.op:
            case "embedding" | "recv":
                found.add(node.output)
            case "add_rms_norm" | "add_layer_norm":
                found.add(node.outputs[1])
            case "add" | "scale" | "mul" | "gather_last" | "all_reduce" | "all_gather":
                if any(name in found for name in node.inputs.values()):
                    found.add(node.output)
    return found


def _narrow(graph: Graph, residuals: set[str]) -> set[str]:
    """Tensors of the residual stream that steps may keep in bfloat16: all whose rows are tokens, or none.

    None where ranks sum: the kernel that does so also adds to the residual, and is for float32.
    """
    found = {name for name in residuals if graph.tensors[name].shape[0] == NUM_TOKENS}
    kept = found.intersection(graph.outputs) or any(
        node.op == "all_reduce"
        or (node.op not in _NARROW_OPS and found.intersection((*node.inputs.values(), *node.outputs)))
        for node in graph.nodes
    )
    return set() if kept else found


def _cast_inputs(graph: Graph, residuals: set[str]) -> Graph:
    """The graph with a `cast` to bfloat16 where a linear reads the residual stream itself, as OLMo 2's do."""
    nodes: list[Node] = []
    tensors: dict[str, TensorType] = {}
    for node in graph.nodes:
        x = node.inputs.get("x", "")
        if node.op in ("linear", "expert_linear", "head_linear") and x in residuals:
            cast = f"{x}.cast"
            if cast not in tensors:
                tensors[cast] = graph.tensors[x]
                nodes.append(Node("cast", {"x": x}, (cast,)))
            node = replace(node, inputs={**node.inputs, "x": cast})
        nodes.append(node)
    return graph.with_nodes(nodes, tensors)
