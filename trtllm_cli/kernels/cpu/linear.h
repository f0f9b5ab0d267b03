// Linear layers. Few rows: the packed weight goes through registers once, straight from memory (`direct`). Many rows:
// a tile is unpacked to float32 in cache, and all rows pass over it (`blocked`). Both sum over k in the same order.
//
// A format F says how a packed tile is read; pack.py has the layouts:
//     kStep              inputs that one fetch gives
//     kFetchBytes        bytes of a tile that they take
//     kGrouped           inputs come in groups with a scale and a minimum; the sums over groups add up in order
//     fetch(p, v, b)     the weights of vector v of the tile's 16 outputs, for kStep inputs from p
#pragma once

#include "micro.h"
#include "ops.h"

constexpr int kDirectRows = 6;
constexpr int kBlockRows = kWidth == 16 ? 12 : 6;
constexpr int kBlockTiles = kWidth == 16 ? 2 : 1;
constexpr int kRowGroup = 16 * kBlockRows;  // rows that pass over one unpacked tile; their x stays in L2
constexpr int kBlockInputs = 256;           // inputs of an unpacked tile; it stays in L1
constexpr int kNibbles = 8;                 // inputs in a word of int4

// A step's parameters.
struct Linear {
    int rows, in, out, tiles;
    int group, groups, padded_group;  // int4; padded to whole words
    int padded_in;
    int64_t x_stride, out_stride;
    bool grouped, accumulate;
    const float* x;
    float* y;
    const char* weight;
    const float *scale, *bias;

    Linear(const tl_step& s, int rows)
        : rows(rows), in(s.i[1]), out(s.i[2]), tiles(ceil_div(out, kTile)), group(s.i[4]), groups(ceil_div(in, group)),
          padded_group((int)round_up(group, kNibbles)), x_stride(s.i[6]), out_stride(s.i[7]),
          grouped(s.i[3] == kInt4), accumulate(s.i[5]), x((const float*)s.p[0]), y((float*)s.p[1]),
          weight((const char*)s.p[2]), scale((const float*)s.p[3]), bias((const float*)s.p[4]) {
        padded_in = grouped ? groups * padded_group : s.i[3] == kBfloat16 ? (int)round_up(in, 2) : in;
    }

    // A row of x as int4 wants it: the padded inputs, then a sum for each group.
    int64_t prepared_stride() const { return (int64_t)round_up(padded_in + groups, kTile); }
};

// out = c * scale + bias, and out += that; c is [rows, tiles * 16] for outputs from the first tile on.
inline void finish(const Linear& l, int row, int rows, int tile, int tiles, const float* c) {
    const int first = tile * kTile, width = tiles * kTile;
    const int valid = first + width <= l.out ? width : l.out - first;
    for (int m = 0; m < rows; m++, c += width) {
        float* y = l.y + (row + m) * l.out_stride + first;
        int j = 0;
        for (; j + kWidth <= valid; j += kWidth) {
            vf v = load(c + j);
            if (l.scale) v = v * load(l.scale + first + j);
            if (l.bias) v = v + load(l.bias + first + j);
            if (l.accumulate) v = load(y + j) + v;
            store(y + j, v);
        }
        for (; j < valid; j++) {
            float v = c[j];
            if (l.scale) v = v * l.scale[first + j];
            if (l.bias) v = v + l.bias[first + j];
            y[j] = l.accumulate ? y[j] + v : v;
        }
    }
}

// How x is read: as it is, or as prepared.
struct Input {
    const float* x;
    int64_t stride;
};

template <class F>
size_t tile_bytes(const Linear& l) {
    if (F::kGrouped) return (size_t)l.groups * (l.padded_group / F::kStep * F::kFetchBytes + 4 * kTile);
    return (size_t)(l.padded_in / F::kStep) * F::kFetchBytes;
}

