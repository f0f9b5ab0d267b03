// The steps between the projection of q, k and v, and attention: norms, rotation, and the write to the cache.
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

template <class E>
void append(const CacheShape& shape, E* cache, int slot, int head, const float* k, const float* v, const float* scale) {
    const int block = slot / shape.block_size, offset = slot % shape.block_size;
    const float k_scale = scale ? scale[0] : 1.0f, v_scale = scale ? scale[1] : 1.0f;
    E* keys = cache + shape.keys(block, head) + (int64_t)(offset / kTile) * shape.padded_dim * kTile + offset % kTile;
    for (int j = 0; j < shape.dim; j++) put(keys[j * kTile], k[j], k_scale);
    E* values = cache + shape.values(block, head) + (int64_t)offset * shape.padded_v_dim;
    for (int j = 0; j < shape.v_dim; j++) put(values[j], v[j], v_scale);
}

}  // namespace

void rope_append(const Context& c) {
    const tl_step& s = c.step;
    const int heads = s.i[1], kv_heads = s.i[2], dim = s.i[3], rotary = s.i[6], layout = s.i[7];
    const CacheShape shape(kv_heads, dim, dim, s.i[4]);
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
            with_cache(s.i[5], s.p[2], [&](auto* cache) {
                append(shape, cache, slot, h, k, v, (const float*)s.p[6]);
            });
        }
    }
}

void rope(const Context& c) {
    const tl_step& s = c.step;
    const int64_t width = s.i[1];
    const int dim = s.i[1] / s.i[2], rotary = s.i[3];
    int begin, end;
    c.share(c.batch.num_tokens, begin, end);
    for (int64_t t = begin; t < end; t++) {
        const float* angles = (const float*)s.p[2] + (int64_t)c.batch.positions[t] * rotary;
        float* out = (float*)s.p[1] + t * width;
        memmove(out, (const float*)s.p[0] + t * width, width * sizeof(float));
        for (int64_t at = 0; at < width; at += dim) rotate(out + at, angles, rotary, s.i[4]);
    }
}

void kv_append(const Context& c) {
    const tl_step& s = c.step;
    const CacheShape shape(s.i[2], s.i[3], s.i[6], s.i[4]);
    int begin, end;
    c.share(c.batch.num_tokens, begin, end);
    with_cache(s.i[5], s.p[2], [&](auto* cache) {
        for (int64_t t = begin; t < end; t++)
            for (int h = 0; h < shape.kv_heads; h++) {
                const int64_t head = t * shape.kv_heads + h;
                append(shape, cache, c.batch.slot_mapping[t], h, (const float*)s.p[0] + head * shape.dim,
                       (const float*)s.p[1] + head * shape.v_dim, (const float*)s.p[3]);
            }
    });
}
