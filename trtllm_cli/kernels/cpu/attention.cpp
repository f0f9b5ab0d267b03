// Causal attention over the paged cache, with a running softmax over tiles of keys (FlashAttention, arXiv 2205.14135).
//
// A part of the work is one KV head, and some tokens of one sequence: the rows are those tokens' query heads of the KV
// head's group, or of one split of a large group. Key tiles are whole blocks and begin at fixed positions, so a row sums
// over the same tiles in the same order, whatever else is in the step; keys that it must not see add exact zeros.
#include "cache.h"
#include "micro.h"
#include "ops.h"
#include "vector_math.h"

#include <algorithm>

namespace {

constexpr int kRows = 48;      // query rows of a part, about
constexpr int kTileKeys = 64;  // keys of a tile, about
constexpr int kMaxBlockRows = 6;

struct Attention {
    int heads, group, window;
    int splits, split;  // of a KV head's group, and query heads of one; the last may have fewer
    float scale, v_scale, cap;
    CacheShape cache;
    int tokens;       // of a part
    int rows;         // of a part
    int tile_blocks;  // of a key tile
    const float *q, *sinks;
    float* out;

    explicit Attention(const tl_step& s)
        : heads(s.i[1]), group(s.i[1] / s.i[2]), window(s.i[6]), splits(ceil_div(group, kRows)),
          split(ceil_div(group, splits)), scale(s.f[0]), v_scale(1.0f), cap(s.f[1]),
          cache(s.i[2], s.i[3], s.i[7], s.i[4]), tokens(split < kRows ? kRows / split : 1), rows(tokens * split),
          tile_blocks(cache.block_size < kTileKeys ? kTileKeys / cache.block_size : 1), q((const float*)s.p[0]),
          sinks((const float*)s.p[3]), out((float*)s.p[1]) {
        if (const float* kv_scale = (const float*)s.p[4]) scale *= kv_scale[0], v_scale = kv_scale[1];
    }

    int columns() const { return tile_blocks * cache.padded_block; }
    int lanes() const { return cache.kv_heads * splits; }  // parts of the same tokens
};

// A thread's working memory, cut from its scratch.
struct Work {
    float *q, *o;               // [rows, padded_dim] and [rows, padded_v_dim]
    float* s;                   // [rows, columns]: scores, then probabilities
    float *peak, *total;        // [rows]
    float *keys, *values;       // one block's in float32, as the cache lays them
    int32_t* positions;         // [columns]: of the tile's keys; INT32_MAX where there is none

