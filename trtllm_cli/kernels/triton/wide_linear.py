"""Linears of 9 to 64 tokens, bf16 or fp8, whose weights are on their way before the kernel in front has ended.

stream_linear's sibling for more tokens than fit beside each other, as wide_words is stream_words'. Weights are the rows
of the products, tokens their columns, so that tiles of both lie in shared memory as they lie in memory. A round's
products go on while the next round's tiles are waited for. linear.py's skinny_linear is the slow twin.
"""

from __future__ import annotations

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
from trtllm_cli.kernels.triton.gluon_names import barrier, reinterpret
from trtllm_cli.kernels.triton.linear import COUNTERS
from trtllm_cli.kernels.triton.stream_linear import (
    copy_inputs,
    copy_weights,
    read_biases,
    read_in_one,
    read_scale,
    side_by_side,
    store_outputs,
)


@gluon.jit
def waited(most: gl.constexpr, sums):
    """The sums, when no more than so many products are left to wait for."""
    if len(sums) == 1:
        return (warpgroup_mma_wait(most, sums),)
    else:  # noqa: RET505 - for the compiler, which reads on behind a return
        return warpgroup_mma_wait(most, sums)


@gluon.constexpr_function
def _in_lines(dtype, rows, warps):
    """The layout of outputs [rows, tokens] in which a thread stores 16 bytes of a token."""
    each = min(side_by_side(dtype), rows)
    lanes = min(32, rows // each)
    return gl.BlockedLayout([each, 1], [lanes, 32 // lanes], [1, warps], [0, 1])


@gluon.jit
def _end(
    sums, factors, biases, in_one, y_ptr, first, token, num_tokens, outputs: gl.constexpr, R: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """From sums [rows, tokens] to what is stored, in their layout up to its type."""
    ROWS: gl.constexpr = sums[0].shape[0]
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    layout: gl.constexpr = _in_lines(DTYPE, ROWS, gl.num_warps())
    tokens = token + gl.arange(0, sums[0].shape[1], gl.SliceLayout(0, layout))
    for r in gl.static_range(R):
        y = sums[r] * factors[r] + biases[2 * r]
        if GATED != "":
            y = gated(y, sums[R + r] * factors[R + r] + biases[2 * r + 1], GATED)
        rows = first + r * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        y = gl.convert_layout((y * in_one).to(DTYPE), layout)
        store_outputs(y_ptr, y, rows, tokens, num_tokens, outputs)


@gluon.jit
def end_split(
    sums, factors, biases, in_one, scratch_ptr, y_ptr, first, token, num_tokens, outputs: gl.constexpr, R: gl.constexpr,
    GATED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """_end, by the last of the SPLIT programs (axis 0) of an output tile (axes 1 and 2); see linear.py.

    `sums` [rows, tokens] of each of R times as many rows, with GATED of the gate's, then of up's, and `factors` that
    they are times; `biases` of the first rows, then of up's first rows, and so on.
    """
    if SPLIT == 1:
        _end(sums, factors, biases, in_one, y_ptr, first, token, num_tokens, outputs, R, GATED)
    else:
        P: gl.constexpr = len(sums)
        layout: gl.constexpr = sums[0].type.layout
        BN: gl.constexpr = sums[0].shape[0]
        BM: gl.constexpr = sums[0].shape[1]
        AT_ONCE: gl.constexpr = min(SPLIT & -SPLIT, max(256 // (P * BM), 1))  # not to take too many registers
        rows = gl.arange(0, BN, gl.SliceLayout(1, layout))
        columns = gl.arange(0, BM, gl.SliceLayout(0, layout))
        tile = gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)
        at = scratch_ptr + COUNTERS + tile * (SPLIT * P * BN * BM) + (rows[:, None] * BM + columns[None, :])
        for p in gl.static_range(P):
            gl.store(at + (gl.program_id(0) * P + p) * (BN * BM), sums[p])
        barrier()  # all of the parts are written before the count goes up
        if gl.atomic_add(scratch_ptr + tile, 1.0, sem="acq_rel") == SPLIT - 1:
            totals = ()
            for p in gl.static_range(P):
                total = gl.zeros([BN, BM], gl.float32, layout)
                for first_part in range(0, SPLIT, AT_ONCE):
                    for i in gl.static_range(AT_ONCE):
                        total += gl.load(at + ((first_part + i) * P + p) * (BN * BM), cache_modifier=".cg")
                totals += (total,)
            gl.store(scratch_ptr + tile, 0.0)
            _end(totals, factors, biases, in_one, y_ptr, first, token, num_tokens, outputs, R, GATED)


@gluon.jit
def wide_linear(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, out_scale_ptr, scratch_ptr, y_ptr, num_tokens,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr,
    SPLIT: gl.constexpr, W_SCALE: gl.constexpr, X_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid (SPLIT, num_tokens / BM, outputs / (16 R warps)): programs of the same weights follow each other.

    A program has R times 16 outputs a warp (4 or 8 warps), with GATED as many gates and ups, and a SPLITth of their
    inputs, in rounds of ROUND pieces of 128 bytes; STAGES rounds, 3 or more, have room, all but two of them are on
    their way. Sums are split as linear.py's are.
    """
    outputs: gl.constexpr = N if GATED == "" else N // 2
    DTYPE: gl.constexpr = w_ptr.dtype.element_ty
    BK: gl.constexpr = 8 * side_by_side(DTYPE)
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    HALVES: gl.constexpr = 1 if GATED == "" else 2
    P: gl.constexpr = HALVES * R
    rounds: gl.constexpr = K // (BK * ROUND * SPLIT)
    gl.static_assert(rounds * ROUND * BK * SPLIT == K and outputs % (R * ROWS) == 0 and outputs * K < 2**31)
    gl.static_assert(2 < STAGES and STAGES <= rounds and BM % 8 == 0)
    if PDL:
        gdc_launch_dependents()
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, DTYPE.primitive_bitwidth, 2)
    w_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROUND * P * ROWS, BK], swizzled)
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROUND * BM, BK], swizzled)
    start = gl.program_id(0) * rounds
    token = gl.program_id(1) * BM
    first = gl.program_id(2) * (R * ROWS)
    for s in gl.static_range(STAGES):
        copy_weights(w_smem, w_ptr, first, start + s, s, K, outputs, K, ROUND, HALVES)

    # What is no output of the kernel in front is read here too: after the products it would have to be waited for.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 2 * side_by_side(DTYPE)])
    biases, scales, up_scales = (), (), ()
    for r in gl.static_range(R):
        rows = first + r * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        biases += read_biases(bias_ptr, rows, outputs, HAS_BIAS, GATED)
        scales += (read_scale(w_scale_ptr, rows, 0, W_SCALE),)
        if GATED != "":
            up_scales += (read_scale(w_scale_ptr, rows, outputs, W_SCALE),)
    in_one = read_in_one(y_ptr, out_scale_ptr)
    x_scale = 1.0
    if X_SCALE == "one":
        x_scale = gl.load(x_scale_ptr)

    if PDL:
        gdc_wait()
    x_ptr += token.to(gl.int64) * K
    for s in gl.static_range(STAGES):
        copy_inputs(x_smem, x_ptr, num_tokens - token, start + s, s, K, K, BM, 1, ROUND)
    async_copy.commit_group()
    if X_SCALE == "row":
        tokens = token + gl.arange(0, BM, gl.SliceLayout(0, mma))
        x_scale = gl.load(x_scale_ptr + gl.minimum(tokens, num_tokens - 1))[None, :]
    async_copy.wait_group(0)

    sums = ()
    for _ in gl.static_range(P):
        sums += (gl.zeros([ROWS, BM], gl.float32, mma),)
    parts: gl.constexpr = ROUND * P
    weights = reinterpret(w_smem, DTYPE, [STAGES * parts, ROWS, BK], swizzled)
    inputs = reinterpret(x_smem, DTYPE, [STAGES * ROUND, BM, BK], swizzled)
    for i in range(rounds):
        async_copy.wait_group(STAGES - 3)
        barrier()  # also of the products before the last, which read the slot that is filled next
        fence_async_shared()
        slot = i % STAGES
        for u in gl.static_range(ROUND):
            x = inputs.index(slot * ROUND + u).permute((1, 0))
            made = ()
            for p in gl.static_range(P):
                made += (warpgroup_mma(weights.index(slot * parts + u * P + p), x, sums[p], is_async=True),)
            sums = made
        if STAGES < rounds:  # else all is on its way
            ahead = i - 2 + STAGES
            if (i > 1) & (ahead < rounds):
                free = (i - 2) % STAGES
                copy_weights(w_smem, w_ptr, first, start + ahead, free, K, outputs, K, ROUND, HALVES)
                copy_inputs(x_smem, x_ptr, num_tokens - token, start + ahead, free, K, K, BM, 1, ROUND)
        async_copy.commit_group()
        sums = waited(parts, sums)
    sums = waited(0, sums)

    factors = ()
    for p in gl.static_range(P):
        factors += ((scales + up_scales)[p] * x_scale,)
    end_split(
        sums, factors, biases, in_one, scratch_ptr, y_ptr, first, token, num_tokens, outputs, R, GATED, SPLIT
    )  # fmt: skip
