// Weights from row-major [n][k] to the layouts of linear.h, and memory in huge pages for them.
#include <sys/mman.h>

#include <cstring>

#include "linear.h"

using namespace tandem;

namespace {

constexpr size_t HUGE_PAGE = 2u << 20;

size_t rounded(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

}  // namespace

extern "C" {

// Zeroed memory, in huge pages where the kernel grants them: streaming weights then needs few address translations.
void* tandem_allocate(size_t bytes) {
    size_t size = rounded(bytes) + HUGE_PAGE;
    char* p = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (p == MAP_FAILED) return nullptr;
    char* aligned = reinterpret_cast<char*>(rounded(reinterpret_cast<size_t>(p)));
    if (aligned > p) munmap(p, aligned - p);
    munmap(aligned + rounded(bytes), p + size - (aligned + rounded(bytes)));
    madvise(aligned, rounded(bytes), MADV_HUGEPAGE);
    return aligned;
}

void tandem_free(void* p, size_t bytes) { munmap(p, rounded(bytes)); }

size_t tandem_packed_bytes(int kind, int n, int k) {
    Linear w{kind, n, k, nullptr, nullptr, nullptr};
    return pair_bytes(w) * (n / PAIR);
}

// source is [rows][columns] bf16; the packed matrix is n x k with zeros around it.
void tandem_pack_bf16(const bf16* source, int rows, int columns, int n, int k, bf16* target) {
    for (int row = 0; row < rows; ++row) {
        bf16* tile = target + static_cast<size_t>(row / PAIR) * k * PAIR + (row % PAIR) / 16 * 512 + row % 16 * 2;
        const bf16* from = source + static_cast<size_t>(row) * columns;
        for (int c = 0; c < columns; ++c) tile[c / 32 * 1024 + c % 32 / 2 * 32 + c % 2] = from[c];
    }
    (void)n;
}

// source is [rows][columns] int8; stored + 128, so padding must be 128 too.
void tandem_pack_int8(const int8_t* source, int rows, int columns, int n, int k, uint8_t* target) {
    memset(target, 128, static_cast<size_t>(n) * k);
    for (int row = 0; row < rows; ++row) {
        uint8_t* tile = target + static_cast<size_t>(row / PAIR) * k * PAIR + (row % PAIR) / 16 * 1024 + row % 16 * 4;
        const int8_t* from = source + static_cast<size_t>(row) * columns;
        for (int c = 0; c < columns; ++c)
            tile[c / 64 * 2048 + c % 64 / 4 * 64 + c % 4] = static_cast<uint8_t>(from[c] + 128);
    }
}

// source is [rows][columns] of -8..7, scales [rows][groups] bf16, both already padded to k = columns.
void tandem_pack_int4(const int8_t* source, const bf16* scales, int rows, int columns, int n, uint8_t* target) {
    const int groups = columns / GROUP;
    memset(target, 0x88, static_cast<size_t>(n) / PAIR * groups * INT4_BLOCK);
    for (int row = 0; row < n; ++row)
        for (int g = 0; g < groups; ++g) {
            uint8_t* block = target + (static_cast<size_t>(row / PAIR) * groups + g) * INT4_BLOCK;
            bf16 scale = row < rows ? scales[static_cast<size_t>(row) * groups + g] : bf16(0);
            memcpy(block + row % PAIR * 2, &scale, 2);
            if (row >= rows) continue;
            const int8_t* from = source + static_cast<size_t>(row) * columns + g * GROUP;
            uint8_t* quads = block + 64 + row % PAIR / 16 * 256 + row % 16 * 4;
            for (int i = 0; i < 16; ++i) {
                int low = from[i] + 8, high = from[i + 16] + 8;
                quads[i / 4 * 64 + i % 4] = static_cast<uint8_t>(low | high << 4);
            }
        }
}

}  // extern "C"
