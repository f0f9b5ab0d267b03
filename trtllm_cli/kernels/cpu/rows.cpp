// Steps that copy rows, or parts of them.
#include "ops.h"
#include "simd.h"

void embedding(const Context& c) {
    const int width = c.step.i[1], vocab = c.step.i[2], start = c.step.i[3];
    const int32_t* ids = c.step.i[5] ? c.batch.positions : c.batch.input_ids;
    int begin, end;
    c.share(c.batch.num_tokens, begin, end);
    for (int64_t t = begin; t < end; t++) {
        const int64_t row = (int64_t)ids[t] - start;
        float* out = (float*)c.step.p[0] + t * width;
        if (row < 0 || row >= vocab) {
            memset(out, 0, width * sizeof(float));
        } else if (c.step.i[4] == kFloat32) {
            memcpy(out, (const float*)c.step.p[1] + row * width, width * sizeof(float));
        } else {
            const uint16_t* table = (const uint16_t*)c.step.p[1] + row * width;
            for (int j = 0; j < width; j++) out[j] = bf16_to_float(table[j]);
        }
    }
}

void gather_rows(const Context& c) {
    const int64_t width = c.step.i[1];
    int begin, end;
    c.share(c.batch.num_logits, begin, end);
    for (int64_t r = begin; r < end; r++)
        memcpy((float*)c.step.p[1] + r * width, (const float*)c.step.p[0] + c.batch.logits_indices[r] * width,
               width * sizeof(float));
}

void copy_rows(const Context& c) {
    const int64_t width = c.step.i[1], x_stride = c.step.i[2], out_stride = c.step.i[3];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++)
        memcpy((float*)c.step.p[1] + r * out_stride, (const float*)c.step.p[0] + r * x_stride, width * sizeof(float));
}

void gather_columns(const Context& c) {
    const int64_t width = c.step.i[1], x_stride = c.step.i[2];
    const int32_t* indices = (const int32_t*)c.step.p[2];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++) {
        const float* x = (const float*)c.step.p[0] + r * x_stride;
        float* out = (float*)c.step.p[1] + r * width;
        for (int64_t j = 0; j < width; j++) out[j] = x[indices[j]];
    }
}

void concat(const Context& c) {
    const int64_t width = c.step.i[1], heads = c.step.i[2], first = c.step.i[3], second = width / heads - first;
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t part = begin * heads; part < end * heads; part++) {
        float* out = (float*)c.step.p[1] + part * (first + second);
        memcpy(out, (const float*)c.step.p[0] + part * first, first * sizeof(float));
        memcpy(out + first, (const float*)c.step.p[2] + part * second, second * sizeof(float));
    }
}
