// Linear layers. Few rows: the packed weight goes through registers once, straight from memory (`direct`). Many rows:
// a tile is unpacked to float32 in cache, and all rows pass over it (`blocked`). Both compute each output as the same
// chain of multiply-adds over k: the same bits.
//
// A format F says how a packed tile is read; pack.py has the layouts:
//     kStep, kReadBytes   inputs that one read gives, and bytes of the tile that they take
//     read(p, v)          vector v of the 16 outputs, as it is stored, for kStep inputs from p
//     get(raw, j)         its weights for input j of them
//     kMostVectors        vectors of outputs at a time for one row
//     kPassRows           rows that pass over the packed weight together
//     kGrouped            groups of inputs have a scale (before their weights) and a minimum (at the tile's end); then
//                         an output is the sum over groups of scale * (sum of x * weight), plus the sum over groups of
//                         minimum * (sum of x)
#pragma once

#include "micro.h"
#include "ops.h"

constexpr int kDirectRows = 12;  // rows for which unpacking does not pay: they take the packed weight in passes
constexpr int kBlockRows = kWidth == 16 ? 12 : 6;
constexpr int kBlockTiles = kWidth == 16 ? 2 : 1;
constexpr int kRowGroup = 16 * kBlockRows;  // rows that pass over one unpacked tile; their x stays in L2
constexpr int kBlockInputs = 256;           // inputs of an unpacked tile; it stays in L1
constexpr int kNibbles = 8;                 // inputs in a word of int4
constexpr int kAloneRows = 2;               // rows that each thread prepares for itself

// A step's parameters. Inputs come in groups, each padded to whole reads; but for int4, all are one group.
struct Linear {
    int rows, in, out, tiles;
    int group, groups, padded_group, padded_in;
    bool grouped;
    int64_t x_stride, out_stride;
    bool accumulate;
    const float* x;
    float* y;
    const char* weight;
    const float *scale, *bias;

    Linear(const tl_step& s, int rows)
        : rows(rows), in(s.i[1]), out(s.i[2]), tiles(ceil_div(out, kTile)), group(s.i[4]),
          groups(ceil_div(in, group)), grouped(s.i[3] == kInt4), x_stride(s.i[6]), out_stride(s.i[7]), accumulate(s.i[5]),
          x((const float*)s.p[0]), y((float*)s.p[1]), weight((const char*)s.p[2]), scale((const float*)s.p[3]),
          bias((const float*)s.p[4]) {
        const int step = grouped ? kNibbles : s.i[3] == kBfloat16 ? 2 : 1;
        padded_group = (int)round_up(group, step);
        padded_in = groups * padded_group;
    }
    // Whether the kernels want another x: zeros where the weight has padding; int4's scaling, and sums of groups.
    bool prepares() const { return grouped || padded_in != in; }
    int64_t prepared_stride() const { return (int64_t)round_up(padded_in + groups, kTile); }
};

// The input of all rows: x itself, or prepared; then each row is followed by its sums of groups.
struct Input {
    const float* x;
    int64_t stride;
};

