// Steps that take each row by itself.
#include "ops.h"
#include "simd.h"
#include "vector_math.h"

namespace {

// f on every vector of a row of n; the last one padded with zeros. f(a, b) of x and y, or of x alone where y is null.
template <class F>
INLINE void map_row(const float* x, const float* y, float* out, int n, F f) {
    int j = 0;
    for (; j + kWidth <= n; j += kWidth) store(out + j, f(load(x + j), y ? load(y + j) : (vf){}));
    if (j == n) return;
    float a[kWidth] = {}, b[kWidth] = {};
    memcpy(a, x + j, (n - j) * sizeof(float));
    if (y) memcpy(b, y + j, (n - j) * sizeof(float));
    store(a, f(load(a), load(b)));
    memcpy(out + j, a, (n - j) * sizeof(float));
}

float sum_of_squares(const float* x, int n) {
    vf sums[4] = {};
    int j = 0;
    for (; j + 4 * kWidth <= n; j += 4 * kWidth)
        for (int v = 0; v < 4; v++) {
            vf a = load(x + j + v * kWidth);
            sums[v] = fma(a, a, sums[v]);
        }
    float rest = 0;
    for (; j < n; j++) rest += x[j] * x[j];
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

void normalize(const float* x, const float* weight, float* out, int n, float eps) {
    const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / (float)n + eps);
    map_row(x, weight, out, n, [=](vf a, vf w) { return a * factor * w; });
}

template <class F>
void gated(const Context& c, F activation) {
    const int n = c.step.i[1];
    const float* x = (const float*)c.step.p[0];
    float* out = (float*)c.step.p[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++)
        map_row(x + 2 * r * n, x + (2 * r + 1) * n, out + r * n, n, [=](vf g, vf u) { return activation(g) * u; });
}

}  // namespace

void embedding(const Context& c) {
    const int width = c.step.i[1], vocab = c.step.i[2], start = c.step.i[3];
    int begin, end;
    c.share(c.batch.num_tokens, begin, end);
    for (int64_t t = begin; t < end; t++) {
        const int64_t row = (int64_t)c.batch.input_ids[t] - start;
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

void rms_norm(const Context& c) {
    const int width = c.step.i[1], part = width / c.step.i[2];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t j = (int64_t)begin * width; j < (int64_t)end * width; j += part)
        normalize((const float*)c.step.p[0] + j, (const float*)c.step.p[2], (float*)c.step.p[1] + j, part, c.step.f[0]);
}

void add_rms_norm(const Context& c) {
    const int width = c.step.i[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++) {
        float* residual = (float*)c.step.p[3] + r * width;
        map_row(residual, (const float*)c.step.p[0] + r * width, residual, width, [](vf a, vf b) { return a + b; });
        normalize(residual, (const float*)c.step.p[2], (float*)c.step.p[1] + r * width, width, c.step.f[0]);
    }
}

void gated_act(const Context& c) {
    switch (c.step.i[2]) {
        case kSilu: return gated(c, [](vf g) { return g * vsigmoid(g); });
        case kGelu: return gated(c, [](vf g) { return 0.5f * g * (1.0f + verf(g * 0.70710678118654752f)); });
        case kGeluTanh:
            return gated(c, [](vf g) {
                return 0.5f * g * (1.0f + vtanh(0.79788456080286536f * (g + 0.044715f * g * g * g)));
            });
        case kRelu: return gated(c, [](vf g) { return g < 0.0f ? (vf){} : g; });
    }
}

void add(const Context& c) {
    const int width = c.step.i[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++) {
        const float* y = (const float*)c.step.p[2] + (c.step.i[2] ? 0 : r * width);
        map_row((const float*)c.step.p[0] + r * width, y, (float*)c.step.p[1] + r * width, width,
                [](vf a, vf b) { return a + b; });
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
