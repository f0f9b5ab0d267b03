// A mixture of experts, but for its linears: who goes where, the activation, and the sum.
#include <cmath>

#include "activations.h"
#include "ops.h"
#include "row.h"

namespace {

// A route step's numbers.
struct Route {
    int experts, top_k, groups, top_groups;
    bool sigmoid, renormalize;
    float scaling;

    explicit Route(const tl_step& s)
        : experts(s.i[1]), top_k(s.i[2]), groups(s.i[5]), top_groups(s.i[6]), sigmoid(s.i[3]), renormalize(s.i[4]),
          scaling(s.f[0]) {}
};

// The first of the largest of n; what was taken before is NaN, and is passed over.
int take_largest(const float* x, int n) {
    int best = -1;
    for (int i = 0; i < n; i++)
        if (x[i] == x[i] && (best < 0 || x[i] > x[best])) best = i;
    return best < 0 ? 0 : best;
}

void softmax(const float* x, float* out, int n) {
    float most = x[0];
    for (int i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    map_row(out, n, [=](vf v) { return vexp(v - most); }, x);
    float sum = 0;
    for (int i = 0; i < n; i++) sum += out[i];
    map_row(out, n, [=](vf v) { return v / sum; }, (const float*)out);
}

// Leaves -inf where an expert's group is not among the best.
void keep_best_groups(const Route& r, float* choice, float* best) {
    const int size = r.experts / r.groups;
    for (int g = 0; g < r.groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (choice[i] > first) second = first, first = choice[i];
            else if (choice[i] > second) second = choice[i];
        }
        best[g] = r.sigmoid ? first + second : first;
    }
    for (int j = 0; j < r.top_groups; j++) best[take_largest(best, r.groups)] = NAN;
    for (int i = 0; i < r.experts; i++)
        if (best[i / size] == best[i / size]) choice[i] = -INFINITY;
}

}  // namespace

void route(const Context& c) {
    const Route r(c.step);
    const float* bias = (const float*)c.step.p[3];
    float *scores = c.scratch(), *choice = scores + round_up(r.experts, kTile);
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t t = begin; t < end; t++) {
        const float* logits = (const float*)c.step.p[0] + t * r.experts;
        float* weights = (float*)c.step.p[1] + t * r.top_k;
        int32_t* ids = (int32_t*)c.step.p[2] + t * r.top_k;
        if (r.sigmoid) map_row(scores, r.experts, [](vf x) { return vsigmoid(x); }, logits);
        else softmax(logits, scores, r.experts);
        for (int i = 0; i < r.experts; i++) choice[i] = scores[i] + (bias ? bias[i] : 0.0f);
        if (r.groups) keep_best_groups(r, choice, choice + round_up(r.experts, kTile));
        float sum = 0;
        for (int j = 0; j < r.top_k; j++) {
            ids[j] = take_largest(choice, r.experts);
            choice[ids[j]] = NAN;
            weights[j] = scores[ids[j]];
            sum += weights[j];
        }
        if (sum < 1e-20f) sum = 1e-20f;
        for (int j = 0; j < r.top_k; j++) weights[j] = (r.renormalize ? weights[j] / sum : weights[j]) * r.scaling;
    }
}

Needs route_needs(const tl_step& step, Needs needs) {
    needs.per_thread = 3 * round_up(step.i[1], kTile) * sizeof(float);
    return needs;
}

void expert_gated_act(const Context& c) {
    const int top_k = c.step.i[3];
    const int64_t n = c.step.i[1] / top_k;
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    with_gated_activation(c.step.i[2], [&](auto f) {
        for (int64_t part = (int64_t)begin * top_k; part < (int64_t)end * top_k; part++) {
            const float* up = (const float*)c.step.p[0] + part * 2 * n;
            map_row((float*)c.step.p[1] + part * n, (int)n, f, up + n, up);
        }
    });
}

void combine(const Context& c) {
    const int64_t width = c.step.i[1], top_k = c.step.i[2];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t t = begin; t < end; t++) {
        const float *x = (const float*)c.step.p[0] + t * top_k * width, *weights = (const float*)c.step.p[2] + t * top_k;
        float* out = (float*)c.step.p[1] + t * width;
        for (int64_t j = 0; j < top_k; j++, x += width) {
            const vf w = splat(weights[j]);
            if (j == 0) map_row(out, (int)width, [=](vf v) { return v * w; }, x);
            else map_row(out, (int)width, [=](vf sum, vf v) { return fma(v, w, sum); }, (const float*)out, x);
        }
    }
}
