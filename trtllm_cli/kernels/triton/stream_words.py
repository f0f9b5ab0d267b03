"""Linears of few tokens whose int4 weights are on their way into shared memory before the kernel in front has ended.

stream_linear's sibling, in Gluon as well. Weights are linear.py's words, whose fragment_linear is the slow twin. They
are multiplied as int8, which takes three instructions for the 8 of a word. x goes to two bytes a number, high and low,
that are columns of one product side by side, so that a thread gets both sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
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
from trtllm_cli.kernels.triton.gluon_names import barrier, copy_to_shared, reinterpret
from trtllm_cli.kernels.triton.over_ranks import over_ranks, read_deltas, read_flag
from trtllm_cli.kernels.triton.stream_linear import (
    pieces_at_once,
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
    """The layout of [parts, bytes] in which a lane has the words that are its own of each piece, and copies them."""
    of_pieces = [[0, 512 << i] for i in range(pieces.bit_length() - 1)]
    registers = [*([0, 1 << i] for i in range(4)), *of_pieces, *([i, 0] for i in range(warps, parts, warps))]
    lanes = [[0, 16 << i] for i in range(5)]
    return gl.DistributedLinearLayout(
        registers, lanes, [[1 << i, 0] for i in range(warps.bit_length() - 1)], [], [parts, 512 * pieces]
    )


@gluon.jit
def _copy_words(w_smem, w_ptr, block, group, slot, blocks: gl.constexpr, K: gl.constexpr):
    """Asks for a group's pieces of each part of a block; of gate's and up's where there are twice as many parts."""
    PARTS: gl.constexpr = gl.num_warps()
    BYTES: gl.constexpr = w_smem.shape[2]
    layout: gl.constexpr = _as_words(w_smem.shape[1], BYTES // 512, PARTS)
    parts = gl.arange(0, w_smem.shape[1], gl.SliceLayout(1, layout))
    inside = gl.arange(0, BYTES, gl.SliceLayout(0, layout))
    at = parts // PARTS * (blocks * 8 * K) + parts % PARTS * (8 * K // PARTS)
    w_ptr = w_ptr.to(gl.pointer_type(gl.int8)) + block.to(gl.int64) * (8 * K) + group * BYTES
    copy_to_shared(w_smem.index(slot), w_ptr + (at[:, None] + inside[None, :]))


@gluon.jit
def _copy_scales(smem, ptr, block, blocks: gl.constexpr, GROUPS: gl.constexpr):
    """Asks for scales of a block's parts: [power of two, ROWS] of each half; past GROUPS, the last again."""
    PARTS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * PARTS
    e = gl.arange(0, smem.shape[0], gl.BlockedLayout([4], [32], [PARTS], [0]))
    group = e // 16 % PARTS * GROUPS + gl.minimum(e // ROWS % triton.next_power_of_2(GROUPS), GROUPS - 1)
    at = e // (triton.next_power_of_2(GROUPS) * ROWS) * (blocks * ROWS * GROUPS) + group * 16 + e % 16
    copy_to_shared(smem, ptr + block.to(gl.int64) * (ROWS * GROUPS) + at)


@gluon.constexpr_function
def _of_inputs(rows, columns, warps, steps):
    """The layout of x [rows, columns] in which 8 lanes have 64 inputs of a row, or, of few rows, more lanes all of it.

    Steps are columns from register to register of the 8 inputs that a thread has side by side, then from lane to lane.
    """
    threads = 5 + warps.bit_length() - 1
    of_columns = [[0, steps[-1] << i] for i in range((columns // steps[-1]).bit_length() - 1)]
    of_rows = [[1 << i, 0] for i in range(rows.bit_length() - 1)]
    in_lanes = 3 if rows >= 4 * warps else len(of_columns)
    bases = [*of_columns[:in_lanes], *of_rows, *of_columns[in_lanes:]]
    bases += [[0, 0]] * (threads - len(bases))
    registers = [*([0, step] for step in steps[:-1]), *bases[threads:]]
    return gl.DistributedLinearLayout(registers, bases[:5], bases[5:threads], [], [rows, columns])


@gluon.jit
def _inputs(x_ptr, num_tokens, group, C: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, GROUP: gl.constexpr):
    """x of C groups of each of the parts, int32 of two: [C * PARTS * BM, GROUP / 2]; past the last token copies."""
    PARTS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _of_inputs(C * PARTS * BM, GROUP // 2, PARTS, [1, 2, 4])
    rows = gl.arange(0, C * PARTS * BM, gl.SliceLayout(1, layout))
    columns = gl.arange(0, GROUP // 2, gl.SliceLayout(0, layout))
    of_part = rows // BM % PARTS * (K // PARTS) + (group + rows // (PARTS * BM)) * GROUP
    at = (gl.minimum(rows % BM, num_tokens - 1) * K + of_part) // 2
    return gl.load(x_ptr.to(gl.pointer_type(gl.int32)) + (at[:, None] + columns[None, :]))


@gluon.jit
def _larger(a, b):
    """The larger number; NaN if one is."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.constexpr_function
def _bytes_of_sums():
    """PTX: high and low bytes of 4 numbers, to which 128 has been added; int8, high * 256 + low is the number."""
    return """{ // side by side
        .reg .b32 a, b, low;
        prmt.b32 a, $2, $3, 0x5140;
        prmt.b32 b, $4, $5, 0x5140;
        prmt.b32 $0, a, b, 0x7632;
        prmt.b32 low, a, b, 0x5410;
        lop3.b32 $1, low, 0xFFFFFFFF, 0x80808080, 0x6A;
    }"""


@gluon.jit
def _quantized(pairs, HAS_ZERO: gl.constexpr):
    """int8 [2 * rows, GROUP] of pairs of bf16 [rows, GROUP / 2], in the words' order; steps, with HAS_ZERO sums [rows].

    A number is 16 * (256 * high + low) steps, with a row of high bytes and one of low ones. 16 steps are a power of
    two, of which a row's largest number has 2^13 at least: what is not below 2^-6 of that stays as it is.
    """
    ROWS: gl.constexpr = pairs.shape[0]
    GROUP: gl.constexpr = 2 * pairs.shape[1]
    x = gl.reshape(gl.join(pairs << 16, pairs & -65536), [ROWS, GROUP]).to(gl.float32, bitcast=True)
    most = gl.reduce(gl.abs(x), 1, _larger)
    exponent = most.to(gl.int32, bitcast=True) & 0x7F800000  # times 2^23
    step = gl.maximum(exponent, 32 << 23) - (13 << 23)
    in_one = ((254 << 23) - step).to(gl.float32, bitcast=True)
    # 1.5 * 2^23 leaves no bits for what is less than a step
    q = (x * in_one[:, None] + (12582912.0 + 128.0)).to(gl.int32, bitcast=True)
    q = gl.convert_layout(q, _of_inputs(ROWS, GROUP, gl.num_warps(), [4, 1, 2, 8]), assert_trivial=True)
    # inputs as [pieces, h, j, b, k, m]
    q = gl.permute(gl.reshape(q, [ROWS, GROUP // 64, 2, 4, 2, 2, 2]), [0, 1, 2, 5, 3, 6, 4])
    high, low = gl.inline_asm_elementwise(
        _bytes_of_sums(), "=r,=r,r,r,r,r", [gl.reshape(q, [ROWS * GROUP])], dtype=(gl.int8, gl.int8), is_pure=True,
        pack=4,
    )  # fmt: skip
    q = gl.reshape(gl.permute(gl.reshape(gl.join(high, low), [ROWS, GROUP, 2]), [0, 2, 1]), [2 * ROWS, GROUP])
    step = (step - (4 << 23)).to(gl.float32, bitcast=True)  # a sixteenth: _weights are 16 times what they are
    total = gl.sum(x, 1) if HAS_ZERO else step
    return q, gl.where(exponent < 0x7F800000, step, most), total  # or infinity, NaN


@gluon.jit
def _store_inputs(x_smem, steps, totals, x_ptr, num_tokens, C: gl.constexpr, K: gl.constexpr, BM: gl.constexpr,
                  HAS_ZERO: gl.constexpr):  # fmt: skip
    """All of x, its steps and sums, C groups at a time; a few times are asked for before the first is stored."""
    GROUP: gl.constexpr = x_smem.shape[2]
    times: gl.constexpr = x_smem.shape[0]
    few: gl.constexpr = max(128 * 32 * gl.num_warps() // (x_smem.shape[1] // 2 * GROUP), 1)
    for first in gl.static_range(0, times, few):
        xs = ()
        for i in gl.static_range(first, min(first + few, times)):
            xs += (_inputs(x_ptr, num_tokens, i * C, C, K, BM, GROUP),)
        for i in gl.static_range(first, min(first + few, times)):
            q, step, total = _quantized(xs[i - first], HAS_ZERO)
            x_smem.index(i).store(q)
            steps.index(i).store(step)
            if HAS_ZERO:
                totals.index(i).store(total)


@gluon.constexpr_function
def _numbers_of_word():
    """PTX: int8 of a word's low nibbles and of its high ones, 8 less and times 16."""
    return """{ // side by side
        .reg .b32 moved;
        shl.b32 moved, $2, 4;
        lop3.b32 $0, moved, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
    }"""


@gluon.jit
def _weights(words, GROUP: gl.constexpr, mma: gl.constexpr):
    """int8 of words [PARTS, bytes] as the operand [ROWS, GROUP], 16 times what they are.

    They are in the right registers, so nothing moves.
    """
    PARTS: gl.constexpr = gl.num_warps()
    low, high = gl.inline_asm_elementwise(
        _numbers_of_word(), "=&r,=r,r", [gl.reshape(words, [PARTS * 8 * GROUP])], dtype=(gl.int8, gl.int8),
        is_pure=True, pack=4,
    )  # fmt: skip
    # words as [parts, pieces, i, j, h, k, (m, b), l]
    w = gl.reshape(gl.join(low, high), [PARTS, GROUP // 64, 8, 4, 2, 2, 4, 2])
    w = gl.reshape(gl.permute(w, [0, 7, 2, 1, 4, 5, 3, 6]), [16 * PARTS, GROUP])
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)


@gluon.jit
def _whole(parts):
    """float32 [ROWS, PARTS * BM] of int32 products, whose columns are high and low bytes' in turn."""
    high, low = gl.split(gl.reshape(parts, [parts.shape[0], parts.shape[1] // 2, 2]))
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def _product(words, scales, zeros, x, step, total, slot, group, none, layout: gl.constexpr):
    """A group's weights with x [inputs, columns], not waited for; what it is times; what is to be added."""
    mma: gl.constexpr = none.type.layout
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    scale = scales.index(group).load(of_rows)[:, None]
    offset = 0.0
    if zeros is not None:
        offset = scale * (8.0 - zeros.index(group).load(of_rows)[:, None]) * total
    w = words.index(slot).load(_as_words(gl.num_warps(), x.shape[0] // 64, gl.num_warps()))
    w = _weights(w, x.shape[0], mma)
    return warpgroup_mma(w, x, none, use_acc=False, is_async=True), scale * step, offset


@gluon.jit
def _products(words, scales, zeros, x_smem, steps, totals, slot, group, UP_FIRST: gl.constexpr, GATED: gl.constexpr,
              none, layout: gl.constexpr):  # fmt: skip
    """A group's products, what they are times, and what is to be added: of one, or of gate and up."""
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    x = x_smem.index(group).permute((1, 0))
    of_columns: gl.constexpr = gl.SliceLayout(0, layout)
    step = steps.index(group).load(of_columns)[None, :]
    total = 0.0
    if totals is not None:
        total = totals.index(group).load(of_columns)[None, :]
    part, times, offset = _product(words, scales, zeros, x, step, total, slot * HALVES, group, none, layout)
    if GATED != "":
        up, up_times, up_offset = _product(
            words, scales, zeros, x, step, total, slot * HALVES + 1, UP_FIRST + group, none, layout
        )  # fmt: skip
        return (part, up), (times, up_times), (offset, up_offset)
    else:  # noqa: RET505 - for the compiler, which reads on behind a return
        return (part,), (times,), (offset,)


@gluon.jit
def _added(sums, products, times, offsets, UNDER_WAY: gl.constexpr):
    """The sums with a group's products, when no more than those of UNDER_WAY later groups are left to wait for."""
    if len(products) == 2:
        part, up = warpgroup_mma_wait(2 * UNDER_WAY, products)
        return sums[0] + (_whole(part) * times[0] + offsets[0]), sums[1] + (_whole(up) * times[1] + offsets[1])
    else:  # noqa: RET505
        part = warpgroup_mma_wait(UNDER_WAY, products)
        return (sums[0] + (_whole(part) * times[0] + offsets[0]),)


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
    x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_scale_ptr, y_ptr, residual_ptr, new_residual_ptr,
    norm_weight_ptr, squares_ptr, eps, num_tokens, staging_ptr, deltas_ptr, step_ptr, calls, call,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr, GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, SUMS: gl.constexpr, SQUARES: gl.constexpr,
    RANKS: gl.constexpr, RANK: gl.constexpr, STAGING: gl.constexpr, PUSH: gl.constexpr, PULL: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid (outputs / 16, num_tokens / BM).

    A program has a block of 16 outputs, whose pieces lie side by side in memory. Each of its warps, 4 or 8, has a part
    of their inputs, so that the tensor cores see ROWS, 16 a warp; of the product with the parts of x those of the same
    inputs count. Words of STAGES times ROUND groups of each part are on their way. A weight is its nibble less 8, or
    with HAS_ZERO less the zero of its GROUP, 64 or 128 inputs, times that group's scale; K is a multiple of the parts
    of ROUND groups, and 2 * parts * BM of 8. SUMS, SQUARES and RANKS are stream_linear's.
    """
    outputs: gl.constexpr = N if GATED == "" else N // 2
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    PARTS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * PARTS
    groups: gl.constexpr = K // (PARTS * GROUP)  # of a part
    rounds: gl.constexpr = groups // ROUND
    gl.static_assert((GROUP == 64 or GROUP == 128) and outputs % 16 == 0 and 2 * PARTS * BM % 8 == 0)
    gl.static_assert(rounds * ROUND * GROUP * PARTS == K and 1 < STAGES and STAGES <= rounds)
    gl.static_assert(not SUMS or GATED == "")
    if PDL:
        gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_smem = gl.allocate_shared_memory(gl.int8, [STAGES * ROUND, HALVES * PARTS, 8 * GROUP], plain)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(GROUP, 8, 2)
    C: gl.constexpr = pieces_at_once(groups, PARTS * BM * GROUP, PARTS)
    x_smem = gl.allocate_shared_memory(gl.int8, [groups // C, C * 2 * PARTS * BM, GROUP], swizzled)
    step_smem = gl.allocate_shared_memory(gl.float32, [groups // C, C * PARTS * BM], flat)
    s_smem = gl.allocate_shared_memory(gl.float32, [HALVES * triton.next_power_of_2(groups) * ROWS], flat)
    total_smem, z_smem = None, None
    if HAS_ZERO:
        total_smem = gl.allocate_shared_memory(gl.float32, [groups // C, C * PARTS * BM], flat)
        z_smem = gl.allocate_shared_memory(gl.float32, [HALVES * triton.next_power_of_2(groups) * ROWS], flat)
    block = gl.program_id(0)
    token = gl.program_id(1) * BM
    x_ptr += token.to(gl.int64) * K
    _copy_scales(s_smem, w_scale_ptr, block, outputs // 16, groups)
    if HAS_ZERO:
        _copy_scales(z_smem, w_zero_ptr, block, outputs // 16, groups)
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
    deltas, flag = read_deltas(deltas_ptr, RANKS), read_flag(step_ptr, calls, call, RANKS)

    if PDL:
        gdc_wait()
    _store_inputs(x_smem, step_smem, total_smem, x_ptr, num_tokens - token, C, K, BM, HAS_ZERO)
    residual = read_residual(residual_ptr, rows, tokens, num_tokens, outputs, SUMS)
    if SQUARES:
        squares = read_squares(squares_ptr, token, num_tokens, BM, SQUARES)
    fence_async_shared()
    # where a group lies as well
    x_smem = reinterpret(x_smem, gl.int8, [groups, 2 * PARTS * BM, GROUP], swizzled)
    steps = reinterpret(step_smem, gl.float32, [groups, PARTS * BM], flat)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [PARTS, 1], [16, 2 * PARTS * BM, 32])
    none = gl.zeros([ROWS, 2 * PARTS * BM], gl.int32, mma)
    empty = _whole(none)
    sums = (empty,) if GATED == "" else (empty, empty)
    of_sums: gl.constexpr = empty.type.layout
    words = reinterpret(w_smem, gl.int8, [STAGES * ROUND * HALVES, PARTS, 8 * GROUP], plain)
    up_first: gl.constexpr = triton.next_power_of_2(groups)
    scales = reinterpret(s_smem, gl.float32, [HALVES * up_first, ROWS], flat)
    totals, zeros = None, None
    if HAS_ZERO:
        totals = reinterpret(total_smem, gl.float32, [groups, PARTS * BM], flat)
        zeros = reinterpret(z_smem, gl.float32, [HALVES * up_first, ROWS], flat)
    for r in range(rounds):
        async_copy.wait_group(STAGES - 2)
        barrier()  # also of the reads before, of the slots that are filled next
        if STAGES < rounds:  # else all is on its way
            ahead = r - 1 + STAGES
            if (r > 0) & (ahead < rounds):
                for u in gl.static_range(ROUND):
                    slot = (r - 1) % STAGES * ROUND + u
                    _copy_words(w_smem, w_ptr, block, ahead * ROUND + u, slot, outputs // 16, K)
        async_copy.commit_group()
        first_slot = r % STAGES * ROUND
        products, times, offsets = _products(
            words, scales, zeros, x_smem, steps, totals, first_slot, r * ROUND, up_first, GATED, none, of_sums
        )  # fmt: skip
        for u in gl.static_range(1, ROUND):
            later, later_times, later_offsets = _products(
                words, scales, zeros, x_smem, steps, totals, first_slot + u, r * ROUND + u, up_first, GATED, none,
                of_sums,
            )  # fmt: skip
            sums = _added(sums, products, times, offsets, 1)
            products, times, offsets = later, later_times, later_offsets
        sums = _added(sums, products, times, offsets, 0)

    factors = 1.0
    if SQUARES:
        factors = rms_factors(squares, eps, K, gl.SliceLayout(0, layout))[None, :]
    y = _of_parts(sums[0], BM, of_parts) * factors + bias
    if GATED != "":
        y = gated(y, _of_parts(sums[1], BM, of_parts) * factors + up_bias, GATED)
    y = over_ranks(
        y, staging_ptr, deltas, flag, calls, block * 16, token, num_tokens, outputs, RANKS, RANK, STAGING, PUSH, PULL
    )  # fmt: skip
    if RANKS == 1 or PULL:
        y = store_sums(
            y, residual, norm_weights, new_residual_ptr, squares_ptr, rows, tokens, num_tokens, outputs, SUMS
        )  # fmt: skip
        store_outputs(y_ptr, y * in_one, rows, tokens, num_tokens, outputs)
