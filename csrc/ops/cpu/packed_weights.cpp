// The owners of packed weights as C functions, which torchconv/_packed_weights.py calls through
// ctypes: like those of memory.cpp they take no tensor.

#include "cpu/packed_weights.h"

#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

namespace packed_weights = torchconv::cpu::packed_weights;

TORCHCONV_EXPORT int64_t torchconv_packed_weights_create() { return packed_weights::create(); }

TORCHCONV_EXPORT void torchconv_packed_weights_clear(int64_t owner) {
  packed_weights::clear(owner);
}

TORCHCONV_EXPORT void torchconv_packed_weights_destroy(int64_t owner) {
  packed_weights::destroy(owner);
}

TORCHCONV_EXPORT int64_t torchconv_packed_weights_bytes(int64_t owner) {
  return packed_weights::bytes(owner);
}
