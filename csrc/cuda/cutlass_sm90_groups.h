// Convolutions of wide groups on Hopper, in plain C++: fprop, and dgrad, in terms of one gather
// with as many filters as channels a group; which problems are worth it, and how they are cut for
// the kernel of cutlass_sm90_groups.cu.
//
// A unit is up to 64 outputs of one image, some rows of them. What it reads of a slab of 64
// channels is loaded once for all taps: of stride 2, pixels are in patches, one for each residue of
// rows and columns, in which those of neighbouring outputs are neighbours. Rows of a patch and of
// the outputs are equally long, so that the outputs' pixels for a tap are 64 in a row of their
// patch, from product_at on.
//
// dgrad of stride 2 is the other way round: one patch of dz is for the outputs of all residues,
// each with taps of its own, phase after phase.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"

namespace torchconv::cuda::sm90 {

constexpr int kSlabChannels = 64, kPixelBytes = 2 * kSlabChannels, kUnitOutputs = 64;
constexpr int kGroupTaps = 9, kGroupResidues = 4, kGroupStages = 8;
// Warpgroups that multiply, each with units' outputs to store.
constexpr int kGroupMultipliers = 2;
// A block's shared memory, less static and what aligns it.
constexpr int64_t kGroupRoom = (227 - 2) * 1024;
constexpr int kUnitBytes = kUnitOutputs * kPixelBytes;

enum class GroupWalk { kForward, kBackward, kDoubled };

inline GroupWalk group_walk(const ConvProblem& p, Pass pass) {
  if (pass == Pass::kFprop) return GroupWalk::kForward;
  return p.stride_h == 1 ? GroupWalk::kBackward : GroupWalk::kDoubled;
}

// The tap of the filters that is the i-th to be multiplied.
TORCHCONV_HOST_DEVICE constexpr int tap_of_product(GroupWalk walk, int i) {
  // A pad of 1 takes even rows and columns of dx to taps 1, odd ones to taps 2 and 0.
  constexpr int kDoubled[kGroupTaps] = {4, 5, 3, 7, 1, 8, 6, 2, 0};
  return walk == GroupWalk::kForward ? i : walk == GroupWalk::kBackward ? 8 - i : kDoubled[i];
}

// Products before a phase, whose sums are outputs of one residue, and of all.
TORCHCONV_HOST_DEVICE constexpr int products_before(GroupWalk walk, int phase) {
  if (walk != GroupWalk::kDoubled) return phase * kGroupTaps;
  return phase < 4 ? 2 * phase - (phase > 0) : kGroupTaps;
}
TORCHCONV_HOST_DEVICE constexpr int phases_of(GroupWalk walk) {
  return walk == GroupWalk::kDoubled ? kGroupResidues : 1;
}
// What a warpgroup has room for in shared memory.
TORCHCONV_HOST_DEVICE constexpr int stored_units(GroupWalk walk) {
  return walk == GroupWalk::kDoubled ? 2 : 1;
}

struct GroupPatch {
  int64_t residue_h, residue_w;  // modulo the stride
  int64_t first_h, first_w;      // of the image's first unit, in pixels of the residue
  int64_t rows;
  int64_t at;  // in bytes
};

struct GroupTile {
  int64_t rows, columns;  // outputs of a unit; pixels of a row, of which the first are outputs
  int64_t units_of_image;
  int patches;
  GroupPatch patch[kGroupResidues];
  int64_t product_at[kGroupTaps];
  int64_t loaded, stage_bytes;  // of one unit
  int64_t stages;               // units that a block has room for
};

// What the units are of: of stride 2 backward, dx's positions of a residue and pixels of dz, with
// as many taps on an axis as the residue that has most.
inline Gather groups_gather(const ConvProblem& p, Pass pass) {
  if (pass == Pass::kFprop) return fprop_gather(p);
  const int64_t last = p.stride_h - 1;
  Gather g = dgrad_phase(p, last, last).gather;
  g.h.outputs = ceil_div(p.H, p.stride_h), g.w.outputs = ceil_div(p.W, p.stride_w);
  return g;
}

// A problem that takes_groups takes, but for the room.
inline GroupTile group_tile(const ConvProblem& p, Pass pass) {
  const GroupWalk walk = group_walk(p, pass);
  const Gather g = groups_gather(p, pass);
  const int64_t stride = g.h.stride;
  GroupTile t{};
  t.columns = g.w.outputs + ceil_div(g.w.taps, stride) - 1;
  const int64_t most = std::min(std::max<int64_t>(kUnitOutputs / t.columns, 1), g.h.outputs);
  t.rows = ceil_div(g.h.outputs, ceil_div(g.h.outputs, most));
  t.units_of_image = ceil_div(g.h.outputs, t.rows);
  for (int64_t i = 0; i < stride; ++i)
    for (int64_t j = 0; j < stride; ++j) {
      // Of taps i, i + stride, ... and j, j + stride, ...
      const int64_t h = floor_div(i - g.h.pad, stride), w = floor_div(j - g.w.pad, stride);
      GroupPatch& patch = t.patch[t.patches++];
      patch = {i - g.h.pad - h * stride,
               j - g.w.pad - w * stride,
               h,
               w,
               t.rows + ceil_div(g.h.taps - i, stride) - 1,
               t.stage_bytes};
      const int64_t bytes = patch.rows * t.columns * kPixelBytes;
      t.loaded += bytes;
      t.stage_bytes += round_up(bytes, 1024);
    }
  for (int i = 0; i < kGroupTaps; ++i) {
    int64_t r = i / 3, s = i % 3;
    if (walk == GroupWalk::kDoubled) {
      // Taps 0 read the next pixel of dz, others the first.
      const int tap = tap_of_product(walk, i);
      r = tap / 3 == 0, s = tap % 3 == 0;
    }
    t.product_at[i] = t.patch[r % stride * stride + s % stride].at +
                      (r / stride * t.columns + s / stride) * kPixelBytes;
  }
  const int64_t filters = kGroupTaps * kSlabChannels * (p.C / p.groups) * 2;
  const int64_t stored = kGroupMultipliers * stored_units(walk) * kUnitBytes;
  t.stages = std::min<int64_t>((kGroupRoom - filters - stored) / t.stage_bytes, kGroupStages);
  return t;
}

// Blocks that share the units of a slab: as many as keep the multiprocessors, one block each, busy
// for the shortest time.
inline int64_t group_parts(int64_t slabs, int64_t units, int64_t multiprocessors) {
  constexpr int64_t kStart = 3;  // as long as so many units
  const int64_t most = std::min(units, std::max<int64_t>(4 * multiprocessors / slabs, 1));
  int64_t best = 1, best_cost = 0;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const int64_t cost =
        ceil_div(slabs * parts, multiprocessors) * (ceil_div(units, parts) + kStart);
    if (best_cost == 0 || cost < best_cost) best = parts, best_cost = cost;
  }
  return best;
}

