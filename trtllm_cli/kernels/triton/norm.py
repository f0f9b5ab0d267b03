"""RMS norm (arXiv 1910.07467) and layer norm, with the addition to the residual before and quantization after them.

Both kernels: grid (num_tokens,), a row a program; a padded token's row is normed as any other. A row is NUM_HEADS parts
of WIDTH elements, each normed by itself, NUM_HEADS * WIDTH in all.

    x_ptr             bf16 or float32, rows X_STRIDE elements apart
    residual_ptr      bf16 or float32 [num_tokens, row], added to x first with HAS_RESIDUAL
    weight_ptr        bf16 or float32
    out_ptr           bf16, float32, float8e4nv or int8, rows OUT_STRIDE elements apart
    new_residual_ptr  bf16 or float32 [num_tokens, row]: the sum, with HAS_RESIDUAL; may be residual_ptr
    out_scale_ptr     float32 [1], the step, with QUANT "static"
    row_scale_ptr     float32 [num_tokens], steps found here, with QUANT "token"; [num_tokens, WIDTH / 128] with
                      "group", where there is one head
    eps               float32

BLOCK_HEADS and BLOCK are powers of two, at least NUM_HEADS and WIDTH.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import steps_in_one, steps_of_row, store_quantized


@triton.jit
def _row_mask(
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Which elements of a tile [BLOCK_HEADS, BLOCK] there are."""
    heads, columns = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    return (heads < NUM_HEADS) & (columns < WIDTH)


@triton.jit
def normed(x, weight, eps, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """RMS norm of float32 `x` over an axis, of which WIDTH elements are not zeros that fill up a tile."""
    mean_square = tl.sum(x * x, axis=AXIS, keep_dims=True) / WIDTH
    return x * tl.rsqrt(mean_square + eps) * weight


@triton.jit
def rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, new_residual_ptr, out_scale_ptr, row_scale_ptr, eps,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, QUANT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """functional.rms_norm; weight [WIDTH], the same for all heads."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    offsets = tl.arange(0, BLOCK_HEADS)[:, None] * WIDTH + columns
    mask = _row_mask(NUM_HEADS, WIDTH, BLOCK_HEADS, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    in_one = steps_in_one(out_scale_ptr, QUANT)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * X_STRIDE + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * (NUM_HEADS * WIDTH) + offsets, mask=mask, other=0.0).to(tl.float32)
    y = normed(x, weight, eps, WIDTH, 1)
    if HAS_RESIDUAL:
        sums = new_residual_ptr + row * (NUM_HEADS * WIDTH) + offsets
        tl.store(sums, x.to(new_residual_ptr.dtype.element_ty), mask=mask)
    row_scale_ptr += row * steps_of_row(QUANT, WIDTH)
    store_quantized(out_ptr + row * OUT_STRIDE + offsets, y, mask, in_one, row_scale_ptr, QUANT)


@triton.jit
def layer_norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, new_residual_ptr, out_scale_ptr, row_scale_ptr, eps,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUANT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.layer_norm; weight and bias [NUM_HEADS * WIDTH], each head has its own."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_HEADS)[:, None] * WIDTH + tl.arange(0, BLOCK)[None, :]
    mask = _row_mask(NUM_HEADS, WIDTH, BLOCK_HEADS, BLOCK)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    in_one = steps_in_one(out_scale_ptr, QUANT)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * X_STRIDE + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * (NUM_HEADS * WIDTH) + offsets, mask=mask, other=0.0).to(tl.float32)
    centered = tl.where(mask, x - tl.sum(x, axis=1, keep_dims=True) / WIDTH, 0.0)
    variance = tl.sum(centered * centered, axis=1, keep_dims=True) / WIDTH
    y = centered * tl.rsqrt(variance + eps) * weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        sums = new_residual_ptr + row * (NUM_HEADS * WIDTH) + offsets
        tl.store(sums, x.to(new_residual_ptr.dtype.element_ty), mask=mask)
    row_scale_ptr += row * steps_of_row(QUANT, WIDTH)
    store_quantized(out_ptr + row * OUT_STRIDE + offsets, y, mask, in_one, row_scale_ptr, QUANT)
