// Which algorithm computes a pass, where there is a choice that the user may restrict. It depends
// on one sample's problem, the instruction set and the switches here, never on batch or threads.
#pragma once

#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Process-wide, true at first. Calls that run already keep what they began with.
void allow_winograd(bool allowed);
bool winograd_allowed();

// Whether a float32 gather goes by winograd.h.
bool gathers_by_winograd(const ConvView& view);

}  // namespace torchconv::cpu
