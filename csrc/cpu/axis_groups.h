// Which outputs of an axis read the image through the same taps, so that products with the padding
// are left out.
#pragma once

#include <cstdint>
#include <vector>

#include "core/range.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Outputs that read the image through the same taps of an axis: offsets [taps.begin, taps.end) of
// the axis' distinct ones. The products of the others with the padding are left out.
struct AxisGroup {
  Range outputs, taps;
};

// The distinct offsets of a view's taps along an axis (&ConvTap::h or w), ascending.
std::vector<int64_t> distinct_offsets(const ConvView& view, int64_t ConvTap::* axis);

// Groups of at least `least` outputs, where there are so many, whose taps are those of any of them.
std::vector<AxisGroup> group_outputs(const std::vector<int64_t>& offsets, int64_t step,
                                     int64_t size, Range outputs, int64_t least);

}  // namespace torchconv::cpu
