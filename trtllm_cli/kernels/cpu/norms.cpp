// Root-mean-square and layer norms, alone or with the residual's sum before them.
#include "ops.h"
#include "row.h"

namespace {

float sum(const float* x, int n) {
    vf sums[4] = {};
    int j = 0;
    for (; j + 4 * kWidth <= n; j += 4 * kWidth)
        for (int v = 0; v < 4; v++) sums[v] = sums[v] + load(x + j + v * kWidth);
    float rest = 0;
    for (; j < n; j++) rest += x[j];
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

INLINE float sum_of_squares(const float* x, int n, float mean) {
    vf sums[4] = {};
    int j = 0;
    for (; j + 4 * kWidth <= n; j += 4 * kWidth)
        for (int v = 0; v < 4; v++) {
            vf a = load(x + j + v * kWidth) - mean;
            sums[v] = fma(a, a, sums[v]);
        }
    float rest = 0;
    for (; j < n; j++) rest += (x[j] - mean) * (x[j] - mean);
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

float factor_of(float squares, int n, float eps) { return 1.0f / __builtin_sqrtf(squares / (float)n + eps); }

void rms_norm_row(const float* x, const float* weight, float* out, int n, float eps) {
    const float factor = factor_of(sum_of_squares(x, n, 0.0f), n, eps);
    map_row(out, n, [=](vf a, vf w) { return a * factor * w; }, x, weight);
}

void layer_norm_row(const float* x, const float* weight, const float* bias, float* out, int n, float eps) {
    const float mean = sum(x, n) / (float)n, factor = factor_of(sum_of_squares(x, n, mean), n, eps);
    if (bias) map_row(out, n, [=](vf a, vf w, vf b) { return (a - mean) * factor * w + b; }, x, weight, bias);
    else map_row(out, n, [=](vf a, vf w) { return (a - mean) * factor * w; }, x, weight);
}

// residual += x, and then norm(residual, out), for each row.
template <class F>
INLINE void add_norm(const Context& c, F norm) {
    const int width = c.step.i[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++) {
        float* residual = (float*)c.step.p[3] + r * width;
        map_row(residual, width, [](vf a, vf b) { return a + b; }, residual, (const float*)c.step.p[0] + r * width);
        norm(residual, (float*)c.step.p[1] + r * width, width);
    }
}

}  // namespace

void rms_norm(const Context& c) {
    const int width = c.step.i[1], part = width / c.step.i[2];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t j = (int64_t)begin * width; j < (int64_t)end * width; j += part)
        rms_norm_row((const float*)c.step.p[0] + j, (const float*)c.step.p[2], (float*)c.step.p[1] + j, part,
                     c.step.f[0]);
}

void layer_norm(const Context& c) {
    const int width = c.step.i[1], heads = c.step.i[2], part = width / heads;
    const float *weight = (const float*)c.step.p[2], *bias = (const float*)c.step.p[4];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++)
        for (int at = 0; at < width; at += part)
            layer_norm_row((const float*)c.step.p[0] + r * width + at, weight + at, bias ? bias + at : nullptr,
                           (float*)c.step.p[1] + r * width + at, part, c.step.f[0]);
}

void add_rms_norm(const Context& c) {
    add_norm(c, [&](const float* x, float* out, int n) {
        rms_norm_row(x, (const float*)c.step.p[2], out, n, c.step.f[0]);
    });
}

void add_layer_norm(const Context& c) {
    add_norm(c, [&](const float* x, float* out, int n) {
        layer_norm_row(x, (const float*)c.step.p[2], (const float*)c.step.p[4], out, n, c.step.f[0]);
    });
}
