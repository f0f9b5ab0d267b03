#include "ops.h"

namespace {

// Elements of a piece below which handing it out takes longer than doing it.
constexpr int64_t kPieceElements = 2048;

void linear(const Context& c, bool prepares) {
    switch (c.step.i[3]) {
        case kFloat32: return linear_float32(c, prepares);
        case kBfloat16: return linear_bfloat16(c, prepares);
        case kInt8: return linear_int8(c, prepares);
        case kInt4: return linear_int4(c, prepares);
        case kFp8: return linear_fp8(c, prepares);
    }
}

int64_t width_of(const tl_step& s) {
    if (s.op == kRopeAppend) return (int64_t)(s.i[1] + 2 * s.i[2]) * s.i[3];
    return s.i[1];
}

}  // namespace

Needs needs_of(const tl_step& step, const tl_batch& batch, int num_threads) {
    const int rows = rows_of(step, batch);
    if (step.op == kLinear) return linear_needs(step, rows, num_threads);
    if (step.op == kExpertLinear) return expert_linear_needs(step, rows, num_threads);
    if (step.op == kPagedAttention) return attention_needs(step, batch, num_threads);
    int64_t pieces = rows * width_of(step) / kPieceElements + 1;
    if (pieces > rows) pieces = rows;
    if (pieces > 2 * num_threads) pieces = 2 * num_threads;
    Needs needs;
    needs.pieces = (int)pieces;
    return step.op == kRoute ? route_needs(step, needs) : needs;
}

void run_piece(const Context& c, bool prepares) {
    switch (c.step.op) {
        case kEmbedding: return embedding(c);
        case kRmsNorm: return rms_norm(c);
        case kAddRmsNorm: return add_rms_norm(c);
        case kLinear:
        case kExpertLinear: return linear(c, prepares);
        case kGatedAct: return gated_act(c);
        case kAdd: return add(c);
        case kRopeAppend: return rope_append(c);
        case kPagedAttention: return paged_attention(c);
        case kGatherRows: return gather_rows(c);
        case kCopyRows: return copy_rows(c);
        case kLayerNorm: return layer_norm(c);
        case kAddLayerNorm: return add_layer_norm(c);
        case kAct: return act(c);
        case kMul: return mul(c);
        case kScale: return scale(c);
        case kSoftcap: return softcap(c);
        case kRope: return rope(c);
        case kKvAppend: return kv_append(c);
        case kQdq: return qdq(c);
        case kGatherColumns: return gather_columns(c);
        case kRoute: return route(c);
        case kExpertGatedAct: return expert_gated_act(c);
        case kCombine: return combine(c);
        case kConcat: return concat(c);
    }
}
