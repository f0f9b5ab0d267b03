"""Mixtures of experts on the GPU: routing, sorting tokens by expert, the experts' linears, their sum. And linears of
heads, each with a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from trtllm_cli.build.backends.cuda_program import TYPES, Dim, Launch
from trtllm_cli.build.backends.cuda_rows import BLOCK, RowLaunches
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.functional import NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.linear_format import ROLES, LinearFormat
from trtllm_cli.tensor_file import TensorInfo

# Pairs (a token's choices) that an expert gets on average: up to the first number each pair is computed by itself, up
# to the second pairs are sorted into blocks of 16, above it into blocks of 128.
_ALONE, _FEW = 1, 16
_FEW_BLOCK, _MANY_BLOCK = 16, 128
_SORTED_BY_ONE = 2048  # pairs up to which one program sorts them all
_CHUNK = 128  # pairs of a program that sorts
_FEW_HEAD_TOKENS = 64  # tokens up to which heads' linears have tiles of 16 tokens


@dataclass(frozen=True)
class _Tier:
    """Steps of up to `most` tokens (None: any), whose pairs are sorted into blocks of `block` (0: not at all)."""

    most: int | None
    block: int


@dataclass(frozen=True)
class _Weight:
    """What the kernels read: Triton's type and reference of each operand, and the constants that belong to them."""

    operands: dict[str, tuple[str, str | None]]
    constants: dict[str, Any]


