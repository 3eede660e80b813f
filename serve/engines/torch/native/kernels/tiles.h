// AMX tile registers: permission, configuration, and which of them hold what.
#pragma once
#include "vec.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TANDEM_AMX 1
#endif

namespace tandem {

// GCC's tile intrinsics do not tell the compiler that they read memory: have it finish its stores first.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Tiles 0-3 are sums and 4-5 activations, of `rows` rows; 6-7 weights, of 16 rows.
void use_tiles(int rows);
// Leave the tiles: call after the last product of a step, on every thread.
void release_tiles();
// Ask the kernel for the tiles, once for the process; whether AMX can be used at all.
bool tiles_allowed();

}  // namespace tandem
