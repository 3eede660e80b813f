// A fixed team of threads that go through one step's phases together.
//
// A phase is a number of work items that whoever is free takes; it is over when all items are done, not when all threads
// have arrived. So a thread that has lost its core to another process delays nobody unless it holds an item: it finds
// the phases it missed done, and catches up. A thread that sleeps when a step begins joins when it wakes.
//
// Waiting spins for a moment and then sleeps on a futex: an idle engine takes no CPU.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cassert>
#include <functional>
#include <memory>
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
        open();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Runs job(id) on this thread, which is thread 0, and on the others that are awake; returns when all have left it.
    // The job goes through at most `phases` phases.
    void run(int phases, const std::function<void(int)>& job) {
        if (phases > capacity_) phases_.reset(new Phase[capacity_ = phases]);
        for (int i = 0; i < phases; ++i) phases_[i].taken = phases_[i].done = 0;
        job_ = &job;
        open();
        job(0);
        inside_.fetch_or(CLOSED, std::memory_order_acq_rel);
        for (int now; (now = inside_.load(std::memory_order_acquire)) != CLOSED;) await(inside_, now, SPINS_IN_STEP);
    }

    // Do items of a phase until none is left, then wait for those that others do. Every thread calls this for the same
    // phases in the same order, with the same count.
    template <class Item>
    void share(int phase, int count, Item item) {
        assert(phase < capacity_);
        Phase& state = phases_[phase];
        for (int i; (i = state.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
            item(i);
            if (state.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) state.done.notify_all();
        }
        for (int now; (now = state.done.load(std::memory_order_acquire)) < count;) await(state.done, now, SPINS_IN_STEP);
    }

   private:
    struct alignas(64) Phase {
        std::atomic<int> taken{0}, done{0};
    };
    static constexpr int CLOSED = 1 << 30;
    static constexpr int SPINS_IN_STEP = 2000;  // about 0.1 ms
    static constexpr int SPINS_BETWEEN = 4000;  // about 0.2 ms: longer than the sampling of a few streams

    // Wait until the word has changed.
    static void await(std::atomic<int>& word, int old, int spins) {
        for (int i = 0; i < spins; ++i) {
            if (word.load(std::memory_order_acquire) != old) return;
            _mm_pause();
        }
        word.wait(old, std::memory_order_acquire);
    }

    void open() {
        inside_.store(0, std::memory_order_release);
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
    }

    // Join the step that is open; false if there is none any more.
    bool enter() {
        int now = inside_.load(std::memory_order_acquire);
        while (!(now & CLOSED))
            if (inside_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void leave() {
        inside_.fetch_sub(1, std::memory_order_acq_rel);
        inside_.notify_all();
    }

    void serve(int id) {
        for (int seen = 0;;) {
            await(epoch_, seen, SPINS_BETWEEN);
            seen = epoch_.load(std::memory_order_acquire);
            if (!enter()) continue;
            const auto* job = job_;
            if (job) (*job)(id);
            leave();
            if (!job) return;
        }
    }

    const int size_;
    const std::function<void(int)>* job_ = nullptr;
    std::unique_ptr<Phase[]> phases_;
    int capacity_ = 0;
    alignas(64) std::atomic<int> epoch_{0};
    alignas(64) std::atomic<int> inside_{CLOSED};
    std::vector<std::thread> threads_;
};

}  // namespace tandem
