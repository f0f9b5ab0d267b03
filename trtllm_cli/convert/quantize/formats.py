"""The formats by their names, and what a checkpoint's `quantization` says for each: decided before a tensor is read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, get_args

from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.graph import Shard
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.models.stored import FP4_GROUP, FP8_BLOCK
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant, QuantConfig

# The names of TensorRT-LLM's quantize.py, and fp8_pc_pt and fp8_block as ModelOpt's examples call them.
QFormat = Literal[
    "full_prec", "int8_wo", "int4_wo", "fp8_pc_pt", "fp8_block", "fp8", "int8_sq", "int8_sq_static", "int4_awq",
    "w4a8_awq", "nvfp4",
]  # fmt: skip
CALIBRATED: frozenset[str] = frozenset({"fp8", "int8_sq", "int8_sq_static", "int4_awq", "w4a8_awq", "nvfp4"})
KvCache = Literal["fp8", "int8"]

_SPELLINGS: dict[str, QFormat] = {
    "w8a16": "int8_wo", "w4a16": "int4_wo", "fp8_rowwise": "fp8_pc_pt",
    "fp8_per_channel_per_token": "fp8_pc_pt", "fp8_block_scales": "fp8_block", "fp8_pb": "fp8_block",
    "fp8_pb_wo": "fp8_block", "smoothquant": "int8_sq", "awq": "int4_awq", "w4a16_awq": "int4_awq", "fp4": "nvfp4",
}  # fmt: skip

# TensorRT-LLM's words for each format. int4_awq has zero points, which its own export has not but its kernels take;
# int8_sq has a scale for each token, where ModelOpt's has one for all (int8_sq_static), which costs far more.
_LAYERS: dict[str, dict[str, Any]] = {
    "int8_wo": {"quant_algo": "W8A16"},
    "int4_wo": {"quant_algo": "W4A16", "has_zero_point": True},
    "fp8_pc_pt": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_block": {"quant_algo": "FP8_BLOCK_SCALES", "group_size": FP8_BLOCK},
    "fp8": {"quant_algo": "FP8"},
    "int8_sq": {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "pre_quant_scale": True},
    "int8_sq_static": {"quant_algo": "W8A8_SQ_PER_CHANNEL", "pre_quant_scale": True},
    "int4_awq": {"quant_algo": "W4A16_AWQ", "has_zero_point": True, "pre_quant_scale": True},
    "w4a8_awq": {"quant_algo": "W4A8_AWQ", "has_zero_point": True, "pre_quant_scale": True},
    "nvfp4": {"quant_algo": "NVFP4", "group_size": FP4_GROUP},
}
_GROUP_SIZES = {"int8_wo": 64, "int4_wo": 32, "int4_awq": 128, "w4a8_awq": 128}  # where the caller may choose
_SMALLEST_GROUP = 8  # rather than smaller groups everywhere, a narrow layer is left out
# What chooses experts decides too much to be rounded, and is small.
_KEPT = ("*router*", "*shared_expert_gate*")
_PROBE = QuantConfig(quant_algo="W8A16")  # a format that any shape can have


@dataclass(frozen=True)
class Linear:
    """A linear that can be quantized: its shape on a rank, and how it is split."""

    rows: int
    columns: int
    shard: Shard | None
    experts: int | None = None
    splits_inputs: bool = False  # each rank has some of them


def qformat_named(name: str) -> QFormat:
    """The format that `name` means, in any of its spellings. Raises UsageError."""
    plain = name.lower().replace("-", "_")
    known: tuple[str, ...] = get_args(QFormat)
    if plain in known:
        return plain  # type: ignore[return-value]
    if plain in _SPELLINGS:
        return _SPELLINGS[plain]
    near = difflib.get_close_matches(plain, known, 1)
    raise UsageError(
        f"--qformat is {name!r}",
        where="--qformat",
        fix=f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}",
    )


def linears(config: ModelConfig) -> dict[str, Linear]:
    """The linears that can be quantized, by their names in the whole model, of all pipeline stages.

    A head that is the embedding table is not one of them.
    """
    probe = config.model_copy(update={"quantization": _PROBE})
    found: dict[str, Linear] = {}
    for pp_rank in range(config.mapping.pp_size):
        rank = config.mapping.ranks[pp_rank * config.mapping.tp_size]
        found |= _linears_of(probe, rank)
    return found


def _weights(config: ModelConfig) -> list[str]:
    """The names of all weights of a rank."""
    return [name for name in trace_model(config, config.mapping.ranks[0]).weights if name.endswith(".weight")]


def _linears_of(probe: ModelConfig, rank: Rank) -> dict[str, Linear]:
    found = {}
    for name, weight in trace_model(probe, rank).weights.items():
        if weight.dtype == "int8":
            module = rank.whole_name(name.removesuffix(".weight"), probe.num_hidden_layers)
            *lead, rows, columns = weight.shape
            ranks = {"columns": probe.mapping.tp_size, "expert_columns": probe.mapping.moe_tp}
            splits = ranks.get(weight.shard or "", 1) > 1
            found[module] = Linear(rows, columns, weight.shard, lead[0] if lead else None, splits)
    return found


def quant_config(
    qformat: QFormat | None,
    group_size: int | None,
    config: ModelConfig,
    exclude: Sequence[str] = (),
    quantize_lm_head: bool = False,
    kv_cache: KvCache | None = None,
) -> tuple[QuantConfig, list[str]]:
    """The checkpoint's `quantization` for `config` (whose mapping counts), and what the user should know of it.

    `group_size` None is the format's own. A layer that the format cannot divide is left out by name. Raises
    UsageError for a pattern that names nothing, UnsupportedError if no layer can have the format.
    """
    kv: dict[str, KvCacheQuantAlgo] = {"fp8": "FP8", "int8": "INT8"}
    cache = None if kv_cache is None else kv[kv_cache]
    known = linears(config)
    _check_patterns(exclude, known)
    if qformat is None or qformat == "full_prec":
        return QuantConfig(kv_cache_quant_algo=cache), []
    out = [*([] if quantize_lm_head else ["lm_head"]), *exclude]
    out += [p for p in _KEPT if any(fnmatch(name, p) for name in _weights(config))]
    chosen = {n: lin for n, lin in known.items() if not any(fnmatch(n, pattern) for pattern in out)}
    layer, left_out, notes = fit(qformat, group_size, chosen)
    if layer.get("pre_quant_scale") and any(lin.experts for lin in chosen.values()):
        layers = {name: _of(layer, lin) for name, lin in chosen.items() if name not in left_out}
        layer = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        notes.append("the experts' inputs are not scaled: tokens find their experts by them as they are")
    quantization = QuantConfig(**layer, exclude_modules=[*out, *left_out], kv_cache_quant_algo=cache)
    trace_checked(config.model_copy(update={"quantization": quantization}))
    return quantization, notes


def _of(fields: dict[str, Any], linear: Linear) -> LayerQuant:
    """One layer's; a scale for each input is only for layers whose inputs are theirs alone, which experts' are not."""
    made = LayerQuant(**fields)
    return made.model_copy(update={"pre_quant_scale": False}) if linear.experts else made


def fit(qformat: str, group_size: int | None, chosen: dict[str, Linear]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The fields of LayerQuant that suit the layers `chosen`, the layers that it does not suit, and notes."""
    fields = dict(_LAYERS[qformat])
    notes: list[str] = []
    left_out: dict[str, str] = {}
    if qformat in _GROUP_SIZES:
        asked = group_size or _GROUP_SIZES[qformat]
        size = best_group_size(asked, chosen)
        if size == 0 and qformat == "int8_wo":
            notes.append(f"no groups of up to {asked} inputs divide the layers: one scale for each output was taken")
        elif size == 0:
            widths = sorted({linear.columns for linear in chosen.values()})
            raise UnsupportedError(
                f"no group size up to {asked} divides the layers' inputs {widths}",
                where="--group-size",
                fix="give a larger one, or use --qformat int8_wo",
            )
        else:
            fields["group_size"] = size
            fields |= {"per_group": True} if qformat == "int8_wo" else {}
            left_out |= {n: f"{lin.columns} inputs" for n, lin in chosen.items() if lin.columns % size}
            if size != asked:
                notes.append(f"groups of {asked} do not divide every layer: {size} was taken")
    elif qformat == "nvfp4":
        left_out |= {n: f"{lin.columns} inputs" for n, lin in chosen.items() if lin.columns % FP4_GROUP}
    elif qformat == "fp8_block":
        left_out |= {
            n: f"{lin.columns} inputs a rank"
            for n, lin in chosen.items()
            if lin.columns % FP8_BLOCK and lin.splits_inputs
        }
    if left_out:
        notes.append(_left_out_note(left_out))
    if len(left_out) == len(chosen):
        raise UnsupportedError(f"no layer of this model can be {qformat}", where="--qformat", fix="choose another")
    return fields, sorted(left_out), notes


