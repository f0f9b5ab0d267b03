"""Linears of few tokens whose int4 weights are on their way into shared memory before the kernel in front has ended.

stream_linear's sibling, in Gluon as well. Weights are linear.py's words, whose fragment_linear is the slow twin.
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

from trtllm_cli.kernels.triton.device import gated
from trtllm_cli.kernels.triton.linear import pairs_of_word
from trtllm_cli.kernels.triton.stream_linear import (
    read_biases,
    read_in_one,
    read_norm_weights,
    read_residual,
    read_squares,
    rms_factors,
    store_outputs,
    store_sums,
)


@gluon.constexpr_function
def _as_words(parts, pieces, warps):
    """The layout of [parts, words] in which a lane has the words that are its own of each piece, and copies them."""
    of_pieces = [[0, 128 << i] for i in range(pieces.bit_length() - 1)]
    registers = [[0, 1], [0, 2], *of_pieces, *([i, 0] for i in range(warps, parts, warps))]
    lanes = [[0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(
        registers, lanes, [[1 << i, 0] for i in range(warps.bit_length() - 1)], [], [parts, 128 * pieces]
    )


@gluon.jit
def _copy_words(w_smem, w_ptr, block, group, slot, blocks: gl.constexpr, K: gl.constexpr):
    """Asks for a group's pieces of each part of a block; of gate's and up's where there are twice as many parts."""
    PARTS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = w_smem.shape[2]
    layout: gl.constexpr = _as_words(w_smem.shape[1], WORDS // 128, PARTS)
    parts = gl.arange(0, w_smem.shape[1], gl.SliceLayout(1, layout))
    words = gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    at = parts // PARTS * (blocks * 2 * K) + parts % PARTS * (2 * K // PARTS)
    w_ptr += block.to(gl.int64) * (2 * K) + group * WORDS
    async_copy.async_copy_global_to_shared(w_smem.index(slot), w_ptr + (at[:, None] + words[None, :]))


@gluon.jit
def _copy_scales(smem, ptr, block, blocks: gl.constexpr, GROUPS: gl.constexpr):
    """Asks for scales of a block's parts: [power of two, ROWS] of each half; past GROUPS, the last again."""
    PARTS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * PARTS
    e = gl.arange(0, smem.shape[0], gl.BlockedLayout([4], [32], [PARTS], [0]))
    group = e // 16 % PARTS * GROUPS + gl.minimum(e // ROWS % triton.next_power_of_2(GROUPS), GROUPS - 1)
    at = e // (triton.next_power_of_2(GROUPS) * ROWS) * (blocks * ROWS * GROUPS) + group * 16 + e % 16
    async_copy.async_copy_global_to_shared(smem, ptr + block.to(gl.int64) * (ROWS * GROUPS) + at)


@gluon.constexpr_function
def _pieces_at_once(pieces, rows):
    """How many pieces of x, each [rows, 64], a tensor has: a power of two, and at most 64 elements of a thread."""
    return min(pieces & -pieces, max(128 // rows, 1))


@gluon.jit
def _inputs(x_ptr, num_tokens, piece, C: gl.constexpr, K: gl.constexpr, BM: gl.constexpr):
    """x of C pieces, in the words' order, of each of the parts: [C * PARTS * BM, 64]; past the last token copies."""
    PARTS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [PARTS, 1], [1, 0])
    rows = gl.arange(0, C * PARTS * BM, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))
    of_part = rows // BM % PARTS * (K // PARTS) + (piece + rows // (PARTS * BM)) * 64
    at = gl.minimum(rows % BM, num_tokens - 1) * K + of_part
    x = gl.load(x_ptr + (at[:, None] + columns[None, :]))
    # inputs as [h, j, b, k, m]
    x = gl.permute(gl.reshape(x, [C * PARTS * BM, 2, 4, 2, 2, 2]), [0, 1, 4, 3, 2, 5])
    return gl.reshape(x, [C * PARTS * BM, 64])


@gluon.jit
def _store_inputs(x_smem, x_ptr, num_tokens, K: gl.constexpr, BM: gl.constexpr):
    """All of x to [chunks, pieces * PARTS * BM, 64]; a few chunks are asked for before the first one is stored."""
    C: gl.constexpr = x_smem.shape[1] // (gl.num_warps() * BM)
    chunks: gl.constexpr = x_smem.shape[0]
    few: gl.constexpr = max(64 // (C * BM), 1)
    for first in gl.static_range(0, chunks, few):
        xs = ()
        for i in gl.static_range(first, min(first + few, chunks)):
            xs += (_inputs(x_ptr, num_tokens, i * C, C, K, BM),)
        for i in gl.static_range(first, min(first + few, chunks)):
            x_smem.index(i).store(xs[i - first])


@gluon.jit
def _weights(words, GROUP: gl.constexpr, mma: gl.constexpr):
    """bf16 of words as the operand [ROWS, GROUP]; they are in the right registers, so nothing moves."""
    PARTS: gl.constexpr = gl.num_warps()
    U: gl.constexpr = GROUP // 64
    w = gl.reshape(words, [PARTS * U * 128])
    w = gl.join(w, w)
    w = gl.join(w, w)
    w = gl.join(w, w)
    w = gl.reshape(w, [PARTS * U * 1024])  # a word beside itself, for the same register holds all of it
    w = gl.inline_asm_elementwise(
        pairs_of_word("int4", False), "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [w], dtype=gl.bfloat16, is_pure=True, pack=8
    )
    # words as [parts, pieces, i, j, h, k], what they hold as [l, b, m]
    w = gl.permute(gl.reshape(w, [PARTS, U, 8, 4, 2, 2, 2, 2, 2]), [0, 6, 2, 1, 4, 5, 7, 3, 8])
    w = gl.convert_layout(gl.reshape(w, [16 * PARTS, GROUP]), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)
    return w - gl.full([16 * PARTS, GROUP], 136.0, gl.bfloat16, w.type.layout)


@gluon.jit
def _product(words, scales, x, slot, group, none):
    """A group's weights with x [inputs, rows], which is not waited for, and what it is times."""
    mma: gl.constexpr = none.type.layout
    scale = scales.index(group).load(gl.SliceLayout(1, mma))
    w = words.index(slot).load(_as_words(gl.num_warps(), x.shape[0] // 64, gl.num_warps()))
    w = _weights(w, x.shape[0], mma)
    return warpgroup_mma(w, x, none, use_acc=False, is_async=True), scale[:, None]


@gluon.jit
def _products(words, scales, x_smem, slot, group, UP_FIRST: gl.constexpr, GATED: gl.constexpr, none):
    """A group's products and what they are times: one, or gate's and up's."""
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    x = x_smem.index(group).permute((1, 0))
    part, scale = _product(words, scales, x, slot * HALVES, group, none)
    if GATED != "":
        up, up_scale = _product(words, scales, x, slot * HALVES + 1, UP_FIRST + group, none)
        return (part, up), (scale, up_scale)
    else:  # noqa: RET505 - for the compiler, which reads on behind a return
        return (part,), (scale,)


@gluon.jit
def _added(sums, products, scales, UNDER_WAY: gl.constexpr):
    """The sums with a group's products, when no more than those of UNDER_WAY later groups are left to wait for."""
    if len(products) == 2:
        part, up = warpgroup_mma_wait(2 * UNDER_WAY, products)
        return sums[0] + part * scales[0], sums[1] + up * scales[1]
    else:  # noqa: RET505
        part = warpgroup_mma_wait(UNDER_WAY, products)
        return (sums[0] + part * scales[0],)


@gluon.jit
def _of_parts(acc, BM: gl.constexpr, layout: gl.constexpr):
    """[16, BM] of products [ROWS, PARTS * BM] of each part of the weights' inputs with each part of x."""
    PARTS: gl.constexpr = gl.num_warps()
    of_weights = gl.arange(0, 16 * PARTS, gl.SliceLayout(1, acc.type.layout)) // 16
    of_inputs = gl.arange(0, PARTS * BM, gl.SliceLayout(0, acc.type.layout)) // BM
    acc = gl.where(of_weights[:, None] == of_inputs[None, :], acc, 0.0)
    acc = gl.sum(gl.reshape(acc, [PARTS, 16, PARTS, BM]), 2)
    return gl.sum(gl.convert_layout(acc, layout), 0)


@gluon.jit
def stream_words(
    x_ptr, w_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, residual_ptr, new_residual_ptr, norm_weight_ptr,
    squares_ptr, eps, num_tokens,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr, GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr, GATED: gl.constexpr, SUMS: gl.constexpr, SQUARES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (outputs / 16, num_tokens / BM).

    A program has a block of 16 outputs, whose pieces lie side by side in memory. Each of its warps, 4 or 8, has a part
    of their inputs, so that the tensor cores see ROWS, 16 a warp; of the product with the parts of x those of the same
    inputs count. Words of STAGES times ROUND groups of each part are on their way. A weight is 8 below its nibble,
    times the scale of its GROUP, 64 or 128; K is a multiple of the parts of ROUND groups, and parts * BM of 8. SUMS and
    SQUARES are stream_linear's.
    """
    outputs: gl.constexpr = N if GATED == "" else N // 2
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    PARTS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * PARTS
    U: gl.constexpr = GROUP // 64
    groups: gl.constexpr = K // (PARTS * GROUP)  # of a part
    rounds: gl.constexpr = groups // ROUND
    gl.static_assert((GROUP == 64 or GROUP == 128) and outputs % 16 == 0 and PARTS * BM % 8 == 0)
    gl.static_assert(rounds * ROUND * GROUP * PARTS == K and 1 < STAGES and STAGES <= rounds)
    gl.static_assert(not SUMS or GATED == "")
    if PDL:
        gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES * ROUND, HALVES * PARTS, U * 128], plain)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    C: gl.constexpr = _pieces_at_once(groups * U, PARTS * BM)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [groups * U // C, C * PARTS * BM, 64], swizzled)
    s_smem = gl.allocate_shared_memory(gl.float32, [HALVES * triton.next_power_of_2(groups) * ROWS], flat)
    block = gl.program_id(0)
    token = gl.program_id(1) * BM
    x_ptr += token.to(gl.int64) * K
    _copy_scales(s_smem, w_scale_ptr, block, outputs // 16, groups)
    for s in gl.static_range(STAGES):
        for u in gl.static_range(s * ROUND, (s + 1) * ROUND):
            _copy_words(w_smem, w_ptr, block, u, u, outputs // 16, K)
        async_copy.commit_group()

    # What is no output of the kernel in front is read here too: after the products it would have to be waited for.
    of_parts: gl.constexpr = gl.BlockedLayout([PARTS, 1, 1], [1, 16, 2], [1, 1, PARTS], [1, 2, 0])  # a thread has all
    layout: gl.constexpr = gl.SliceLayout(0, of_parts)
    rows = block * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
    tokens = token + gl.arange(0, BM, gl.SliceLayout(0, layout))
    bias, up_bias = read_biases(bias_ptr, rows, outputs, HAS_BIAS, GATED)
    in_one = read_in_one(y_ptr, out_scale_ptr)
    norm_weights = read_norm_weights(norm_weight_ptr, rows, SUMS)

    if PDL:
        gdc_wait()
    residual = read_residual(residual_ptr, rows, tokens, num_tokens, outputs, SUMS)
    if SQUARES:
        squares = read_squares(squares_ptr, token, num_tokens, BM, SQUARES)
    _store_inputs(x_smem, x_ptr, num_tokens - token, K, BM)
    fence_async_shared()
    # where a group's pieces lie as well
    x_smem = x_smem._reinterpret(gl.bfloat16, [groups, PARTS * BM, GROUP], swizzled)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [PARTS, 1], [16, PARTS * BM, 16])
    none = gl.zeros([ROWS, PARTS * BM], gl.float32, mma)
    sums = (none,) if GATED == "" else (none, none)
    words = w_smem._reinterpret(gl.int32, [STAGES * ROUND * HALVES, PARTS, U * 128], plain)
    up_first: gl.constexpr = triton.next_power_of_2(groups)
    scales = s_smem._reinterpret(gl.float32, [HALVES * up_first, ROWS], flat)
    for r in range(rounds):
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()  # also of the reads before, of the slots that are filled next
        if STAGES < rounds:  # else all is on its way
            ahead = r - 1 + STAGES
            if (r > 0) & (ahead < rounds):
                for u in gl.static_range(ROUND):
                    slot = (r - 1) % STAGES * ROUND + u
                    _copy_words(w_smem, w_ptr, block, ahead * ROUND + u, slot, outputs // 16, K)
        async_copy.commit_group()
        first_slot = r % STAGES * ROUND
        products, times = _products(words, scales, x_smem, first_slot, r * ROUND, up_first, GATED, none)
        for u in gl.static_range(1, ROUND):
            later, later_times = _products(
                words, scales, x_smem, first_slot + u, r * ROUND + u, up_first, GATED, none
            )  # fmt: skip
            sums = _added(sums, products, times, 1)
            products, times = later, later_times
        sums = _added(sums, products, times, 0)

    factors = 1.0
    if SQUARES:
        factors = rms_factors(squares, eps, K, gl.SliceLayout(0, layout))[None, :]
    y = _of_parts(sums[0], BM, of_parts) * factors + bias
    if GATED != "":
        y = gated(y, _of_parts(sums[1], BM, of_parts) * factors + up_bias, GATED)
    if SUMS:
        y += residual
        store_sums(new_residual_ptr, squares_ptr, y, rows, tokens, num_tokens, outputs)
        y *= norm_weights
    store_outputs(y_ptr, y * in_one, rows, tokens, num_tokens, outputs)
