"""What a source and the options come to, before any tensor is written: the checkpoint's config, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trtllm_cli.artifact import describe, validate
from trtllm_cli.checkpoint import PRODUCER
from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.family import Family
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.options import ConvertOptions
from trtllm_cli.convert.plan import source_of, sources_of, whole_weights
from trtllm_cli.convert.quantize.formats import CALIBRATED, linears, qformat_named, quant_config
from trtllm_cli.convert.quantize.rows import Calibration, Quantized
from trtllm_cli.convert.quantized_source import Merged, config_of, merge, patterns
from trtllm_cli.convert.random_weights import RandomReader
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.stack import Stack
from trtllm_cli.errors import SnapshotError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decided:
    """What a source and the options say, before any tensor is looked at."""

    config: ModelConfig  # the checkpoint's
    family: Family
    tied: bool  # the source's head is its embedding
    notes: list[str]  # what the user should know
    quantized: Quantized = field(default_factory=lambda: Quantized(QuantConfig()))  # how weights are, that were plain
    kept: dict[str, Merged] = field(default_factory=dict)  # by module: taken as the source has quantized them


def read_config(reader: Reader, options: ConvertOptions, quantization: Quantized | None = None) -> Decided:
    """The config of the checkpoint that the source would make. Raises SnapshotError, UnsupportedError, UsageError."""
    family = family_of(reader.config, reader.config_path)
    notes = [family.note] if family.note else []
    fields = family.config_fields(Fields(reader.config, reader.config_path))
    if "auto_map" in reader.config:
        notes.append(f"config.json names code of its own; it was not run, and the model read as {family.architecture}")
    fields["dtype"] = reader.default_dtype() if options.dtype == "auto" else options.dtype
    fields["producer"] = {"name": PRODUCER, "version": __version__}
    base = validate(ModelConfig, fields, reader.config_path, SnapshotError)
    if any(family.is_extra(name, base.num_hidden_layers) for name in reader.tensors):
        notes.append(f"the layers from {base.num_hidden_layers} on, for multi-token prediction, were left out")
    tied, mapping = base.share_embedding_table, _mapping(options, base)
    keep = (reader.quant_method is not None or options.keep_quantized) and not options.dequantize
    own_head = options.quantize_lm_head or (keep and reader.weight(family.embedding).layer is not None)
    fields |= {
        "mapping": mapping,
        "share_embedding_table": tied and mapping.world_size == 1 and not own_head,
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
    }
    config = _with_mapping(fields)
    kept: dict[str, Merged] = {}
    if keep:
        _check_quantized_twice(reader, options, quantization)
        kept, quantized, said = _keep(reader, family, config, options, tied=tied)
    elif quantization is not None:
        quantized, said = quantization, []
    else:
        quantized, said = _decide(reader, options, config)
    config = config.model_copy(update={"quantization": quantized.config})
    return Decided(config, family, tied, notes + said, quantized, kept)


def _decide(reader: Reader, options: ConvertOptions, config: ModelConfig) -> tuple[Quantized, list[str]]:
    qformat = None if options.qformat is None else qformat_named(options.qformat)
    if isinstance(reader, RandomReader):
        from trtllm_cli.convert.quantize.assumed import assumed_calibration

        made, notes = quant_config(
            qformat, options.group_size, config, options.exclude, options.quantize_lm_head, options.kv_cache
        )
        return Quantized(made, assumed_calibration(made, config, reader.largest)), notes
    if qformat in CALIBRATED or options.kv_cache is not None:
        what = f"--qformat {qformat}" if qformat in CALIBRATED else f"--kv-cache-dtype {options.kv_cache}"
        raise UsageError(f"{what} takes calibration", where=what.split()[0], fix="trtllm quantize does that")
    made, notes = quant_config(qformat, options.group_size, config, options.exclude, options.quantize_lm_head)
    return Quantized(made), notes


def _check_quantized_twice(reader: Reader, options: ConvertOptions, quantization: Quantized | None) -> None:
    if options.qformat is not None or quantization is not None:
        raise UsageError(
            f"the source is quantized already ({reader.quant_method or 'GGUF'})",
            where="--qformat",
            fix="leave --qformat out to keep its weights as they are, or pass --dequantize to make them plain first",
        )


def _keep(
    reader: Reader, family: Family, config: ModelConfig, options: ConvertOptions, *, tied: bool
) -> tuple[dict[str, Merged], Quantized, list[str]]:
    """The weights that stay as the source has quantized them; the others become plain, and a note says why."""
    sources, whole, modules = sources_of(reader, family, config, tied=tied), whole_weights(config), linears(config)
    kept: dict[str, Merged] = {}
    plain: dict[str, list[str]] = {}  # why -> modules
    for name, source in sources.items():
        weights = [reader.weight(theirs) for theirs in source.names]
        if not any(weight.layer or weight.why_plain for weight in weights):
            continue
        module = name.removesuffix(".weight")
        merged = merge(weights, source, whole[name], config)
        if module not in modules:
            merged = "this model keeps it plain"
        if isinstance(merged, Merged):
            kept[module] = merged
        else:
            plain.setdefault(merged, []).append(module)
    if options.keep_quantized and not kept:
        raise UsageError(
            "the source has no weights that can be kept as they are",
            where="--keep-quantized",
            fix="leave it out; it is for GGUF files whose weights are Q4_0, Q4_1 or Q8_0",
        )
    every = {name.removesuffix(".weight") for name in whole}
    notes = [f"made plain, as {why}: {', '.join(patterns(names, every))}" for why, names in plain.items()]
    if brought := [module for module, merged in kept.items() if merged.factors]:
        names = ", ".join(patterns(brought, modules))
        notes.append(f"parts with scales of their own were brought to the largest one, and rounded again: {names}")
    quantization = config_of({m: merged.layer for m, merged in kept.items()}, modules, reader.kv_cache)
    kv_scales = {f"transformer.layers.{layer}.attention": scales for layer, scales in reader.kv_scales.items()}
    return kept, Quantized(quantization, Calibration(kv_scales=kv_scales)), notes


def _mapping(options: ConvertOptions, base: ModelConfig) -> Mapping:
    """The ranks that the options ask for. Raises UsageError where they cannot divide the experts of `base` so."""
    if base.moe is None and (options.moe_ep_size or 1, options.moe_tp_size or options.tp_size) != (1, options.tp_size):
        flag = "--moe-ep-size" if options.moe_ep_size else "--moe-tp-size"
        raise UsageError(
            f"{base.architecture} has no experts to divide among ranks",
            where=flag,
            fix=f"leave {flag} out: --tp-size alone splits every layer",
        )
    try:
        mapping = Mapping.of(options.tp_size, options.pp_size, options.moe_tp_size or 0, options.moe_ep_size or 0)
    except ValidationError as e:
        raise UsageError(
            f"the ranks do not divide so: {describe(e)}",
            where="--moe-tp-size, --moe-ep-size",
            fix="their product is --tp-size: choose other sizes, only one of them, or another --tp-size",
        ) from None
    if base.moe is not None and base.moe.num_experts % mapping.moe_ep:
        experts = base.moe.num_experts
        sizes = [n for n in range(1, experts + 1) if experts % n == mapping.tp_size % n == 0]
        raise UsageError(
            f"{experts} experts cannot be divided among {mapping.moe_ep} ranks",
            where="--moe-ep-size",
            fix=f"with --tp-size {mapping.tp_size} it can be {', '.join(map(str, sizes))}",
        )
    return mapping


def _with_mapping(fields: dict[str, Any]) -> ModelConfig:
    """The config, once it is known to be right on one rank; what is wrong with it now is the options' doing."""
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as e:
        flags = "--tp-size, --pp-size" + (", --moe-ep-size" if fields["mapping"].moe_ep > 1 else "")
        raise UsageError(
            f"the model does not divide so: {describe(e)}", where=flags, fix="choose other sizes"
        ) from None


def whole_tensor(reader: Reader, decided: Decided, name: str) -> torch.Tensor:
    """A weight of the whole model, not quantized, by our name, in the dtype of the checkpoint."""
    weight = whole_weights(decided.config)[name]
    stack = Stack(reader, source_of(decided.family, name, decided.config, tied=decided.tied), weight, decided.config)
    return stack.plain(0, stack.rows, weight.dtype).reshape(weight.shape)
