"""Linears of few tokens whose weights are on their way into shared memory before the kernel in front has ended.

In Gluon, as Triton lets nothing go to shared memory ahead of `gdc_wait`. Operands are linear.py's, whose vector_linear
and skinny_linear are the slow twins.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import gated, steps_in_one
from trtllm_cli.kernels.triton.gluon_names import barrier, copy_to_shared, reinterpret
from trtllm_cli.kernels.triton.over_ranks import in_pairs, over_ranks, read_deltas, read_flag


@gluon.constexpr_function
def side_by_side(dtype):
    """Elements in 16 bytes."""
    return 128 // dtype.primitive_bitwidth


@gluon.constexpr_function
def _rows_of_pieces(dtype, warps):
    """The layout of [rows, 128 bytes] in which threads copy, 16 bytes each."""
    return gl.BlockedLayout([1, side_by_side(dtype)], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def copy_weights(w_smem, w_ptr, first, r, slot, PART: gl.constexpr, outputs: gl.constexpr, K: gl.constexpr,
                 ROUND: gl.constexpr, HALVES: gl.constexpr):  # fmt: skip
    """Asks for a round's pieces of the program's rows, seen as ROWS of PART inputs; of gate's and up's with HALVES 2.

    In one copy: between two of them the compiler puts a barrier.
    """
    DTYPE: gl.constexpr = w_ptr.dtype.element_ty
    ROWS: gl.constexpr = w_smem.shape[1] // (ROUND * HALVES)
    BK: gl.constexpr = 8 * side_by_side(DTYPE)
    layout: gl.constexpr = _rows_of_pieces(DTYPE, gl.num_warps())
    rows = gl.arange(0, ROUND * HALVES * ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BK, gl.SliceLayout(0, layout))
    at = rows % ROWS * PART + rows // ROWS % HALVES * (outputs * K) + rows // (HALVES * ROWS) * BK
    w_ptr += first.to(gl.int64) * K + r * (ROUND * BK)
    copy_to_shared(w_smem.index(slot), w_ptr + (at[:, None] + columns[None, :]))


@gluon.jit
def copy_inputs(x_smem, x_ptr, num_tokens, r, slot, PART: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
                PARTS: gl.constexpr, ROUND: gl.constexpr):  # fmt: skip
    """Asks for a round's pieces of x, seen as [PARTS * BM, PART]; tokens past the last one are copies of it."""
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    BK: gl.constexpr = 8 * side_by_side(DTYPE)
    layout: gl.constexpr = _rows_of_pieces(DTYPE, gl.num_warps())
    rows = gl.arange(0, ROUND * PARTS * BM, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BK, gl.SliceLayout(0, layout))
    at = gl.minimum(rows % BM, num_tokens - 1) * K + rows // BM % PARTS * PART + rows // (PARTS * BM) * BK
    x_ptr += r * (ROUND * BK)
    copy_to_shared(x_smem.index(slot), x_ptr + (at[:, None] + columns[None, :]))


