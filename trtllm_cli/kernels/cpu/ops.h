// What each step does; the dispatch is in ops.cpp.
#pragma once

#include "pool.h"

struct Scratch {
    size_t per_thread = 0, shared = 0;  // bytes
};

void run_op(const Context& c);                                                        // by all threads, or thread 0
bool is_serial(const tl_step& step, const tl_batch& batch, int num_threads);          // too small to share
Scratch scratch_of(const tl_step& step, const tl_batch& batch, int num_threads);

// rows.cpp
void embedding(const Context& c);
void rms_norm(const Context& c);
void add_rms_norm(const Context& c);
void gated_act(const Context& c);
void add(const Context& c);
void gather_rows(const Context& c);
void copy_rows(const Context& c);

// rope.cpp
void rope_append(const Context& c);

// attention.cpp
void paged_attention(const Context& c);
Scratch attention_scratch(const tl_step& step);

// linear_*.cpp
void linear_float32(const Context& c);
void linear_bfloat16(const Context& c);
void linear_int8(const Context& c);
void linear_int4(const Context& c);
Scratch linear_scratch(const tl_step& step, int rows);
