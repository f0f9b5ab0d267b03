"""How a linear layer's weight lies in a checkpoint: which tensors, of which dtypes and shapes, for each algorithm.

The names are TensorRT-LLM's. What they mean is in `functional.linear` and `functional.qdq`. A weight of experts has
them all once for each expert, in front: `[experts, out, in]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_cli import functional as F
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import Tensor
from trtllm_cli.graph import Shard

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig
    from trtllm_cli.quant_config import LayerQuant

FP8_BLOCK = 128  # inputs, and outputs, of a block of FP8_BLOCK_SCALES
FP4_GROUP = 16  # inputs of a group of NVFP4

_OF_INPUTS: dict[Shard | None, Shard | None] = {"columns": "rows"}  # a vector of inputs, when the weight is so split
_OF_OUTPUTS: dict[Shard | None, Shard | None] = {
    "rows": "rows", "qkv": "qkv", "expert_halves": "expert_halves", "expert_rows": "expert_rows",
    "expert_columns": "experts",
}  # fmt: skip


@dataclass
class StoredWeight:
    """A linear's weight as its ops take it: what happens to x before, and the operands beside the weight."""

    weight: Tensor
    quant: str | None = None
    group_size: int | None = None
    operands: dict[str, Tensor] = field(default_factory=dict)  # scale, zero, global_scale
    perm: Tensor | None = None  # int32 [in]: the order in which the weight has its inputs
    pre_scale: Tensor | None = None  # float32 [in]
    act_format: str | None = None  # qdq's
    act_group: int | None = None
    act_scale: Tensor | None = None  # float32 [1]; None: by token

    def prepare(self, x: Tensor, part: int | None = None) -> Tensor:
        """`x` as the layer multiplies it: its inputs in order, scaled, rounded.

        `part` is the width of an expert's part where `x` has one for each choice.
        """
        if self.perm is not None:
            x = F.gather_columns(x, self.perm)
        if self.pre_scale is not None:
            x = F.mul(x, self.pre_scale)
        if self.act_format is not None:
            x = F.qdq(x, self.act_scale, self.act_format, self.act_group or (None if self.act_scale else part))
        return x

    @property
    def op_args(self) -> dict[str, Any]:
        """Keyword arguments of `functional.linear` and `functional.expert_linear`."""
        return {"quant": self.quant, "group_size": self.group_size, **self.operands}


def declare(
    config: ModelConfig,
    rank: Rank,
    name: str,
    rows: int,
    columns: int,
    shard: Shard | None,
    *,
    experts: int | None = None,
    weight_name: str | None = None,
) -> StoredWeight:
    """Declares the weights of the linear `name`, [rows, columns] on this rank, as its checkpoint quantizes it.

    `weight_name` is for a layer that shares another's plain weight. Raises UnsupportedError for a shape that the
    algorithm cannot divide into its groups.
    """
    layer = None
    if weight_name is None:
        layer = config.quantization.layer_quant(rank.whole_name(name, config.num_hidden_layers))
    if layer is None or layer.quant_algo == "NO_QUANT":
        lead = () if experts is None else (experts,)
        return StoredWeight(F.weight(weight_name or f"{name}.weight", (*lead, rows, columns), config.dtype, shard))
    return _Declaration(name, rows, columns, shard, experts, layer).declare()


