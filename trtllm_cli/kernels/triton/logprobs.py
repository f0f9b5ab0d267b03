"""Log probabilities of the tokens that were sampled and of the most likely ones, as run/sampler.py has them.

Tokens are ranked by how far their logit is below the best, equals by id: (distance's bits, id) is one integer, of which
no two are the same, and the least is taken again and again. A chunk of the vocabulary first gives its own most likely.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOWEST = tl.constexpr(-1e30)  # as sample.py
ID_BITS = tl.constexpr(31)
NO_ID = tl.constexpr(0x7FFFFFFF)
LAST_RANK = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _best(partial_ptr, sample, splits, SPLITS_BLOCK: tl.constexpr):
    """The largest logit of a sample's row, of what `sample` found in each split."""
    split = tl.arange(0, SPLITS_BLOCK)
    return tl.max(tl.load(partial_ptr + (sample * splits + split) * 4, mask=split < splits, other=LOWEST), axis=0)


@triton.jit
def _rank(shifted, ids, there):
    """int64, ascending with unlikeliness and then with the id; `shifted` is logit - best, at most 0."""
    distance = tl.abs(shifted).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(there, (distance << ID_BITS) | ids.to(tl.int64), LAST_RANK)


@triton.jit
def likely_of_chunks(
    logits_ptr,
    logits_rows_ptr,
    samples_ptr,
    numbers_ptr,
    partial_ptr,
    splits,
    likely_ptr,
    weights_ptr,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each chunk of token ids the most likely, and its weight. Grid (ceil(VOCAB / CHUNK), n), after `sample`.

    logits float32 [num_logits, ROW_STRIDE] and logits_rows int32 as `sample` had them, partial float32 [_, splits, 4]
    as it left them; samples int32 [n]: which of the samples; numbers int32 [n]: how many of the most likely, up to
    MOST. Writes likely int32 [n, chunks, MOST] (NO_ID where the chunk has no more) and weights float32 [n, chunks], the
    sums of exp(logit - best). CHUNK and SPLITS_BLOCK, at least splits, are powers of two.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk, this = tl.program_id(0), tl.program_id(1)
    sample = tl.load(samples_ptr + this)
    best = _best(partial_ptr, sample, splits, SPLITS_BLOCK)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ptr = logits_ptr + tl.load(logits_rows_ptr + sample).to(tl.int64) * ROW_STRIDE
    shifted = tl.load(row_ptr + ids, mask=ids < VOCAB, other=-float("inf")) - best
    place = this * tl.num_programs(0) + chunk
    tl.store(weights_ptr + place, tl.sum(tl.exp(shifted), axis=0))
    ranks = _rank(shifted, ids, ids < VOCAB)
    for i in range(tl.load(numbers_ptr + this)):
        first = tl.min(ranks, axis=0)
        tl.store(likely_ptr + place * MOST + i, (first & NO_ID).to(tl.int32))
        ranks = tl.where(ranks == first, LAST_RANK, ranks)


@triton.jit
def logprobs(
    logits_ptr,
    logits_rows_ptr,
    samples_ptr,
    numbers_ptr,
    partial_ptr,
    splits,
    likely_ptr,
    weights_ptr,
    tokens_ptr,
    out_ids_ptr,
    out_logprobs_ptr,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    MOST_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sampled token's log probability, then those of the most likely. Grid (n), after `likely_of_chunks`.

    tokens int32 as the sampling kernels left them, the other arguments as there. Writes out_ids int32 and out_logprobs
    float32, [n, 1 + MOST], as far as is asked for. The blocks are powers of two, CHUNKS = ceil(VOCAB / CHUNK).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    this = tl.program_id(0)
    sample = tl.load(samples_ptr + this)
    number = tl.load(numbers_ptr + this)
    best = _best(partial_ptr, sample, splits, SPLITS_BLOCK)
    row_ptr = logits_ptr + tl.load(logits_rows_ptr + sample).to(tl.int64) * ROW_STRIDE
    out_ids_ptr += this * (1 + MOST)
    out_logprobs_ptr += this * (1 + MOST)

    chunk = tl.arange(0, CHUNKS_BLOCK)
    weights = tl.load(weights_ptr + this * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    log_total = tl.log(tl.sum(weights, axis=0))
    token = tl.maximum(tl.load(tokens_ptr + sample), 0)  # -1: not finite, which is found with the token
    tl.store(out_ids_ptr, token)
    tl.store(out_logprobs_ptr, tl.load(row_ptr + token) - best - log_total)

    index = tl.arange(0, CHUNKS_BLOCK * MOST_BLOCK)
    chunk, place = index // MOST_BLOCK, index % MOST_BLOCK
    there = (chunk < CHUNKS) & (place < number)
    ids = tl.load(likely_ptr + (this * CHUNKS + chunk) * MOST + place, mask=there, other=NO_ID)
    there = ids < VOCAB
    ranks = _rank(tl.load(row_ptr + ids, mask=there, other=0.0) - best, ids, there)
    for i in range(number):
        first = tl.min(ranks, axis=0)
        tl.store(out_ids_ptr + 1 + i, (first & NO_ID).to(tl.int32))
        distance = (first >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(out_logprobs_ptr + 1 + i, -distance - log_total)
        ranks = tl.where(ranks == first, LAST_RANK, ranks)
