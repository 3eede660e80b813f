// The memory of one step, kept from step to step and grown when a step needs more.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "model.h"

namespace tandem {

template <class T>
class Buffer {
   public:
    // At least `count` values, aligned to a cache line; zero when they are new.
    T* at_least(size_t count) {
        if (count > count_) {
            size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
            memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            std::memset(static_cast<void*>(memory_.get()), 0, bytes);
            count_ = count;
        }
        return memory_.get();
    }
    T* get() const { return memory_.get(); }

   private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    size_t count_ = 0;
};

// Activations that own their memory.
class OwnedActivations : public Activations {
   public:
    void reshape(int new_rows, int new_k) {
        shape(new_rows, new_k);
        size_t padded = static_cast<size_t>(padded_rows(new_rows));
        x = x_.at_least(padded * k);
        reserve_fixed();
    }
    // The fixed-point form of rows that live in `other`.
    void follow(const Activations& other) {
        shape(other.rows, other.k);
        x = other.x;
        reserve_fixed();
    }

   private:
    void reserve_fixed() {
        size_t padded = static_cast<size_t>(padded_rows(rows));
        fixed = fixed_.at_least(padded * k * 2);
        scale = scale_.at_least(padded);
        sums = sums_.at_least(padded * 2);
        group_sums = group_sums_.at_least(padded * (k / GROUP));
    }
    Buffer<bf16> x_;
    Buffer<int8_t> fixed_;
    Buffer<float> scale_;
    Buffer<int32_t> sums_, group_sums_;
};

// What each thread has for itself.
struct ThreadSpace {
    Buffer<float> columns;   // [ROW_CHUNK][columns computed together]
    Buffer<bf16> expanded;   // one pair of int4 weights as bf16
    OwnedActivations normed, fixed;
    std::unique_ptr<AttentionScratch> attention{new AttentionScratch};
};

struct Workspace {
    int hidden = 0;                // padded
    Buffer<float> residual, branch;  // [tokens][hidden]
    Buffer<bf16> queries;          // [tokens][heads][head_width]
    OwnedActivations normed, attended, inner, last;
    std::vector<ThreadSpace> thread;
};

}  // namespace tandem
