"""The steps that take each row by itself, but for linears; see library.py."""

from __future__ import annotations

from typing import Literal

from trtllm_cli.kernels.cpu.library import ACTIVATIONS, FORMATS, ROWS, ActivationName, Op, Rows, TlStep, make_step

TableDType = Literal["float32", "bfloat16"]


def embedding_step(
    out: int, table: int, *, vocab_size: int, hidden_size: int, dtype: TableDType = "float32", vocab_start: int = 0
) -> TlStep:
    """out [num_tokens, hidden] = the rows of `table` [vocab_size, hidden] (row-major, not packed) that input_ids name.

    Row 0 of the table is the id `vocab_start`; ids outside the table give zeros.
    """
    return make_step(Op.EMBEDDING, (0, hidden_size, vocab_size, vocab_start, FORMATS[dtype]), (), (out, table))


def rms_norm_step(
    x: int, out: int, weight: int, *, width: int, eps: float, num_heads: int = 1, rows: Rows = "num_tokens"
) -> TlStep:
    """out = `x / sqrt(mean(x^2) + eps) * weight`, over each row of `width`, or over each of `num_heads` parts of it.

    weight is float32 [width / num_heads]. `out` may be `x`.
    """
    assert width % num_heads == 0
    return make_step(Op.RMS_NORM, (ROWS[rows], width, num_heads), (eps,), (x, out, weight))


def add_rms_norm_step(
    x: int, residual: int, out: int, weight: int, *, width: int, eps: float, rows: Rows = "num_tokens"
) -> TlStep:
    """residual += x, then out = the norm of residual; weight float32 [width]. `out` may be `x`."""
    return make_step(Op.ADD_RMS_NORM, (ROWS[rows], width), (eps,), (x, out, weight, residual))


def gated_act_step(
    x: int, out: int, *, intermediate_size: int, activation: ActivationName, rows: Rows = "num_tokens"
) -> TlStep:
    """out [rows, I] = activation(gate) * up, where x [rows, 2 * I] has the gate columns and then the up columns."""
    return make_step(Op.GATED_ACT, (ROWS[rows], intermediate_size, ACTIVATIONS[activation]), (), (x, out))


def add_step(x: int, y: int, out: int, *, width: int, broadcast: bool = False, rows: Rows = "num_tokens") -> TlStep:
    """out = x + y; y is one row [width] with `broadcast`. `out` may be `x` or `y`."""
    return make_step(Op.ADD, (ROWS[rows], width, int(broadcast)), (), (x, out, y))


def gather_rows_step(x: int, out: int, *, width: int) -> TlStep:
    """out [num_logits, width] = the rows of x [num_tokens, width] that logits_indices name."""
    return make_step(Op.GATHER_ROWS, (1, width), (), (x, out))


def copy_rows_step(
    x: int, out: int, *, width: int, x_stride: int, out_stride: int, rows: Rows = "num_tokens"
) -> TlStep:
    """out[:, :width] = x[:, :width] between row strides given in elements: a split or a concatenation of columns."""
    return make_step(Op.COPY_ROWS, (ROWS[rows], width, x_stride, out_stride), (), (x, out))
