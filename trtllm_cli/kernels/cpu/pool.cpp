#include "pool.h"

#include <cstdlib>
#include <ctime>
#include <new>
#include <sched.h>

#include "ops.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Long enough to bridge the sampling between two steps of a small model, short enough to leave a busy machine alone.
constexpr int64_t kSpinNanoseconds = 60'000;

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_while(std::atomic<int32_t>& word, int32_t old) {
#if defined(__linux__)
    syscall(SYS_futex, (int32_t*)&word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
    if (word.load() == old) sched_yield();
#endif
}

void wake_all(std::atomic<int32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, (int32_t*)&word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

void* thread_main(void* argument) {
    Worker& self = *(Worker*)argument;
    for (int32_t seen = 0;;) {
        self.pool->job.wait_while(seen);
        seen = self.pool->job.value.load(std::memory_order_acquire);
        if (seen < 0) return nullptr;
        self.pool->run_steps(self.thread);
    }
}

// Room for the run, and what its steps are; the number of the step that found none, from 1, or 0.
int prepare(Pool& pool, const tl_step* steps, int n, const tl_batch& batch) {
    if (!pool.counters.reserve(n * sizeof(Counter)) || !pool.serial.reserve(n)) return 1;
    for (int i = 0; i < n; i++) {
        new (pool.counters.data + i * sizeof(Counter)) Counter{};
        pool.serial.data[i] = is_serial(steps[i], batch, pool.num_threads);
        Scratch need = scratch_of(steps[i], batch, pool.num_threads);
        if (!pool.shared.reserve(need.shared)) return i + 1;
        for (int t = 0; t < pool.num_threads; t++)
            if (!pool.workers[t].scratch.reserve(need.per_thread)) return i + 1;
    }
    pool.steps = steps, pool.num_steps = n, pool.batch = &batch;
    return 0;
}

}  // namespace

void Signal::wait_while(int32_t old) {
    const int64_t deadline = now() + kSpinNanoseconds;
    do {
        for (int i = 0; i < 64; i++) {
            if (value.load(std::memory_order_acquire) != old) return;
            pause_cpu();
        }
    } while (now() < deadline);
    sleepers.fetch_add(1);
    while (value.load() == old) sleep_while(value, old);
    sleepers.fetch_sub(1);
}

void Signal::set(int32_t next) {
    value.store(next);  // sequentially consistent: a sleeper either sees it, or is counted here
    if (sleepers.load()) wake_all(value);
}

bool Buffer::reserve(size_t bytes) {
    if (bytes <= size) return true;
    bytes = round_up(bytes + bytes / 4, 4096);
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 4096, bytes)) return false;
    free(data);
    data = (char*)fresh, size = bytes;
    return true;
}

void Pool::barrier() {
    if (num_threads == 1) return;
    const int32_t turn = passed.value.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
        arrived.store(0, std::memory_order_relaxed);
        passed.set((turn + 1) & 0x7fffffff);
    } else {
        passed.wait_while(turn);
    }
}

void Pool::run_steps(int thread) {
    // After the last barrier thread 0 may be in the next run already: nothing of this one is read from there on.
    const tl_step* const first = steps;
    const int n = num_steps;
    const bool* alone = (const bool*)serial.data;
    for (int i = 0; i < n; i++) {
        Context c{*this, first[i], *batch, ((Counter*)counters.data)[i], thread, alone[i] ? 1 : num_threads};
        if (thread == 0 || !alone[i]) run_op(c);
        if (!alone[i] || i + 1 == n || !alone[i + 1]) barrier();
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t tl_abi_version() { return kAbiVersion; }

EXPORT void tl_pool_destroy(Pool* pool) {
    pool->job.set(-1);
    for (int t = 1; t < pool->num_threads; t++) pthread_join(pool->workers[t].handle, nullptr);
    for (int t = 0; t < pool->num_threads; t++) free(pool->workers[t].scratch.data);
    free(pool->counters.data), free(pool->serial.data), free(pool->shared.data);
    free(pool->workers);
    free(pool);
}

EXPORT Pool* tl_pool_create(int32_t num_threads) {
    if (num_threads < 1) return nullptr;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(Pool))) return nullptr;
    Pool* pool = new (memory) Pool;
    pool->workers = (Worker*)calloc(num_threads, sizeof(Worker));
    for (int t = 0; pool->workers && t < num_threads; t++) {
        Worker& w = pool->workers[t] = Worker{pool, t, {}, {}};
        if (t && pthread_create(&w.handle, nullptr, thread_main, &w)) break;
        pool->num_threads = t + 1;
    }
    if (pool->num_threads == num_threads) return pool;
    tl_pool_destroy(pool);
    return nullptr;
}

// 0, or the number (from 1) of a step that found no memory for its scratch; nothing was computed then.
EXPORT int32_t tl_run(Pool* pool, const tl_step* steps, int32_t n, const tl_batch* batch) {
    if (n == 0) return 0;
    if (int failed = prepare(*pool, steps, n, *batch)) return failed;
    if (pool->num_threads > 1) pool->job.set((pool->job.value.load() + 1) & 0x7fffffff);
    pool->run_steps(0);
    return 0;
}
