// Linear layers. Few rows: the packed weight goes through registers once, straight from memory (`direct`). Many rows:
// a tile is unpacked to float32 in cache, and all rows pass over it (`blocked`). Both compute each output as one chain
// of multiply-adds over k, with the same float32 weights: the same bits.
//
// A format F says how a packed tile is read; pack.py has the layouts:
//     kStep, kReadBytes      inputs that one read gives, and bytes of the tile that they take
//     kHeaderBytes           before each group of inputs
//     Params params(p, v)    what vector v of the 16 outputs needs from the group's header
//     Raw read(p, v)         vector v of the 16 outputs, as it is stored, for kStep inputs from p
//     vf get(raw, params, j) its weights for input j of them
#pragma once

#include "micro.h"
#include "ops.h"

constexpr int kTileRows = 6;     // rows that take whole tiles directly; a few more take one vector of a tile at a time
constexpr int kDirectRows = 12;  // rows for which unpacking does not pay
constexpr int kBlockRows = kWidth == 16 ? 12 : 6;
constexpr int kBlockTiles = kWidth == 16 ? 2 : 1;
constexpr int kRowGroup = 16 * kBlockRows;  // rows that pass over one unpacked tile; their x stays in L2
constexpr int kBlockInputs = 256;           // inputs of an unpacked tile; it stays in L1
constexpr int kNibbles = 8;                 // inputs in a word of int4

// A step's parameters. Inputs come in groups, each padded to whole reads; but for int4, all are one group.
struct Linear {
    int rows, in, out, tiles;
    int group, padded_group, padded_in;
    int64_t x_stride, out_stride;
    bool accumulate;
    const float* x;
    float* y;
    const char* weight;
    const float *scale, *bias;

    Linear(const tl_step& s, int rows)
        : rows(rows), in(s.i[1]), out(s.i[2]), tiles(ceil_div(out, kTile)), group(s.i[4]), x_stride(s.i[6]),
          out_stride(s.i[7]), accumulate(s.i[5]), x((const float*)s.p[0]), y((float*)s.p[1]),
          weight((const char*)s.p[2]), scale((const float*)s.p[3]), bias((const float*)s.p[4]) {
        const int step = s.i[3] == kInt4 ? kNibbles : s.i[3] == kBfloat16 ? 2 : 1;
        padded_group = (int)round_up(group, step);
        padded_in = ceil_div(in, group) * padded_group;
    }
    bool padded() const { return padded_in != in; }
    int64_t padded_stride() const { return (int64_t)round_up(padded_in, kTile); }
};

// The input of all rows: x itself, or a copy with zeros where the packed weight has padding.
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

template <class F>
int64_t group_bytes(const Linear& l) {
    return F::kHeaderBytes + (int64_t)(l.padded_group / F::kStep) * F::kReadBytes;
}

template <class F>
int64_t tile_bytes(const Linear& l) {
    return l.padded_in / l.padded_group * group_bytes<F>(l);
}

// M rows times NV vectors of outputs, from vector `v0` of `tile` on. c is [M, NV * kWidth].
template <class F, int M, int NV>
INLINE void direct(const Linear& l, Input in, int tile, int v0, float* c) {
    constexpr int kReads = F::kReadBytes < 64 ? 64 / F::kReadBytes : 1, kTiles = (NV - 1) / kTileVectors + 1;
    const int64_t bytes = tile_bytes<F>(l);
    const char* p = l.weight + tile * bytes;
    const float* x = in.x;
    Block<M, NV> block;
    block.clear();
    for (int g = 0; g < l.padded_in; g += l.padded_group) {
        typename F::Params params[NV];
        UNROLL for (int v = 0; v < NV; v++)
            params[v] = F::params(p + v / kTileVectors * bytes, v0 + v % kTileVectors);
        p += F::kHeaderBytes;
        auto read_and_step = [&]() __attribute__((always_inline)) {
            typename F::Raw raw[NV];
            UNROLL for (int v = 0; v < NV; v++)
                raw[v] = F::read(p + v / kTileVectors * bytes, v0 + v % kTileVectors);
            UNROLL for (int j = 0; j < F::kStep; j++) {
                vf b[NV];
                UNROLL for (int v = 0; v < NV; v++) b[v] = F::get(raw[v], params[v], j);
                block.step(x + j, in.stride, b);
            }
            p += F::kReadBytes;
            x += F::kStep;
        };
        int k = 0;
        for (; k + F::kStep * kReads <= l.padded_group; k += F::kStep * kReads) {
            if (v0 == 0) UNROLL for (int t = 0; t < kTiles; t++) __builtin_prefetch(p + (t + kTiles) * bytes);
            UNROLL for (int i = 0; i < kReads; i++) read_and_step();
        }
        if constexpr (kReads > 1)
            for (; k < l.padded_group; k += F::kStep) read_and_step();
    }
    block.write(c, NV * kWidth);
}

