// The threads that run a plan. All of them walk through the steps together, with a barrier between steps; a step
// shares its work out by thread number (`share`) or by taking the next piece (`next`).
#pragma once

#include <atomic>
#include <pthread.h>

#include "steps.h"

// A word that threads wait for: they spin for a while, then sleep.
struct alignas(64) Signal {
    std::atomic<int32_t> value{0};
    std::atomic<int32_t> sleepers{0};

    void wait_while(int32_t old);
    void set(int32_t now);
};

struct alignas(64) Counter {
    std::atomic<int32_t> value;
};

struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    bool reserve(size_t bytes);  // its contents are lost
};

struct Worker;

struct Pool {
    int num_threads = 0;
    Worker* workers = nullptr;

    // What is being run.
    const tl_step* steps = nullptr;
    const tl_batch* batch = nullptr;
    int num_steps = 0;
    Buffer counters;  // a Counter for each step
    Buffer serial;    // a bool for each step: thread 0 does it alone
    Buffer shared;    // scratch of all threads
    Signal job;       // goes up when there is something to run; -1 ends the threads

    alignas(64) std::atomic<int32_t> arrived{0};
    Signal passed;  // goes up when all threads have come to the barrier

    void barrier();
    void run_steps(int thread);
};

struct Worker {
    Pool* pool;
    int thread;
    pthread_t handle;
    Buffer scratch;
};

// A thread's view of the step that it is in.
struct Context {
    Pool& pool;
    const tl_step& step;
    const tl_batch& batch;
    Counter& counter;
    int thread, num_threads;

    float* scratch() const { return (float*)pool.workers[thread].scratch.data; }
    float* shared() const { return (float*)pool.shared.data; }
    // The next `count` pieces of work that nobody has; the first's number.
    int next(int count = 1) const { return counter.value.fetch_add(count, std::memory_order_relaxed); }
    // This thread's contiguous part of n pieces: [begin, end).
    void share(int n, int& begin, int& end) const {
        begin = (int)((int64_t)n * thread / num_threads);
        end = (int)((int64_t)n * (thread + 1) / num_threads);
    }
    void barrier() const { pool.barrier(); }
};
