// A layer's paged KV cache. A block has, per KV head, the keys in strips of 16, [strip, dim, 16] so that a vector
// holds one element of several keys, and then the values [key, v_dim]; both widths and the block's keys are rounded up
// to 16.
#pragma once

#include "fp8.h"
#include "steps.h"

enum CacheType { kCacheFloat32, kCacheBfloat16, kCacheInt8, kCacheFp8 };

// An element, as a type of its own for each format.
struct bf16 {
    uint16_t bits;
};
struct fp8 {
    uint8_t bits;
};

INLINE vf load_as(const float* p) { return load(p); }
INLINE vf load_as(const bf16* p) { return load_bf16(&p->bits); }
INLINE vf load_as(const int8_t* p) { return load_int8(p); }
INLINE vf load_as(const fp8* p) { return load_fp8(&p->bits); }

// Only int8 and fp8 have a scale.
INLINE void put(float& to, float x, float) { to = x; }
INLINE void put(bf16& to, float x, float) { to.bits = float_to_bf16(x); }
INLINE void put(fp8& to, float x, float scale) { to.bits = float_to_fp8(x / scale); }
INLINE void put(int8_t& to, float x, float scale) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to even
    x = x / scale;
    x = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
    to = x == x ? (int8_t)(int)(x + magic - magic) : 0;
}

// f of the cache's memory as elements of its type.
template <class F>
INLINE void with_cache(int type, void* cache, F f) {
    switch (type) {
        case kCacheFloat32: return f((float*)cache);
        case kCacheBfloat16: return f((bf16*)cache);
        case kCacheInt8: return f((int8_t*)cache);
        case kCacheFp8: return f((fp8*)cache);
    }
}

struct CacheShape {
    int kv_heads, dim, v_dim, block_size;
    int padded_dim, padded_v_dim, padded_block;

    CacheShape(int kv_heads, int dim, int v_dim, int block_size)
        : kv_heads(kv_heads), dim(dim), v_dim(v_dim), block_size(block_size), padded_dim((int)round_up(dim, kTile)),
          padded_v_dim((int)round_up(v_dim, kTile)), padded_block((int)round_up(block_size, kTile)) {}

    int64_t head_elements() const { return (int64_t)(padded_dim + padded_v_dim) * padded_block; }
    int64_t keys(int block, int head) const { return ((int64_t)block * kv_heads + head) * head_elements(); }
    int64_t values(int block, int head) const { return keys(block, head) + (int64_t)padded_dim * padded_block; }
};
