// Copies of an operand that the transforms of winograd_wgrad_operands.h read in whole vectors where
// the tensor itself would have to be read element by element: blocked by channels, or with the
// four phases of stride 2 as channels (space to depth).
#pragma once

#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu::winograd_gradient {

// [vector of channels][n][row][column][lane], each image's pixels rounded up to a vector.
template <typename A>
struct BlockedImage {
  int64_t n, vector;  // strides
  Buffer<A> data;
};

// Of an image of N x C channels whose pixels are neighbours in memory.
template <typename A>
BlockedImage<A> block_channels(const A* src, const ConvStrides& stride, int64_t N, int64_t C,
                               int64_t rows, int64_t columns, const Parallel& pool);

// Of x for a stride of two: channel c*4 + a*2 + b is element (2*i + a, 2*j + b) of channel c,
// counted from the first tap's element of the first window, with zeros outside x. `rows` and
// `columns` are those of the result.
template <typename A>
BlockedImage<A> space_to_depth(const ConvView& view, const A* x, int64_t rows, int64_t columns,
                               const Parallel& pool);

// ConvTap::weight and the channel's offset for [channel of space_to_depth][4 x 4 taps], -1 where
// the kernel has no such tap.
std::vector<int64_t> phase_tap_offsets(const ConvView& view);

}  // namespace torchconv::cpu::winograd_gradient
