// Threads that have samples of their own: each does all that one sample takes, and no other cache
// holds what it reads again.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace torchconv::cpu {

// What a sample takes, by the thread that calls.
inline constexpr Parallel kAlone{[](int64_t begin, int64_t end, int64_t, Parallel::Body body,
                                    void* context) { body(begin, end, context); }};

// Whether a few threads have about as many samples each.
inline bool is_even_for_threads(int64_t samples) { return samples % 4 == 0 || samples >= 12; }

}  // namespace torchconv::cpu
