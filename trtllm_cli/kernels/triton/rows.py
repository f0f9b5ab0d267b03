"""Kernels that compute each row by itself, and copies.

Rows are tokens (or a token's choices of experts) and come first in every grid; where a grid has a second part, it is
blocks of BLOCK columns: cdiv(width, BLOCK). A STRIDE is how many elements apart the rows of a tensor begin, so that
columns cut from a wider one are read where they lie. A padded token's row is computed as any other. BLOCKs are powers
of two. Inputs are bf16 or float32, outputs too where nothing else is said.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import (
    activate,
    gated,
    largest,
    round_to,
    steps_in_one,
    steps_of_row,
    store,
    store_quantized,
    tanh,
)


@triton.jit
def embedding(
    ids_ptr, last_tokens_ptr, weight_ptr, out_ptr, vocab_start, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.embedding; grid (num_tokens, blocks).

    ids int32 [num_tokens]; an id below 0 stands for last_tokens[-1 - id], int32, the token last sampled for that row of
    the batch. weight [num_rows, WIDTH] of ids from vocab_start on, others give zeros; out [num_tokens, WIDTH].
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_id = tl.load(ids_ptr + token)
    if token_id < 0:
        token_id = tl.load(last_tokens_ptr - 1 - token_id)
    row = token_id - vocab_start
    mask = columns < WIDTH
    known = (row >= 0) & (row < num_rows)
    x = tl.load(weight_ptr + row.to(tl.int64) * WIDTH + columns, mask=mask & known, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * WIDTH + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_act(
    gate_ptr, up_ptr, out_ptr, out_scale_ptr, row_scale_ptr,
    WIDTH: tl.constexpr, GATE_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr, GATE_OFFSET: tl.constexpr,
    UP_OFFSET: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, QUANT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.gated_act and expert_gated_act; grid (rows, blocks), with QUANT "token" (rows, 1), with "group" blocks
    of whole groups.

    The gate's columns of a row begin GATE_OFFSET elements behind its start, up's UP_OFFSET: of a joint
    x [num_tokens, 2 * WIDTH], both pointers are x's, the strides 2 * WIDTH and the offsets 0 and WIDTH. Of experts'
    x [num_tokens, top_k * 2 * WIDTH], rows are num_tokens * top_k and the offsets WIDTH and 0.
    out [rows, WIDTH]: bf16, float32, or by QUANT float8e4nv or int8, with out_scale float32 [1] or row_scale
    float32 [rows] or [rows, WIDTH / 128]; see device.store_quantized.
    """
    tl.static_assert(QUANT != "token" or BLOCK >= WIDTH)
    if PDL:
        gdc_launch_dependents()
    in_one = steps_in_one(out_scale_ptr, QUANT)
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(gate_ptr + row * GATE_STRIDE + GATE_OFFSET + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + UP_OFFSET + columns, mask=mask, other=0.0).to(tl.float32)
    y = gated(gate, up, ACTIVATION)
    row_scale_ptr += row * steps_of_row(QUANT, WIDTH) + tl.program_id(1) * steps_of_row(QUANT, BLOCK)
    store_quantized(out_ptr + row * WIDTH + columns, y, mask, in_one, row_scale_ptr, QUANT)


