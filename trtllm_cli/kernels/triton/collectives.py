"""Collectives of GPUs that see each other's memory, without the host in between.

Every rank of a group has a piece of memory of one layout, which the others have mapped. `deltas_ptr` int64 [RANKS] says
how many bytes behind an address in this rank's own the same place in each rank's memory is. RANK is this rank's place
in the group.

An all-reduce is one-shot: a rank writes what it has to all others, and waits for theirs. What is small goes as words
that each have a flag: `staging_ptr` int64 [2, RANKS - 1, STAGING], what the others wrote here, of two calls in turn.
What is large goes as it is, a program's part and then its flag, in half the bytes: int32 [2, RANKS - 1, STAGING], and
behind them the flags, int32 [2, RANKS - 1, FLAGS]; FLAGS, 0 for words with flags, is at least the number of programs.
There is no other synchronization: whoever gets to a call has seen every other rank get to the one before it, and so
past reading the one before that. The two kinds have memory of their own.

PUSH and PULL are both set on a GPU. Where one processor plays all the ranks, it first pushes for each, then pulls.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import (
    await_flagged,
    flagged,
    steps_in_one,
    steps_of_row,
    store,
    store_quantized,
)
from trtllm_cli.kernels.triton.norm import normed


@triton.jit
def _there(ptr, deltas_ptr, rank):
    """The same place in another rank's memory, as an address; a multiple of what `ptr` is a multiple of up to 16."""
    return ptr.to(tl.int64) + tl.load(deltas_ptr + rank)


@triton.jit
def _floats(words, IS_BF16: tl.constexpr):
    """What int32 words [n] hold: float32 [n], or of pairs of bf16 float32 [2 n]."""
    if IS_BF16:
        low, high = words << 16, words & -65536
        pairs = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        y = tl.reshape(pairs, (2 * words.shape[0],))
    else:
        y = words.to(tl.float32, bitcast=True)
    return y


@triton.jit
def _sum_over_ranks(
    x_ptr, staging_ptr, deltas_ptr, flag, row, start,
    WORDS: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, STAGING: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr,
):  # fmt: skip
    """float32: the sum over the ranks, in their order, of BLOCK words from `start` on of a row of x, WORDS long."""
    IS_BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    OTHERS: tl.constexpr = RANKS - 1
    columns = start + tl.arange(0, BLOCK)
    mask = columns < WORDS
    own = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + row * WORDS + columns, mask=mask, other=0)
    slot, place = (flag & 1).to(tl.int64) * OTHERS, row * WORDS + columns
    flags_ptr = staging_ptr + 2 * OTHERS * STAGING + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    if PUSH:
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                there = slot + (RANK - (RANK > peer))  # this rank among the peer's others
                theirs = tl.multiple_of(_there(staging_ptr, deltas_ptr, peer).to(staging_ptr.dtype), 16)
                if FLAGS == 0:
                    tl.store(theirs + there * STAGING + place, flagged(own, flag), mask=mask, cache_modifier=".wt")
                else:
                    tl.store(theirs + there * STAGING + place, own, mask=mask)
                    tl.debug_barrier()  # all threads have written, before one of them says so
                    at = _there(flags_ptr + there * FLAGS, deltas_ptr, peer).to(staging_ptr.dtype)
                    tl.atomic_xchg(at, flag, sem="release", scope="sys")
    total = tl.zeros_like(_floats(own, IS_BF16))
    if PULL:
        for source in tl.static_range(RANKS):
            if source == RANK:
                total += _floats(own, IS_BF16)
            else:
                here = slot + (source - (source > RANK))
                words_ptr = staging_ptr + here * STAGING + place
                if FLAGS == 0:
                    words = await_flagged(words_ptr, mask, flag)
                else:
                    arrived = tl.atomic_add(flags_ptr + here * FLAGS, 0, sem="acquire", scope="sys")
                    while arrived != flag:
                        arrived = tl.atomic_add(flags_ptr + here * FLAGS, 0, sem="acquire", scope="sys")
                    tl.debug_barrier()
                    words = tl.load(words_ptr, mask=mask, other=0)
                total += _floats(words, IS_BF16)
    return total


