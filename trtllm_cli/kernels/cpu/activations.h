// The activation functions, on vectors.
#pragma once

#include "steps.h"
#include "vector_math.h"

// f(the function); not for kSwigluOai, which takes the up projection too.
template <class F>
INLINE void with_activation(int activation, F f) {
    switch (activation) {
        case kSilu: return f([](vf x) { return x * vsigmoid(x); });
        case kGelu: return f([](vf x) { return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f)); });
        case kGeluTanh:
            return f([](vf x) {
                return 0.5f * x * (1.0f + vtanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
            });
        case kRelu: return f([](vf x) { return x < 0.0f ? (vf){} : x; });
    }
}

// f(the function of gate and up).
template <class F>
INLINE void with_gated_activation(int activation, F f) {
    if (activation == kSwigluOai)
        return f([](vf gate, vf up) {
            gate = vmin(splat(7.0f), gate), up = vmax(splat(-7.0f), vmin(splat(7.0f), up));
            return gate * vsigmoid(1.702f * gate) * (up + 1.0f);
        });
    with_activation(activation, [&](auto act) { f([act](vf gate, vf up) { return act(gate) * up; }); });
}
