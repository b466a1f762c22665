// The same as group_winograd.h of images whose pixels are neighbours, with vectors along tiles
// instead of channels (microkernels/group_winograd_planes.h).
#pragma once

#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Where group_winograd_applies.
bool group_planes_applies(const ConvView& view);
// The part of vectors' lanes that are tiles with outputs.
double group_planes_lanes_used(const ConvView& view);
// Whether all rows of a plane are computed together.
bool group_planes_at_once(const ConvView& view);
// Of a point of a plane.
int64_t group_planes_vectors(const ConvView& view);

// Elements of the packed weights, as those of group_winograd.h.
int64_t group_planes_weights_size(const ConvView& view);
void group_planes_pack_weights(const ConvView& view, const float* w, float* packed,
                               const Parallel& pool);

std::vector<int64_t> group_planes_gather(const ConvView& view, const float* src, const float* w,
                                         const float* packed, const float* bias,
                                         const Epilogue<float>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
