// Functions of one element, or of two in the same place.
#include "activations.h"
#include "ops.h"
#include "row.h"

namespace {

// f of every element of x.
template <class F>
INLINE void map(const Context& c, F f) {
    const int width = c.step.i[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++)
        map_row((float*)c.step.p[1] + r * width, width, f, (const float*)c.step.p[0] + r * width);
}

// f of every element of x and y; y is one row with i[2].
template <class F>
INLINE void map_both(const Context& c, F f) {
    const int width = c.step.i[1];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++) {
        const float* y = (const float*)c.step.p[2] + (c.step.i[2] ? 0 : r * width);
        map_row((float*)c.step.p[1] + r * width, width, f, (const float*)c.step.p[0] + r * width, y);
    }
}

}  // namespace

void act(const Context& c) {
    with_activation(c.step.i[2], [&](auto f) { map(c, f); });
}

void scale(const Context& c) {
    const float factor = c.step.f[0];
    map(c, [=](vf x) { return x * factor; });
}

void softcap(const Context& c) {
    const float cap = c.step.f[0];
    map(c, [=](vf x) { return cap * vtanh(x / cap); });
}

void add(const Context& c) {
    map_both(c, [](vf x, vf y) { return x + y; });
}

void mul(const Context& c) {
    map_both(c, [](vf x, vf y) { return x * y; });
}

void gated_act(const Context& c) {
    const int n = c.step.i[1];
    const float *gate = (const float*)c.step.p[0], *up = (const float*)c.step.p[2];
    const int64_t stride = up ? n : 2 * (int64_t)n;  // without `up`, a row has the gate and then up
    if (!up) up = gate + n;
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    with_gated_activation(c.step.i[2], [&](auto f) {
        for (int64_t r = begin; r < end; r++)
            map_row((float*)c.step.p[1] + r * n, n, f, gate + r * stride, up + r * stride);
    });
}
