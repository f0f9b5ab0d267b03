"""Mixture of experts: routing, sorting the tokens by expert, the experts' linear layers, and their sum.

A pair is a token's choice of an expert: pair `token * top_k + choice`, as `ids` [num_tokens, top_k] lies in memory. An
expert is counted from this rank's first; a pair of another rank's expert, or of none (id -1, a padded token), belongs
to expert NUM_EXPERTS, whose output is zeros.

Many tokens: `sort_pairs`, or for thousands of pairs `count_pairs`, `scan_counts` and `place_pairs`, put the pairs in
runs by expert, each run padded to whole blocks of BLOCK_M (as vLLM's moe_align_block_size); `expert_linear` multiplies
a block by its expert's weight. Few tokens: `expert_linear_pairs` takes each pair by itself, without sorting.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import sigmoid


@triton.jit
def route(
    logits_ptr, bias_ptr, slot_mapping_ptr, weights_ptr, ids_ptr, scaling,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_GROUP: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.route; grid (num_tokens,), one warp.

    logits bf16 or float32 [num_tokens, NUM_EXPERTS], bias float32 [NUM_EXPERTS]; weights float32 and ids int32
    [num_tokens, TOP_K]. slot_mapping int32 [num_tokens], with HAS_SLOTS: a token at -1 goes to no expert (id -1, weight
    0), so that padding reads no weights. NUM_GROUPS and TOP_GROUPS are 1 without groups. Powers of two: BLOCK_K of
    TOP_K, BLOCK_GROUPS of NUM_GROUPS, BLOCK_GROUP of a group's experts.
    """
    tl.static_assert(SCORING == "softmax" or SCORING == "sigmoid")
    GROUP: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    if PDL:
        gdc_launch_dependents()
    groups, within = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_GROUP)[None, :]
    experts = groups[:, None] * GROUP + within
    mask = (groups[:, None] < NUM_GROUPS) & (within < GROUP)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + experts, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    logits = tl.load(logits_ptr + token * NUM_EXPERTS + experts, mask=mask, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        powers = tl.exp(logits - tl.max(logits))
        scores = powers / tl.sum(powers)
    else:
        scores = sigmoid(logits)
    choice = scores
    if HAS_BIAS:
        choice += bias
    choice = tl.where(mask, choice, float("-inf"))
    if NUM_GROUPS > TOP_GROUPS:
        best, first = tl.max(choice, axis=1, return_indices=True)
        if SCORING == "sigmoid":
            best += tl.max(tl.where(within == first[:, None], float("-inf"), choice), axis=1)
        best = tl.where(groups < NUM_GROUPS, best, float("-inf"))
        kept = groups < 0
        for _ in tl.static_range(TOP_GROUPS):
            place = tl.argmax(best, axis=0)
            kept |= groups == place
            best = tl.where(groups == place, float("-inf"), best)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    # From here on flat; groups come first, so that the order is still the experts'.
    choice = tl.reshape(choice, (BLOCK_GROUPS * BLOCK_GROUP,))
    scores = tl.reshape(scores, (BLOCK_GROUPS * BLOCK_GROUP,))
    places, ranks = tl.arange(0, BLOCK_GROUPS * BLOCK_GROUP), tl.arange(0, BLOCK_K)
    weights, ids = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for j in tl.static_range(TOP_K):
        place = tl.argmax(choice, axis=0)  # the first among equals
        weights = tl.where(ranks == j, tl.sum(tl.where(places == place, scores, 0.0)), weights)
        ids = tl.where(ranks == j, place // BLOCK_GROUP * GROUP + place % BLOCK_GROUP, ids)
        choice = tl.where(places == place, float("-inf"), choice)
    if RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights), 1e-20)
    weights *= scaling
    if HAS_SLOTS:
        padded = tl.load(slot_mapping_ptr + token) < 0
        weights, ids = tl.where(padded, 0.0, weights), tl.where(padded, -1, ids)
    tl.store(weights_ptr + token * TOP_K + ranks, weights, mask=ranks < TOP_K)
    tl.store(ids_ptr + token * TOP_K + ranks, ids, mask=ranks < TOP_K)


