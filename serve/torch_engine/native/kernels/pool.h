// A fixed team of threads that run one function together, with barriers inside it.
//
// Waiting spins for a moment and then sleeps on a futex, so that an idle engine takes no CPU and a thread that lost its
// core is not waited for at full speed.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace tandem {

class Pool {
   public:
    explicit Pool(int size) : size_(size) {
        for (int id = 1; id < size; ++id) threads_.emplace_back([this, id] { serve(id); });
    }

    ~Pool() {
        job_ = nullptr;
        start();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Runs job(id) on every thread, the caller being thread 0; returns when all are done.
    void run(const std::function<void(int)>& job) {
        job_ = &job;
        taken_.store(0, std::memory_order_relaxed);
        start();
        job(0);
        barrier();
    }

    // All threads wait for each other; the last one resets the counter of `take`.
    void barrier() {
        if (size_ == 1) {
            taken_.store(0, std::memory_order_relaxed);
            return;
        }
        int generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            taken_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            generation_.notify_all();
        } else {
            await(generation_, generation, SPINS_IN_STEP);
        }
    }

    // The next piece of work of this phase: 0, 1, 2, ... over all threads together.
    int take() { return taken_.fetch_add(1, std::memory_order_relaxed); }

   private:
    static constexpr int SPINS_IN_STEP = 2000;   // about 0.1 ms
    static constexpr int SPINS_BETWEEN = 4000;   // about 0.2 ms: longer than the sampling of a few streams

    static void await(std::atomic<int>& word, int old, int spins) {
        for (int i = 0; i < spins; ++i) {
            if (word.load(std::memory_order_acquire) != old) return;
            _mm_pause();
        }
        word.wait(old, std::memory_order_acquire);
    }

    void start() {
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }

    void serve(int id) {
        for (int seen = 0;; ++seen) {
            await(epoch_, seen, SPINS_BETWEEN);
            if (!job_) return;
            (*job_)(id);
            barrier();
        }
    }

    const int size_;
    const std::function<void(int)>* job_ = nullptr;
    alignas(64) std::atomic<int> epoch_{0};
    alignas(64) std::atomic<int> generation_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> taken_{0};
    std::vector<std::thread> threads_;
};

}  // namespace tandem
