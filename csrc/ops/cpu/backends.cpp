// The switches of torchconv/backends.py as C functions: like those of memory.cpp they take no
// tensor.

#include "cpu/conv_choice.h"

#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

TORCHCONV_EXPORT void torchconv_allow_winograd(bool allowed) {
  torchconv::cpu::allow_winograd(allowed);
}

TORCHCONV_EXPORT bool torchconv_winograd_allowed() { return torchconv::cpu::winograd_allowed(); }
