// The weights' gradient of wide groups on Hopper, in plain C++: how its sums are divided among the
// blocks of cutlass_sm90_groups_wgrad.cu, and which problems it takes.
//
// A step of wgmma adds 16 terms, which here are those of 16 images at one output: pixels beside the
// image are no terms, so that nothing is multiplied with zeros that stand for them. An item is some
// rows of outputs of 16 images; a part is some items after each other, whose sums a block has in
// registers. Rows of x, lines, come to a ring in shared memory, and rows of dz to another.
#pragma once

#include "cuda/cutlass_sm90_groups.h"

namespace torchconv::cuda::sm90 {

constexpr int kWgradImages = 16, kWgradSlots = 8;

struct GroupsWgrad {
  int64_t rows, segments;         // of an item; of the rows of outputs
  int64_t items, of_part, parts;  // of a slab
  int64_t chain;                  // items whose terms tensor cores add up
  int64_t x_slots, dz_slots;      // lines and rows that shared memory has room for
  int64_t x_bytes, dz_bytes;      // of one
};

// By the shape alone, for the multiprocessors of an H100. Tensor cores round each addition towards
// zero, so that they add kMostTerms at most; these sums are added in float32, and so are the parts.
inline GroupsWgrad groups_wgrad(const ConvProblem& p) {
  constexpr int64_t kMultiprocessors = 132, kMostTerms = 4096;
  const int64_t slabs = ceil_div(p.C, kSlabChannels), chunks = ceil_div(p.N, kWgradImages);
  const int64_t most_rows = std::max<int64_t>(kMostTerms / kWgradImages / p.Q, 1);
  GroupsWgrad g{};
  // Few images are divided in rows, of which an item has two and more.
  const int64_t wanted = std::min(kMultiprocessors / (slabs * chunks), p.P / 2);
  g.rows = std::min(ceil_div(p.P, std::max<int64_t>(wanted, 1)), most_rows);
  g.segments = ceil_div(p.P, g.rows);
  g.items = chunks * g.segments;
  g.chain = std::max<int64_t>(most_rows / g.rows, 1);
  g.of_part = ceil_div(g.items, std::max<int64_t>(kMultiprocessors / slabs, 1));
  // Sums are added where those of a part are, which one part alone does not have.
  if (g.of_part == g.items && g.items > g.chain) g.of_part = ceil_div(g.items, 2);
  g.parts = ceil_div(g.items, g.of_part);
  g.x_bytes = p.W * kWgradImages * kPixelBytes;
  g.dz_bytes = p.Q * kWgradImages * kPixelBytes;
  // A row of dz is loaded before the lines that it meets, of which the last is two after the first:
  // so many more rows are there at once.
  const int64_t least = p.stride_h == 1 ? 3 : 2;
  for (g.dz_slots = 4; g.dz_slots >= least; --g.dz_slots) {
    g.x_slots = std::min<int64_t>((kGroupRoom - g.dz_slots * g.dz_bytes) / g.x_bytes, kWgradSlots);
    if (g.x_slots >= 3) return g;
  }
  g.x_slots = 0;
  return g;
}

// The outputs of a row whose pixel for column s of the taps is inside the image.
inline Range outputs_inside(const ConvProblem& p, int64_t s) {
  const int64_t begin = std::max<int64_t>(ceil_div(p.pad_left - s, p.stride_w), 0);
  const int64_t end = std::min(floor_div(p.W - 1 + p.pad_left - s, p.stride_w) + 1, p.Q);
  return {begin, end};
}

inline bool takes_groups_wgrad(const ConvProblem& p, int capability) {
  constexpr int64_t kMost = 256;  // pixels along an axis of what TMA loads at once
  return wide_groups(p, capability) && p.W <= kMost && p.Q <= kMost &&
         gather_fits(fprop_gather(p), 2) && groups_wgrad(p).x_slots > 0 &&
         ceil_div(p.C, kSlabChannels) * groups_wgrad(p).parts < INT32_MAX / 4;
}

// dw is K x R x S x C / groups, and may begin at any element.
void wgrad_groups(const ConvProblem& p, const void* dz, const void* x, void* dw,
                  const Queue& queue);

}  // namespace torchconv::cuda::sm90
