"""Lowering for the cpu backend: each node becomes one step of our C++ kernels, or of torch where there is no compiler.

A native plan is the list of `kernels.cpu.library` steps by name and argument. Arguments that are addresses at run time
are strings here: "b:N" a buffer, "w:NAME" a tensor of the engine, "kv:N" a layer's KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trtllm_cli.build.lowered import Lowered, Memory, Packing, ReadWeight
from trtllm_cli.build.passes.plan_buffers import BufferPlan, plan_buffers
from trtllm_cli.build.tactics import faster, time_linears
from trtllm_cli.engine import KERNELS
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.cpu import compiler, pack
from trtllm_cli.kernels.cpu.library import TILE, kv_bytes_per_block
from trtllm_cli.kernels.quantization import quantize_int4, quantize_int8
from trtllm_cli.kernels.rope import cos_sin_table
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.tensor_file import TensorInfo, total_bytes

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.model_config import ModelConfig

FLOAT_BYTES = 4  # activations are float32


def lower(graph: Graph, config: ModelConfig, build_config: BuildConfig, *, kernels: str = "auto") -> Lowered:
    """The plan of one rank. `kernels` is "native", "torch", or "auto": the faster by timing, torch without a compiler.

    Raises ResourceError when native is asked for and there is no compiler, UnsupportedError for a graph with an op that
    the native kernels do not have.
    """
    notes: dict[str, Any] = {}
    if kernels == "auto":
        kernels, notes = _choose(graph, build_config)
    lowering = NativeLowering(graph, build_config) if kernels == "native" else TorchLowering(graph, build_config)
    lowering.lower()
    attention = [n for n in graph.nodes if n.op in ("paged_attention", "attention")]
    kv_block = sum(
        kv_bytes_per_block(
            n.attrs["num_kv_heads"], n.attrs["head_dim"], build_config.tokens_per_block, build_config.kv_cache_dtype
        )
        for n in attention
    )
    blocks_a_sequence = -(-build_config.max_seq_len // build_config.tokens_per_block)
    memory = Memory(
        weights=total_bytes(t for p in lowering.packings for t in p.tensors.values()),
        activations=lowering.activation_bytes(),
        kv_block=kv_block,
        kv_blocks_full=blocks_a_sequence * build_config.max_batch_size,
    )
    plan = {"kernels": kernels, "vocab_size": config.vocab_size, "kv_layers": len(attention), **lowering.plan()}
    return Lowered(plan, lowering.packings, memory, lowering.target(), notes)


def _choose(graph: Graph, build_config: BuildConfig) -> tuple[str, dict[str, Any]]:
    """ "native" or "torch", and the times that say why."""
    if compiler.find_compiler() is None:
        return "torch", {"kernels": "torch: no C++ compiler was found"}
    lowering = NativeLowering(graph, build_config)
    if lowering.unsupported():
        return "torch", {"kernels": f"torch: there is no native {lowering.unsupported()}"}
    image = compiler.compile_library(compiler.host_features())
    times = time_linears(graph, build_config, image, lowering.format_of)
    return faster(times), {"kernels": "the faster in linears_ms", "linears_ms": times}


@dataclass
class _Lowering:
    """What the two ways share: the weights' formats and how each is packed."""

    graph: Graph
    build_config: BuildConfig
    packings: list[Packing] = field(default_factory=list)
    _packed: set[str] = field(default_factory=set)

    def format_of(self, node: Node) -> str:
        """How a linear's weight is stored in the engine. The head of an int4 engine is int8: four bits cost it most."""
        if node.attrs.get("quant"):
            return str(node.attrs["quant"])
        wanted = self.build_config.weight_dtype
        is_head = self.graph.type_of(node.output).shape[0] == NUM_LOGITS
        return "int8" if wanted == "int4" and is_head else wanted

    def add(self, name: str, info: TensorInfo, make: Callable[[ReadWeight], torch.Tensor]) -> str:
        """An engine tensor made from one weight (or none); its reference for the plan."""
        if name not in self._packed:
            self._packed.add(name)
            self.packings.append(Packing({name: info}, lambda read: {name: make(read)}))
        return f"w:{name}"

    def add_vector(self, weight: str) -> str:
        """A norm's weight or a bias, float32."""
        (width,) = self.graph.weights[weight].shape
        return self.add(weight, TensorInfo("float32", (width,)), lambda read: read(weight).float())

    def add_table(self, weight: str) -> tuple[str, str]:
        """A row-major embedding table, and its dtype: float32 in a float32 engine, else bfloat16."""
        dtype = "float32" if self.build_config.weight_dtype == "float32" else "bfloat16"
        shape = self.graph.weights[weight].shape
        name = f"{weight}.rows"
        return self.add(name, TensorInfo(dtype, shape), lambda read: read(weight).to(getattr(torch, dtype))), dtype

    def add_rope_table(self, rope: dict[str, Any]) -> tuple[str, RopeSpec]:
        """The cosines and sines of every position that the engine allows."""
        spec = RopeSpec.model_validate(rope)
        length = self.build_config.max_seq_len
        name = f"rope.{spec.model_dump_json(exclude_none=True)}"
        return self.add(name, TensorInfo("float32", (length, spec.dim)), lambda _: cos_sin_table(spec, length)), spec


