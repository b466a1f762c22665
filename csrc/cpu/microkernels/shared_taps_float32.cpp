// The tiles of shared_taps.h: products of floats.
#include "cpu/microkernels/shared_taps_impl.h"

namespace torchconv::cpu {
namespace {

struct FloatProduct {
  static constexpr bool kRounds = false;
  using Register = Vec<float>::Type;
  static TORCHCONV_INLINE void add(Register& sum, Register x, Register filters) {
    sum += x * filters;
  }
};

}  // namespace

SharedTapsMicrokernel shared_taps_microkernel(int64_t taps, bool one_line) {
  return find_shared_taps_tile<FloatProduct>(taps, one_line);
}

}  // namespace torchconv::cpu
