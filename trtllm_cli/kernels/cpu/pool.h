// The threads that run a plan.
//
// Each step is cut into pieces, and whoever is free takes the next one. A step is over when its pieces are done, not
// when every thread has come: a thread that the machine gives to somebody else, or that wakes up late, is not waited for
// unless it holds a piece. Results do not depend on who does what.
#pragma once

#include <atomic>
#include <pthread.h>

#include "steps.h"

// A word that threads wait for: they spin for a while, then sleep.
struct alignas(64) Signal {
    std::atomic<int32_t> value{0};
    std::atomic<int32_t> sleepers{0};

    void wait_while(int32_t old);
    void set(int32_t next);
    void add(int32_t n);
};

struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    bool reserve(size_t bytes);  // its contents are lost
};

// A step, or the preparation of one's input: pieces that may run at once.
struct alignas(64) Phase {
    const tl_step* step;
    bool prepares;
    int32_t pieces;
    std::atomic<int32_t> taken, done;
};

struct Worker;

constexpr int32_t kOver = -1;

struct Pool {
    int num_threads = 0;
    Worker* workers = nullptr;
    Buffer phases_buffer, shared;  // shared: scratch of all threads

    // What is being run; written while no other thread is inside.
    const tl_batch* batch = nullptr;
    Phase* phases = nullptr;
    int num_phases = 0;

    Signal job;      // goes up when there is something to run; -1 ends the threads
    Signal inside;   // other threads that may look at phases
    Signal current;  // the phase whose pieces are to be done, or kOver

    alignas(64) std::atomic<int64_t> progress{0};  // pieces done, ever; for those who watch

    Pool() { current.value = kOver; }

    void take_part(int thread);
};

struct Worker {
    Pool* pool;
    int thread;
    pthread_t handle;
    Buffer scratch;
};

// A thread's view of its piece of a step.
struct Context {
    Pool& pool;
    const tl_step& step;
    const tl_batch& batch;
    int thread;
    int piece, pieces;
    bool first;  // of the pieces of this step that this thread does

    float* scratch() const { return (float*)pool.workers[thread].scratch.data; }
    float* shared() const { return (float*)pool.shared.data; }
    // This piece's part of n things: [begin, end).
    void share(int n, int& begin, int& end) const {
        begin = part_of(n, piece, pieces);
        end = part_of(n, piece + 1, pieces);
    }
};
