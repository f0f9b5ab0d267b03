"""What changes a step's logits before sampling: penalties and bans, as run/sampler.py has them, in place.

A row of `counts` is a batch row's tokens: of each token id how often it is in the output, and, in the sign bit, whether
it is in the prompt. int16 does for sequences of less than 2**15 tokens, int32 for all.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def penalize(
    logits_ptr,
    logits_rows_ptr,
    rows_ptr,
    uncounted_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    last_tokens_ptr,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Counts each row's last token, then applies its penalties. Grid (ceil(VOCAB / TILE), n).

    logits float32 [num_logits, ROW_STRIDE], changed in place; logits_rows int32 [n], no two the same; rows int32 [n];
    uncounted int32 [n]: whether last_tokens[row] is not yet in counts[row], to which it is added then; repetition (1 is
    off), presence and frequency (0 is off) float32 [n]; counts int16 or int32 [rows, ROW_STRIDE]; last_tokens int32
    [rows]. TILE is a power of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    this = tl.program_id(1)
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(rows_ptr + this)
    count_ptrs = counts_ptr + row.to(tl.int64) * ROW_STRIDE + ids
    count_type: tl.constexpr = counts_ptr.dtype.element_ty
    most: tl.constexpr = (1 << (count_type.primitive_bitwidth - 1)) - 1
    counts = tl.load(count_ptrs, mask=ids < VOCAB, other=0).to(tl.int32)
    is_last = (ids == tl.load(last_tokens_ptr + row)) & (tl.load(uncounted_ptr + this) != 0)
    counts += is_last.to(tl.int32)
    tl.store(count_ptrs, counts.to(count_type), mask=is_last)

    seen = (counts != 0) & (ids < VOCAB)
    logits_ptrs = logits_ptr + tl.load(logits_rows_ptr + this).to(tl.int64) * ROW_STRIDE + ids
    x = tl.load(logits_ptrs, mask=seen, other=0.0)
    repetition = tl.load(repetition_ptr + this)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    in_output = counts & most
    penalty = tl.load(presence_ptr + this) + tl.load(frequency_ptr + this) * in_output.to(tl.float32)
    tl.store(logits_ptrs, tl.where(in_output > 0, x - penalty, x), mask=seen)


@triton.jit
def ban(logits_ptr, banned_ptr, ROW_STRIDE: tl.constexpr, PDL: tl.constexpr):
    """Makes logits -inf. Grid (n): banned int32 [n, 2], a row of the logits and a token id; n may name one twice."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(banned_ptr + 2 * tl.program_id(0))
    token = tl.load(banned_ptr + 2 * tl.program_id(0) + 1)
    tl.store(logits_ptr + row.to(tl.int64) * ROW_STRIDE + token, -float("inf"))
