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
    Pool& pool = *self.pool;
    for (int32_t seen = 0;;) {
        pool.job.wait_while(seen);
        seen = pool.job.value.load();
        if (seen < 0) return nullptr;
        pool.inside.add(1);
        pool.take_part(self.thread);  // a late thread finds the run over, or the next one begun: either is fine
        pool.inside.add(-1);
    }
}

void add_phase(Pool& pool, const tl_step& step, bool prepares, int pieces) {
    new (pool.phases + pool.num_phases++) Phase{&step, prepares, pieces, {0}, {0}};
}

// Room for the run, and its phases; the number of the step that found none, from 1, or 0.
int prepare(Pool& pool, const tl_step* steps, int n, const tl_batch& batch) {
    if (!pool.phases_buffer.reserve(2 * n * sizeof(Phase))) return 1;
    pool.phases = (Phase*)pool.phases_buffer.data;
    pool.num_phases = 0;
    for (int i = 0; i < n; i++) {
        const Needs needs = needs_of(steps[i], batch, pool.num_threads);
        if (!pool.shared.reserve(needs.shared)) return i + 1;
        for (int t = 0; t < pool.num_threads; t++)
            if (!pool.workers[t].scratch.reserve(needs.per_thread)) return i + 1;
        if (needs.preparation) add_phase(pool, steps[i], true, needs.preparation);
        if (needs.pieces) add_phase(pool, steps[i], false, needs.pieces);
    }
    pool.batch = &batch;
    return 0;
}

bool worth_sharing(const Pool& pool) {
    for (int i = 0; i < pool.num_phases; i++)
        if (pool.phases[i].pieces > 1) return true;
    return false;
}

// Waits until no other thread looks at phases. One that comes in later sees that no run has begun, or all of the run.
void wait_until_alone(Pool& pool) {
    for (int32_t n; (n = pool.inside.value.load());) pool.inside.wait_while(n);
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

void Signal::add(int32_t n) {
    value.fetch_add(n);
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

void Pool::take_part(int thread) {
    for (int32_t at; (at = current.value.load()) != kOver; current.wait_while(at)) {
        Phase& phase = phases[at];
        if (phase.taken.load(std::memory_order_relaxed) >= phase.pieces) continue;
        bool first = true;
        for (int i; (i = phase.taken.fetch_add(1, std::memory_order_relaxed)) < phase.pieces; first = false) {
            run_piece({*this, *phase.step, *batch, thread, i, phase.pieces, first}, phase.prepares);
            progress.fetch_add(1, std::memory_order_relaxed);
            if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == phase.pieces)
                current.set(at + 1 < num_phases ? at + 1 : kOver);
        }
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t tl_abi_version() { return kAbiVersion; }

EXPORT void tl_pool_destroy(Pool* pool) {
    pool->job.set(-1);
    for (int t = 1; t < pool->num_threads; t++) pthread_join(pool->workers[t].handle, nullptr);
    for (int t = 0; t < pool->num_threads; t++) free(pool->workers[t].scratch.data);
    free(pool->phases_buffer.data), free(pool->shared.data);
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

EXPORT int64_t tl_pool_progress(const Pool* pool) { return pool->progress.load(std::memory_order_relaxed); }

// 0, or the number (from 1) of a step that found no memory for its scratch; nothing was computed then.
EXPORT int32_t tl_run(Pool* pool, const tl_step* steps, int32_t n, const tl_batch* batch) {
    wait_until_alone(*pool);
    if (const int failed = prepare(*pool, steps, n, *batch)) return failed;
    if (pool->num_phases == 0) return 0;
    pool->current.set(0);
    if (worth_sharing(*pool)) pool->job.set((pool->job.value.load() + 1) & 0x7fffffff);
    pool->take_part(0);
    return 0;
}
