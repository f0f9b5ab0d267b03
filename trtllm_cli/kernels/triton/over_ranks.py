"""Sums over ranks of what a kernel has in registers, in Gluon: the exchange of collectives.all_reduce_add_rms_norm.

So a rank may have its sum by either, whatever the others do. That module says what a kernel is told of the ranks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trtllm_cli.kernels.triton.device import (
    await_flagged,
    await_words,
    await_words_constraints,
    flagged,
    is_compiled,
)


@gluon.jit
def read_deltas(deltas_ptr, RANKS: gl.constexpr):
    """How far each rank's memory is, ahead of `gdc_wait`."""
    deltas = ()
    for rank in gl.static_range(RANKS if RANKS > 1 else 0):
        deltas += (gl.load(deltas_ptr + rank),)
    return deltas


@gluon.jit
def read_flag(step_ptr, calls, call, RANKS: gl.constexpr):
    """What marks this call's words, ahead of `gdc_wait`."""
    flag = 0
    if RANKS > 1:
        if calls > 0:
            flag = gl.load(step_ptr) * calls + call
    return flag


@gluon.constexpr_function
def in_pairs(tokens, warps):
    """The layout of [rows, tokens] in which a thread has two rows that are side by side, and all tokens."""
    return gl.BlockedLayout([2, tokens], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _await(ptrs, flag):
    """The words, int32 [pairs, tokens], that lie flagged at these pointers, of all tokens in each thread."""
    if is_compiled():
        words = gl.inline_asm_elementwise(
            await_words(ptrs.shape[1]), await_words_constraints(ptrs.shape[1], ptrs.shape[1]), [ptrs, flag],
            dtype=gl.int32, is_pure=False, pack=ptrs.shape[1],
        )  # fmt: skip
    else:
        words = await_flagged(ptrs, True, flag)
    return words


@gluon.jit
def _bits(x):
    """int32: float32 rounded to bf16, in the low half."""
    return x.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF


@gluon.jit
def _exchanged(
    y, staging_ptr, deltas, flag, first, token, num_tokens, outputs: gl.constexpr, RANKS: gl.constexpr,
    RANK: gl.constexpr, STAGING: gl.constexpr, PUSH: gl.constexpr, PULL: gl.constexpr,
):  # fmt: skip
    """y [rows, tokens] of the ranks, each rounded to bf16, in their order: the sum."""
    PAIRS: gl.constexpr = y.shape[0] // 2
    BM: gl.constexpr = y.shape[1]
    OTHERS: gl.constexpr = RANKS - 1
    paired = gl.convert_layout(y, in_pairs(BM, gl.num_warps()))
    low, high = gl.split(gl.permute(gl.reshape(paired, [PAIRS, 2, BM]), (0, 2, 1)))
    own = _bits(low) | (_bits(high) << 16)
    layout: gl.constexpr = own.type.layout
    pairs = first // 2 + gl.arange(0, PAIRS, gl.SliceLayout(1, layout))
    tokens = token + gl.arange(0, BM, gl.SliceLayout(0, layout))
    # past the last token its words, so that nobody waits for what is not sent
    at = gl.minimum(tokens, num_tokens - 1)[None, :] * (outputs // 2) + pairs[:, None]
    slot = (flag & 1).to(gl.int64) * OTHERS
    if PUSH:
        for peer in gl.static_range(RANKS):
            if peer != RANK:
                place = (slot + (RANK - (RANK > peer))) * STAGING  # this rank's among the peer's others
                theirs = (staging_ptr.to(gl.int64) + deltas[peer]).to(staging_ptr.dtype)
                gl.store(
                    theirs + place + at, flagged(own, flag), mask=(tokens < num_tokens)[None, :], cache_modifier=".wt"
                )
    if PULL:
        low, high = gl.zeros_like(own).to(gl.float32), gl.zeros_like(own).to(gl.float32)
        for source in gl.static_range(RANKS):
            words = own
            if source != RANK:
                words = _await(staging_ptr + ((slot + (source - (source > RANK))) * STAGING + at), flag)
            low += (words << 16).to(gl.float32, bitcast=True)
            high += (words & -65536).to(gl.float32, bitcast=True)
        total = gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), [2 * PAIRS, BM])
        y = gl.convert_layout(total, y.type.layout)
    return y


@gluon.jit
def over_ranks(
    y, staging_ptr, deltas, flag, calls, first, token, num_tokens, outputs: gl.constexpr, RANKS: gl.constexpr,
    RANK: gl.constexpr, STAGING: gl.constexpr, PUSH: gl.constexpr, PULL: gl.constexpr,
):  # fmt: skip
    """y, of one rank or with `calls` 0 as it is; else summed over the ranks."""
    if RANKS > 1:
        if calls > 0:
            y = _exchanged(
                y, staging_ptr, deltas, flag, first, token, num_tokens, outputs, RANKS, RANK, STAGING, PUSH, PULL
            )  # fmt: skip
    return y
