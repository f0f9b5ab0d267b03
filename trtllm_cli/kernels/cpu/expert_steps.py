"""The steps of a mixture of experts; see library.py, and functional.py for what they compute.

A token's `ids` are int32 [rows, top_k], the numbers of different experts, all ranks' counted through.
"""

from __future__ import annotations

from typing import Literal

from trtllm_cli.kernels.cpu.library import (
    ACTIVATIONS,
    FORMATS,
    ROWS,
    ActivationName,
    Op,
    Rows,
    TlStep,
    WeightFormat,
    make_step,
)

Scoring = Literal["softmax", "sigmoid"]


def route_step(
    logits: int,
    weights: int,
    ids: int,
    *,
    num_experts: int,
    top_k: int,
    scoring: Scoring,
    renormalize: bool,
    bias: int | None = None,
    scaling: float = 1.0,
    num_groups: int | None = None,
    top_groups: int | None = None,
    rows: Rows = "num_tokens",
) -> TlStep:
    """weights float32 and ids int32 [rows, top_k] of logits [rows, num_experts]; see functional.route."""
    ints = (
        ROWS[rows], num_experts, top_k, int(scoring == "sigmoid"), int(renormalize), num_groups or 0, top_groups or 0,
    )  # fmt: skip
    return make_step(Op.ROUTE, ints, (scaling,), (logits, weights, ids, bias))


def expert_linear_step(
    x: int,
    ids: int,
    out: int,
    weight: int,
    *,
    fmt: WeightFormat,
    in_features: int,
    out_features: int,
    num_experts: int,
    top_k: int,
    x_per_choice: bool = False,
    scale: int | None = None,
    bias: int | None = None,
    group_size: int | None = None,
    minima: bool = False,
    first_expert: int = 0,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out [rows, top_k * out_features] = each token's x by each of its experts.

    x is [rows, in_features], or has a part for each choice with `x_per_choice`. `weight` and `scale` are those of
    the experts, as pack.py lays each out, one after another; bias is float32 [num_experts, out_features]. Ids outside
    the `num_experts` from `first_expert` on give zeros.
    """
    ints = (
        ROWS[rows], in_features, out_features, FORMATS[fmt], group_size or 0, 0, in_features, out_features, int(minima),
        num_experts, top_k, int(x_per_choice), first_expert,
    )  # fmt: skip
    return make_step(Op.EXPERT_LINEAR, ints, (), (x, out, weight, scale, bias, ids))


def expert_gated_act_step(
    x: int, out: int, *, width: int, top_k: int, activation: ActivationName, rows: Rows = "num_tokens"
) -> TlStep:
    """out [rows, width]: activation(gate) * up of each of the `top_k` parts of x, which has up and then gate."""
    assert width % top_k == 0
    return make_step(Op.EXPERT_GATED_ACT, (ROWS[rows], width, ACTIVATIONS[activation], top_k), (), (x, out))


def combine_step(x: int, weights: int, out: int, *, width: int, top_k: int, rows: Rows = "num_tokens") -> TlStep:
    """out [rows, width] = the sum of the `top_k` parts of x, each times its weight [rows, top_k]."""
    return make_step(Op.COMBINE, (ROWS[rows], width, top_k), (), (x, out, weights))