@triton.jit
def _experts_of(ids_ptr, pairs, num_pairs, first_expert, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """The expert of each of `pairs`; BINS - 1 of those past the end."""
    experts = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=0) - first_expert
    experts = tl.where((experts >= 0) & (experts < NUM_EXPERTS), experts, NUM_EXPERTS)
    return tl.where(pairs < num_pairs, experts, BINS - 1)


@triton.jit
def _padded(totals, NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr):
    """Each expert's run, in whole blocks of pairs."""
    real = tl.arange(0, BINS) <= NUM_EXPERTS
    return tl.where(real, (totals + BLOCK_M - 1) // BLOCK_M * BLOCK_M, 0)


@triton.jit
def _place(sorted_ptr, pairs, experts, starts, num_pairs, CHUNK: tl.constexpr):
    """Stores pairs behind the `starts` of their experts' runs, in order."""
    order = tl.arange(0, CHUNK)
    same = (experts[:, None] == experts[None, :]) & (order[None, :] < order[:, None])
    places = tl.gather(starts, experts, 0) + tl.sum(same.to(tl.int32), axis=1)
    tl.store(sorted_ptr + places, pairs, mask=pairs < num_pairs)


@triton.jit
def _name_blocks(
    block_experts_ptr, blocks, last, ends, BINS: tl.constexpr
):  # fmt: skip
    """Stores the expert of each of `blocks` below `last`, -1 behind all runs; they end at `ends` [BINS], in blocks."""
    experts = tl.sum((ends[None, :] <= blocks[:, None]).to(tl.int32), axis=1)
    tl.store(block_experts_ptr + blocks, tl.where(experts < BINS, experts, -1), mask=blocks < last)


@triton.jit
def sort_pairs(
    ids_ptr, sorted_ptr, block_experts_ptr, num_pairs, max_blocks, first_expert,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pairs in runs by expert, in their order within one; grid (1,), for up to about 2000 pairs.

    ids int32 [num_pairs]. sorted int32 [max_blocks * BLOCK_M]: pairs, -1 where a run is padded. block_experts int32
    [max_blocks]: each block's expert, -1: it is behind the last. max_blocks is at least
    min(num_pairs, num_pairs / BLOCK_M + NUM_EXPERTS + 1). BINS is a power of two, at least 32 and NUM_EXPERTS + 2.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    order = tl.arange(0, CHUNK)
    for start in range(0, max_blocks * BLOCK_M, CHUNK):
        tl.store(sorted_ptr + start + order, tl.full((CHUNK,), -1, tl.int32), mask=start + order < max_blocks * BLOCK_M)
    totals = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        experts = _experts_of(ids_ptr, start + order, num_pairs, first_expert, NUM_EXPERTS, BINS)
        totals += tl.histogram(experts, BINS)
    runs = _padded(totals, NUM_EXPERTS, BLOCK_M, BINS)
    ends = tl.cumsum(runs, 0)
    starts = ends - runs
    tl.debug_barrier()  # the pairs that follow replace -1 that other threads have stored
    for start in range(0, num_pairs, CHUNK):
        experts = _experts_of(ids_ptr, start + order, num_pairs, first_expert, NUM_EXPERTS, BINS)
        _place(sorted_ptr, start + order, experts, starts, num_pairs, CHUNK)
        starts += tl.histogram(experts, BINS)
    for start in range(0, max_blocks, 32):
        _name_blocks(block_experts_ptr, start + tl.arange(0, 32), max_blocks, ends // BLOCK_M, BINS)


@triton.jit
def count_pairs(
    ids_ptr, counts_ptr, sorted_ptr, num_pairs, max_blocks, first_expert,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first of three that do what sort_pairs does; grid (chunks,), chunks = cdiv(num_pairs, CHUNK).

    counts int32 [BINS, chunks]: the chunk's pairs of each expert. Fills `sorted` with -1.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    order = tl.arange(0, CHUNK)
    experts = _experts_of(ids_ptr, chunk * CHUNK + order, num_pairs, first_expert, NUM_EXPERTS, BINS)
    tl.store(counts_ptr + tl.arange(0, BINS) * chunks + chunk, tl.histogram(experts, BINS))
    for start in range(chunk * CHUNK, max_blocks * BLOCK_M, chunks * CHUNK):
        tl.store(sorted_ptr + start + order, tl.full((CHUNK,), -1, tl.int32), mask=start + order < max_blocks * BLOCK_M)


@triton.jit
def scan_counts(
    counts_ptr, totals_ptr, chunks,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The second; grid (BINS,). counts become what the chunks before have; totals int32 [BINS]. BLOCK: of `chunks`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, order = tl.program_id(0), tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + expert * chunks + order, mask=order < chunks, other=0)
    tl.store(counts_ptr + expert * chunks + order, tl.cumsum(counts, 0) - counts, mask=order < chunks)
    tl.store(totals_ptr + expert, tl.sum(counts))


@triton.jit
def place_pairs(
    ids_ptr, counts_ptr, totals_ptr, sorted_ptr, block_experts_ptr, num_pairs, max_blocks, first_expert,
    NUM_EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The third; grid as the first's."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    bins = tl.arange(0, BINS)
    runs = _padded(tl.load(totals_ptr + bins), NUM_EXPERTS, BLOCK_M, BINS)
    ends = tl.cumsum(runs, 0)
    starts = ends - runs + tl.load(counts_ptr + bins * chunks + chunk)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    experts = _experts_of(ids_ptr, pairs, num_pairs, first_expert, NUM_EXPERTS, BINS)
    _place(sorted_ptr, pairs, experts, starts, num_pairs, CHUNK)
    for start in range(chunk * 32, max_blocks, chunks * 32):
        _name_blocks(block_experts_ptr, start + tl.arange(0, 32), max_blocks, ends // BLOCK_M, BINS)


@triton.jit
def _load_weight(
    weight_ptr, scale_ptr, zero_ptr, rows, start,
    IN: tl.constexpr, QUANT: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns from `start` on of `rows` of an expert's weight, [BLOCK_N, BLOCK_K].

    fp8 and plain numbers as they are stored, others float32, with a GROUP by their scales. Past the end there are
    zeros, or of groups anything finite.
    """
    if QUANT == "int4":
        bytes_ = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        places = weight_ptr + rows[:, None] * (IN // 2) + bytes_
        packed = tl.load(places) if IN % BLOCK_K == 0 else tl.load(places, mask=bytes_ < IN // 2, other=0)
        weight = tl.reshape(tl.join(packed & 15, packed >> 4), (BLOCK_N, BLOCK_K))
    else:
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        places = weight_ptr + rows[:, None] * IN + columns
        weight = tl.load(places) if IN % BLOCK_K == 0 else tl.load(places, mask=columns < IN, other=0.0)
        if QUANT == "int8":
            weight = weight.to(tl.float32)
    if GROUP > 0:
        GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
        # [BLOCK_N, PARTS, WIDTH]: each part has one scale, unless groups end within one.
        PARTS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K % GROUP == 0 else (1 if GROUP % BLOCK_K == 0 else BLOCK_K)
        WIDTH: tl.constexpr = BLOCK_K // PARTS
        groups = tl.minimum((start + tl.arange(0, PARTS) * WIDTH) // GROUP, GROUPS - 1)
        places = rows[:, None] * GROUPS + groups[None, :]
        values = tl.reshape(weight.to(tl.float32), (BLOCK_N, PARTS, WIDTH))
        if HAS_ZERO:
            values -= tl.load(zero_ptr + places).to(tl.float32)[:, :, None]
        elif QUANT == "int4":
            values -= 8.0
        values *= tl.load(scale_ptr + places).to(tl.float32)[:, :, None]
        weight = tl.reshape(values, (BLOCK_N, BLOCK_K))
    return weight


@triton.jit
def expert_linear(
    x_ptr, sorted_ptr, block_experts_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, x_scale_ptr, out_ptr, max_blocks,
    IN: tl.constexpr, OUT: tl.constexpr, NUM_EXPERTS: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, QUANT: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, X_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.expert_linear over sorted pairs; grid (max_blocks * cdiv(OUT, BLOCK_N),).

    x [num_pairs / PAIRS_PER_ROW, IN]: PAIRS_PER_ROW is top_k where a token's choices share its row, else 1; bf16 or
    float32, or float8e4nv with fp8 weights and X_SCALES "row" (float32, one a row of x) or "one" (float32 [1]). sorted
    and block_experts as sort_pairs leaves them. bias [NUM_EXPERTS, OUT], out bf16 or float32 [num_pairs, OUT].

    weight [NUM_EXPERTS, OUT, IN] as functional.linear has it by QUANT: "none", "fp8", "int8" or "int4" (uint8, IN / 2).
    scale by SCALES: "none", "expert" [NUM_EXPERTS], "row" [NUM_EXPERTS, OUT], or with GROUP > 0 "group" [NUM_EXPERTS,
    OUT, groups], and zero so too with HAS_ZERO.

    The weight is the left operand, so that it may come from registers when it is dequantized, and a few tokens are the
    narrow side of an instruction. GROUP_M blocks of pairs go by turns over the outputs, that both stay in L2.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program, columns = tl.program_id(0), tl.cdiv(OUT, BLOCK_N)
    turn = program // (GROUP_M * columns)
    height = tl.minimum(max_blocks - turn * GROUP_M, GROUP_M)
    block = turn * GROUP_M + program % (GROUP_M * columns) % height
    column = program % (GROUP_M * columns) // height
    expert = tl.load(block_experts_ptr + block)
    if expert < 0:
        return
    pairs = tl.load(sorted_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    outputs = column * BLOCK_N + tl.arange(0, BLOCK_N)
    places = out_ptr + pairs.to(tl.int64)[None, :] * OUT + outputs[:, None]
    mask = (pairs >= 0)[None, :] & (outputs < OUT)[:, None]
    if expert == NUM_EXPERTS:
        tl.store(places, tl.zeros((BLOCK_N, BLOCK_M), out_ptr.dtype.element_ty), mask=mask)
        return
    first_row = expert.to(tl.int64) * OUT
    rows = tl.minimum(outputs, OUT - 1)  # read twice rather than masked
    x_rows = tl.maximum(pairs, 0) // PAIRS_PER_ROW
    x_places = x_ptr + x_rows.to(tl.int64)[None, :] * IN
    if GROUP > 0:
        GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
        scale_ptr += first_row * GROUPS
        zero_ptr += first_row * GROUPS
    weight_ptr += first_row * (IN // 2 if QUANT == "int4" else IN)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, IN, BLOCK_K):
        weight = _load_weight(
            weight_ptr, scale_ptr, zero_ptr, rows, start, IN, QUANT, GROUP, HAS_ZERO, BLOCK_N, BLOCK_K
        )
        inputs = start + tl.arange(0, BLOCK_K)[:, None]
        x = tl.load(x_places + inputs) if IN % BLOCK_K == 0 else tl.load(x_places + inputs, mask=inputs < IN, other=0.0)
        acc = tl.dot(weight.to(x.dtype), x, acc)
    if SCALES == "expert":
        acc *= tl.load(scale_ptr + expert).to(tl.float32)
    elif SCALES == "row":
        acc *= tl.load(scale_ptr + first_row + rows).to(tl.float32)[:, None]
    if X_SCALES == "one":
        acc *= tl.load(x_scale_ptr)
    elif X_SCALES == "row":
        acc *= tl.load(x_scale_ptr + x_rows)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_row + rows).to(tl.float32)[:, None]
    tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_linear_pairs(
    x_ptr, ids_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, x_scale_ptr, out_ptr, first_expert,
    IN: tl.constexpr, OUT: tl.constexpr, NUM_EXPERTS: tl.constexpr, PAIRS_PER_ROW: tl.constexpr, QUANT: tl.constexpr,
    SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, X_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """expert_linear of each pair by itself, ids int32 [num_pairs]; grid (num_pairs, cdiv(OUT, BLOCK_N)).

    Pairs come first in the grid, so that those of one expert read a weight at about the same time, all but one from L2.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(ids_ptr + pair) - first_expert
    places, mask = out_ptr + pair.to(tl.int64) * OUT + outputs, outputs < OUT
    if (expert < 0) | (expert >= NUM_EXPERTS):
        tl.store(places, tl.zeros((BLOCK_N,), out_ptr.dtype.element_ty), mask=mask)
        return
    first_row = expert.to(tl.int64) * OUT
    rows = tl.minimum(outputs, OUT - 1)
    x_row = pair // PAIRS_PER_ROW
    x_ptr += x_row.to(tl.int64) * IN
    if GROUP > 0:
        GROUPS: tl.constexpr = (IN + GROUP - 1) // GROUP
        scale_ptr += first_row * GROUPS
        zero_ptr += first_row * GROUPS
    weight_ptr += first_row * (IN // 2 if QUANT == "int4" else IN)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, IN, BLOCK_K):
        weight = _load_weight(
            weight_ptr, scale_ptr, zero_ptr, rows, start, IN, QUANT, GROUP, HAS_ZERO, BLOCK_N, BLOCK_K
        )
        inputs = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + inputs, mask=inputs < IN, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if SCALES == "expert":
        y *= tl.load(scale_ptr + expert).to(tl.float32)
    elif SCALES == "row":
        y *= tl.load(scale_ptr + first_row + rows).to(tl.float32)
    if X_SCALES == "one":
        y *= tl.load(x_scale_ptr)
    elif X_SCALES == "row":
        y *= tl.load(x_scale_ptr + x_row)
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_row + rows).to(tl.float32)
    tl.store(places, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine(
    x_ptr, weights_ptr, out_ptr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.combine; grid (num_tokens, cdiv(WIDTH, BLOCK)).

    x bf16 or float32 [num_tokens, TOP_K * WIDTH], weights float32 [num_tokens, TOP_K]; out bf16 or float32.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        x = tl.load(x_ptr + (token * TOP_K + j) * WIDTH + columns, mask=mask, other=0.0)
        acc += tl.load(weights_ptr + token * TOP_K + j) * x.to(tl.float32)
    tl.store(out_ptr + token * WIDTH + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def head_linear(
    x_ptr, weight_ptr, out_ptr, num_tokens,
    IN: tl.constexpr, OUT: tl.constexpr, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """functional.head_linear; grid (cdiv(num_tokens, BLOCK_M), cdiv(OUT, BLOCK_N), num_heads).

    x: heads of IN columns, rows X_STRIDE elements apart; weight, of x's dtype, [num_heads * OUT, IN], or TRANSPOSED
    [num_heads * IN, OUT]; out: heads of OUT columns, rows OUT_STRIDE apart, bf16 or float32.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * X_STRIDE + head * IN
    weight_ptr += head * (IN * OUT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, IN, BLOCK_K):
        inputs = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inputs[None, :], mask=inputs[None, :] < IN, other=0.0)
        places = inputs[:, None] * OUT + outputs[None, :] if TRANSPOSED else outputs[None, :] * IN + inputs[:, None]
        weight = tl.load(weight_ptr + places, mask=(inputs < IN)[:, None] & (outputs < OUT)[None, :], other=0.0)
        acc = tl.dot(x, weight, acc)
    out_places = out_ptr + tokens.to(tl.int64)[:, None] * OUT_STRIDE + head * OUT + outputs[None, :]
    mask = (tokens < num_tokens)[:, None] & (outputs < OUT)[None, :]
    tl.store(out_places, acc.to(out_ptr.dtype.element_ty), mask=mask)