// c[m] = fma(sum over the group, scale, c), then + sum of x * minimum.
template <int M, int NT>
INLINE void add_group(const Block<M, NT * kTileVectors>& b, const vf (&scale)[NT * kTileVectors],
                      const vf (&minimum)[NT * kTileVectors], const float* sums, int64_t stride, float* c, int64_t ldc) {
    UNROLL for (int m = 0; m < M; m++) {
        const vf s = splat(sums[m * stride]);
        UNROLL for (int v = 0; v < NT * kTileVectors; v++) {
            float* p = c + m * ldc + v * kWidth;
            store(p, fma(s, minimum[v], fma(b.acc[m][v], scale[v], load(p))));
        }
    }
}

// M rows times NT tiles, from the packed weight. c is [M, NT * 16].
template <class F, int M, int NT>
void direct(const Linear& l, Input in, const char* weight, float* c) {
    constexpr int NV = NT * kTileVectors, kFetches = F::kFetchBytes < 64 ? 64 / F::kFetchBytes : 1;
    const size_t bytes = tile_bytes<F>(l);
    const int group = F::kGrouped ? l.padded_group : l.padded_in;
    const float* sums = in.x + l.padded_in;
    const char* p = weight;
    if (F::kGrouped) memset(c, 0, M * NT * kTile * sizeof(float));
    const float* x = in.x;
    for (int g = 0; g < (F::kGrouped ? l.groups : 1); g++) {
        Block<M, NV> block;
        block.clear();
        auto fetch_and_step = [&]() __attribute__((always_inline)) {
            vf b[F::kStep][NV];
            UNROLL for (int v = 0; v < NV; v++) {
                vf column[F::kStep];
                F::fetch(p + v / kTileVectors * bytes, v % kTileVectors, column);
                UNROLL for (int j = 0; j < F::kStep; j++) b[j][v] = column[j];
            }
            UNROLL for (int j = 0; j < F::kStep; j++) block.step(x + j, in.stride, b[j]);
            p += F::kFetchBytes;
            x += F::kStep;
        };
        int k = 0;
        for (; k + F::kStep * kFetches <= group; k += F::kStep * kFetches) {
            UNROLL for (int t = 0; t < NT; t++) __builtin_prefetch(p + (t + NT) * bytes);
            UNROLL for (int f = 0; f < kFetches; f++) fetch_and_step();
        }
        if constexpr (kFetches > 1)
            for (; k < group; k += F::kStep) fetch_and_step();
        if constexpr (F::kGrouped) {
            vf scale[NV], minimum[NV];
            UNROLL for (int v = 0; v < NV; v++) {
                const uint16_t* halves = (const uint16_t*)(p + v / kTileVectors * bytes) + v % kTileVectors * kWidth;
                scale[v] = load_half(halves), minimum[v] = load_half(halves + kTile);
            }
            add_group<M, NT>(block, scale, minimum, sums + g, in.stride, c, NT * kTile);
            p += 4 * kTile;
        } else {
            block.write(c, NT * kTile);
        }
    }
}

// Tiles that M rows take at a time, so that the accumulators hide the multiply-add's latency and fit the registers.
template <int M>
constexpr int direct_tiles() {
    int n = (kRegisters == 32 ? 16 : 12) / (M * kTileVectors);
    return n < 1 ? 1 : n > 8 / kTileVectors && kTileVectors < 8 ? 8 / kTileVectors : n;
}

template <class F, int M, int NT>
void direct_tile(const Linear& l, Input in, int row, int tile) {
    float c[M * NT * kTile];
    in.x += row * in.stride;
    direct<F, M, NT>(l, in, l.weight + tile * tile_bytes<F>(l), c);
    finish(l, row, M, tile, NT, c);
}

template <class F, int M, int NT>
void direct_tiles_left(const Linear& l, Input in, int row, int tile, int left) {
    if (left == NT) return direct_tile<F, M, NT>(l, in, row, tile);
    if constexpr (NT > 1) direct_tiles_left<F, M, NT - 1>(l, in, row, tile, left);
}

