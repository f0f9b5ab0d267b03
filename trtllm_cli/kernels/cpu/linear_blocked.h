// A linear of many rows: weight tiles are unpacked to float32 in cache.
#pragma once

#include "linear.h"

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
    const char* packed_minima = tile + l.groups * group_bytes<F>(l) + (int64_t)g * kScalesBytes<F>;
    for (int i = 0; i < u.groups; i++) {
        if constexpr (F::kScaleBytes > 0) {
            for (int v = 0; v < kTileVectors; v++) {
                store(scales + v * kWidth, load_scales<F>(p, v));
                if (l.minima) store(minima + v * kWidth, load_scales<F>(packed_minima, v));
            }
            p += kScalesBytes<F>, packed_minima += kScalesBytes<F>, scales += kTile, minima += kTile;
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
    constexpr bool kGrouped = F::kScaleBytes > 0;
    float *b = scratch, *scales = b + NT * (int64_t)size.inputs * kTile, *minima = scales + NT * size.groups * kTile;
    float *c = scratch + NT * size.tile_floats(), *d = c + kRowGroup * N;  // d: the sums of minima
    const char* weight = l.weight + tile * tile_bytes<F>(l);
    const int blocks = ceil_div(rows, kBlockRows);
    memset(c, 0, (size_t)rows * N * sizeof(float));
    if (kGrouped && l.minima) memset(d, 0, (size_t)rows * N * sizeof(float));
    for (int k = 0; k < l.padded_in; k += size.inputs) {
        const int inputs = k + size.inputs < l.padded_in ? size.inputs : l.padded_in - k;
        const int groups = kGrouped ? inputs / l.padded_group : 1;
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
            multiply_any<kGrouped, NT>(m, u, x + k, in.stride, c + from * N);
            if (kGrouped && l.minima)
                multiply_any<false, NT>(m, of_minima, x + l.padded_in + k / l.padded_group, in.stride, d + from * N);
        }
    }
    if (kGrouped && l.minima)
        for (int j = 0; j < rows * N; j += kWidth) store(c + j, fma(load(d + j), splat(1.0f), load(c + j)));
    finish(l, row, rows, tile * kTile, N, c);
}