class NativeLowering(_Lowering):
    """Each node as one step of the compiled library."""

    def lower(self) -> None:
        """Fills the steps and the packings."""
        self.buffers: BufferPlan = plan_buffers(self.graph)
        self.steps: list[dict[str, Any]] = []
        features = compiler.host_features()
        image = compiler.compile_library(features)
        self.features = features
        blob = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        self.add(KERNELS, TensorInfo("uint8", (len(image),)), lambda _: blob)
        if op := self.unsupported():
            raise UnsupportedError(
                f"the native kernels have no {op}", fix="build with --kernels torch, which runs any graph"
            )
        for node in self.graph.nodes:
            getattr(self, f"_{node.op}")(node)

    def unsupported(self) -> str:
        """The first node that the native kernels cannot compute, in words; empty when they have all."""
        for node in self.graph.nodes:
            if not hasattr(self, f"_{node.op}"):
                return f"`{node.op}` in this place of the graph"
            if node.op == "gated_act" and "x" not in node.inputs:
                return "`gated_act` of two tensors that could not be merged into one linear"
        return ""

    def plan(self) -> dict[str, Any]:
        """The native part of the plan."""
        return {
            "buffers": [{"rows": b.rows, "width": b.width} for b in self.buffers.buffers],
            "steps": self.steps,
            "output": self._buffer(self.graph.outputs[0]) if self.graph.outputs else None,
            "output_width": self.graph.type_of(self.graph.outputs[0]).shape[-1] if self.graph.outputs else 0,
        }

    def target(self) -> dict[str, str]:
        """What the kernels were compiled for."""
        return {"arch": compiler.host_arch(), "kernels": "native", "features": " ".join(self.features)}

    def activation_bytes(self) -> int:
        """Bytes of the buffers at the engine's limits."""
        sizes = {NUM_TOKENS: self.build_config.max_num_tokens, NUM_LOGITS: self.build_config.max_batch_size}
        return self.buffers.elements(sizes) * FLOAT_BYTES

    def _buffer(self, tensor: str) -> str:
        return f"b:{self.buffers.of[tensor]}"

    def _operand(self, name: str) -> str:
        """An activation, or a vector among the weights."""
        return self.add_vector(name) if name in self.graph.weights else self._buffer(name)

    def _step(self, op: str, **args: Any) -> None:
        self.steps.append({"op": op, "args": {k: v for k, v in args.items() if v is not None}})

    def _rows(self, tensor: str) -> str:
        return str(self.graph.type_of(tensor).shape[0])

    def _width(self, tensor: str) -> int:
        width = self.graph.type_of(tensor).shape[-1]
        assert isinstance(width, int)
        return width

    def _embedding(self, node: Node) -> None:
        table, dtype = self.add_table(node.inputs["weight"])
        rows, width = self.graph.weights[node.inputs["weight"]].shape
        self._step(
            "embedding",
            out=self._buffer(node.output),
            table=table,
            vocab_size=rows,
            hidden_size=width,
            dtype=dtype,
            vocab_start=node.attrs["vocab_start"],
        )

    def _rms_norm(self, node: Node) -> None:
        self._step(
            "rms_norm",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            weight=self.add_vector(node.inputs["weight"]),
            width=self._width(node.output),
            eps=node.attrs["eps"],
            num_heads=node.attrs.get("num_heads"),
            rows=self._rows(node.output),
        )

    def _add_rms_norm(self, node: Node) -> None:
        norm, total = node.outputs
        self._into(node.inputs["residual"], total)
        self._step(
            "add_rms_norm",
            x=self._buffer(node.inputs["x"]),
            residual=self._buffer(total),
            out=self._buffer(norm),
            weight=self.add_vector(node.inputs["weight"]),
            width=self._width(norm),
            eps=node.attrs["eps"],
            rows=self._rows(norm),
        )

    def _into(self, tensor: str, destination: str) -> None:
        """Copies `tensor` where the plan could not give `destination` its buffer."""
        if self._buffer(tensor) != self._buffer(destination):
            width = self._width(tensor)
            self._step(
                "copy_rows",
                x=self._buffer(tensor),
                out=self._buffer(destination),
                width=width,
                x_stride=width,
                out_stride=width,
                rows=self._rows(tensor),
            )

    def _add(self, node: Node) -> None:
        y = node.inputs["y"]
        self._step(
            "add",
            x=self._buffer(node.inputs["x"]),
            y=self._operand(y),
            out=self._buffer(node.output),
            width=self._width(node.output),
            broadcast=len(self.graph.type_of(y).shape) == 1,
            rows=self._rows(node.output),
        )

    def _linear(self, node: Node) -> None:
        fmt = self.format_of(node)
        weight, group_size = node.inputs["weight"], None
        out_features, in_features = self._width(node.output), self._width(node.inputs["x"])
        if fmt == "int4":
            group_size = node.attrs.get("group_size") or self.build_config.group_size
        infos = packed_infos(fmt, out_features, in_features, group_size)
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt}" for role in infos}
        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            make = _packer(node, fmt, group_size, in_features)
            self.packings.append(
                Packing(
                    {names[role]: info for role, info in infos.items()},
                    lambda read: {names[role]: tensor for role, tensor in make(read).items()},
                )
            )
        self._step(
            "linear",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            weight=f"w:{names['weight']}",
            scale=f"w:{names['scale']}" if "scale" in names else None,
            bias=self.add_vector(node.inputs["bias"]) if "bias" in node.inputs else None,
            fmt=fmt,
            in_features=in_features,
            out_features=out_features,
            group_size=group_size,
            rows=self._rows(node.output),
        )

    def _gated_act(self, node: Node) -> None:
        self._step(
            "gated_act",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            intermediate_size=self._width(node.output),
            activation=node.attrs["activation"],
            rows=self._rows(node.output),
        )

    def _rope_append(self, node: Node) -> None:
        table, spec = self.add_rope_table(node.attrs["rope"])
        norms = {role: self.add_vector(node.inputs[role]) for role in ("q_norm", "k_norm") if role in node.inputs}
        self._step(
            "rope_append",
            qkv=self._buffer(node.inputs["qkv"]),
            q_out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            table=table,
            rotary_dim=spec.dim,
            layout=spec.layout,
            eps=node.attrs.get("eps"),
            **norms,
            **self._heads(node),
        )

    def _paged_attention(self, node: Node) -> None:
        self._step(
            "paged_attention",
            q=self._buffer(node.inputs["q"]),
            out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            scale=node.attrs["scale"],
            window=node.attrs.get("window"),
            **self._heads(node),
        )

    def _heads(self, node: Node) -> dict[str, Any]:
        names = ("num_heads", "num_kv_heads", "head_dim")
        return {
            **{name: node.attrs[name] for name in names},
            "block_size": self.build_config.tokens_per_block,
            "cache_dtype": self.build_config.kv_cache_dtype,
        }

    def _gather_last(self, node: Node) -> None:
        x, out = self._buffer(node.inputs["x"]), self._buffer(node.output)
        self._step("gather_rows", x=x, out=out, width=self._width(node.output))

    def _all_reduce(self, node: Node) -> None:
        self._into(node.inputs["x"], node.output)
        self._collective(node, x=self._buffer(node.output), tensor=node.output)

    def _all_gather(self, node: Node) -> None:
        x = node.inputs["x"]
        self._collective(node, x=self._buffer(x), out=self._buffer(node.output), tensor=x)

    def _send(self, node: Node) -> None:
        self._collective(node, x=self._buffer(node.inputs["x"]), tensor=node.inputs["x"])

    def _recv(self, node: Node) -> None:
        self._collective(node, x=self._buffer(node.output), tensor=node.output)

    def _collective(self, node: Node, *, tensor: str, **buffers: str) -> None:
        """A step between two runs of the kernels."""
        self._step(node.op, **buffers, width=self._width(tensor), rows=self._rows(tensor), **node.attrs)


