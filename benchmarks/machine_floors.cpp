// What the machine can do at most: bytes read and float32 multiply-adds, with every thread at it.
// Built and called by cpu_kernels.py.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <pthread.h>

#include "../trtllm_cli/kernels/cpu/simd.h"

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct Job {
    const char* data;
    size_t bytes;
    double result;
    pthread_t thread;
};

static void* read_bytes(void* argument) {
    Job& job = *(Job*)argument;
    vi sums[4] = {};
    for (size_t i = 0; i + 256 <= job.bytes; i += 256)
        for (int v = 0; v < 256 / (4 * kWidth); v++) {
            if (v * 4 * kWidth % 64 == 0) __builtin_prefetch(job.data + i + 4096 + v * 4 * kWidth);
            sums[v % 4] ^= load_words(job.data + i + v * 4 * kWidth);
        }
    vi all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    job.result = all[0];
    return nullptr;
}

static void* multiply_add(void* argument) {
    Job& job = *(Job*)argument;
    vf a0 = splat(1.0f), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0, a8 = a0, a9 = a0;
    vf x = splat(0.999f), y = splat(1e-3f);
    for (size_t i = 0; i < job.bytes; i++) {
        a0 = fma(a0, x, y), a1 = fma(a1, x, y), a2 = fma(a2, x, y), a3 = fma(a3, x, y), a4 = fma(a4, x, y);
        a5 = fma(a5, x, y), a6 = fma(a6, x, y), a7 = fma(a7, x, y), a8 = fma(a8, x, y), a9 = fma(a9, x, y);
    }
    vf all = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9;
    job.result = all[0];
    return nullptr;
}

static double best(void* (*work)(void*), Job* jobs, int threads) {
    double least = 1e9;
    for (int repeat = 0; repeat < 12; repeat++) {
        double start = now();
        for (int t = 1; t < threads; t++) pthread_create(&jobs[t].thread, nullptr, work, jobs + t);
        work(jobs);
        for (int t = 1; t < threads; t++) pthread_join(jobs[t].thread, nullptr);
        double took = now() - start;
        if (took < least) least = took;
    }
    return least;
}

extern "C" double bytes_per_second(int threads) {
    const size_t size = (size_t)320 << 20;
    char* data = (char*)malloc(size);
    memset(data, 1, size);
    Job jobs[256];
    for (int t = 0; t < threads; t++) jobs[t] = {data + size / threads * t, size / threads, 0, {}};
    double seconds = best(read_bytes, jobs, threads);
    free(data);
    return size / seconds;
}

extern "C" double flops_per_second(int threads) {
    const size_t loops = 1 << 20;
    Job jobs[256];
    for (int t = 0; t < threads; t++) jobs[t] = {nullptr, loops, 0, {}};
    return 2.0 * 10 * kWidth * loops * threads / best(multiply_add, jobs, threads);
}
