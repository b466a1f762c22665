// Multiply-adds of independent sums in registers: what a core does when it reads and writes
// nothing, the arithmetic peak that explain and the benchmarks hold kernels to.
#pragma once

#include <cstdint>

namespace torchconv::cpu {

// Each returns how many multiply-adds it did. `pairs`: of bfloat16 in float32, two in a lane, or 0
// where the processor has none.
int64_t multiply_adds_float32(int64_t rounds);
int64_t multiply_adds_float64(int64_t rounds);
int64_t multiply_adds_pairs(int64_t rounds);

}  // namespace torchconv::cpu