    Work(const Attention& a, float* p) {
        const int64_t row = a.cache.padded_dim, v_row = a.cache.padded_v_dim;
        q = p, o = q + a.rows * row, s = o + a.rows * v_row, keys = s + a.rows * a.columns();
        values = keys + row * a.cache.padded_block, peak = values + v_row * a.cache.padded_block;
        total = peak + a.rows, positions = (int32_t*)(total + a.rows);
    }
    static size_t bytes(const Attention& a) {
        const Work w(a, nullptr);
        return (size_t)(char*)w.positions + a.columns() * sizeof(int32_t);
    }
};

// Tiles of a matrix: [k, 16] each, `tile` elements apart, with rows `row` apart. `ahead` is read soon after them.
template <class E>
struct Tiles {
    const E* b;
    int64_t tile, row;
    const char* ahead;
};

// c [M, NT * 16] = or += a [M, k] @ NT tiles from `first` on.
template <int M, int NT, class E>
void product(const float* a, int64_t lda, Tiles<E> tiles, int first, int k, float* c, int64_t ldc, bool add) {
    constexpr int NV = NT * kTileVectors;
    Block<M, NV> block;
    if (add) block.read(c, ldc);
    else block.clear();
    Rows<M> x(a, lda);
    const E* b = tiles.b + first * tiles.tile;
    const char* ahead = tiles.ahead + (int64_t)first * k * kTile * sizeof(E);
    for (int j = 0; j < k; j++, b += tiles.row, x.advance(1), ahead += NT * kTile * sizeof(E)) {
        __builtin_prefetch(ahead);
        vf w[NV];
        UNROLL for (int v = 0; v < NV; v++)
            w[v] = load_as(b + v / kTileVectors * tiles.tile + v % kTileVectors * kWidth);
        block.step(x, 0, w);
    }
    block.write(c, ldc);
}

template <int M, class E>
void product_tiles(const float* a, int64_t lda, Tiles<E> tiles, int count, int k, float* c, int64_t ldc, bool add) {
    constexpr int NT = M <= 3 ? 2 : 1;
    int t = 0;
    for (; t + NT <= count; t += NT) product<M, NT>(a, lda, tiles, t, k, c + t * kTile, ldc, add);
    for (; t < count; t++) product<M, 1>(a, lda, tiles, t, k, c + t * kTile, ldc, add);
}

// The same for any number of rows, by blocks of up to 6.
template <class E>
void product_rows(int rows, const float* a, int64_t lda, Tiles<E> tiles, int count, int k, float* c, int64_t ldc,
                  bool add) {
    const int blocks = ceil_div(rows, kMaxBlockRows);
    for (int i = 0; i < blocks; i++) {
        const int from = rows * i / blocks, m = rows * (i + 1) / blocks - from;
        const float* x = a + from * lda;
        float* y = c + from * ldc;
        switch (m) {
            case 1: product_tiles<1>(x, lda, tiles, count, k, y, ldc, add); break;
            case 2: product_tiles<2>(x, lda, tiles, count, k, y, ldc, add); break;
            case 3: product_tiles<3>(x, lda, tiles, count, k, y, ldc, add); break;
            case 4: product_tiles<4>(x, lda, tiles, count, k, y, ldc, add); break;
            case 5: product_tiles<5>(x, lda, tiles, count, k, y, ldc, add); break;
            case 6: product_tiles<6>(x, lda, tiles, count, k, y, ldc, add); break;
        }
    }
}

void cap_scores(float* s, int columns, float cap) {
    for (int j = 0; j < columns; j += kWidth) store(s + j, cap * vtanh(load(s + j) / cap));
}

// One tile's scores of one row to probabilities; the row's sums so far are scaled to the new peak.
void soften(float* s, const int32_t* positions, int columns, int first, int last, float& peak, float& total, float* o,
            int dim) {
    const vf hidden = splat(-__builtin_inff());
    vf top = hidden;
    for (int j = 0; j < columns; j += kWidth) {
        const vi at = load_words(positions + j);
        const vf x = (at >= first) & (at <= last) ? load(s + j) : hidden;
        store(s + j, x);
        top = vmax(top, x);
    }
    const float highest = max_lanes(top), now = highest > peak ? highest : peak;
    const float base = now == -__builtin_inff() ? 0.0f : now;
    vf sum = {};
    for (int j = 0; j < columns; j += kWidth) {
        const vf p = vexp(load(s + j) - base);
        store(s + j, p);
        sum = sum + p;
    }
    const vf keep = vexp(splat(peak - base));
    if (keep[0] != 1.0f)
        for (int j = 0; j < dim; j += kWidth) store(o + j, load(o + j) * keep);
    total = total * keep[0] + sum_lanes(sum);
    peak = now;
}

// Rows of query heads of one KV head, `heads` for each token from `position` on of the sequence whose blocks `table`
// names.
template <class E>
void attend(const Attention& a, const Work& w, const E* cache, const int32_t* table, int kv_head, int rows, int heads,
            int position) {
    const CacheShape& shape = a.cache;
    const int dim = shape.padded_dim, v_dim = shape.padded_v_dim;
    const int columns = a.columns(), tile_keys = a.tile_blocks * shape.block_size;
    const int last = position + (rows - 1) / heads;
    const int first = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    const bool convert = sizeof(E) != sizeof(float) && rows > kMaxBlockRows;
    // The same part of the next block that is needed, or of this one.
    auto ahead = [&](const E* part, int from) {
        const int next = from + shape.block_size;
        if (next > last) return (const char*)part;
        return (const char*)(part + (table[next / shape.block_size] - table[from / shape.block_size]) *
                                        (shape.keys(1, 0) - shape.keys(0, 0)));
    };
    for (int start = first / tile_keys * tile_keys; start <= last; start += tile_keys) {
        int used = 0;  // columns
        for (int b = 0; b < a.tile_blocks && start + b * shape.block_size <= last; b++) {
            const int from = start + b * shape.block_size, left = last + 1 - from;
            const int n = left < shape.block_size ? left : shape.block_size, strips = ceil_div(n, kTile);
            const E* keys = cache + shape.keys(table[from / shape.block_size], kv_head);
            float* s = w.s + b * shape.padded_block;
            used = b * shape.padded_block + strips * kTile;
            for (int j = 0; j < shape.padded_block; j++)
                w.positions[b * shape.padded_block + j] = j < n ? from + j : INT32_MAX;
            if (convert) {
                for (int j = 0; j < strips * kTile * dim; j += kWidth) store(w.keys + j, load_as(keys + j));
                const Tiles<float> tiles{w.keys, dim * kTile, kTile, (const char*)w.keys};
                product_rows(rows, w.q, dim, tiles, strips, shape.dim, s, columns, false);
            } else {
                const Tiles<E> tiles{keys, dim * kTile, kTile, ahead(keys, from)};
                product_rows(rows, w.q, dim, tiles, strips, shape.dim, s, columns, false);
            }
        }
        for (int r = 0; r < rows; r++) {
            const int at = position + r / heads, low = a.window && at + 1 > a.window ? at + 1 - a.window : 0;
            if (a.cap) cap_scores(w.s + r * columns, used, a.cap);
            soften(w.s + r * columns, w.positions, used, low, at, w.peak[r], w.total[r], w.o + r * v_dim, v_dim);
        }
        for (int b = 0; b < a.tile_blocks && start + b * shape.block_size <= last; b++) {
            const int from = start + b * shape.block_size, left = last + 1 - from;
            const int n = left < shape.block_size ? left : shape.block_size;
            const E* values = cache + shape.values(table[from / shape.block_size], kv_head);
            const float* p = w.s + b * shape.padded_block;
            if (convert) {
                for (int j = 0; j < n * v_dim; j += kWidth) store(w.values + j, load_as(values + j));
                const Tiles<float> tiles{w.values, kTile, v_dim, (const char*)w.values};
                product_rows(rows, p, columns, tiles, v_dim / kTile, n, w.o, v_dim, true);
            } else {
                const Tiles<E> tiles{values, kTile, v_dim, ahead(values, from)};
                product_rows(rows, p, columns, tiles, v_dim / kTile, n, w.o, v_dim, true);
            }
        }
    }
}

// Rows [row, row + count) of q, tokens that follow one another in one sequence from `position` on; `lane` is the KV head
// and split.
void part(const Context& c, const Attention& a, const Work& w, int seq, int lane, int row, int count, int position) {
    const CacheShape& shape = a.cache;
    const int kv_head = lane / a.splits, first = lane % a.splits * a.split;
    const int heads = first + a.split <= a.group ? a.split : a.group - first, rows = count * heads;
    auto head_of = [&](int r) { return kv_head * a.group + first + r % heads; };
    auto at = [&](int r) { return (int64_t)(row + r / heads) * a.heads + head_of(r); };
    for (int r = 0; r < rows; r++) {
        const float* q = a.q + at(r) * shape.dim;
        for (int j = 0; j < shape.dim; j++) w.q[r * shape.padded_dim + j] = q[j] * a.scale;
        // A sink is a key that has been seen already, with a value of zeros.
        w.peak[r] = a.sinks ? a.sinks[head_of(r)] : -__builtin_inff(), w.total[r] = a.sinks ? 1.0f : 0.0f;
    }
    memset(w.o, 0, (size_t)rows * shape.padded_v_dim * sizeof(float));
    const int32_t* table = c.batch.block_tables + (int64_t)seq * c.batch.max_blocks;
    with_cache(c.step.i[5], c.step.p[2], [&](const auto* cache) {
        attend(a, w, cache, table, kv_head, rows, heads, position);
    });
    for (int r = 0; r < rows; r++) {
        float* out = a.out + at(r) * shape.v_dim;
        for (int j = 0; j < shape.v_dim; j++) out[j] = w.o[r * shape.padded_v_dim + j] / w.total[r] * a.v_scale;
    }
}

// Of the tokens whose logits are wanted: those from `row` on that follow one another in one sequence, which is found.
int following(const tl_batch& batch, const Attention& a, int row, int& seq) {
    const int32_t *wanted = batch.logits_indices, *starts = batch.query_start;
    seq = (int)(std::upper_bound(starts, starts + batch.num_seqs + 1, wanted[row]) - starts) - 1;
    int count = 1;
    while (count < a.tokens && row + count < batch.num_logits && wanted[row + count] == wanted[row] + count &&
           wanted[row + count] < starts[seq + 1])
        count++;
    return count;
}

// Parts of a sequence's tokens, of one lane.
int tiles_of(const tl_batch& batch, const Attention& a, int seq) {
    return ceil_div(batch.query_start[seq + 1] - batch.query_start[seq], a.tokens);
}

// Parts of a step's tokens, or of those whose logits are wanted.
int parts_of(const tl_step& step, const tl_batch& batch, const Attention& a) {
    int tiles = 0, seq = 0;
    if (step.i[0])
        for (int row = 0; row < batch.num_logits; row += following(batch, a, row, seq)) tiles++;
    else
        for (int s = 0; s < batch.num_seqs; s++) tiles += tiles_of(batch, a, s);
    return tiles * a.lanes();
}

void of_wanted_rows(const Context& c, const Attention& a, const Work& w) {
    const tl_batch& batch = c.batch;
    int begin, end, seq = 0, before = 0;  // before: parts of the tokens in front of `row`
    c.share(parts_of(c.step, batch, a), begin, end);
    for (int row = 0, count; row < batch.num_logits && before < end; row += count, before += a.lanes()) {
        count = following(batch, a, row, seq);
        const int position = batch.positions[batch.logits_indices[row]];
        for (int lane = 0; lane < a.lanes(); lane++)
            if (before + lane >= begin && before + lane < end) part(c, a, w, seq, lane, row, count, position);
    }
}

}  // namespace

