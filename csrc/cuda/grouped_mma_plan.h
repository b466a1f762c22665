// The tiles of grouped convolution on tensor cores: functions of the problem and, where the order
// of no sum depends on it, of the device.
#pragma once

#include "cuda/grouped_mma.h"

namespace torchconv::cuda {

// Chooses the tile and all that follows from it. False where none fits into shared memory.
bool plan_grouped_gather(GroupedGather& p, const Queue& queue);
bool plan_grouped_wgrad(GroupedWgrad& p, const Queue& queue);

}  // namespace torchconv::cuda