template <class F, int M>
void direct_rows(const Linear& l, Input in, int begin, int end) {
    constexpr int NT = direct_tiles<M>();
    // Pieces of like size: 18 tiles by 4 are 4, 4, 4, 3, 3.
    const int pieces = ceil_div(end - begin, NT);
    for (int i = 0; i < pieces; i++) {
        const int from = begin + (end - begin) * i / pieces, to = begin + (end - begin) * (i + 1) / pieces;
        direct_tiles_left<F, M, NT>(l, in, 0, from, to - from);
    }
}

template <class F>
void direct_any(const Linear& l, Input in, int begin, int end) {
    switch (l.rows) {
        case 1: return direct_rows<F, 1>(l, in, begin, end);
        case 2: return direct_rows<F, 2>(l, in, begin, end);
        case 3: return direct_rows<F, 3>(l, in, begin, end);
        case 4: return direct_rows<F, 4>(l, in, begin, end);
        case 5: return direct_rows<F, 5>(l, in, begin, end);
        case 6: return direct_rows<F, 6>(l, in, begin, end);
    }
}

// Unpacked tiles: b is [NT][inputs][16] with `stride` elements from tile to tile; halves [NT][groups][2][16].
struct Unpacked {
    const float *b, *halves;
    int64_t stride, halves_stride;
    int inputs, group;
};

// c [M, NT * 16] += M rows times the unpacked inputs.
template <bool Grouped, int M, int NT>
void multiply(const Unpacked& u, const float* x, int64_t x_stride, const float* sums, float* c) {
    constexpr int NV = NT * kTileVectors;
    const float* b = u.b;
    Block<M, NV> block;
    auto steps = [&](int n) __attribute__((always_inline)) {
        for (int k = 0; k < n; k++, b += kTile, x++) {
            vf w[NV];
            UNROLL for (int v = 0; v < NV; v++)
                w[v] = load(b + v / kTileVectors * u.stride + v % kTileVectors * kWidth);
            block.step(x, x_stride, w);
        }
    };
    if constexpr (!Grouped) {
        block.read(c, NT * kTile);
        steps(u.inputs);
        block.write(c, NT * kTile);
        return;
    }
    const float* halves = u.halves;
    for (int k = 0; k < u.inputs; k += u.group, halves += 2 * kTile, sums++) {
        block.clear();
        steps(u.group);
        vf scale[NV], minimum[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            const float* h = halves + v / kTileVectors * u.halves_stride + v % kTileVectors * kWidth;
            scale[v] = load(h), minimum[v] = load(h + kTile);
        }
        add_group<M, NT>(block, scale, minimum, sums, x_stride, c, NT * kTile);
    }
}

template <bool Grouped, int NT, int M = kBlockRows>
void multiply_any(int m, const Unpacked& u, const float* x, int64_t x_stride, const float* sums, float* c) {
    if (m == M) return multiply<Grouped, M, NT>(u, x, x_stride, sums, c);
    if constexpr (M > 1) multiply_any<Grouped, NT, M - 1>(m, u, x, x_stride, sums, c);
}

// What a thread needs to unpack NT tiles' inputs, and the sums of a group of rows.
struct BlockScratch {
    int inputs, groups;

    explicit BlockScratch(const Linear& l) {
        groups = l.grouped && l.padded_group < kBlockInputs ? kBlockInputs / l.padded_group : 1;
        inputs = l.grouped ? groups * l.padded_group : kBlockInputs;
    }
    int64_t b_stride() const { return (int64_t)inputs * kTile; }
    int64_t halves_stride() const { return (int64_t)groups * 2 * kTile; }
    int64_t floats() const { return kBlockTiles * (b_stride() + halves_stride() + kRowGroup * kTile); }
};

template <class F>
void unpack(const char* p, int inputs, int group, float* b, float* halves) {
    for (int k = 0; k < inputs; k += F::kStep, p += F::kFetchBytes, b += F::kStep * kTile) {
        UNROLL for (int v = 0; v < kTileVectors; v++) {
            vf column[F::kStep];
            F::fetch(p, v, column);
            UNROLL for (int j = 0; j < F::kStep; j++) store(b + j * kTile + v * kWidth, column[j]);
        }
        if (F::kGrouped && (k + F::kStep) % group == 0) {
            const uint16_t* packed = (const uint16_t*)(p + F::kFetchBytes);
            for (int j = 0; j < 2 * kTile; j += kWidth) store(halves + j, load_half(packed + j));
            p += 4 * kTile;
            halves += 2 * kTile;
        }
    }
}