template <class F, int M, int NV>
void direct_part(const Linear& l, Input in, int tile, int v0) {
    float c[M * NV * kWidth];
    direct<F, M, NV>(l, in, tile, v0, c);
    finish(l, 0, M, tile * kTile + v0 * kWidth, NV * kWidth, c);
}

// Up to NT tiles at a time.
template <class F, int M, int NT>
void direct_tiles_left(const Linear& l, Input in, int tile, int left) {
    if (left == NT) return direct_part<F, M, NT * kTileVectors>(l, in, tile, 0);
    if constexpr (NT > 1) direct_tiles_left<F, M, NT - 1>(l, in, tile, left);
}

// Tiles that M rows take at a time, so that the accumulators hide the multiply-add's latency and fit the registers.
template <class F, int M>
constexpr int direct_tiles() {
    constexpr int vectors = (kRegisters == 32 ? 16 : 12) / M, most = F::kMostVectors;
    constexpr int n = (vectors < most ? vectors : most) / kTileVectors;
    return n < 1 ? 1 : n;
}

template <class F, int M>
void direct_rows(const Linear& l, Input in, int begin, int end) {
    if constexpr (M > kTileRows) {
        for (int tile = begin; tile < end; tile++)
            for (int v = 0; v < kTileVectors; v++) direct_part<F, M, 1>(l, in, tile, v);
        return;
    }
    // Pieces of like size: 18 tiles by 4 are 4, 4, 4, 3, 3.
    constexpr int NT = M > kTileRows ? 1 : direct_tiles<F, M>();
    const int pieces = ceil_div(end - begin, NT);
    for (int i = 0; i < pieces; i++) {
        const int from = begin + (end - begin) * i / pieces, to = begin + (end - begin) * (i + 1) / pieces;
        direct_tiles_left<F, M, NT>(l, in, from, to - from);
    }
}

template <class F, int M = kDirectRows>
void direct_any(const Linear& l, Input in, int begin, int end) {
    if (l.rows == M) return direct_rows<F, M>(l, in, begin, end);
    if constexpr (M > 1) direct_any<F, M - 1>(l, in, begin, end);
}

// c [M, NT * 16] += M rows of x times unpacked tiles: b is [NT][inputs][16], `stride` elements from tile to tile.
template <int M, int NT>
void multiply(const float* b, int64_t stride, int inputs, const float* x, int64_t x_stride, float* c) {
    constexpr int NV = NT * kTileVectors;
    Block<M, NV> block;
    block.read(c, NT * kTile);
    for (int k = 0; k < inputs; k += 16) {
        UNROLL for (int m = 0; m < M; m++) __builtin_prefetch(x + (m + M) * x_stride);  // of the next rows
        const int end = inputs - k < 16 ? inputs - k : 16;
        for (int i = 0; i < end; i++, b += kTile, x++) {
            vf w[NV];
            UNROLL for (int v = 0; v < NV; v++) w[v] = load(b + v / kTileVectors * stride + v % kTileVectors * kWidth);
            block.step(x, x_stride, w);
        }
    }
    block.write(c, NT * kTile);
}

template <int NT, int M = kBlockRows>
void multiply_any(int m, const float* b, int64_t stride, int inputs, const float* x, int64_t x_stride, float* c) {
    if (m == M) return multiply<M, NT>(b, stride, inputs, x, x_stride, c);
    if constexpr (M > 1) multiply_any<NT, M - 1>(m, b, stride, inputs, x, x_stride, c);
}