class ExpertLaunches(RowLaunches):
    """Launches of kernels/triton/moe.py."""

    def _route(self, node: Node) -> None:
        a = node.attrs
        experts, groups = self.width(node.inputs["logits"]), a.get("num_groups") or 1
        bias = node.inputs.get("bias")
        weights, ids = node.outputs
        args = {
            "logits_ptr": self._out(node.inputs["logits"]), "bias_ptr": ("*fp32", self.floats(bias) if bias else None),
            "slot_mapping_ptr": ("*i32", "i:slot_mapping"), "weights_ptr": self._out(weights),
            "ids_ptr": self._out(ids), "scaling": ("fp32", float(a["scaling"])),
        }  # fmt: skip
        rows = self.rows(ids)

        def by_slots(has: bool, when: str = "") -> Launch:
            return self.launch(
                "moe", "route", [[rows, 1]], args, num_warps=1, NUM_EXPERTS=experts, TOP_K=a["top_k"],
                BLOCK_K=triton.next_power_of_2(a["top_k"]), NUM_GROUPS=groups, TOP_GROUPS=a.get("top_groups") or 1,
                BLOCK_GROUPS=triton.next_power_of_2(groups), BLOCK_GROUP=triton.next_power_of_2(experts // groups),
                SCORING=a["scoring"], RENORMALIZE=a["renormalize"], HAS_BIAS=bias is not None, HAS_SLOTS=has, when=when,
            )  # fmt: skip

        # Of some rows alone, in steps with prompts, none is padding.
        route = [by_slots(True)] if rows == NUM_TOKENS else [by_slots(True, "decode"), by_slots(False, "mixed")]
        linear = next((n for n in self.consumers.get(ids, []) if n.op == "expert_linear"), None)
        if linear is None:  # the gate of a shared expert
            self.step(node.op, route)
            return
        by_one, before = _SORTED_BY_ONE // a["top_k"], 0
        ways: list[tuple[int | None, list[Launch]]] = []
        for tier in self._tiers(node):
            last = tier.most or self.build_config.max_num_tokens
            if tier.block == 0:
                ways.append((tier.most, route))
            elif before < by_one:
                ways.append((tier.most if last <= by_one else by_one, [*route, self._sort(linear, tier)]))
            if tier.block and last > by_one:
                ways.append((tier.most, [*route, *self._sort_by_many(linear, tier)]))
            before = last
        self.ways(node.op, rows, ways)

    def _tiers(self, route: Node) -> list[_Tier]:
        """How the experts of a router compute, by the number of tokens; the last takes any."""
        experts, top_k = self.width(route.inputs["logits"]), route.attrs["top_k"]
        tiers: list[_Tier] = []
        for pairs, block in ((_ALONE, 0), (_FEW, _FEW_BLOCK)):
            most = max(1, experts * pairs // top_k)
            if most >= self.build_config.max_num_tokens:
                return [*tiers, _Tier(None, block)]
            tiers.append(_Tier(most, block))
        return [*tiers, _Tier(None, _MANY_BLOCK)]

    def _sort(self, linear: Node, tier: _Tier) -> Launch:
        args, constants = self._sorting(linear, tier)
        return self.launch("moe", "sort_pairs", [1], args, **constants)

    def _sort_by_many(self, linear: Node, tier: _Tier) -> list[Launch]:
        args, constants = self._sorting(linear, tier)
        bins, top_k = constants["BINS"], self._top_k(linear)
        chunks: Dim = [self._pairs(linear), _CHUNK]
        most = -(-self.build_config.max_num_tokens * top_k // _CHUNK)
        counts = {"counts_ptr": ("*i32", self.room("expert counts", bins * most * 4))}
        totals = {"totals_ptr": ("*i32", self.room("expert totals", bins * 4))}
        blocks = {"block_experts_ptr": args.pop("block_experts_ptr")}
        return [
            self.launch("moe", "count_pairs", [chunks], args | counts, **constants),
            self.launch(
                "moe", "scan_counts", [bins], counts | totals | {"chunks": ("i32", ["n", chunks])},
                BLOCK=triton.next_power_of_2(most),
            ),
            self.launch("moe", "place_pairs", [chunks], args | counts | totals | blocks, **constants),
        ]  # fmt: skip

    def _sorting(self, linear: Node, tier: _Tier) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
        """The operands and constants that all ways to sort share."""
        experts, _, _ = self.graph.weights[linear.inputs["weight"]].shape
        args = {
            "ids_ptr": self._out(linear.inputs["ids"]), **self._sorted(linear, tier),
            "num_pairs": ("i32", ["n", [self._pairs(linear), 1]]),
            "first_expert": ("i32", linear.attrs.get("first_expert", 0)),
        }  # fmt: skip
        bins = max(32, triton.next_power_of_2(experts + 2))
        return args, {"NUM_EXPERTS": experts, "BLOCK_M": tier.block, "BINS": bins, "CHUNK": _CHUNK}

    def _sorted(self, linear: Node, tier: _Tier) -> dict[str, tuple[str, Any]]:
        """Where the sorted pairs are, and how many blocks they can be; layers sort into the same memory by turns."""
        experts, top_k = self.graph.weights[linear.inputs["weight"]].shape[0], self._top_k(linear)
        tokens = self.build_config.max_num_tokens if tier.most is None else tier.most
        most = tokens * top_k // tier.block + experts + 1
        return {
            "sorted_ptr": ("*i32", self.room("expert pairs", most * tier.block * 4)),
            "block_experts_ptr": ("*i32", self.room("expert blocks", most * 4)),
            "max_blocks": ("i32", ["n", self._blocks(linear, tier)]),
        }  # fmt: skip

    def _blocks(self, linear: Node, tier: _Tier, times: int = 1) -> Dim:
        """Blocks that a step's pairs can be, `times` as many: every expert's last one may have room left."""
        experts = self.graph.weights[linear.inputs["weight"]].shape[0]
        return [self._pairs(linear), tier.block, experts + 1, times]

    def _pairs(self, linear: Node) -> str:
        """The symbol that counts pairs of a token and an expert."""
        return f"{self.rows(linear.output)}*{self._top_k(linear)}"

    def _top_k(self, linear: Node) -> int:
        return self.width(linear.inputs["ids"])

    def _expert_linear(self, node: Node) -> None:
        x, top_k = node.inputs["x"], self._top_k(node)
        experts, out, _ = self.graph.weights[node.inputs["weight"]].shape
        inner, weight = self._in_features(node), self._expert_weight(node)
        x_scale = node.inputs.get("x_scale")
        bias = node.inputs.get("bias")
        args: dict[str, tuple[str, Any]] = {
            "x_ptr": self._out(x), **weight.operands, "bias_ptr": self.plain(bias)[::-1] if bias else ("*bf16", None),
            "x_scale_ptr": ("*fp32", self.steps_of_input(node)), "out_ptr": self._out(node.output),
        }  # fmt: skip
        constants: dict[str, Any] = {
            "IN": inner, "OUT": out, "NUM_EXPERTS": experts, "PAIRS_PER_ROW": top_k if self.width(x) == inner else 1,
            "HAS_BIAS": bias is not None, "X_SCALES": "none" if x_scale is None else self._per_what(x_scale),
            **weight.constants,
        }  # fmt: skip

        def way(tier: _Tier) -> list[Launch]:
            if tier.block == 0:
                operands = {
                    "ids_ptr": self._out(node.inputs["ids"]), "first_expert": ("i32", node.attrs.get("first_expert", 0))
                }  # fmt: skip
                grid: list[Dim] = [[self._pairs(node), 1], -(-out // 16)]
                return [
                    self.launch(
                        "moe", "expert_linear_pairs", grid, args | operands, BLOCK_N=16, BLOCK_K=_width(256, inner),
                        **constants,
                    )
                ]  # fmt: skip
            few, each = tier.block == _FEW_BLOCK, 1 if x_scale else 2
            tile_n, tile_k = (64, _width(256 // each, inner)) if few else (128, _width(128 // each, inner))
            stages = self.stages(4, (tier.block + tile_n) * tile_k * each)
            launch = self.launch(
                "moe", "expert_linear", [self._blocks(node, tier, -(-out // tile_n))], args | self._sorted(node, tier),
                num_warps=4 if few else 8, num_stages=stages, BLOCK_M=tier.block, BLOCK_N=tile_n, BLOCK_K=tile_k,
                GROUP_M=8, **constants,
            )  # fmt: skip
            return [launch]

        tiers = self._tiers(self.producers[node.inputs["ids"]])
        self.ways(node.op, self.rows(node.output), [(tier.most, way(tier)) for tier in tiers])

    def _per_what(self, x_scale: str) -> str:
        return "one" if x_scale in self.graph.weights else "row"

    def _expert_weight(self, node: Node) -> _Weight:
        """All experts' weights: as they are, made int8 or int4, or of a format that kernels cannot read bfloat16."""
        fmt, weight = self._expert_format(node), node.inputs["weight"]
        experts, out, _ = self.graph.weights[weight].shape
        inner = self._in_features(node)
        kept = "quant" in node.attrs and fmt.name != "bfloat16"
        refs: dict[str, str] = {}
        if "quant" not in node.attrs and fmt.name == "bfloat16":
            refs["weight"] = self.plain(weight)[0]
        elif kept:
            stored = self.graph.weights[weight]
            refs["weight"] = self.add(weight, TensorInfo(stored.dtype, stored.shape), lambda read: read(weight))
            refs |= {role: self.floats(node.inputs[role]) for role in ("scale", "zero") if role in node.inputs}
        else:
            refs = self._pack_experts(node, fmt)
        scale_shape = (experts, out, *([-(-inner // fmt.group_size)] if fmt.group_size else []))
        if kept:
            scale_shape = self.graph.weights[node.inputs["scale"]].shape
        scales = "none"
        if "scale" in refs:
            scales = "group" if len(scale_shape) == 3 else "expert" if scale_shape[1:] == (1,) and out > 1 else "row"
        stored_as = {"bfloat16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}[fmt.name]
        operands = {
            "weight_ptr": (TYPES[stored_as], refs["weight"]), "scale_ptr": ("*fp32", refs.get("scale")),
            "zero_ptr": ("*fp32", refs.get("zero")),
        }  # fmt: skip
        return _Weight(operands, {
            "QUANT": "none" if fmt.name == "bfloat16" else fmt.name, "SCALES": scales, "GROUP": fmt.group_size or 0,
            "HAS_ZERO": "zero" in refs,
        })  # fmt: skip

    def _expert_format(self, node: Node) -> LinearFormat:
        """How the kernels read the weights."""
        fmt = self.format_of(node)
        match fmt.name:
            case "fp8":
                return fmt
            case "int8" if fmt.group_size or not fmt.has_zero:
                return fmt
            case "int4" if fmt.group_size and self._in_features(node) % 2 == 0:
                return fmt
        return LinearFormat("bfloat16")

    def _pack_experts(self, node: Node, fmt: LinearFormat) -> dict[str, str]:
        """Weights that the build quantizes, or makes plain, one expert after another; references by role."""
        weight, inner = node.inputs["weight"], self._in_features(node)
        experts, out, _ = self.graph.weights[weight].shape
        stored = self.format_of(node)
        groups = (-(-inner // fmt.group_size),) if fmt.group_size else ()
        numbers = TensorInfo("float32", (experts, out, *groups))
        infos = {
            "bfloat16": {"weight": TensorInfo("bfloat16", (experts, out, inner))},
            "int8": {"weight": TensorInfo("int8", (experts, out, inner)), "scale": numbers},
            "int4": {"weight": TensorInfo("uint8", (experts, out, inner // 2)), "scale": numbers, "zero": numbers},
        }[fmt.name]
        names = {role: f"{weight}.{role}.{fmt.name}" for role in infos}

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            stack = self.read_format(node, read)
            made: dict[str, torch.Tensor] = {
                role: torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for role, info in infos.items()
            }
            for expert in range(experts):
                parts = stack.one(expert)
                if fmt.name == "bfloat16":
                    parts = {"weight": stored.dequantize(parts, inner)}
                for role in ROLES:
                    if role in made:
                        made[role][expert] = parts[role]
            return {names[role]: tensor for role, tensor in made.items()}

        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(Packing({names[role]: info for role, info in infos.items()}, make))
        return {role: f"w:{name}" for role, name in names.items()}

    def _expert_gated_act(self, node: Node) -> None:
        x, top_k = self._out(node.inputs["x"]), node.attrs["top_k"]
        width = self.width(node.outputs[0]) // top_k
        launch = self.gated_rows(
            node, [f"{self.rows(node.outputs[0])}*{top_k}", 1], width, x, x, GATE_STRIDE=2 * width, UP_STRIDE=2 * width,
            GATE_OFFSET=width, UP_OFFSET=0,
        )  # fmt: skip
        self.step(node.op, [launch])

    def _combine(self, node: Node) -> None:
        width, top_k = self.width(node.output), self.width(node.inputs["weights"])
        block = min(BLOCK, triton.next_power_of_2(width))
        args = {
            "x_ptr": self._out(node.inputs["x"]), "weights_ptr": self._out(node.inputs["weights"]),
            "out_ptr": self._out(node.output),
        }  # fmt: skip
        grid: list[Dim] = [self._dim(node.output), -(-width // block)]
        self.step(node.op, [self.launch("moe", "combine", grid, args, WIDTH=width, TOP_K=top_k, BLOCK=block)])

    def _head_linear(self, node: Node) -> None:
        x, heads, transposed = node.inputs["x"], node.attrs["num_heads"], bool(node.attrs.get("transposed"))
        inner, out = self.width(x) // heads, self.width(node.output) // heads
        weight, kind = self.plain(node.inputs["weight"])
        rows = self.rows(node.output)
        args = {
            "x_ptr": self._out(x), "weight_ptr": (kind, weight), "out_ptr": self._out(node.output),
            "num_tokens": ("i32", f"n:{rows}"),
        }  # fmt: skip
        tile_n, tile_k = _width(128, out), _width(64, inner)

        def way(tile_m: int, warps: int) -> list[Launch]:
            grid: list[Dim] = [[rows, tile_m], -(-out // tile_n), heads]
            return [
                self.launch(
                    "moe", "head_linear", grid, args, num_warps=warps,
                    num_stages=self.stages(3, (tile_m + tile_n) * tile_k * 2), IN=inner, OUT=out,
                    X_STRIDE=heads * inner, OUT_STRIDE=heads * out, TRANSPOSED=transposed, BLOCK_M=tile_m,
                    BLOCK_N=tile_n, BLOCK_K=tile_k,
                )
            ]  # fmt: skip

        self.ways(node.op, rows, [(_FEW_HEAD_TOKENS, way(16, 4)), (None, way(128, 8))])


def _width(block: int, size: int) -> int:
    """A tile's extent over `size` elements: `block`, or less where there are fewer; FP8 products want 32 at least."""
    return min(block, max(32, int(triton.next_power_of_2(size))))
