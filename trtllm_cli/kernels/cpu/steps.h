// What a plan is made of. library.py mirrors both structures and every value below.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr int32_t kAbiVersion = 3;
constexpr int kTile = 16;  // outputs of a linear layer, or keys of a cache strip, that lie side by side

struct tl_step {
    int32_t op;
    int32_t i[16];
    float f[4];
    void* p[12];
};

struct tl_batch {
    int32_t num_tokens, num_seqs, num_logits, max_blocks;
    const int32_t *input_ids, *positions, *slot_mapping, *block_tables, *query_start, *seq_lens, *logits_indices;
};

enum Op {
    kEmbedding, kRmsNorm, kAddRmsNorm, kLinear, kGatedAct, kAdd, kRopeAppend, kPagedAttention, kGatherRows, kCopyRows,
    kLayerNorm, kAddLayerNorm, kAct, kMul, kScale, kSoftcap, kRope, kKvAppend,
    kQdq, kGatherColumns, kRoute, kExpertLinear, kExpertGatedAct, kCombine, kConcat,
};
enum Format { kFloat32, kBfloat16, kInt8, kInt4, kFp8 };
enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kSwigluOai };
enum QdqFormat { kQdqFp8, kQdqInt8, kQdqFp4 };
enum RopeLayout { kNeox, kGptj };

// i[0] of every step.
inline int rows_of(const tl_step& s, const tl_batch& b) { return s.i[0] ? b.num_logits : b.num_tokens; }

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
// Where part i of `parts` like ones of n things begins.
inline int part_of(int n, int i, int parts) { return (int)((int64_t)n * i / parts); }