// What the kernels of all passes ask for.
inline bool wide_groups(const ConvProblem& p, int capability) {
  const int64_t group = p.C / p.groups;
  return capability == 90 && (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) &&
         p.groups > 1 && p.K == p.C && (group == 32 || group == 64) && !p.flip &&
         p.layout == Layout::kNHWC && p.weight_layout == Layout::kNHWC && p.N > 0 && p.P > 0 &&
         p.Q > 0 && p.R == 3 && p.S == 3 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.stride_h == p.stride_w && p.stride_h <= 2;
}

// Whether the pass is one of the kernel's, and uses the multiplications well: by a sample's shape
// alone.
inline bool takes_groups(const ConvProblem& p, Pass pass, bool preactivation, bool residual,
                         int capability) {
  constexpr double kFilled = 0.6;
  if (!wide_groups(p, capability) || pass == Pass::kWgrad) return false;
  if (p.H < p.stride_h || p.W < p.stride_w) return false;
  if (group_walk(p, pass) == GroupWalk::kDoubled && (p.pad_top != 1 || p.pad_left != 1))
    return false;
  const bool clamps = p.activation == Activation::kNone || p.activation == Activation::kReLU ||
                      p.activation == Activation::kReLU6;
  if (pass == Pass::kFprop && (!clamps || preactivation || residual)) return false;
  const Gather g = groups_gather(p, pass);
  if (!gather_fits(g, 2) || g.w.outputs + ceil_div(g.w.taps, g.w.stride) - 1 > kUnitOutputs)
    return false;
  const GroupTile t = group_tile(p, pass);
  return t.stages >= 2 && g.N * t.units_of_image < INT32_MAX / 4 &&
         (t.rows - 1) * g.h.stride + g.h.taps <= 2 * t.rows * g.h.stride &&
         static_cast<double>(g.h.outputs * g.w.outputs) >=
             kFilled * kUnitOutputs * static_cast<double>(t.units_of_image);
}

// Of fprop or dgrad. filters: K x R x S x C / groups, as they are.
void gather_groups(const ConvProblem& p, Pass pass, const GatherTensors& tensors,
                   const Queue& queue);

}  // namespace torchconv::cuda::sm90
