// How fast this machine's memory can be read, to say which share of it a step of one token reaches.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "pool.h"

extern "C" void* tandem_allocate(size_t bytes);
extern "C" void tandem_free(void* p, size_t bytes);

namespace {

void read(const char* p, size_t bytes) {
    __m512i sum[8];
    for (auto& s : sum) s = _mm512_setzero_si512();
    for (size_t i = 0; i < bytes; i += 512)
        for (int j = 0; j < 8; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(p + i + 64 * j));
    for (auto& s : sum) asm volatile("" ::"x"(s));
}

}  // namespace

// Bytes per second of the best of `passes` passes over `bytes` of memory, by `threads` threads.
extern "C" double tandem_read_rate(int threads, size_t bytes, int passes) {
    const size_t share = bytes / threads / 4096 * 4096;
    char* memory = static_cast<char*>(tandem_allocate(bytes));
    std::memset(memory, 1, bytes);
    tandem::Pool pool(threads);
    double best_s = 1e9;
    for (int i = 0; i < passes; ++i) {
        auto began = std::chrono::steady_clock::now();
        pool.run(1, [&](int) { pool.share(0, threads, [&](int part) { read(memory + part * share, share); }); });
        best_s = std::min(best_s, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    tandem_free(memory, bytes);
    return share * threads / best_s;
}