@triton.jit
def unary(
    x_ptr, out_ptr, number,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.scale (by number), softcap (number is the cap) and act (OP is the activation); grid (rows, blocks).

    out [rows, WIDTH].
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    if OP == "scale":
        y = x * number
    elif OP == "softcap":
        y = number * tanh(x / number)
    else:
        y = activate(x, OP)
    store(out_ptr + row * WIDTH + columns, y, mask)


@triton.jit
def binary(
    x_ptr, y_ptr, out_ptr,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, BLOCK: tl.constexpr, OP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """functional.add and mul (OP); grid (rows, blocks). Y_STRIDE 0: one row of y for all of x; out [rows, WIDTH]."""
    tl.static_assert(OP == "add" or OP == "mul")
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * Y_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    if OP == "add":
        x += y
    else:
        x *= y
    store(out_ptr + row * WIDTH + columns, x, mask)


@triton.jit
def quantize(
    x_ptr, out_ptr, out_scale_ptr, row_scale_ptr,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, BLOCK: tl.constexpr, QUANT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows to float8e4nv or int8, out [rows, WIDTH].

    With QUANT "static" by the step out_scale float32 [1], grid (rows, blocks). With "token" by steps found here,
    row_scale float32 [rows], grid (rows, 1); a row may be wider than BLOCK. With "group" by steps found here, row_scale
    float32 [rows, WIDTH / 128], grid (rows, blocks) of whole groups.
    """
    tl.static_assert(QUANT == "static" or QUANT == "token" or QUANT == "group")
    if PDL:
        gdc_launch_dependents()
    in_one = steps_in_one(out_scale_ptr, QUANT)
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if QUANT != "token" or BLOCK >= WIDTH:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < WIDTH
        x = tl.load(x_ptr + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        row_scale_ptr += row * steps_of_row(QUANT, WIDTH) + tl.program_id(1) * steps_of_row(QUANT, BLOCK)
        store_quantized(out_ptr + row * WIDTH + columns, x, mask, in_one, row_scale_ptr, QUANT)
    else:
        sizes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * X_STRIDE + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
            sizes = tl.maximum(sizes, tl.abs(x))
        limit: tl.constexpr = 448.0 if out_ptr.dtype.element_ty == tl.float8e4nv else 127.0
        step = tl.maximum(tl.max(sizes) / limit, 1e-30)
        tl.store(row_scale_ptr + row, step)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * X_STRIDE + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
            store(out_ptr + row * WIDTH + columns, x * (1.0 / step), columns < WIDTH)


@triton.jit
def qdq(
    x_ptr, scale_ptr, out_ptr,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    FMT: tl.constexpr, HAS_SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.qdq: rounded to FMT ("fp8", "int8", "fp4") and back, out bf16 or float32 [rows, WIDTH].

    Grid (rows, cdiv(cdiv(WIDTH, GROUP), BLOCK_GROUPS)); BLOCK at least GROUP, which is WIDTH for a step by token.
    scale float32 [1] with HAS_SCALE: the step, or of fp4 what the groups' steps are divided by.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)[None, :]
    columns = (tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS))[:, None] * GROUP + within
    mask = (within < GROUP) & (columns < WIDTH)
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE and FMT != "fp4":
        steps = tl.load(scale_ptr)
    else:
        steps = tl.max(tl.abs(x), axis=1, keep_dims=True) / largest(FMT)
        if HAS_SCALE:
            scale = tl.load(scale_ptr)
            steps = round_to(tl.div_rn(steps, scale), "fp8") * scale
        steps = tl.maximum(steps, 1e-30)
    y = round_to(tl.div_rn(x, steps), FMT) * steps
    store(out_ptr + row * WIDTH + columns, y, mask)


@triton.jit
def gather_columns(
    x_ptr, indices_ptr, out_ptr,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.gather_columns; grid (rows, blocks). indices int32 [WIDTH], a weight; out [rows, WIDTH]."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    sources = tl.load(indices_ptr + columns, mask=mask, other=0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * X_STRIDE + sources, mask=mask, other=0.0)
    tl.store(out_ptr + row * WIDTH + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_rows(
    x_ptr, indices_ptr, out_ptr,
    WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.gather_last; grid (num_logits, blocks). indices int32 [num_logits]; out [num_logits, WIDTH]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    source = tl.load(indices_ptr + row).to(tl.int64)
    x = tl.load(x_ptr + source * X_STRIDE + columns, mask=mask, other=0.0)
    tl.store(out_ptr + row * WIDTH + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def concat(
    x_ptr, y_ptr, out_ptr,
    X_WIDTH: tl.constexpr, Y_WIDTH: tl.constexpr, X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.concat; grid (rows, cdiv(NUM_HEADS * (X_WIDTH + Y_WIDTH), BLOCK)).

    X_WIDTH and Y_WIDTH are a head's part of x and y; out [rows, NUM_HEADS * (X_WIDTH + Y_WIDTH)].
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, within = columns // (X_WIDTH + Y_WIDTH), columns % (X_WIDTH + Y_WIDTH)
    is_x, inside = within < X_WIDTH, head < NUM_HEADS
    x = tl.load(x_ptr + row * X_STRIDE + head * X_WIDTH + within, mask=inside & is_x, other=0.0).to(tl.float32)
    y_place = y_ptr + row * Y_STRIDE + head * Y_WIDTH + (within - X_WIDTH)
    y = tl.load(y_place, mask=inside & ~is_x, other=0.0).to(tl.float32)
    store(out_ptr + row * (NUM_HEADS * (X_WIDTH + Y_WIDTH)) + columns, tl.where(is_x, x, y), inside)


@triton.jit
def rope(
    x_ptr, positions_ptr, table_ptr, out_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, X_STRIDE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, LAYOUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """functional.rope; grid (num_tokens, cdiv(NUM_HEADS, BLOCK_HEADS)).

    x: NUM_HEADS of HEAD_DIM, the first ROTARY_DIM rotated; positions int32 [num_tokens]; table float32
    [positions, ROTARY_DIM], cosines then sines (kernels.rope.cos_sin_table); out [num_tokens, NUM_HEADS * HEAD_DIM], x
    too. BLOCK_HALF is at least ROTARY_DIM / 2, BLOCK_REST at least HEAD_DIM - ROTARY_DIM, 0 where nothing is left.
    """
    tl.static_assert(LAYOUT == "neox" or LAYOUT == "gptj")
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    HALF: tl.constexpr = ROTARY_DIM // 2
    place = tl.load(positions_ptr + row).to(tl.int64) * ROTARY_DIM
    half = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(table_ptr + place + half, mask=half < HALF, other=0.0)
    sin = tl.load(table_ptr + place + HALF + half, mask=half < HALF, other=0.0)
    x_row, out_row = x_ptr + row * X_STRIDE, out_ptr + row * (NUM_HEADS * HEAD_DIM)
    if LAYOUT == "neox":
        offsets, mask = heads * HEAD_DIM + half, (heads < NUM_HEADS) & (half < HALF)
        a = tl.load(x_row + offsets, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_row + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        store(out_row + offsets, a * cos - b * sin, mask)
        store(out_row + offsets + HALF, b * cos + a * sin, mask)
    else:
        pair = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        offsets, mask = heads * HEAD_DIM + pair, (heads < NUM_HEADS) & (pair < ROTARY_DIM)
        x = tl.load(x_row + offsets, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_HALF, 2)))
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        store(out_row + offsets, tl.reshape(y, (BLOCK_HEADS, 2 * BLOCK_HALF)), mask)
    if BLOCK_REST > 0:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]
        offsets, mask = heads * HEAD_DIM + rest, (heads < NUM_HEADS) & (rest < HEAD_DIM)
        store(out_row + offsets, tl.load(x_row + offsets, mask=mask, other=0.0).to(tl.float32), mask)


@triton.jit
def copy_blocks(
    pairs_ptr, parts_ptr, part_words_ptr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies blocks of the KV cache in every layer; grid (pairs, parts, cdiv(the largest part's words, BLOCK)).

    pairs int32 [pairs, 2]: source and destination, no destination being a source or another's destination. A part is
    what a layer has contiguous, its k or its v: parts int64 [parts], each one's address, a multiple of 16; part_words
    int32 [parts], how many 4-byte words a block of it has, a multiple of 4.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair, part = tl.program_id(0), tl.program_id(1)
    source, destination = tl.load(pairs_ptr + 2 * pair).to(tl.int64), tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    words = tl.multiple_of(tl.load(part_words_ptr + part), 4)
    base = tl.multiple_of(tl.load(parts_ptr + part).to(tl.pointer_type(tl.int32)), 16)
    offsets = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < words
    tl.store(base + destination * words + offsets, tl.load(base + source * words + offsets, mask=mask), mask=mask)