@triton.jit
def all_reduce(
    x_ptr, staging_ptr, deltas_ptr, step_ptr, calls, call, out_ptr,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, STAGING: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.all_reduce; grid (rows, cdiv(WIDTH, BLOCK)).

    x bf16 (WIDTH is even) or float32 [rows, WIDTH], rows * WIDTH elements being at most STAGING words of 4 bytes; out
    [rows, WIDTH]. step int32 [1]: the step's number; `call`: which of a step's `calls` this is.
    """
    if PDL:
        gdc_launch_dependents()
    PER_WORD: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.bfloat16 else 1
    flag = tl.load(step_ptr) * calls + call
    if PDL:
        gdc_wait()
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * (BLOCK // PER_WORD)
    x = _sum_over_ranks(
        x_ptr, staging_ptr, deltas_ptr, flag, row, start, WIDTH // PER_WORD, RANKS, RANK, STAGING, FLAGS,
        BLOCK // PER_WORD, PUSH, PULL,
    )  # fmt: skip
    if PULL:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        store(out_ptr + row * WIDTH + columns, x, columns < WIDTH)


@triton.jit
def all_reduce_add_rms_norm(
    x_ptr, staging_ptr, deltas_ptr, step_ptr, calls, call, residual_ptr, weight_ptr, out_ptr, new_residual_ptr,
    out_scale_ptr, row_scale_ptr, eps,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, STAGING: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, QUANT: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """all_reduce, and norm.rms_norm with HAS_RESIDUAL of the sum, which is not rounded in between; grid (rows,).

    BLOCK is a power of two, at least WIDTH.
    """
    if PDL:
        gdc_launch_dependents()
    PER_WORD: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.bfloat16 else 1
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    flag = tl.load(step_ptr) * calls + call
    in_one = steps_in_one(out_scale_ptr, QUANT)
    if PDL:
        gdc_wait()
    residual = tl.load(residual_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    x = _sum_over_ranks(
        x_ptr, staging_ptr, deltas_ptr, flag, row, 0, WIDTH // PER_WORD, RANKS, RANK, STAGING, FLAGS,
        BLOCK // PER_WORD, PUSH, PULL,
    )  # fmt: skip
    if PULL:
        x += residual
        tl.store(new_residual_ptr + row * WIDTH + columns, x.to(new_residual_ptr.dtype.element_ty), mask=mask)
        y = normed(x, weight, eps, WIDTH, 0)
        row_scale_ptr += row * steps_of_row(QUANT, WIDTH)
        store_quantized(out_ptr + row * WIDTH + columns, y, mask, in_one, row_scale_ptr, QUANT)


@triton.jit
def sync_ranks(
    arrivals_ptr, deltas_ptr,
    RANKS: tl.constexpr, RANK: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ends when every rank has come here: what each wrote before, into anyone's memory, is then there; grid (1,).

    arrivals int32 [RANKS]: how often each has come and was not waited for yet.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if PUSH:
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                theirs = _there(arrivals_ptr + RANK, deltas_ptr, peer).to(tl.pointer_type(tl.int32))
                tl.atomic_add(theirs, 1, sem="release", scope="sys")
    if PULL:
        for source in tl.static_range(RANKS):
            if source != RANK:
                arrived = tl.atomic_add(arrivals_ptr + source, 0, sem="acquire", scope="sys")
                while arrived < 1:
                    arrived = tl.atomic_add(arrivals_ptr + source, 0, sem="acquire", scope="sys")
                tl.atomic_add(arrivals_ptr + source, -1, sem="relaxed", scope="sys")


@triton.jit
def all_gather(
    x_ptr, deltas_ptr, out_ptr,
    WIDTH: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes x [rows, WIDTH] as this rank's part of everyone's out [rows, RANKS * WIDTH]; grid (rows, blocks).

    With a `sync_ranks` before it, so that no rank needs what lies there any more, and one after it.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * WIDTH + columns, mask=mask, other=0.0)
    for peer in tl.static_range(RANKS):
        theirs = tl.multiple_of(_there(out_ptr, deltas_ptr, peer).to(out_ptr.dtype), 16)
        tl.store(theirs + row * (RANKS * WIDTH) + RANK * WIDTH + columns, x, mask=mask)


@triton.jit
def all_gather_words(
    x_ptr, staging_ptr, deltas_ptr, step_ptr, out_ptr,
    WORDS: tl.constexpr, RANKS: tl.constexpr, RANK: tl.constexpr, STAGING: tl.constexpr, BLOCK: tl.constexpr,
    PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """all_gather of few rows of WORDS int32, each with the step's number, in one kernel; grid (rows, blocks).

    staging int64 [RANKS - 1, STAGING]. Between two of them every rank waits for every other, in an all-reduce: what the
    first one sent has been read then.
    """
    if PDL:
        gdc_launch_dependents()
    flag = tl.load(step_ptr)
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WORDS
    place = row * WORDS + columns
    if PDL:
        gdc_wait()
    own = tl.load(x_ptr + place, mask=mask, other=0)
    if PUSH:
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                theirs = tl.multiple_of(_there(staging_ptr, deltas_ptr, peer).to(staging_ptr.dtype), 16)
                there = (RANK - (RANK > peer)) * STAGING + place
                tl.store(theirs + there, flagged(own, flag), mask=mask, cache_modifier=".wt")
    if PULL:
        for source in tl.static_range(RANKS):
            words = own
            if source != RANK:
                words = await_flagged(staging_ptr + (source - (source > RANK)) * STAGING + place, mask, flag)
            tl.store(out_ptr + row * (RANKS * WORDS) + source * WORDS + columns, words, mask=mask)
