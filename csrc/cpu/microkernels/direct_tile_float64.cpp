// The register tiles of channels_last convolutions in double.
#include "cpu/microkernels/direct_even_impl.h"

namespace torchconv::cpu {

template <>
DirectMicrokernel<double> direct_microkernel<double>(int64_t rows, int64_t vectors) {
  return find_direct_tile<ChannelProduct<double>>(rows, vectors,
                                                  std::make_integer_sequence<int, kMaxRows>());
}

template <>
DirectMicrokernel<double> direct_even_microkernel<double>() {
  return direct_even_tile<ChannelProduct<double>>;
}

}  // namespace torchconv::cpu