@gluon.constexpr_function
def pieces_at_once(pieces, elements, warps):
    """Of so many pieces of x, how many a tensor has: a power of two, at most 64 elements of a thread."""
    return min(pieces & -pieces, max(64 * 32 * warps // elements, 1))


@gluon.constexpr_function
def _of_tokens(warps):
    """The layout of [pieces, tokens, columns] in which threads read x and write it, 16 columns each."""
    return gl.BlockedLayout([1, 1, 16], [4, 1, 8], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def _sums_in(x_ptr, token, num_tokens, piece, C: gl.constexpr, PART: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
             PARTS: gl.constexpr, BK: gl.constexpr):  # fmt: skip
    """C pieces of x from `piece` on, in bfloat16 and in copy_inputs' order: [C * PARTS, BM, BK]."""
    layout: gl.constexpr = _of_tokens(gl.num_warps())
    rows = gl.arange(0, C * PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    tokens = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    columns = gl.arange(0, BK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    tokens = gl.minimum(token + tokens, num_tokens - 1)
    at = (rows % PARTS * PART + (piece + rows // PARTS) * BK)[:, None, None] + columns[None, None, :]
    return gl.load(x_ptr + (tokens[None, :, None] * K + at))


@gluon.jit
def _store_normed(x_smem, x_ptr, squares_ptr, eps, in_one, token, num_tokens, PART: gl.constexpr, K: gl.constexpr,
                  BM: gl.constexpr, PARTS: gl.constexpr, SQUARES: gl.constexpr):  # fmt: skip
    """All of x, normed and in steps of FP8, to [chunks, pieces * PARTS * BM, BK]; a few are asked for at once."""
    BK: gl.constexpr = x_smem.shape[2]
    C: gl.constexpr = x_smem.shape[1] // (PARTS * BM)
    chunks: gl.constexpr = x_smem.shape[0]
    few: gl.constexpr = max(64 * 32 * gl.num_warps() // (C * PARTS * BM * BK), 1)
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, _of_tokens(gl.num_warps())))
    for first in gl.static_range(0, chunks, few):
        xs = ()
        for i in gl.static_range(first, min(first + few, chunks)):
            xs += (_sums_in(x_ptr, token, num_tokens, i * C, C, PART, K, BM, PARTS, BK),)
        if first == 0:
            squares = read_squares(squares_ptr, token, num_tokens, BM, SQUARES)
            factors = (rms_factors(squares, eps, K, layout) * in_one)[None, :, None]
        for i in gl.static_range(first, min(first + few, chunks)):
            x = (xs[i - first].to(gl.float32) * factors).to(x_smem.dtype)
            x_smem.index(i).store(gl.reshape(x, [C * PARTS * BM, BK]))


@gluon.jit
def _of_parts(acc, BM: gl.constexpr, PARTS: gl.constexpr, layout: gl.constexpr):
    """[rows / PARTS, BM] of products [rows, PARTS * BM] of each part of the weights' inputs with each part of x."""
    ROWS: gl.constexpr = acc.shape[0]
    if PARTS > 1:
        of_weights = gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout)) % PARTS
        of_inputs = gl.arange(0, PARTS * BM, gl.SliceLayout(0, acc.type.layout)) // BM
        acc = gl.where(of_weights[:, None] == of_inputs[None, :], acc, 0.0)
        acc = gl.sum(gl.sum(gl.reshape(acc, [ROWS // PARTS, PARTS, PARTS, BM]), 1), 1)
    return gl.convert_layout(acc, layout)


@gluon.jit
def read_biases(bias_ptr, rows, outputs: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr):
    """[rows, 1] of these outputs, and of the second half's; zeros where there are none."""
    bias, up_bias = 0.0, 0.0
    if HAS_BIAS:
        bias = gl.load(bias_ptr + rows).to(gl.float32)[:, None]
        if GATED != "":
            up_bias = gl.load(bias_ptr + outputs + rows).to(gl.float32)[:, None]
    return bias, up_bias


@gluon.jit
def read_scale(w_scale_ptr, rows, FIRST: gl.constexpr, W_SCALE: gl.constexpr):
    """Of rows of weights from FIRST on: one, or [rows, 1]."""
    scale = 1.0
    if W_SCALE == "one":
        scale = gl.load(w_scale_ptr)
    elif W_SCALE == "row":
        scale = gl.load(w_scale_ptr + FIRST + rows)[:, None]
    return scale


@gluon.jit
def read_in_one(y_ptr, out_scale_ptr):
    """1 / the step of an E4M3 output, else 1."""
    return steps_in_one(out_scale_ptr, "static" if y_ptr.dtype.element_ty == gl.float8e4nv else "none")


@gluon.jit
def _places(rows, tokens, num_tokens, outputs: gl.constexpr):
    """Of [rows, tokens] in an output, and which of them there are."""
    at = tokens[None, :].to(gl.int64) * outputs + rows[:, None]
    return at, (tokens < num_tokens)[None, :] & (rows < outputs)[:, None]


@gluon.jit
def store_outputs(y_ptr, y, rows, tokens, num_tokens, outputs: gl.constexpr):
    """y [rows, tokens], in the pointer's type."""
    at, mask = _places(rows, tokens, num_tokens, outputs)
    gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.constexpr_function
def _in_each_warp(tokens, sums, warps):
    """The layout of [tokens, sums] in which each warp has all of them, so that each thread has every token's total."""
    near = [[0, 1 << i] for i in range(2)]
    far = [[0, 128 << i] for i in range((sums // 128).bit_length() - 1)]
    lanes = [[0, 4 << i] if 4 << i < sums else [0, 0] for i in range(5)]
    registers = [*near, *far, *([1 << i, 0] for i in range(tokens.bit_length() - 1))]
    alike = [[0, 0]] * (warps.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, alike, [], [tokens, sums])


@gluon.jit
def read_squares(squares_ptr, token, num_tokens, BM: gl.constexpr, SQUARES: gl.constexpr):
    """[BM, .]: of each token's row the sums of squares that the kernel in front has left, zeros past SQUARES."""
    SUMS: gl.constexpr = max(triton.next_power_of_2(SQUARES), 4)
    layout: gl.constexpr = _in_each_warp(BM, SUMS, gl.num_warps())
    tokens = gl.minimum(token + gl.arange(0, BM, gl.SliceLayout(1, layout)), num_tokens - 1)
    sums = gl.arange(0, SUMS, gl.SliceLayout(0, layout))
    return gl.load(squares_ptr + (tokens[:, None] * SQUARES + sums[None, :]), mask=(sums < SQUARES)[None, :], other=0.0)


@gluon.jit
def rms_factors(squares, eps, K: gl.constexpr, layout: gl.constexpr):
    """[BM]: what RMS norm multiplies rows of K numbers by, of their sums of squares."""
    return gl.convert_layout(gl.rsqrt(gl.sum(squares, 1) / K + eps), layout)


@gluon.jit
def read_norm_weights(norm_weight_ptr, rows, SUMS: gl.constexpr):
    """[rows, 1] of the norm behind, ahead of `gdc_wait`."""
    weights = 1.0
    if SUMS:
        weights = gl.load(norm_weight_ptr + rows).to(gl.float32)[:, None]
    return weights


@gluon.jit
def read_residual(residual_ptr, rows, tokens, num_tokens, outputs: gl.constexpr, SUMS: gl.constexpr):
    """[rows, tokens] that outputs are added to."""
    residual = 0.0
    if SUMS:
        at, mask = _places(rows, tokens, num_tokens, outputs)
        residual = gl.load(residual_ptr + at, mask=mask, other=0.0).to(gl.float32)
    return residual


@gluon.jit
def store_sums(
    y, residual, norm_weights, new_residual_ptr, squares_ptr, rows, tokens, num_tokens, outputs: gl.constexpr,
    SUMS: gl.constexpr,
):  # fmt: skip
    """y, or with SUMS it and the residual, which go to memory as that, times the norm's weights.

    Of each token's rows the sum of squares goes to memory too: a program's number of them all.
    """
    if SUMS:
        y += residual
        store_outputs(new_residual_ptr, y, rows, tokens, num_tokens, outputs)
        at = squares_ptr + tokens * (outputs // rows.shape[0]) + gl.program_id(0)
        gl.store(at, gl.sum(y * y, 0), mask=tokens < num_tokens)
        y *= norm_weights
    return y


@gluon.jit
def stream_linear(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, residual_ptr, new_residual_ptr,
    norm_weight_ptr, squares_ptr, eps, num_tokens, staging_ptr, deltas_ptr, step_ptr, calls, call,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr,
    W_SCALE: gl.constexpr, X_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, SUMS: gl.constexpr,
    SQUARES: gl.constexpr, RANKS: gl.constexpr, RANK: gl.constexpr, STAGING: gl.constexpr, PUSH: gl.constexpr,
    PULL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Weights bf16 or fp8: grid (outputs / (ROWS / PARTS), num_tokens / BM), ROWS being 16 a warp.

    A program has whole rows of weights, which lie side by side in memory: they are ROWS of K / PARTS inputs as well.
    Their product with the PARTS parts of x, of which those of the same inputs count, is one of the tensor cores'.
    STAGES times ROUND pieces of 128 bytes of each of them are on their way. K is a multiple of PARTS times ROUND of
    them; PARTS * BM is 8, or a multiple of it.

    An RMS norm of the residual stream between two linears may be computed by them. With SUMS the one in front adds its
    outputs to `residual`, which becomes `new_residual` (in place of it, if they are the same), writes what it is times
    the norm's weight as y, and each program's sum of squares to squares [num_tokens, programs]. With SQUARES, how many
    of these a token has, the one behind divides by the root of their mean: its products, or x before it becomes FP8.
    With RANKS beside 1 the one in front sums over the ranks first: see collectives.py for what it is told of them. With
    `calls` 0 it does not.
    """
    outputs: gl.constexpr = N if GATED == "" else N // 2
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    DTYPE: gl.constexpr = w_ptr.dtype.element_ty
    BK: gl.constexpr = 8 * side_by_side(DTYPE)
    ROWS: gl.constexpr = 16 * gl.num_warps()
    PART: gl.constexpr = K // PARTS
    rounds: gl.constexpr = PART // (ROUND * BK)
    gl.static_assert(rounds * ROUND * BK * PARTS == K and outputs % (ROWS // PARTS) == 0)
    gl.static_assert(STAGES <= rounds and (1 < STAGES or rounds == 1) and (HALVES - 1) * outputs * K < 2**31)
    gl.static_assert(not SUMS or GATED == "")
    QUANTIZES: gl.constexpr = x_ptr.dtype.element_ty != DTYPE
    X_ROUNDS: gl.constexpr = rounds if QUANTIZES else STAGES
    X_PIECES: gl.constexpr = ROUND * X_ROUNDS
    X_AT_ONCE: gl.constexpr = pieces_at_once(X_PIECES, PARTS * BM * BK, gl.num_warps()) if QUANTIZES else ROUND
    if PDL:
        gdc_launch_dependents()
    pieces_layout: gl.constexpr = gl.NVMMASharedLayout(128, DTYPE.primitive_bitwidth, 2)
    w_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROUND * HALVES * ROWS, BK], pieces_layout)
    x_smem = gl.allocate_shared_memory(DTYPE, [X_PIECES // X_AT_ONCE, X_AT_ONCE * PARTS * BM, BK], pieces_layout)
    first = gl.program_id(0) * (ROWS // PARTS)
    token = gl.program_id(1) * BM
    for s in gl.static_range(STAGES):
        copy_weights(w_smem, w_ptr, first, s, s, PART, outputs, K, ROUND, HALVES)

    # What is no output of the kernel in front is read here too: after the products it would have to be waited for.
    lines: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [0, 1])
    layout: gl.constexpr = lines if RANKS == 1 else in_pairs(BM, gl.num_warps())
    rows = first + gl.arange(0, ROWS // PARTS, gl.SliceLayout(1, layout))
    tokens = token + gl.arange(0, BM, gl.SliceLayout(0, layout))
    bias, up_bias = read_biases(bias_ptr, rows, outputs, HAS_BIAS, GATED)
    in_one = read_in_one(y_ptr, out_scale_ptr)
    norm_weights = read_norm_weights(norm_weight_ptr, rows, SUMS)
    deltas, flag = read_deltas(deltas_ptr, RANKS), read_flag(step_ptr, calls, call, RANKS)
    w_scale, up_scale, x_scale = read_scale(w_scale_ptr, rows, 0, W_SCALE), 1.0, 1.0
    if GATED != "":
        up_scale = read_scale(w_scale_ptr, rows, outputs, W_SCALE)
    if X_SCALE == "one":
        x_scale = gl.load(x_scale_ptr)
    x_in_one = 1.0 / x_scale

    if PDL:
        gdc_wait()
    token_layout: gl.constexpr = gl.SliceLayout(0, layout)
    if QUANTIZES:
        _store_normed(x_smem, x_ptr, squares_ptr, eps, x_in_one, token, num_tokens, PART, K, BM, PARTS, SQUARES)
    else:
        x_ptr += token.to(gl.int64) * K
        for s in gl.static_range(STAGES):
            copy_inputs(x_smem, x_ptr, num_tokens - token, s, s, PART, K, BM, PARTS, ROUND)
        if SQUARES:
            squares = read_squares(squares_ptr, token, num_tokens, BM, SQUARES)
    residual = read_residual(residual_ptr, rows, tokens, num_tokens, outputs, SUMS)
    async_copy.commit_group()
    if STAGES > 2:  # else the first round waits for everything anyway
        async_copy.wait_group(0)
    if X_SCALE == "row":
        x_scale = gl.load(x_scale_ptr + gl.minimum(tokens, num_tokens - 1))[None, :]

    mma: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, PARTS * BM, 2 * side_by_side(DTYPE)]
    )
    acc = gl.zeros([ROWS, PARTS * BM], gl.float32, mma)
    up = gl.zeros([ROWS, PARTS * BM], gl.float32, mma)
    w_pieces = reinterpret(w_smem, DTYPE, [STAGES * ROUND * HALVES, ROWS, BK], pieces_layout)
    x_pieces = reinterpret(x_smem, DTYPE, [X_PIECES, PARTS * BM, BK], pieces_layout)
    for r in range(rounds):
        async_copy.wait_group(max(STAGES - 2, 0))
        barrier()  # also of the products before, which read the slot that is filled next
        fence_async_shared()
        for u in gl.static_range(ROUND):
            slot = r % STAGES * ROUND + u
            x = x_pieces.index(r % X_ROUNDS * ROUND + u).permute((1, 0))
            acc = warpgroup_mma(w_pieces.index(slot * HALVES), x, acc, is_async=True)
            if GATED != "":
                up = warpgroup_mma(w_pieces.index(slot * HALVES + 1), x, up, is_async=True)
        if STAGES < rounds:  # else all is on its way
            ahead = r - 1 + STAGES
            if (r > 0) & (ahead < rounds):
                copy_weights(w_smem, w_ptr, first, ahead, (r - 1) % STAGES, PART, outputs, K, ROUND, HALVES)
                if not QUANTIZES:
                    copy_inputs(x_smem, x_ptr, num_tokens - token, ahead, (r - 1) % STAGES, PART, K, BM, PARTS, ROUND)
        async_copy.commit_group()
        if GATED != "":
            acc, up = warpgroup_mma_wait(0, [acc, up])
        else:
            acc = warpgroup_mma_wait(0, [acc])

    if SQUARES and not QUANTIZES:
        x_scale = rms_factors(squares, eps, K, token_layout)[None, :]
    y = _of_parts(acc, BM, PARTS, layout) * w_scale * x_scale + bias
    if GATED != "":
        y = gated(y, _of_parts(up, BM, PARTS, layout) * up_scale * x_scale + up_bias, GATED)
    y = over_ranks(
        y, staging_ptr, deltas, flag, calls, first, token, num_tokens, outputs, RANKS, RANK, STAGING, PUSH, PULL
    )  # fmt: skip
    if RANKS == 1 or PULL:
        y = store_sums(
            y, residual, norm_weights, new_residual_ptr, squares_ptr, rows, tokens, num_tokens, outputs, SUMS
        )  # fmt: skip
        store_outputs(y_ptr, y * in_one, rows, tokens, num_tokens, outputs)