// Inputs [k, end) of a tile to float32 [end - k, 16]; both are whole reads.
template <class F>
void unpack(const Linear& l, const char* tile, int k, int end, float* b) {
    while (k < end) {
        const int g = k / l.padded_group, left = (g + 1) * l.padded_group, stop = left < end ? left : end;
        const char* header = tile + g * group_bytes<F>(l);
        typename F::Params params[kTileVectors];
        UNROLL for (int v = 0; v < kTileVectors; v++) params[v] = F::params(header, v);
        const char* p = header + F::kHeaderBytes + (int64_t)((k - g * l.padded_group) / F::kStep) * F::kReadBytes;
        for (; k < stop; k += F::kStep, p += F::kReadBytes, b += F::kStep * kTile) {
            __builtin_prefetch(p + tile_bytes<F>(l));
            UNROLL for (int v = 0; v < kTileVectors; v++) {
                const typename F::Raw raw = F::read(p, v);
                UNROLL for (int j = 0; j < F::kStep; j++) store(b + j * kTile + v * kWidth, F::get(raw, params[v], j));
            }
        }
    }
}

// A thread's: NT unpacked tiles, and the sums of a group of rows.
constexpr int64_t kUnpackedFloats = (int64_t)kBlockInputs * kTile;
constexpr int64_t kBlockScratchBytes = sizeof(float) * kBlockTiles * (kUnpackedFloats + kRowGroup * kTile);

// Rows [row, row + rows) times NT tiles.
template <class F, int NT>
void blocked(const Linear& l, Input in, int row, int rows, int tile, float* scratch) {
    float *b = scratch, *c = b + kBlockTiles * kUnpackedFloats;
    const int64_t bytes = tile_bytes<F>(l);
    const char* weight = l.weight + tile * bytes;
    const int blocks = ceil_div(rows, kBlockRows), chunks = ceil_div(l.padded_in, kBlockInputs);
    const int chunk = (int)round_up(ceil_div(l.padded_in, chunks), kNibbles);
    memset(c, 0, (size_t)rows * NT * kTile * sizeof(float));
    for (int k = 0; k < l.padded_in; k += chunk) {
        const int end = k + chunk < l.padded_in ? k + chunk : l.padded_in;
        const float* unpacked = b;
        int64_t stride = kUnpackedFloats;
        if constexpr (F::kUnpacked) {
            unpacked = (const float*)weight + (int64_t)k * kTile, stride = bytes / (int64_t)sizeof(float);
        } else {
            for (int t = 0; t < NT; t++) unpack<F>(l, weight + t * bytes, k, end, b + t * kUnpackedFloats);
        }
        for (int i = 0; i < blocks; i++) {
            const int from = rows * i / blocks, to = rows * (i + 1) / blocks;
            multiply_any<NT>(to - from, unpacked, stride, end - k, in.x + (row + from) * in.stride + k, in.stride,
                             c + from * NT * kTile);
        }
    }
    finish(l, row, rows, tile * kTile, NT * kTile, c);
}

template <class F>
void blocked_any(const Context& context, const Linear& l, Input in) {
    const int row_groups = ceil_div(l.rows, kRowGroup), columns = ceil_div(l.tiles, kBlockTiles);
    float* scratch = context.scratch();
    for (int i; (i = context.next()) < row_groups * columns;) {
        const int g = i / columns, tile = i % columns * kBlockTiles;
        const int from = (int)((int64_t)l.rows * g / row_groups), to = (int)((int64_t)l.rows * (g + 1) / row_groups);
        if (tile + kBlockTiles <= l.tiles) blocked<F, kBlockTiles>(l, in, from, to - from, tile, scratch);
        else blocked<F, 1>(l, in, from, to - from, tile, scratch);
    }
}

inline Input padded_input(const Context& c, const Linear& l) {
    if (!l.padded()) return {l.x, l.x_stride};
    int begin, end;
    c.share(l.rows, begin, end);
    for (int r = begin; r < end; r++) {
        const float* x = l.x + r * l.x_stride;
        float* to = c.shared() + r * l.padded_stride();
        for (int k = 0; k < l.in; k += l.group, to += l.padded_group) {
            const int n = l.in - k < l.group ? l.in - k : l.group;
            memcpy(to, x + k, n * sizeof(float));
            memset(to + n, 0, (l.padded_group - n) * sizeof(float));
        }
    }
    c.barrier();
    return {c.shared(), l.padded_stride()};
}

template <class F>
void linear(const Context& c) {
    const Linear l(c.step, rows_of(c.step, c.batch));
    if (l.rows == 0) return;
    const Input in = padded_input(c, l);
    if (l.rows > kDirectRows) return blocked_any<F>(c, l, in);
    int begin, end;
    c.share(l.tiles, begin, end);
    direct_any<F>(l, in, begin, end);
}