// out = c * scale + bias, and out += that; c is [rows, width] for outputs from `first` on.
inline void finish(const Linear& l, int row, int rows, int first, int width, const float* c) {
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

constexpr int kHalvesBytes = 2 * kTile;  // a float16 for each output: a group's scales, or minima

template <class F>
int64_t group_bytes(const Linear& l) {
    return (F::kGrouped ? kHalvesBytes : 0) + (int64_t)(l.padded_group / F::kStep) * F::kReadBytes;
}

template <class F>
int64_t tile_bytes(const Linear& l) {
    return l.groups * (group_bytes<F>(l) + (F::kGrouped ? kHalvesBytes : 0));
}

// M rows from `in` on, times NV vectors of outputs: whole tiles. c is [M, NV * kWidth].
template <class F, int M, int NV>
NOINLINE void direct(const Linear& l, Input in, int tile, float* c) {
    constexpr int kReads = F::kReadBytes < 64 ? 64 / F::kReadBytes : 1, kTiles = NV / kTileVectors;
    // With few registers left, packed weights are read again for each input that they hold.
    constexpr bool kReread = F::kStep > 1 && (M + 2) * NV + 2 > kRegisters;
    const int64_t bytes = tile_bytes<F>(l);
    const char* p = l.weight + tile * bytes;
    Rows<M> x(in.x, in.stride);
    auto part = [&](const char* p, int v) __attribute__((always_inline)) { return p + v / kTileVectors * bytes; };
    auto half = [&](const char* p, int v) __attribute__((always_inline)) {
        return load_half((const uint16_t*)part(p, v) + v % kTileVectors * kWidth);
    };
    if (F::kGrouped) memset(c, 0, M * NV * kWidth * sizeof(float));
    for (int g = 0; g < l.groups; g++) {
        Block<M, NV> block;
        block.clear();
        const char* scales = p;
        if (F::kGrouped) p += kHalvesBytes;
        auto read_and_step = [&]() __attribute__((always_inline)) {
            UNROLL for (int j = 0; j < F::kStep; j++) {
                vf b[NV];
                UNROLL for (int v = 0; v < NV; v++) b[v] = F::get(F::read(part(p, v), v % kTileVectors), j);
                block.step(x, j, b);
                if (kReread) asm("" : "+r"(p));
            }
            p += F::kReadBytes;
            x.advance(F::kStep);
        };
        int k = 0;
        for (; k + F::kStep * kReads <= l.padded_group; k += F::kStep * kReads) {
            UNROLL for (int t = 0; t < kTiles; t++) __builtin_prefetch(p + (t + kTiles) * bytes);
            UNROLL for (int i = 0; i < kReads; i++) read_and_step();
        }
        if constexpr (kReads > 1)
            for (; k < l.padded_group; k += F::kStep) read_and_step();
        if constexpr (!F::kGrouped) return block.write(c, NV * kWidth);
        UNROLL for (int v = 0; v < NV; v++) block.add_scaled(v, half(scales, v), c + v * kWidth, NV * kWidth);
    }
    Block<M, NV> minima;
    minima.clear();
    Rows<M> sums(in.x + l.padded_in, in.stride);
    for (int g = 0; g < l.groups; g++, p += kHalvesBytes, sums.advance(1)) {
        vf b[NV];
        UNROLL for (int v = 0; v < NV; v++) b[v] = half(p, v);
        minima.step(sums, 0, b);
    }
    UNROLL for (int v = 0; v < NV; v++) minima.add_scaled(v, splat(1.0f), c + v * kWidth, NV * kWidth);
}

// Up to NT tiles at a time.
template <class F, int M, int NT>
void direct_tiles(const Linear& l, Input in, int row, int tile, int left) {
    if (left == NT) {
        float c[M * NT * kTile];
        direct<F, M, NT * kTileVectors>(l, {in.x + row * in.stride, in.stride}, tile, c);
        return finish(l, row, M, tile * kTile, NT * kTile, c);
    }
    if constexpr (NT > 1) direct_tiles<F, M, NT - 1>(l, in, row, tile, left);
}

// Tiles that M rows take at a time, so that the accumulators hide the multiply-add's latency and fit the registers.
template <class F, int M>
constexpr int tiles_at_once() {
    constexpr int vectors = (kRegisters == 32 ? 16 : 8) / M, most = F::kMostVectors;
    constexpr int n = (vectors < most ? vectors : most) / kTileVectors;
    return n < 1 ? 1 : n;
}

// Rows [row, row + m) times tiles [begin, end).
template <class F, int M = F::kPassRows>
void direct_pass(int m, const Linear& l, Input in, int row, int begin, int end) {
    if (m == M) {
        // Pieces of like size: 18 tiles by 4 are 4, 4, 4, 3, 3.
        constexpr int NT = tiles_at_once<F, M>();
        const int pieces = ceil_div(end - begin, NT);
        for (int i = 0; i < pieces; i++) {
            const int from = begin + (end - begin) * i / pieces, to = begin + (end - begin) * (i + 1) / pieces;
            direct_tiles<F, M, NT>(l, in, row, from, to - from);
        }
    } else if constexpr (M > 1) {
        direct_pass<F, M - 1>(m, l, in, row, begin, end);
    }
}

template <class F>
void direct_any(const Linear& l, Input in, int begin, int end) {
    const int passes = ceil_div(l.rows, F::kPassRows), step = passes == 1 ? end - begin : 1;
    for (int tile = begin; tile < end; tile += step)
        for (int i = 0; i < passes; i++) {
            const int from = l.rows * i / passes, to = l.rows * (i + 1) / passes;
            direct_pass<F>(to - from, l, in, from, tile, tile + step);
        }
}

// What `unpack` makes of some inputs: weights [NT][inputs][16], and if grouped, scales and minima [NT][groups][16]; the
// strides are elements from tile to tile.
struct Unpacked {
    const float *b, *scales, *minima;
    int64_t stride, groups_stride;
    int inputs, groups;
};

// c [M, NT * 16] += M rows of x times b, or times b of each group and its scale.
template <bool Grouped, int M, int NT>
void multiply(const Unpacked& u, const float* first, int64_t x_stride, float* c) {
    constexpr int NV = NT * kTileVectors;
    const float *b = u.b, *scales = u.scales;
    const int64_t stride = u.stride;
    const int group = u.inputs / u.groups;
    Rows<M> x(first, x_stride);
    Block<M, NV> block;
    if (!Grouped) block.read(c, NT * kTile);
    for (int g = 0; g < u.groups; g++) {
        if (Grouped) block.clear();
        for (int k = 0; k < group; k += 16) {
            UNROLL for (int m = 0; m < M; m++) __builtin_prefetch(x.at(m, 0) + M * x_stride);  // of the next rows
            const int n = group - k < 16 ? group - k : 16;
            for (int i = 0; i < n; i++, b += kTile, x.advance(1)) {
                vf w[NV];
                UNROLL for (int v = 0; v < NV; v++)
                    w[v] = load(b + v / kTileVectors * stride + v % kTileVectors * kWidth);
                block.step(x, 0, w);
            }
        }
        if (!Grouped) break;
        UNROLL for (int v = 0; v < NV; v++) {
            const vf scale = load(scales + v / kTileVectors * u.groups_stride + v % kTileVectors * kWidth);
            block.add_scaled(v, scale, c + v * kWidth, NT * kTile);
        }
        scales += kTile;
    }
    if (!Grouped) block.write(c, NT * kTile);
}

template <bool Grouped, int NT, int M = kBlockRows>
void multiply_any(int m, const Unpacked& u, const float* x, int64_t x_stride, float* c) {
    if (m == M) return multiply<Grouped, M, NT>(u, x, x_stride, c);
    if constexpr (M > 1) multiply_any<Grouped, NT, M - 1>(m, u, x, x_stride, c);
}

// A thread's: NT tiles' unpacked inputs, and twice the sums of a group of rows.
struct BlockScratch {
    int inputs, groups;  // unpacked at a time

    explicit BlockScratch(const Linear& l) {
        if (l.grouped) {
            const int most = l.padded_group < kBlockInputs ? kBlockInputs / l.padded_group : 1;
            groups = ceil_div(l.groups, ceil_div(l.groups, most)), inputs = groups * l.padded_group;
        } else {
            groups = 1, inputs = (int)round_up(ceil_div(l.padded_in, ceil_div(l.padded_in, kBlockInputs)), kNibbles);
        }
    }
    int64_t tile_floats() const { return (int64_t)(inputs + 2 * groups) * kTile; }
    int64_t bytes() const { return sizeof(float) * kBlockTiles * (tile_floats() + 2 * kRowGroup * kTile); }
};

// `inputs` inputs of a tile from k on, to b and what follows it.
template <class F>
void unpack(const Linear& l, const char* tile, int k, const Unpacked& u, float* b, float* scales, float* minima) {
    const int g = k / l.padded_group, group = u.inputs / u.groups;
    const char* p = tile + g * group_bytes<F>(l) + (int64_t)((k - g * l.padded_group) / F::kStep) * F::kReadBytes;
    const char* packed_minima = tile + l.groups * group_bytes<F>(l) + (int64_t)g * kHalvesBytes;
    for (int i = 0; i < u.groups; i++) {
        if (F::kGrouped) {
            for (int v = 0; v < kTileVectors; v++) {
                store(scales + v * kWidth, load_half((const uint16_t*)p + v * kWidth));
                store(minima + v * kWidth, load_half((const uint16_t*)packed_minima + v * kWidth));
            }
            p += kHalvesBytes, packed_minima += kHalvesBytes, scales += kTile, minima += kTile;
        }
        for (int j = 0; j < group; j += F::kStep, p += F::kReadBytes, b += F::kStep * kTile) {
            __builtin_prefetch(p + 4 * (int64_t)u.inputs);  // of the next inputs, about
            UNROLL for (int v = 0; v < kTileVectors; v++) {
                const typename F::Raw raw = F::read(p, v);
                UNROLL for (int i = 0; i < F::kStep; i++) store(b + i * kTile + v * kWidth, F::get(raw, i));
            }
        }
    }
}

// Rows [row, row + rows) times NT tiles.
template <class F, int NT>
void blocked(const Linear& l, Input in, int row, int rows, int tile, float* scratch) {
    const BlockScratch size(l);
    constexpr int N = NT * kTile;
    float *b = scratch, *scales = b + NT * (int64_t)size.inputs * kTile, *minima = scales + NT * size.groups * kTile;
    float *c = scratch + NT * size.tile_floats(), *d = c + kRowGroup * N;  // d: the sums of minima
    const char* weight = l.weight + tile * tile_bytes<F>(l);
    const int blocks = ceil_div(rows, kBlockRows);
    memset(c, 0, (size_t)rows * N * sizeof(float));
    if (F::kGrouped) memset(d, 0, (size_t)rows * N * sizeof(float));
    for (int k = 0; k < l.padded_in; k += size.inputs) {
        const int inputs = k + size.inputs < l.padded_in ? size.inputs : l.padded_in - k;
        const int groups = F::kGrouped ? inputs / l.padded_group : 1;
        Unpacked u{b, scales, minima, (int64_t)size.inputs * kTile, (int64_t)size.groups * kTile, inputs, groups};
        if constexpr (F::kUnpacked) {
            u.b = (const float*)weight + (int64_t)k * kTile, u.stride = tile_bytes<F>(l) / (int64_t)sizeof(float);
        } else {
            for (int t = 0; t < NT; t++)
                unpack<F>(l, weight + t * tile_bytes<F>(l), k, u, b + t * u.stride, scales + t * u.groups_stride,
                          minima + t * u.groups_stride);
        }
        const Unpacked of_minima{minima, nullptr, nullptr, u.groups_stride, 0, groups, 1};
        for (int i = 0; i < blocks; i++) {
            const int from = rows * i / blocks, m = rows * (i + 1) / blocks - from;
            const float* x = in.x + (row + from) * in.stride;
            multiply_any<F::kGrouped, NT>(m, u, x + k, in.stride, c + from * N);
            if constexpr (F::kGrouped)
                multiply_any<false, NT>(m, of_minima, x + l.padded_in + k / l.padded_group, in.stride, d + from * N);
        }
    }
    if (F::kGrouped)
        for (int j = 0; j < rows * N; j += kWidth) store(c + j, fma(load(d + j), splat(1.0f), load(c + j)));
    finish(l, row, rows, tile * kTile, N, c);
}

template <class F>
void blocked_any(const Context& context, const Linear& l, Input in) {
    const int columns = ceil_div(l.tiles, kBlockTiles), row_groups = context.pieces / columns;
    const int g = context.piece / columns, tile = context.piece % columns * kBlockTiles;
    const int from = (int)((int64_t)l.rows * g / row_groups), to = (int)((int64_t)l.rows * (g + 1) / row_groups);
    if (tile + kBlockTiles <= l.tiles) blocked<F, kBlockTiles>(l, in, from, to - from, tile, context.scratch());
    else blocked<F, 1>(l, in, from, to - from, tile, context.scratch());
}

template <class F>
void prepare(const Context& c, const Linear& l, float* to) {
    int begin, end;
    c.share(l.rows, begin, end);
    for (int r = begin; r < end; r++) F::prepare(l, l.x + r * l.x_stride, to + r * l.prepared_stride());
}

template <class F>
void linear(const Context& c, bool prepares) {
    const Linear l(c.step, rows_of(c.step, c.batch));
    if (prepares) return prepare<F>(c, l, c.shared());
    Input in{l.x, l.x_stride};
    if (l.prepares()) {
        const bool alone = l.rows <= kAloneRows;
        in = {alone ? c.scratch() : c.shared(), l.prepared_stride()};
        if (alone && c.first)
            for (int r = 0; r < l.rows; r++) F::prepare(l, l.x + r * l.x_stride, c.scratch() + r * in.stride);
    }
    if (l.rows > kDirectRows) return blocked_any<F>(c, l, in);
    int begin, end;
    c.share(l.tiles, begin, end);
    direct_any<F>(l, in, begin, end);
}
