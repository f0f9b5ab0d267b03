"""From logits to tokens on the device: the same seed gives the tokens of run/sampler.py.

The noise is run/philox.py's: Philox4x32-10 (Salmon et al., SC 2011) and Gumbel-max as a race in groups of 128 ids. It
is computed in float32, about 1e-6 from float64's, so only tokens whose scores are as close as that may trade places.
Penalties and bans come before (penalties.py), log probabilities after (logprobs.py).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GREEDY_TEMPERATURE = tl.constexpr(1e-5)  # as run/sampler.py
GROUP = tl.constexpr(128)  # token ids, as run/philox.py
LOWEST = tl.constexpr(-1e30)  # a logit below is as good as -inf
ROUNDING = tl.constexpr(1e-3)  # far more than float32 loses in a bound
INFINITE_KEY = tl.constexpr(0x7F800000)  # of a token that cannot be drawn
MANY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _philox(c0, c1, c2, key_low, key_high):
    """Four uint32 words of the counter (c0, c1, c2, 0), broadcast to c0's shape; all arguments uint32."""
    c1 += tl.zeros_like(c0)
    c2 += tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ key_low
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ key_high
        c1 = odd.to(tl.uint32)
        c3 = even.to(tl.uint32)
        key_low = (key_low.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key_high = (key_high.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _exponential(word):
    """-log((word + 0.5) / 2**32), to a few units in the last place at both ends."""
    low = word < 0x80000000
    distance = tl.where(low, word, word ^ 0xFFFFFFFF)  # to the nearer end
    v = (distance.to(tl.int32).to(tl.float32) + 0.5) * 2.0**-32
    u = tl.where(low, v, 1 - v)
    value = -tl.log(u)
    # Near 1, u has lost digits of v: log1p as Kahan has it, the error of u's rounding cancels in v / (1 - u).
    lost = 1 - u
    near_one = tl.where(lost == 0, v, value * (v / tl.where(lost == 0, 1.0, lost)))
    return tl.where(low, value, near_one)


@triton.jit
def _group_race(group, position, key_low, key_high):
    """When the first of each group of ids arrives, and which it is (modulo GROUP)."""
    w0, w1, w2, w3 = _philox((group >> 1).to(tl.uint32), position, 1, key_low, key_high)
    odd = (group & 1) != 0
    time = _exponential(tl.where(odd, w2, w0)) / GROUP
    return time, (tl.where(odd, w3, w1) % GROUP).to(tl.int32)


@triton.jit
def _group_bounds(start, position, key_low, key_high, GROUPS: tl.constexpr):
    """The largest noise of each of GROUPS groups of ids from `start` (of an even group) on."""
    pair = start // (2 * GROUP) + tl.arange(0, GROUPS // 2)
    even, _even_first, odd, _odd_first = _philox(pair.to(tl.uint32), position, 1, key_low, key_high)
    return tl.reshape(tl.join(-tl.log(_exponential(even) / GROUP), -tl.log(_exponential(odd) / GROUP)), (GROUPS,))


@triton.jit
def gumbel(ids, position, key_low, key_high):
    """Noise of token ids (int32, any order) at an output position (uint32) under a seed (two uint32 words)."""
    time, first = _group_race(ids // GROUP, position, key_low, key_high)
    w0, w1, w2, w3 = _philox((ids >> 2).to(tl.uint32), position, 0, key_low, key_high)
    word = ids & 3
    own = _exponential(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
    return -tl.log(tl.where(first == ids % GROUP, time, time + own))


@triton.jit
def _seed_words(seeds_ptr, positions_ptr, sample):
    key_low = tl.load(seeds_ptr + 2 * sample).to(tl.uint32, bitcast=True)
    key_high = tl.load(seeds_ptr + 2 * sample + 1).to(tl.uint32, bitcast=True)
    return tl.load(positions_ptr + sample).to(tl.uint32, bitcast=True), key_low, key_high


@triton.jit
def _put_token(token, sample, rows_ptr, tokens_ptr, last_tokens_ptr):
    tl.store(tokens_ptr + sample, token)
    row = tl.load(rows_ptr + sample)
    if row >= 0:
        tl.store(last_tokens_ptr + row, tl.maximum(token, 0))  # the next step may run before anyone looks: a valid id


@triton.jit
def _row_logits(row_ptr, ids, VOCAB: tl.constexpr, LOADED: tl.constexpr):
    """Logits in float32; inf for NaN, that a maximum may find it, and -inf past the end."""
    x = tl.load(row_ptr + ids, mask=ids < LOADED, other=-float("inf")).to(tl.float32)
    return tl.where(ids < VOCAB, tl.where(x != x, float("inf"), x), -float("inf"))


@triton.jit
def sample(
    logits_ptr,
    logits_rows_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    temperatures_ptr,
    partial_ptr,
    counters_ptr,
    tokens_ptr,
    last_tokens_ptr,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Greedy and temperature sampling, one pass over the logits. Grid (ceil(VOCAB / CHUNK), n).

    logits float32 or bf16 [num_logits, ROW_STRIDE], of which columns from VOCAB on are ignored; logits_rows int32 [n]
    (-1: padded, nothing is written); rows int32 [n] (-1: the token goes to `tokens` only); seeds int32 [n, 2] (low
    word, high word); positions int32 [n] (of the output); temperatures float32 [n] (0: greedy, equals by id).
    Writes tokens int32 [n] (-1: the row has a NaN, or its best logit is infinite) and last_tokens[rows] (0 instead of
    -1). Scratch: partial float32 [n, splits, 4]; counters int32 [n], zero before and after. CHUNK is a multiple of
    TILE, which is one of 256; SPLITS_BLOCK is a power of two of at least ceil(VOCAB / CHUNK).

    A token's noise is at most that of its group's first, which costs one Philox for two groups. So of each tile only
    the groups whose best logit and that together exceed the best score so far are scored token by token, best first.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    groups: tl.constexpr = TILE // GROUP
    splits: tl.constexpr = (VOCAB + CHUNK - 1) // CHUNK
    loaded: tl.constexpr = min((VOCAB + 15) // 16 * 16, ROW_STRIDE)  # whole vectors, where there is padding
    split, this = tl.program_id(0), tl.program_id(1)
    logits_row = tl.load(logits_rows_ptr + this)
    if logits_row < 0:
        return
    row_ptr = logits_ptr + logits_row.to(tl.int64) * ROW_STRIDE
    temperature = tl.load(temperatures_ptr + this)
    drawn = temperature >= GREEDY_TEMPERATURE
    scale = tl.div_rn(1.0, tl.where(drawn, temperature, 1.0))
    position, key_low, key_high = _seed_words(seeds_ptr, positions_ptr, this)

    # The best so far, logit and noise apart: scores are relative to the largest logit, as numpy's, to round as little.
    largest = tl.full((), LOWEST, tl.float32)
    best_logit = tl.full((), LOWEST, tl.float32)
    best_noise = tl.full((), 0.0, tl.float32)
    best_id = tl.full((), 0, tl.int32)
    margin = tl.where(drawn, ROUNDING, 0.0)
    begin = split * CHUNK
    for start in range(begin, min(begin + CHUNK, VOCAB), TILE):
        group = start // GROUP + tl.arange(0, groups)
        tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        group_best = tl.max(_row_logits(row_ptr, tile, VOCAB, loaded), axis=1)
        largest = tl.maximum(largest, tl.max(group_best, axis=0))
        bound = (group_best - largest) * scale
        if drawn:
            bound += _group_bounds(start, position, key_low, key_high, groups)
        best = (best_logit - largest) * scale + best_noise
        hope, where = tl.max(bound, axis=0, return_indices=True)
        while hope > best - margin:
            ids = start + where * GROUP + tl.arange(0, GROUP)
            x = _row_logits(row_ptr, ids, VOCAB, loaded)
            noise = tl.zeros((GROUP,), tl.float32)
            if drawn:
                noise = gumbel(ids, position, key_low, key_high)
            score = (x - largest) * scale + noise
            score_best = tl.max(score, axis=0)
            if score_best > best:
                best = score_best
                best_id = tl.min(tl.where(score == score_best, ids, MANY), axis=0)
                best_logit = tl.max(tl.where(ids == best_id, x, -float("inf")), axis=0)
                best_noise = tl.max(tl.where(ids == best_id, noise, -float("inf")), axis=0)
            bound = tl.where(tl.arange(0, groups) == where, -float("inf"), bound)
            hope, where = tl.max(bound, axis=0, return_indices=True)

    mine_ptr = partial_ptr + (this * splits + split) * 4
    tl.store(mine_ptr, largest)
    tl.store(mine_ptr + 1, best_logit)
    tl.store(mine_ptr + 2, best_noise)
    tl.store(mine_ptr + 3, best_id.to(tl.float32))  # exact below 2**24
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + this, 1, sem="acq_rel", scope="gpu") == splits - 1:  # the last to finish
        tl.store(counters_ptr + this, 0)
        index = tl.arange(0, SPLITS_BLOCK)
        there = index < splits
        all_ptr = partial_ptr + (this * splits + index) * 4
        largest = tl.max(tl.load(all_ptr, mask=there, other=LOWEST, cache_modifier=".cg"), axis=0)
        logit = tl.load(all_ptr + 1, mask=there, other=LOWEST, cache_modifier=".cg")
        noise = tl.load(all_ptr + 2, mask=there, other=0.0, cache_modifier=".cg")
        ids = tl.load(all_ptr + 3, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32)
        score = (logit - largest) * scale + noise
        token = tl.min(tl.where(score == tl.max(score, axis=0), ids, MANY), axis=0)
        finite = (largest > LOWEST) & (largest < float("inf"))
        _put_token(tl.where(finite, token, -1), this, rows_ptr, tokens_ptr, last_tokens_ptr)


@triton.jit
def _scaled(row_ptr, start, best, scale, VOCAB: tl.constexpr, LOADED: tl.constexpr, TILE: tl.constexpr):
    """(logit - best) / temperature of a tile [TILE] of the row; -inf past its end."""
    ids = start + tl.arange(0, TILE)
    x = tl.load(row_ptr + ids, mask=ids < LOADED, other=-float("inf")).to(tl.float32)
    return tl.where(ids < VOCAB, (x - best) * scale, -float("inf"))


@triton.jit
def _key(scaled):
    """A distance from the best, as an integer in the same order: 0 for the best, ascending with unlikeliness."""
    return tl.abs(scaled).to(tl.int32, bitcast=True)


@triton.jit
def _candidates(
    row_ptr,
    values_ptr,
    listed,
    count,
    start,
    best,
    scale,
    VOCAB: tl.constexpr,
    LOADED: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile [TILE] of scaled logits, from the list of candidates where there is one, else from the row."""
    if listed:
        index = start + tl.arange(0, TILE)
        scaled = tl.load(values_ptr + index, mask=index < count, other=-float("inf"))
    else:
        scaled = _scaled(row_ptr, start, best, scale, VOCAB, LOADED, TILE)
    return scaled


@triton.jit
def _within(
    limit,
    row_ptr,
    values_ptr,
    listed,
    count,
    best,
    scale,
    VOCAB: tl.constexpr,
    LOADED: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many candidates have keys of at most `limit`, and the sum of their weights exp(scaled)."""
    number = tl.zeros((TILE // 4,), tl.int32)
    weight = tl.zeros((TILE // 4,), tl.float32)
    for start in range(0, count, TILE):
        scaled = _candidates(row_ptr, values_ptr, listed, count, start, best, scale, VOCAB, LOADED, TILE)
        inside = _key(scaled) <= limit
        number += _fold(inside.to(tl.int32), TILE)
        weight += _fold(tl.where(inside, tl.exp(scaled), 0.0), TILE)
    return tl.sum(number, axis=0), tl.sum(weight, axis=0)


@triton.jit
def _fold(x, TILE: tl.constexpr):
    """[TILE] -> [TILE // 4], adding neighbours, which a thread has."""
    return tl.sum(tl.reshape(x, (TILE // 4, 4)), axis=1)


@triton.jit
def sample_filtered(
    logits_ptr,
    logits_rows_ptr,
    rows_ptr,
    seeds_ptr,
    positions_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    partial_ptr,
    values_ptr,
    ids_ptr,
    tokens_ptr,
    last_tokens_ptr,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draws again where top-k, top-p or min-p are on. Grid (n), after `sample` with the same arguments.

    top_k int32 [n] (0: off), top_p float32 [n] (1: off), min_p float32 [n] (0: off); partial float32 [n, SPLITS, 4] as
    `sample` left it (SPLITS = ceil(VOCAB / CHUNK) there); the others as there. Replaces tokens and last_tokens of
    samples with a filter, and leaves all others (also greedy ones: the best survives any filter) as they are. Scratch:
    values float32 and ids int32, [n, CAPACITY]; CAPACITY is any multiple of 4, TILE a power of two.

    The filters are run/sampler.py's: tokens tied with the k-th stay; top-p keeps the fewest most likely that have
    top_p of the weight that top-k left, equals by id. Their thresholds are found by bisection on the bits of the
    distance from the best, exactly but for the sums of weights, which are float32: a token may fall on the other side
    where the weight up to it is within about 1e-6 of top_p. Tokens near the best are listed first if those are enough
    and fit CAPACITY, and the bisection reads the list; else it reads the row.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    loaded: tl.constexpr = min((VOCAB + 15) // 16 * 16, ROW_STRIDE)
    part: tl.constexpr = TILE // 4  # noise takes many registers
    this = tl.program_id(0)
    logits_row = tl.load(logits_rows_ptr + this)
    if logits_row < 0:
        return
    temperature = tl.load(temperatures_ptr + this)
    top_k = tl.load(top_k_ptr + this)
    top_p = tl.load(top_p_ptr + this)
    min_p = tl.load(min_p_ptr + this)
    by_rank = (top_k > 0) & (top_k < VOCAB)
    by_weight = top_p < 1
    if (temperature < GREEDY_TEMPERATURE) | ~(by_rank | by_weight | (min_p > 0)):
        return
    if tl.load(tokens_ptr + this) < 0:  # not finite
        return
    row_ptr = logits_ptr + logits_row.to(tl.int64) * ROW_STRIDE
    values_ptr += this.to(tl.int64) * CAPACITY
    ids_ptr += this.to(tl.int64) * CAPACITY
    split = tl.arange(0, SPLITS_BLOCK)
    best = tl.max(tl.load(partial_ptr + (this * SPLITS + split) * 4, mask=split < SPLITS, other=LOWEST), axis=0)
    scale = tl.div_rn(1.0, temperature)
    floor = tl.where(min_p > 0, tl.log(tl.where(min_p > 0, min_p, 1.0)), -float("inf"))

    # First looks: how many tokens are near the best, and what they weigh.
    total = tl.zeros((TILE // 4,), tl.float32)
    weight_4 = tl.zeros((TILE // 4,), tl.float32)
    weight_8 = tl.zeros((TILE // 4,), tl.float32)
    weight_16 = tl.zeros((TILE // 4,), tl.float32)
    number_4 = tl.zeros((TILE // 4,), tl.int32)
    number_8 = tl.zeros((TILE // 4,), tl.int32)
    number_16 = tl.zeros((TILE // 4,), tl.int32)
    for start in range(0, VOCAB, TILE):
        scaled = _scaled(row_ptr, start, best, scale, VOCAB, loaded, TILE)
        weight = tl.exp(scaled)
        total += _fold(weight, TILE)
        weight_4 += _fold(tl.where(scaled >= -4, weight, 0.0), TILE)
        weight_8 += _fold(tl.where(scaled >= -8, weight, 0.0), TILE)
        weight_16 += _fold(tl.where(scaled >= -16, weight, 0.0), TILE)
        number_4 += _fold((scaled >= -4).to(tl.int32), TILE)
        number_8 += _fold((scaled >= -8).to(tl.int32), TILE)
        number_16 += _fold((scaled >= -16).to(tl.int32), TILE)
    weight_left = tl.sum(total, axis=0)
    wanted = top_p * weight_left
    enough_4 = _enough(-4.0, number_4, weight_4, top_k, by_rank, wanted, by_weight, floor)
    enough_8 = _enough(-8.0, number_8, weight_8, top_k, by_rank, wanted, by_weight, floor)
    enough_16 = _enough(-16.0, number_16, weight_16, top_k, by_rank, wanted, by_weight, floor)
    cut = tl.where(enough_4, -4.0, tl.where(enough_8, -8.0, -16.0))
    number_near = tl.where(enough_4, tl.sum(number_4), tl.where(enough_8, tl.sum(number_8), tl.sum(number_16)))
    listed = enough_16 & (number_near <= CAPACITY)
    count = tl.where(listed, number_near, VOCAB)
    if listed:
        length = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, TILE):
            scaled = _scaled(row_ptr, start, best, scale, VOCAB, loaded, TILE)
            near = (scaled >= cut).to(tl.int32)
            found = tl.sum(near, axis=0)
            if found > 0:
                place = length + tl.cumsum(near, axis=0) - 1
                tl.store(values_ptr + place, scaled, mask=near != 0)
                tl.store(ids_ptr + place, start + tl.arange(0, TILE), mask=near != 0)
                length += found
        tl.debug_barrier()

    # Invariant of the bisections: keys of at most `high` suffice, those of at most `low` do not.
    high = tl.where(listed, _key(cut), INFINITE_KEY)
    number_high = count
    if by_rank:
        low = tl.full((), -1, tl.int32)
        while (high - low > 1) & (number_high != top_k):
            middle = low + (high - low) // 2
            number, weight = _within(middle, row_ptr, values_ptr, listed, count, best, scale, VOCAB, loaded, TILE)
            suffices = number >= top_k
            low = tl.where(suffices, low, middle)
            high = tl.where(suffices, middle, high)
            number_high = tl.where(suffices, number, number_high)
        number, weight_left = _within(high, row_ptr, values_ptr, listed, count, best, scale, VOCAB, loaded, TILE)
    ties = tl.full((), MANY, tl.int32)  # how many tokens stay of those with the last key
    if by_weight:
        wanted = top_p * weight_left
        low = tl.full((), -1, tl.int32)
        number_low = tl.full((), 0, tl.int32)
        weight_low = tl.full((), 0.0, tl.float32)
        while (high - low > 1) & (number_high - number_low > 1):
            middle = low + (high - low) // 2
            number, weight = _within(middle, row_ptr, values_ptr, listed, count, best, scale, VOCAB, loaded, TILE)
            suffices = weight >= wanted
            number_low = tl.where(suffices, number_low, number)
            weight_low = tl.where(suffices, weight_low, weight)
            low = tl.where(suffices, low, middle)
            high = tl.where(suffices, middle, high)
            number_high = tl.where(suffices, number, number_high)
        each = tl.exp(-high.to(tl.float32, bitcast=True))
        missing = tl.ceil((wanted - weight_low) / tl.maximum(each, 1e-37))
        ties = tl.maximum(tl.minimum(missing, 1e9).to(tl.int32), 1)

    position, key_low, key_high = _seed_words(seeds_ptr, positions_ptr, this)
    best_score = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    tied_before = tl.full((), 0, tl.int32)
    for start in range(0, count, part):
        index = start + tl.arange(0, part)
        scaled = _candidates(row_ptr, values_ptr, listed, count, start, best, scale, VOCAB, loaded, part)
        ids = index
        if listed:
            ids = tl.load(ids_ptr + index, mask=index < count, other=0)
        key = _key(scaled)
        keep = (key <= high) & (scaled >= floor) & (scaled > -float("inf"))
        if ties < MANY:
            tied = (key == high).to(tl.int32)
            keep = keep & ((key < high) | (tied_before + tl.cumsum(tied, axis=0) <= ties))
            tied_before += tl.sum(tied, axis=0)
        if tl.max(keep.to(tl.int32), axis=0) > 0:
            score = tl.where(keep, scaled + gumbel(ids, position, key_low, key_high), -float("inf"))
            tile_best = tl.max(score, axis=0)
            if tile_best > best_score:
                token = tl.min(tl.where(score == tile_best, ids, MANY), axis=0)
                best_score = tile_best
    _put_token(token, this, rows_ptr, tokens_ptr, last_tokens_ptr)


@triton.jit
def _enough(cut, number, weight, top_k, by_rank, wanted, by_weight, floor):
    """Whether the filters keep nothing below `cut`."""
    by_number = by_rank & (tl.sum(number, axis=0) >= top_k)
    by_sum = by_weight & ~by_rank & (tl.sum(weight, axis=0) >= wanted)
    return by_number | by_sum | (floor >= cut)
