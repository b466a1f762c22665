// A loop that the compiler sees unrolled from the start, with its index a constant: what arrays of
// registers need where loops are nested or their body is a function.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/simd.h"

#define TORCHCONV_INLINE_LAMBDA __attribute__((always_inline))

namespace torchconv::cpu {

// f(std::integral_constant<int, i>) for i in [0, kCount).
template <int kCount, typename F, int... I>
TORCHCONV_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int kCount, typename F>
TORCHCONV_INLINE void unroll(F&& f) {
  unroll<kCount>(f, std::make_integer_sequence<int, kCount>());
}

}  // namespace torchconv::cpu
