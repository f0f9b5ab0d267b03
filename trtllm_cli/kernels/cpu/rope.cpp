// The step between the projection of q, k and v, and attention: norms, rotation, and the write to the cache.
#include "cache.h"
#include "ops.h"
#include "simd.h"

namespace {

constexpr int kMaxHeadDim = 1024;

void normalize(float* x, const float* weight, int n, float eps) {
    float partial[16] = {};
    for (int j = 0; j < n; j++) partial[j % 16] += x[j] * x[j];
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) partial[j] += partial[j + half];
    const float factor = 1.0f / __builtin_sqrtf(partial[0] / (float)n + eps);
    for (int j = 0; j < n; j++) x[j] = x[j] * factor * weight[j];
}

// angles: the cosines of n / 2 angles, then the sines.
void rotate(float* __restrict x, const float* __restrict angles, int n, int layout) {
    const int half = n / 2;
    const float *cosine = angles, *sine = angles + half;
    if (layout == kNeox) {
        for (int j = 0; j < half; j++) {
            const float a = x[j], b = x[j + half];
            x[j] = a * cosine[j] - b * sine[j];
            x[j + half] = b * cosine[j] + a * sine[j];
        }
    } else {
        for (int j = 0; j < half; j++) {
            const float a = x[2 * j], b = x[2 * j + 1];
            x[2 * j] = a * cosine[j] - b * sine[j];
            x[2 * j + 1] = b * cosine[j] + a * sine[j];
        }
    }
}

void put(float& to, float x) { to = x; }
void put(uint16_t& to, float x) { to = float_to_bf16(x); }

template <class E>
void append(const CacheShape& shape, E* cache, int slot, int head, const float* k, const float* v) {
    const int block = slot / shape.block_size, offset = slot % shape.block_size;
    E* keys = cache + shape.keys(block, head) + (int64_t)(offset / kTile) * shape.padded_dim * kTile + offset % kTile;
    for (int j = 0; j < shape.dim; j++) put(keys[j * kTile], k[j]);
    E* values = cache + shape.values(block, head) + (int64_t)offset * shape.padded_dim;
    for (int j = 0; j < shape.dim; j++) put(values[j], v[j]);
}

}  // namespace

void rope_append(const Context& c) {
    const tl_step& s = c.step;
    const int heads = s.i[1], kv_heads = s.i[2], dim = s.i[3], rotary = s.i[6], layout = s.i[7];
    const CacheShape shape(kv_heads, dim, s.i[4]);
    const float *table = (const float*)s.p[3], *q_norm = (const float*)s.p[4], *k_norm = (const float*)s.p[5];
    auto transform = [&](const float* from, float* to, const float* norm, int token) {
        memcpy(to, from, dim * sizeof(float));
        if (norm) normalize(to, norm, dim, s.f[0]);
        if (rotary) rotate(to, table + (int64_t)c.batch.positions[token] * rotary, rotary, layout);
    };
    int begin, end;
    c.share(c.batch.num_tokens, begin, end);
    for (int64_t t = begin; t < end; t++) {
        const float* qkv = (const float*)s.p[0] + t * s.i[8];
        for (int h = 0; h < heads; h++)
            transform(qkv + h * dim, (float*)s.p[1] + (t * heads + h) * dim, q_norm, (int)t);
        const int slot = c.batch.slot_mapping[t];
        for (int h = 0; h < kv_heads; h++) {
            float k[kMaxHeadDim];
            transform(qkv + (heads + h) * dim, k, k_norm, (int)t);
            const float* v = qkv + (heads + kv_heads + h) * dim;
            if (s.i[5] == kFloat32) append(shape, (float*)s.p[2], slot, h, k, v);
            else append(shape, (uint16_t*)s.p[2], slot, h, k, v);
        }
    }
}
