// Who keeps a weight in packed form from call to call: csrc/ops passes it from the operator to the
// kernels of a processor that packs weights.
#pragma once

#include <cstdint>

namespace torchconv {

// Whose, and which version the weights have. No owner: nothing is kept. frozen: they change with
// their version or address only, so that nobody need look at them.
struct WeightsOwner {
  int64_t number = 0, version = 0;
  bool frozen = false;
};

}  // namespace torchconv