// Rows [row, row + rows) times NT tiles.
template <class F, int NT>
void blocked(const Linear& l, Input in, int row, int rows, int tile, float* scratch) {
    const BlockScratch size(l);
    float *b = scratch, *halves = b + kBlockTiles * size.b_stride(), *c = halves + kBlockTiles * size.halves_stride();
    const size_t bytes = tile_bytes<F>(l);
    const int group = F::kGrouped ? l.padded_group : 1;
    const int blocks = ceil_div(rows, kBlockRows);
    memset(c, 0, (size_t)rows * NT * kTile * sizeof(float));
    for (int k = 0; k < l.padded_in; k += size.inputs) {
        const int inputs = l.padded_in - k < size.inputs ? l.padded_in - k : size.inputs;
        Unpacked u{b, halves, size.b_stride(), size.halves_stride(), inputs, group};
        const char* p = l.weight + tile * bytes;
        p += F::kGrouped ? (size_t)(k / group) * (group / F::kStep * F::kFetchBytes + 4 * kTile)
                         : (size_t)(k / F::kStep) * F::kFetchBytes;
        if constexpr (F::kUnpacked) {
            u.b = (const float*)p, u.stride = bytes / sizeof(float);
        } else {
            for (int t = 0; t < NT; t++)
                unpack<F>(p + t * bytes, inputs, group, b + t * size.b_stride(), halves + t * size.halves_stride());
        }
        for (int i = 0; i < blocks; i++) {
            const int from = rows * i / blocks, to = rows * (i + 1) / blocks;
            const float* x = in.x + (row + from) * in.stride;
            multiply_any<F::kGrouped, NT>(to - from, u, x + k, in.stride, x + l.padded_in + k / group,
                                          c + from * NT * kTile);
        }
    }
    finish(l, row, rows, tile, NT, c);
}

template <class F>
void blocked_any(const Context& context, const Linear& l, Input in, float* scratch) {
    const int row_groups = ceil_div(l.rows, kRowGroup), columns = ceil_div(l.tiles, kBlockTiles);
    for (int i; (i = context.next()) < row_groups * columns;) {
        const int g = i / columns, tile = i % columns * kBlockTiles;
        const int from = (int)((int64_t)l.rows * g / row_groups), to = (int)((int64_t)l.rows * (g + 1) / row_groups);
        if (tile + kBlockTiles <= l.tiles) blocked<F, kBlockTiles>(l, in, from, to - from, tile, scratch);
        else blocked<F, 1>(l, in, from, to - from, tile, scratch);
    }
}

// x with its inputs padded, and as F::prepare wants them; by all threads for many rows, else by each for itself.
template <class F>
Input prepared(const Context& c, const Linear& l) {
    if (!F::kGrouped && l.padded_in == l.in) return {l.x, l.x_stride};
    const bool alone = l.rows <= 2;
    float* rows = alone ? c.scratch() : c.shared();
    int begin = 0, end = l.rows;
    if (!alone) c.share(l.rows, begin, end);
    for (int r = begin; r < end; r++) F::prepare(l, l.x + r * l.x_stride, rows + r * l.prepared_stride());
    if (!alone) c.barrier();
    return {rows, l.prepared_stride()};
}

template <class F>
void linear(const Context& c) {
    const Linear l(c.step, rows_of(c.step, c.batch));
    if (l.rows == 0) return;
    const Input in = prepared<F>(c, l);
    if (l.rows > kDirectRows) return blocked_any<F>(c, l, in, c.scratch());
    int begin, end;
    c.share(l.tiles, begin, end);
    direct_any<F>(l, in, begin, end);
}