@dataclass
class _Declaration:
    name: str
    rows: int
    columns: int
    shard: Shard | None
    experts: int | None
    layer: LayerQuant

    def declare(self) -> StoredWeight:
        """The weight and its companions, by algorithm."""
        match self.layer.quant_algo:
            case "W8A16" if not self.layer.per_group:
                return StoredWeight(
                    self.weight("int8"), "int8", operands={"scale": self.per_channel("per_channel_scale")}
                )
            case "W8A16" | "W8A16_GPTQ":
                return self.ordered(StoredWeight(self.weight("int8"), "int8", self.layer.group_size, self.groups()))
            case "W4A16" | "W4A16_GPTQ" | "W4A16_AWQ":
                return self.ordered(self.int4())
            case "W4A8_AWQ":
                stored = self.ordered(self.int4())
                stored.act_format, stored.act_scale = "fp8", self.scalar("activation_scaling_factor")
                return stored
            case "FP8":
                stored = StoredWeight(
                    self.weight("float8_e4m3fn"), "fp8", operands={"scale": self.scalar("weights_scaling_factor")}
                )
                stored.act_format, stored.act_scale = "fp8", self.scalar("activation_scaling_factor")
                return stored
            case "FP8_PER_CHANNEL_PER_TOKEN":
                scale = self.per_channel("per_channel_scale")
                return StoredWeight(self.weight("float8_e4m3fn"), "fp8", operands={"scale": scale}, act_format="fp8")
            case "FP8_BLOCK_SCALES":
                # A scale for each output and block of inputs, not each block of both: it divides over ranks and heads.
                scale = self.add(
                    "weights_scaling_factor", "float32", (self.rows, -(-self.columns // FP8_BLOCK)), self.shard
                )
                return StoredWeight(
                    self.weight("float8_e4m3fn"), "fp8", FP8_BLOCK, {"scale": scale}, act_format="fp8",
                    act_group=FP8_BLOCK,
                )  # fmt: skip
            case "W8A8_SQ_PER_CHANNEL" | "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN":
                stored = self.smooth(self.per_channel("weights_scaling_factor"))
                stored.act_scale = self.scalar("activation_scaling_factor")
                return stored
            case "W8A8_SQ_PER_TENSOR_PLUGIN":
                stored = self.smooth(self.scalar("weights_scaling_factor"))
                stored.act_scale = self.scalar("activation_scaling_factor")
                return stored
            case "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
                return self.smooth(self.per_channel("weights_scaling_factor"))
            case "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN":
                return self.smooth(self.scalar("weights_scaling_factor"))
            case "NVFP4":
                return self.nvfp4()
        raise UnsupportedError(
            f"layers quantized as {self.layer.quant_algo} are not supported",
            where=f"config.json: quantization.quant_algo (layer {self.name})",
            fix="convert again with another --qformat, or without quantization",
        )

    def add(self, part: str, dtype: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        """One tensor; of experts, one for each in front."""
        lead = () if self.experts is None else (self.experts,)
        return F.weight(f"{self.name}.{part}", (*lead, *shape), dtype, shard)

    def weight(self, dtype: str, per_byte: int = 1) -> Tensor:
        """The quantized numbers."""
        if self.columns % per_byte:
            raise UnsupportedError(
                f"{self.name} has {self.columns} inputs: an odd number cannot be stored two to a byte"
            )
        return self.add("weight", dtype, (self.rows, self.columns // per_byte), self.shard)

    def scalar(self, part: str) -> Tensor:
        """One number for the layer; of experts, one each."""
        return self.add(part, "float32", (1,), None if self.experts is None else "experts")

    def per_channel(self, part: str) -> Tensor:
        """One number an output."""
        return self.add(part, "float32", (self.rows,), _OF_OUTPUTS.get(self.shard))

    def per_input(self, part: str, dtype: str = "float32") -> Tensor:
        """One number an input."""
        if self.experts is not None:
            raise UnsupportedError(
                f"{self.name}: {self.layer.quant_algo} with a number for each input is not supported for experts",
                where="config.json: quantization",
                fix="exclude the experts, or convert again with another --qformat",
            )
        return F.weight(f"{self.name}.{part}", (self.columns,), dtype, _OF_INPUTS.get(self.shard))

    def num_groups(self, size: int) -> int:
        """Groups of inputs on this rank; they must come out even."""
        if self.columns % size:
            raise UnsupportedError(
                f"{self.name}: groups of {size} do not divide the {self.columns} inputs that a rank holds",
                where="config.json: quantization.group_size",
                fix=f"convert again with a smaller --group-size or --{'moe-' if self.experts else ''}tp-size",
            )
        return self.columns // size

    def groups(self) -> dict[str, Tensor]:
        """A scale, and a zero where the layer has them, for each output and group of inputs."""
        shape = (self.rows, self.num_groups(self.layer.group_size))
        made = {"scale": self.add("weights_scaling_factor", "float32", shape, self.shard)}
        if self.layer.has_zero_point:
            made["zero"] = self.add("zero", "float32", shape, self.shard)
        return made

    def int4(self) -> StoredWeight:
        """Nibbles in groups."""
        return StoredWeight(self.weight("uint8", 2), "int4", self.layer.group_size, self.groups())

    def ordered(self, stored: StoredWeight) -> StoredWeight:
        """With the inputs' order and scales, where the layer has them."""
        if self.layer.act_order:
            stored.perm = self.per_input("perm", "int32")
        if self.layer.pre_quant_scale:
            stored.pre_scale = self.per_input("prequant_scaling_factor")
        return stored

    def smooth(self, scale: Tensor) -> StoredWeight:
        """SmoothQuant: int8 weights and activations."""
        stored = StoredWeight(self.weight("int8"), "int8", operands={"scale": scale}, act_format="int8")
        if self.layer.pre_quant_scale:
            stored.pre_scale = self.per_input("prequant_scaling_factor")
        return stored

    def nvfp4(self) -> StoredWeight:
        """E2M1 in groups of 16 with E4M3 scales, and one float32 scale over all of them; ModelOpt's names."""
        shape = (self.rows, self.num_groups(FP4_GROUP))
        return StoredWeight(
            self.weight("uint8", 2),
            "fp4",
            FP4_GROUP,
            {
                "scale": self.add("weights_scaling_factor", "float8_e4m3fn", shape, self.shard),
                "global_scale": self.scalar("weights_scaling_factor_2"),
            },
            act_format="fp4",
            act_group=FP4_GROUP,
            act_scale=self.scalar("activation_scaling_factor"),
        )
