"""The steps that take each row by itself, but for linears; see library.py."""

from __future__ import annotations

from typing import Literal

from trtllm_cli.kernels.cpu.library import ACTIVATIONS, FORMATS, ROWS, ActivationName, Op, Rows, TlStep, make_step

FLOAT_BYTES = 4

TableDType = Literal["float32", "bfloat16"]
TokenIds = Literal["input_ids", "positions"]
QdqFormat = Literal["fp8", "int8", "fp4"]

_QDQ_FORMATS: dict[QdqFormat, int] = {"fp8": 0, "int8": 1, "fp4": 2}

_IDS: dict[TokenIds, int] = {"input_ids": 0, "positions": 1}


def embedding_step(
    out: int,
    table: int,
    *,
    vocab_size: int,
    hidden_size: int,
    dtype: TableDType = "float32",
    vocab_start: int = 0,
    ids: TokenIds = "input_ids",
) -> TlStep:
    """out [num_tokens, hidden] = the rows of `table` [vocab_size, hidden] (row-major, not packed) that `ids` name.

    Row 0 of the table is the id `vocab_start`; ids outside the table give zeros.
    """
    ints = (0, hidden_size, vocab_size, vocab_start, FORMATS[dtype], _IDS[ids])
    return make_step(Op.EMBEDDING, ints, (), (out, table))


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


def layer_norm_step(
    x: int,
    out: int,
    weight: int,
    *,
    width: int,
    eps: float,
    bias: int | None = None,
    num_heads: int = 1,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out = `(x - mean) / sqrt(var + eps) * weight + bias`, over each row, or over each of `num_heads` parts of it.

    weight and bias are float32 [width]: each head has its own. `out` may be `x`.
    """
    assert width % num_heads == 0
    return make_step(Op.LAYER_NORM, (ROWS[rows], width, num_heads), (eps,), (x, out, weight, None, bias))


def add_layer_norm_step(
    x: int,
    residual: int,
    out: int,
    weight: int,
    *,
    width: int,
    eps: float,
    bias: int | None = None,
    rows: Rows = "num_tokens",
) -> TlStep:
    """residual += x, then out = the layer norm of residual. `out` may be `x`."""
    return make_step(Op.ADD_LAYER_NORM, (ROWS[rows], width), (eps,), (x, out, weight, residual, bias))


def gated_act_step(
    x: int,
    out: int,
    *,
    intermediate_size: int,
    activation: ActivationName,
    up: int | None = None,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out [rows, I] = activation(gate) * up, see functional.gated_act; x is the gate, [rows, I] as `up` and `out` are.

    Without `up`, x is [rows, 2 * I]: the gate columns and then the up columns. `out` may be `x` or `up` if there is up.
    """
    return make_step(Op.GATED_ACT, (ROWS[rows], intermediate_size, ACTIVATIONS[activation]), (), (x, out, up))


def act_step(x: int, out: int, *, width: int, activation: ActivationName, rows: Rows = "num_tokens") -> TlStep:
    """out = activation(x), any but "swiglu_oai". `out` may be `x`."""
    assert activation != "swiglu_oai", "it takes two tensors"
    return make_step(Op.ACT, (ROWS[rows], width, ACTIVATIONS[activation]), (), (x, out))


def add_step(x: int, y: int, out: int, *, width: int, broadcast: bool = False, rows: Rows = "num_tokens") -> TlStep:
    """out = x + y; y is one row [width] with `broadcast`. `out` may be `x` or `y`."""
    return make_step(Op.ADD, (ROWS[rows], width, int(broadcast)), (), (x, out, y))


def mul_step(x: int, y: int, out: int, *, width: int, broadcast: bool = False, rows: Rows = "num_tokens") -> TlStep:
    """out = x * y; y is one row [width] with `broadcast`. `out` may be `x` or `y`."""
    return make_step(Op.MUL, (ROWS[rows], width, int(broadcast)), (), (x, out, y))


def scale_step(x: int, out: int, *, width: int, factor: float, rows: Rows = "num_tokens") -> TlStep:
    """out = x * factor. `out` may be `x`."""
    return make_step(Op.SCALE, (ROWS[rows], width), (factor,), (x, out))


def softcap_step(x: int, out: int, *, width: int, cap: float, rows: Rows = "num_tokens") -> TlStep:
    """out = cap * tanh(x / cap). `out` may be `x`."""
    return make_step(Op.SOFTCAP, (ROWS[rows], width), (cap,), (x, out))


def gather_rows_step(x: int, out: int, *, width: int) -> TlStep:
    """out [num_logits, width] = the rows of x [num_tokens, width] that logits_indices name."""
    return make_step(Op.GATHER_ROWS, (1, width), (), (x, out))


def copy_rows_step(
    x: int,
    out: int,
    *,
    width: int,
    x_stride: int,
    out_stride: int,
    x_first: int = 0,
    out_first: int = 0,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out[:, out_first:][:, :width] = x[:, x_first:][:, :width]: a split or a concatenation of columns.

    The strides from row to row are in elements.
    """
    ints = (ROWS[rows], width, x_stride, out_stride)
    return make_step(Op.COPY_ROWS, ints, (), (x + FLOAT_BYTES * x_first, out + FLOAT_BYTES * out_first))


def qdq_step(
    x: int,
    out: int,
    *,
    width: int,
    fmt: QdqFormat,
    scale: int | None = None,
    group_size: int | None = None,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out = x rounded to `fmt` and back, see functional.qdq; scale is float32 [1]. `out` may be `x`."""
    return make_step(Op.QDQ, (ROWS[rows], width, _QDQ_FORMATS[fmt], group_size or 0), (), (x, out, scale))


def gather_columns_step(
    x: int, out: int, indices: int, *, width: int, x_stride: int, rows: Rows = "num_tokens"
) -> TlStep:
    """out [rows, width] = x[:, indices]; indices are int32 [width], x has `x_stride` columns."""
    return make_step(Op.GATHER_COLUMNS, (ROWS[rows], width, x_stride), (), (x, out, indices))


def concat_step(
    x: int, y: int, out: int, *, x_width: int, y_width: int, num_heads: int = 1, rows: Rows = "num_tokens"
) -> TlStep:
    """out [rows, x_width + y_width] = each of `num_heads` parts of x [rows, x_width], and behind it that of y."""
    assert x_width % num_heads == y_width % num_heads == 0
    return make_step(Op.CONCAT, (ROWS[rows], x_width + y_width, num_heads, x_width // num_heads), (), (x, out, y))
