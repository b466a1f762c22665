// The register tiles of channels_last convolutions in float.
#include "cpu/microkernels/direct_even_impl.h"

namespace torchconv::cpu {

template <>
DirectMicrokernel<float> direct_microkernel<float>(int64_t rows, int64_t vectors) {
  return find_direct_tile<ChannelProduct<float>>(rows, vectors,
                                                 std::make_integer_sequence<int, kMaxRows>());
}

template <>
DirectMicrokernel<float> direct_even_microkernel<float>() {
  return direct_even_tile<ChannelProduct<float>>;
}

}  // namespace torchconv::cpu
