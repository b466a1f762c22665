// Convolutions of wide groups on Hopper, in plain C++: fprop, and dgrad of stride 1, in terms of
// one gather with as many filters as channels a group; which problems are worth it, and how they
// are cut for the kernel of cutlass_sm90_groups.cu.
//
// A unit is up to 64 outputs of one image, some rows of them. What it reads of a slab of 64
// channels is loaded once for all taps: of stride 2, pixels are in patches, one for each residue of
// rows and columns, in which those of neighbouring outputs are neighbours. Rows of a patch and of
// the outputs are equally long, so that the outputs' pixels for a tap are 64 in a row of their
// patch, from tap_at on.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"

namespace torchconv::cuda::sm90 {

constexpr int kSlabChannels = 64, kPixelBytes = 2 * kSlabChannels, kUnitOutputs = 64;
constexpr int kGroupTaps = 9, kGroupPatches = 4, kGroupStages = 8;
// Warpgroups that multiply, each with a unit's outputs to store.
constexpr int kGroupMultipliers = 2;
// A block's shared memory, less static and what aligns it.
constexpr int64_t kGroupRoom = (227 - 2) * 1024;
constexpr int64_t kUnitBytes = int64_t{kUnitOutputs} * kPixelBytes;

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
  GroupPatch patch[kGroupPatches];
  int64_t tap_at[kGroupTaps];
  int64_t loaded, stage_bytes;  // of one unit
  int64_t stages;               // units that a block has room for
};

inline Gather groups_gather(const ConvProblem& p, Pass pass) {
  return pass == Pass::kDgrad ? dgrad_phase(p, 0, 0).gather : fprop_gather(p);
}

// A gather that takes_groups takes, but for the room.
inline GroupTile group_tile(const Gather& g, int64_t group) {
  const int64_t stride = g.h.stride;
  GroupTile t{};
  t.columns = g.w.outputs + ceil_div(g.w.taps, stride) - 1;
  const int64_t most = std::min(std::max<int64_t>(kUnitOutputs / t.columns, 1), g.h.outputs);
  t.units_of_image = ceil_div(g.h.outputs, most);
  t.rows = ceil_div(g.h.outputs, t.units_of_image);
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
  for (int64_t r = 0; r < g.h.taps; ++r)
    for (int64_t s = 0; s < g.w.taps; ++s)
      t.tap_at[r * g.w.taps + s] = t.patch[r % stride * stride + s % stride].at +
                                   (r / stride * t.columns + s / stride) * kPixelBytes;
  const int64_t filters = kGroupTaps * kSlabChannels * group * 2;
  t.stages = std::min<int64_t>(
      (kGroupRoom - filters - kGroupMultipliers * kUnitBytes) / t.stage_bytes, kGroupStages);
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
  if (p.H < p.stride_h || p.W < p.stride_w || (pass == Pass::kDgrad && p.stride_h > 1))
    return false;
  const bool clamps = p.activation == Activation::kNone || p.activation == Activation::kReLU ||
                      p.activation == Activation::kReLU6;
  if (pass == Pass::kFprop && (!clamps || preactivation || residual)) return false;
  const Gather g = groups_gather(p, pass);
  if (!gather_fits(g, 2) || g.w.outputs + ceil_div(g.w.taps, g.w.stride) - 1 > kUnitOutputs)
    return false;
  const GroupTile t = group_tile(g, p.C / p.groups);
  return t.stages >= 2 && g.N * t.units_of_image < INT32_MAX / 4 &&
         (t.rows - 1) * g.h.stride + g.h.taps <= 2 * t.rows * g.h.stride &&
         static_cast<double>(g.h.outputs * g.w.outputs) >=
             kFilled * kUnitOutputs * static_cast<double>(t.units_of_image);
}

// Of fprop or dgrad. filters: K x R x S x C / groups, as they are.
void gather_groups(const ConvProblem& p, Pass pass, const GatherTensors& tensors,
                   const Queue& queue);

}  // namespace torchconv::cuda::sm90