class TorchLowering(_Lowering):
    """The graph itself is the plan; weights are stored plainly, and torch packs int8 and int4 when they are loaded."""

    def lower(self) -> None:
        """Fills the packings."""
        self.formats: dict[str, str] = {}
        linears = {node.inputs["weight"]: node for node in self.graph.nodes if node.op == "linear"}
        for node in self.graph.nodes:
            if node.op == "embedding":
                self.add_table(node.inputs["weight"])
            elif node.op == "linear":
                self._linear(node)
            for name in node.inputs.values():
                if name in self.graph.weights and name not in linears and node.op not in ("embedding", "linear"):
                    self.add_vector(name)

    def plan(self) -> dict[str, Any]:
        """The torch part of the plan; `steps` counts nodes for the report."""
        return {"formats": self.formats, "steps": [node.op for node in self.graph.nodes]}

    def target(self) -> dict[str, str]:
        """torch runs wherever it is installed."""
        return {"arch": "any", "kernels": "torch", "features": ""}

    def activation_bytes(self) -> int:
        """Bytes of the buffers that a plan with reuse would need; torch allocates about as much."""
        sizes = {NUM_TOKENS: self.build_config.max_num_tokens, NUM_LOGITS: self.build_config.max_batch_size}
        return 2 * max(sizes[str(t.shape[0])] * int(t.shape[-1]) for t in self.graph.tensors.values()) * FLOAT_BYTES

    def _linear(self, node: Node) -> None:
        weight, fmt = node.inputs["weight"], self.format_of(node)
        self.formats[weight] = fmt
        if "bias" in node.inputs:
            self.add_vector(node.inputs["bias"])
        rows = int(self.graph.weights[weight].shape[0])
        columns = int(self.graph.type_of(node.inputs["x"]).shape[-1])
        if fmt in ("float32", "bfloat16"):
            dtype = getattr(torch, fmt)
            self.add(f"{weight}.{fmt}", TensorInfo(fmt, (rows, columns)), lambda read: read(weight).to(dtype))
            return
        group_size = node.attrs.get("group_size") or self.build_config.group_size or columns
        shapes = {"weight": TensorInfo("int8", (rows, columns)), "scale": TensorInfo("float32", (rows,))}
        if fmt == "int4":
            groups = TensorInfo("float32", (rows, -(-columns // group_size)))
            shapes = {"weight": TensorInfo("uint8", (rows, -(-columns // 2))), "scale": groups, "zero": groups}
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt}" for role in shapes}

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            if node.attrs.get("quant"):
                parts = [read(node.inputs[role]) for role in ("weight", "scale")]
                if fmt == "int4":
                    parts.append(read(node.inputs["zero"]) if "zero" in node.inputs else torch.full_like(parts[1], 8.0))
            else:
                parts = list(quantize_int8(read(weight)) if fmt == "int8" else quantize_int4(read(weight), group_size))
            return dict(zip(names.values(), parts, strict=True))

        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(Packing({names[role]: info for role, info in shapes.items()}, make))


def packed_infos(fmt: str, out_features: int, in_features: int, group_size: int | None) -> dict[str, TensorInfo]:
    """What kernels.cpu.pack makes of a weight, before it is made."""
    tiles = -(-out_features // TILE)
    scale = TensorInfo("float32", (tiles, TILE))
    match fmt:
        case "float32":
            return {"weight": TensorInfo("float32", (tiles, in_features, TILE))}
        case "bfloat16":
            return {"weight": TensorInfo("bfloat16", (tiles, -(-in_features // 2), TILE, 2))}
        case "int8":
            return {"weight": TensorInfo("int8", (tiles, in_features, TILE)), "scale": scale}
        case "int4":
            assert group_size is not None
            groups, words = -(-in_features // group_size), -(-group_size // 8)
            return {"weight": TensorInfo("uint8", (tiles, groups, (words + 1) * TILE * 4)), "scale": scale}
    raise AssertionError(fmt)


def _packer(
    node: Node, fmt: str, group_size: int | None, in_features: int
) -> Callable[[ReadWeight], dict[str, torch.Tensor]]:
    """Reads a linear's weights and lays them out."""

    def make(read: ReadWeight) -> dict[str, torch.Tensor]:
        weight = read(node.inputs["weight"])
        if node.attrs.get("quant") == "int8":
            return pack.pack_int8(weight, read(node.inputs["scale"]))
        if node.attrs.get("quant") == "int4":
            assert group_size is not None
            zero = read(node.inputs["zero"]) if "zero" in node.inputs else None
            return pack.pack_int4(weight, read(node.inputs["scale"]), zero, group_size, in_features)
        return pack.pack_linear(weight, fmt, group_size)  # type: ignore[arg-type]

    return make

