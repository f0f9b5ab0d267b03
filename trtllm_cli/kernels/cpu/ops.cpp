#include "ops.h"

namespace {

// Elements below which one thread is done before two have met.
constexpr int64_t kWorthSharing = 4096;

void linear(const Context& c) {
    switch (c.step.i[3]) {
        case kFloat32: return linear_float32(c);
        case kBfloat16: return linear_bfloat16(c);
        case kInt8: return linear_int8(c);
        case kInt4: return linear_int4(c);
    }
}

int64_t width_of(const tl_step& s) {
    if (s.op == kRopeAppend) return (int64_t)(s.i[1] + 2 * s.i[2]) * s.i[3];
    return s.i[1];
}

}  // namespace

void run_op(const Context& c) {
    switch (c.step.op) {
        case kEmbedding: return embedding(c);
        case kRmsNorm: return rms_norm(c);
        case kAddRmsNorm: return add_rms_norm(c);
        case kLinear: return linear(c);
        case kGatedAct: return gated_act(c);
        case kAdd: return add(c);
        case kRopeAppend: return rope_append(c);
        case kPagedAttention: return paged_attention(c);
        case kGatherRows: return gather_rows(c);
        case kCopyRows: return copy_rows(c);
    }
}

bool is_serial(const tl_step& step, const tl_batch& batch, int num_threads) {
    if (num_threads == 1) return true;
    if (step.op == kLinear || step.op == kPagedAttention) return false;
    return rows_of(step, batch) * width_of(step) < kWorthSharing;
}

Scratch scratch_of(const tl_step& step, const tl_batch& batch, int) {
    if (step.op == kLinear) return linear_scratch(step, rows_of(step, batch));
    if (step.op == kPagedAttention) return attention_scratch(step);
    return {};
}
