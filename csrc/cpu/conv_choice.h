// Which algorithm computes a view of a pass. THE table of rules is in conv_choice.cpp: the first
// rule that applies wins. The choice depends on one sample's problem (for wgrad on the problem),
// the instruction set and the switch here, never on the batch or the threads.
#pragma once

#include "core/types.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

enum class ConvAlgorithm : uint8_t {
  kWinograd,           // winograd.h, winograd_wgrad.h
  kStridedWinograd,    // winograd_strided.h
  kWinogradRows,       // winograd_rows.h
  kDepthwiseWinograd,  // depthwise_winograd.h
  kDepthwiseChannels,  // depthwise_channels.h
  kDepthwiseColumns,   // depthwise_columns.h
  kDepthwisePlanes,    // depthwise_planes.h
  kPlanesWinograd,     // the same, minimal filtering
  kDepthwisePhases,    // depthwise_phases.h
  kGroupWinograd,      // group_winograd.h, group_wgrad.h
  kGroupPlanes,        // group_winograd_planes.h
  kGroupTiles,         // group_gather.h, group_wgrad.h
  kBandAlongPixels,    // conv_band_gather.h, conv_band_wgrad.h
  kBandAlongChannels,  // the same, several groups side by side
  kInnerProduct,       // inner_gather.h
  kSharedTaps,         // shared_taps.h
  kTapRuns,            // tap_runs.h
  kPlaneTaps,          // plane_taps.h
  kSampleProduct,      // sample_gemm.h
  kDirectProduct,      // direct_gemm.h
  kBandProduct,        // band_gemm.h
  kPixelProduct,       // pixel_gemm.h
  kPlanePairs,         // plane_pairs.h
  kWgradProduct,       // conv_wgrad.h
  kPairWgrad,          // pair_wgrad.h
};

// Process-wide, true at first. Calls that run already keep what they began with.
void allow_winograd(bool allowed);
bool winograd_allowed();
// How often that has changed, for who asks several times and needs one answer.
int64_t winograd_changes();

// The view is not empty and the type floating point. With winograd false: what computes where
// Winograd's algorithm is not allowed, or met infinity, NaN or an overflow.
ConvAlgorithm gather_algorithm(const ConvView& view, DType dtype, bool winograd);

// As gather_algorithm for the weight gradient; view is fprop's and has terms.
ConvAlgorithm wgrad_algorithm(const ConvView& view, DType dtype, bool winograd);

}  // namespace torchconv::cpu
