// The two register kernels of depthwise convolution. A lane is a pixel (NCHW) or a channel (NHWC);
// what differs is only the distance between the vectors of a tile, so both layouts share them.
//
//   tap_sum: out[j*out_step] = start + sum over t of w[t] * src[j*src_step + offset[t]],  j < count
//   tap_dot: sum[t] += sum over j < count of dz[j*dz_step] * src[j*src_step + offset[t]]
//
// for each of `vectors` neighbouring vectors of lanes (1 where vectors run along pixels).
// Every product takes one operand from memory and accumulators stay in registers, in the manner of
// Hao et al., "Optimizing Depthwise Separable Convolution on ARMv8" (arXiv 2206.12124).
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

template <typename T>
struct TapSum {
  const T* src;
  Wide<T>* out;
  const int64_t* offsets;  // [taps]
  const Wide<T>* weights;  // [taps][weight_step], a vector each
  const Wide<T>* start;    // a vector, the bias; or null to add to out
  int64_t taps, weight_step;
  int64_t count, src_step, out_step, vectors;
};
template <typename T>
void tap_sum(const TapSum<T>& sum);

template <typename T>
struct TapDot {
  const T* dz;
  const T* src;
  const int64_t* offsets;  // [taps]
  Wide<T>* sums;           // [taps][sum_step], a vector each
  int64_t taps, sum_step;
  int64_t count, dz_step, src_step, vectors;
};
template <typename T>
void tap_dot(const TapDot<T>& dot);

}  // namespace torchconv::cpu