def best_group_size(asked: int, chosen: dict[str, Linear]) -> int:
    """The largest even size up to `asked` that divides every layer's inputs; 0 if there is none.

    Where that would be below 8, the one that suits the most weights.
    """

    def suited(size: int) -> int:
        return sum(n.rows * n.columns * (n.experts or 1) for n in chosen.values() if n.columns % size == 0)

    sizes = range(min(asked, max((n.columns for n in chosen.values()), default=0)) // 2 * 2, 1, -2)
    everything = suited(1)
    common = next((size for size in sizes if suited(size) == everything), 0)
    if common >= min(asked, _SMALLEST_GROUP):
        return common
    best = max(sizes, key=lambda size: (suited(size) if size >= _SMALLEST_GROUP else 0, size), default=0)
    return best if best and suited(best) else common


def _left_out_note(left_out: dict[str, str]) -> str:
    first = ", ".join(f"{name} ({why})" for name, why in list(left_out.items())[:3])
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"not quantized, as the format does not divide them: {first}{more}"


def _check_patterns(patterns: Sequence[str], known: dict[str, Linear]) -> None:
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in [*known, "lm_head"]):
            example = next(iter(known), "lm_head")
            raise UsageError(
                f"no layer's name matches {pattern!r}", where="--exclude", fix=f"a layer's name is such as {example}"
            )


def trace_checked(config: ModelConfig) -> None:
    """Traces every stage. Raises UnsupportedError for what its quantization cannot be."""
    for pp_rank in range(config.mapping.pp_size):
        trace_model(config, config.mapping.ranks[pp_rank * config.mapping.tp_size])


def layer_quant(qformat: str, group_size: int | None, name: str, linear: Linear) -> LayerQuant | None:
    """How the one layer `name` would be quantized, or None where the format does not suit it."""
    try:
        fields, _, _ = fit(qformat, group_size, {name: linear})
    except UnsupportedError:
        return None
    return _of(fields, linear)
