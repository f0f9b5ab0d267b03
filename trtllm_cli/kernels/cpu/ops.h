// What each step does; the dispatch is in ops.cpp.
#pragma once

#include "pool.h"

// What a step takes: pieces of work, before that pieces of preparing its input (0: none), and bytes of scratch.
struct Needs {
    int pieces = 1, preparation = 0;
    size_t per_thread = 0, shared = 0;
};

Needs needs_of(const tl_step& step, const tl_batch& batch, int num_threads);
void run_piece(const Context& c, bool prepares);

// rows.cpp
void embedding(const Context& c);
void gather_rows(const Context& c);
void copy_rows(const Context& c);
void gather_columns(const Context& c);
void concat(const Context& c);

// norms.cpp
void rms_norm(const Context& c);
void layer_norm(const Context& c);
void add_rms_norm(const Context& c);
void add_layer_norm(const Context& c);

// activations.cpp
void act(const Context& c);
void scale(const Context& c);
void softcap(const Context& c);
void add(const Context& c);
void mul(const Context& c);
void gated_act(const Context& c);

// rope.cpp
void rope_append(const Context& c);
void rope(const Context& c);
void kv_append(const Context& c);

// attention.cpp
void paged_attention(const Context& c);
Needs attention_needs(const tl_step& step, const tl_batch& batch, int num_threads);

// quantize.cpp
void qdq(const Context& c);

// experts.cpp
void route(const Context& c);
void expert_gated_act(const Context& c);
void combine(const Context& c);
Needs route_needs(const tl_step& step, Needs needs);  // of the row-wise needs

// linear_*.cpp, for kLinear and kExpertLinear; with `prepares`, x is made what the kernels want, or the experts' tokens
// are found
void linear_float32(const Context& c, bool prepares);
void linear_bfloat16(const Context& c, bool prepares);
void linear_int8(const Context& c, bool prepares);
void linear_int4(const Context& c, bool prepares);
void linear_fp8(const Context& c, bool prepares);
Needs linear_needs(const tl_step& step, int rows, int num_threads);
Needs expert_linear_needs(const tl_step& step, int tokens, int num_threads);
