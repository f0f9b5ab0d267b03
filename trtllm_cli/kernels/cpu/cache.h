// A layer's paged KV cache. A block has, per KV head, the keys in strips of 16, [strip, dim, 16] so that a vector
// holds one element of several keys, and then the values [key, dim]; dim and the block's keys are rounded up to 16.
#pragma once

#include "steps.h"

struct CacheShape {
    int kv_heads, dim, block_size;
    int padded_dim, padded_block;

    CacheShape(int kv_heads, int dim, int block_size)
        : kv_heads(kv_heads), dim(dim), block_size(block_size), padded_dim((int)round_up(dim, kTile)),
          padded_block((int)round_up(block_size, kTile)) {}

    int64_t head_elements() const { return 2 * (int64_t)padded_dim * padded_block; }
    int64_t keys(int block, int head) const { return ((int64_t)block * kv_heads + head) * head_elements(); }
    int64_t values(int block, int head) const { return keys(block, head) + (int64_t)padded_dim * padded_block; }
};