Needs attention_needs(const tl_step& step, const tl_batch& batch, int num_threads) {
    const Attention a(step);
    const int parts = parts_of(step, batch, a);
    Needs needs;
    needs.pieces = parts < 32 * num_threads ? parts : 32 * num_threads;
    needs.per_thread = Work::bytes(a);
    return needs;
}

void paged_attention(const Context& c) {
    const Attention a(c.step);
    const Work w(a, c.scratch());
    if (c.step.i[0]) return of_wanted_rows(c, a, w);
    const tl_batch& batch = c.batch;
    int begin, end, seq = 0, before = 0;  // before: parts of the sequences before `seq`
    c.share(parts_of(c.step, batch, a), begin, end);
    for (int i = begin; i < end; i++) {
        while (i >= before + tiles_of(batch, a, seq) * a.lanes()) before += tiles_of(batch, a, seq++) * a.lanes();
        const int queries = batch.query_start[seq + 1] - batch.query_start[seq];
        // The last tokens see the most keys: they go first.
        const int tile = tiles_of(batch, a, seq) - 1 - (i - before) / a.lanes(), lane = (i - before) % a.lanes();
        const int from = tile * a.tokens, count = queries - from < a.tokens ? queries - from : a.tokens;
        part(c, a, w, seq, lane, batch.query_start[seq] + from, count, batch.seq_lens[seq] - queries + from);
    }
}
