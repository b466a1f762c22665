// One convolution pass as a list of taps, the form that every algorithm here computes:
//
//   dst[n, k, i, j] = sum over taps t and channels c of
//                     w[k, c, t] * src[n, c, i*step_h + t.h, j*step_w + t.w]
//
// with src zero outside H x W.
// fprop is one such problem. dgrad of any stride and dilation is at most min(R, stride_h) *
// min(S, stride_w) of them, one for each residue of (h, w) modulo the stride that a tap reaches,
// each with step 1 over the taps of that residue: no product with a structural zero is formed (the
// gather form of Dumoulin and Visin, "A guide to convolution arithmetic", 2016, section 4).
#pragma once

#include <cstdint>
#include <vector>

#include "core/conv_problem.h"
#include "core/range.h"

namespace torchconv::cpu {

struct ConvTap {
  int64_t h, w;    // source offset
  int64_t weight;  // of this tap in a filter plane, in elements
};

// Strides in elements; row and column are those of the tensor, or of the view's grid for dst.
struct ConvStrides {
  int64_t n, c, row, column;
};

struct ConvView {
  int64_t N, groups;
  int64_t C, K;  // channels of src and dst in a group
  int64_t H, W;  // src
  int64_t I, J;  // the grid of dst
  int64_t step_h, step_w;
  ConvStrides src, dst;
  int64_t dst_offset;                        // of the grid's first element
  int64_t weight_group, weight_k, weight_c;  // strides
  std::vector<ConvTap> taps;  // those that reach into the image from somewhere in the grid

  int64_t pixels() const { return I * J; }
  int64_t terms() const { return C * static_cast<int64_t>(taps.size()); }
  // Pixels, or else channels, are neighbours in memory.
  bool src_pixels_contiguous() const { return src.column == 1; }
  bool dst_pixels_contiguous() const {
    return (J == 1 || dst.column == 1) && (I == 1 || dst.row == J);
  }
};

// The same problem, on the same memory, with fewer taps of more channels where several pixels are
// all that a tap and its neighbours read: the columns of a channels_last kernel as wide as its
// stride, and the whole of a kernel as large as the image.
ConvProblem merged(const ConvProblem& p);

// z from x and w; also describes wgrad, where dst is dz.
ConvView fprop_view(const ConvProblem& p);

// dx from dz and w: a view for each residue that has taps. covers_all is false where other elements
// of dx exist, whose gradient is zero.
std::vector<ConvView> dgrad_views(const ConvProblem& p, bool* covers_all);

// The j in [0, count) whose source column j*step + offset lies in [0, size): [begin, end).
Range valid_range(int64_t count, int64_t step, int64_t offset, int64_t size);

// The same view, but where a single tap moves with the pixels these are one row.
ConvView flat_pixels(const ConvView& view);

// From the first offset of the taps along an axis to the last: [first, last + 1). There are taps.
Range tap_span(const ConvView& view, int64_t ConvTap::* axis);

}  // namespace torchconv::cpu
