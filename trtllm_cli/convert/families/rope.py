"""Rotary settings of a config.json, in the old form (rope_theta, rope_scaling) and transformers 5's rope_parameters.

The meaning of each field, and what stands in for a missing one, is that of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.errors import SnapshotError

DEFAULT_THETA = 10000.0
_WITHOUT_EFFECT = {"type", "rope_type", "rope_theta", "finetuned"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (None, 1, 1.0)}


def read_rope(
    fields: Fields, head_dim: int, max_positions: int, *, theta: str = "rope_theta", partial: str | None = None
) -> dict[str, Any]:
    """ModelConfig's rotary fields. Raises UnsupportedError for a type that transformers does not have for Llama.

    `theta` and `partial` are the names of the base and, where a part of each head is rotated, of the part's share; the
    latter's default must be filled in.
    """
    base = fields.number(theta, DEFAULT_THETA)
    outer_original = fields.integer("original_max_position_embeddings", None)
    table = _table(fields) or Fields({}, fields.path, "rope_parameters.")
    rotated = head_dim if partial is None else _rotated(fields, table, partial, head_dim)
    base = table.number("rope_theta", base)
    scaling = _scaling(table, outer_original, rotated, max_positions)
    table.refuse_unread(_WITHOUT_EFFECT, _NEUTRAL)
    return {"rotary_base": base, "rotary_embedding_dim": rotated, "rotary_scaling": scaling}


def _rotated(fields: Fields, table: Fields, partial: str, head_dim: int) -> int:
    """How many elements of a head are rotated."""
    share = table.number("partial_rotary_factor", fields.number(partial))
    rotated = int(head_dim * share)
    if rotated < 2 or rotated > head_dim or rotated % 2:
        where, name = (table, "partial_rotary_factor") if table.has("partial_rotary_factor") else (fields, partial)
        raise where.wrong(name, f"a share of the {head_dim} elements of a head that is even and not 0")
    return rotated


def read_layered_rope(fields: Fields, head_dim: int, max_positions: int) -> dict[str, Any]:
    """ModelConfig's rotary fields where sliding layers have a base of their own, and only the others are scaled.

    Of old, `rope_theta` and `rope_scaling` are those of full attention, and `rope_local_base_freq` is the sliding
    layers'; transformers 5 has a table for each type of layer in `rope_parameters`. The defaults must be filled in.
    """
    theta, local = fields.number("rope_theta"), fields.number("rope_local_base_freq")
    tables, scaling = fields.table("rope_parameters"), fields.table("rope_scaling")
    full = sliding = None
    if tables is not None:
        full, sliding = tables.table("full_attention"), tables.table("sliding_attention")
        tables.refuse_unread(set(), {})
    if scaling is not None and scaling.data:
        if full is not None and set(full.data) - {"rope_type", "rope_theta"}:
            raise fields.unsupported("rope_scaling", "rope_parameters is there too")
        theta = theta if full is None else full.number("rope_theta", theta)
        full = scaling
    out = {"rotary_base": theta, "rope_local_base_freq": local}
    if sliding is not None:
        if sliding.text("rope_type", "default") != "default":
            raise sliding.unsupported("rope_type", "rotary scaling of sliding layers is not supported")
        out["rope_local_base_freq"] = sliding.number("rope_theta", local)
        sliding.refuse_unread(_WITHOUT_EFFECT, _NEUTRAL)
    if full is not None:
        out["rotary_base"] = full.number("rope_theta", theta)
        out["rotary_scaling"] = _scaling(full, None, head_dim, max_positions)
        full.refuse_unread(_WITHOUT_EFFECT, _NEUTRAL)
    return out


def _table(fields: Fields) -> Fields | None:
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    table = old or new
    if old is not None and new is not None and old.data and new.data:
        if old.data != new.data:
            raise fields.unsupported("rope_scaling", "rope_parameters is there too, and says something else")
        table = new
    if table is None or not table.data:
        return None
    if any(isinstance(value, dict) for value in table.data.values()):
        name = table.prefix.rstrip(".")
        raise fields.unsupported(name, "other rotary settings for some layers are not supported")
    return table


def _scaling(table: Fields, outer_original: int | None, head_dim: int, max_positions: int) -> dict[str, Any] | None:
    kind = table.text("rope_type", None) or table.text("type", "default")
    match kind:
        case "default":
            return None
        case "linear":
            return {"rope_type": kind, "factor": table.number("factor")}
        case "dynamic":
            # transformers takes max_position_embeddings whatever the table says
            if table.integer("original_max_position_embeddings", max_positions) != max_positions:
                raise table.unsupported("original_max_position_embeddings", "transformers would ignore this value")
            return {"rope_type": kind, "factor": table.number("factor")}
    original = outer_original or table.integer("original_max_position_embeddings", max_positions)
    table.raw("original_max_position_embeddings")
    scaling: dict[str, Any] = {"rope_type": kind, "original_max_position_embeddings": original}
    match kind:
        case "llama3":
            for name in ("factor", "low_freq_factor", "high_freq_factor"):
                scaling[name] = table.number(name)
        case "yarn":
            scaling["factor"] = table.number("factor", max_positions / original)
            for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                scaling[name] = table.number(name, None)
            # an explicit null is false in transformers, a missing one true
            scaling["truncate"] = table.flag("truncate", "truncate" not in table.data)
        case "longrope":
            for name in ("factor", "attention_factor"):
                scaling[name] = table.number(name, None)
            for name in ("short_factor", "long_factor"):
                scaling[name] = _factors(table, name, head_dim // 2)
        case _:
            known = "default, linear, dynamic, yarn, longrope and llama3"
            name = "rope_type" if "rope_type" in table.data else "type"
            raise table.unsupported(name, f"the rotary scaling types known here are {known}")
    return scaling


def _factors(table: Fields, name: str, length: int) -> list[float]:
    values = table.numbers(name)
    if len(values) != length:
        raise SnapshotError(
            f"field `{table.prefix}{name}` has {len(values)} numbers; head_dim / 2 = {length} are needed",
            where=f"{table.path}: {table.prefix}{name}",
        )
    return values
