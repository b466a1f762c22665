// Who keeps a weight in packed form from call to call: csrc/ops passes it from the operator to the
// kernels of a processor that packs weights.
#pragma once

#include <cstdint>

namespace torchconv {

// Whose, and which version the weights have. No owner: nothing is kept.
struct WeightsOwner {
  int64_t number = 0, version = 0;
};

}  // namespace torchconv
