// What the CUTLASS convolutions compute, in plain C++: the passes in terms of one gather, what the
// tensor memory accelerator can address of it, which problems are worth it, and how wgrad's sum is
// divided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <numeric>

#include "core/conv_problem.h"
#include "core/range.h"
#include "cuda/conv_passes.h"

#ifdef __CUDACC__
#define TORCHCONV_HOST_DEVICE __host__ __device__
#else
#define TORCHCONV_HOST_DEVICE
#endif

namespace torchconv::cuda::sm90 {

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One axis of a gather: output position p reads the image at p*stride - pad + r*dilation. A pad
// below zero is a crop.
struct GatherAxis {
  int64_t image, taps, outputs;
  int64_t stride, pad, dilation;
};

// One tap has no dilation, and what is given for it may be of any size.
inline GatherAxis gather_axis(int64_t image, int64_t taps, int64_t outputs, int64_t stride,
                              int64_t pad, int64_t dilation) {
  return {image, taps, outputs, stride, pad, taps > 1 ? dilation : 1};
}

// What stands for padding after the image, exactly: below zero where the last tap stays short of
// the image's end.
inline int64_t pad_after(const GatherAxis& a) {
  return (a.outputs - 1) * a.stride + (a.taps - 1) * a.dilation + 1 - a.image - a.pad;
}

// out[n, p, q, k] = sum over c, r, s of filters[k, r, s, c] * image[n, h, w, c]: fprop as it is,
// and dgrad with dz as the image. Image and filters are dense, the output has strides.
struct Gather {
  int64_t N, C, K;
  GatherAxis h, w;
  int64_t out_n, out_p, out_q;  // strides in elements
};

inline Gather fprop_gather(const ConvProblem& p) {
  return {p.N,
          p.C,
          p.K,
          gather_axis(p.H, p.R, p.P, p.stride_h, p.pad_top, p.dilation_h),
          gather_axis(p.W, p.S, p.Q, p.stride_w, p.pad_left, p.dilation_w),
          p.P * p.Q * p.K,
          p.Q * p.K,
          p.K};
}

// One axis of dgrad, at the positions first + i*stride of x. Those read dz through every step-th
// tap from tap on, backwards: filter position t of the gather is tap + (taps - 1 - t)*step. No taps
// means that no output depends on these positions, whose gradient is zero.
struct PhaseAxis {
  int64_t tap, step;
  GatherAxis gather;
};

inline PhaseAxis phase_axis(int64_t x_size, int64_t z_size, int64_t taps, int64_t stride,
                            int64_t pad, int64_t dilation, int64_t first) {
  // Position first + i*stride is reached from output p by tap r where
  // first + i*stride + pad = p*stride + r*dilation.
  const int64_t common = std::gcd(stride, dilation);
  const int64_t step = stride / common;
  int64_t tap = 0;
  while (tap < std::min(step, taps) && (first + pad - tap * dilation) % stride != 0) ++tap;
  const bool any = tap < std::min(step, taps);
  const int64_t count = any ? ceil_div(taps - tap, step) : 0;
  const int64_t spacing = dilation / common;
  // Output of tap `tap` for i = 0; each further tap is `spacing` outputs before.
  const int64_t start = any ? (first + pad - tap * dilation) / stride : 0;
  return {tap, step,
          gather_axis(z_size, count, ceil_div(x_size - first, stride), 1,
                      (count - 1) * spacing - start, spacing)};
}

struct Phase {
  PhaseAxis h, w;
  Gather gather;
  int64_t offset;  // of its first element in dx
  bool empty() const { return gather.h.outputs <= 0 || gather.w.outputs <= 0; }
  bool zero() const { return gather.h.taps == 0 || gather.w.taps == 0; }
};

// dgrad at the positions of x that are first_h and first_w modulo the strides.
inline Phase dgrad_phase(const ConvProblem& p, int64_t first_h, int64_t first_w) {
  const PhaseAxis h = phase_axis(p.H, p.P, p.R, p.stride_h, p.pad_top, p.dilation_h, first_h);
  const PhaseAxis w = phase_axis(p.W, p.Q, p.S, p.stride_w, p.pad_left, p.dilation_w, first_w);
  const int64_t row = p.W * p.C;
  return {h,
          w,
          {p.N, p.K, p.C, h.gather, w.gather, p.H * row, p.stride_h * row, p.stride_w * p.C},
          first_h * row + first_w * p.C};
}

inline bool has_zero_phase(const ConvProblem& p) {
  for (int64_t h = 0; h < p.stride_h; ++h)
    for (int64_t w = 0; w < p.stride_w; ++w)
      if (const Phase phase = dgrad_phase(p, h, w); !phase.empty() && phase.zero()) return true;
  return false;
}

// Where the filters of dgrad's phases stand: C x R' x S' x K each, phase after phase. Every tap
// belongs to one phase.
constexpr int kMostPhases = 4;  // on an axis, and together

struct TurnedTap {
  int64_t before;     // taps of the phases before, for all channels
  int64_t tap, taps;  // in the phase
};

struct TurnedAxis {
  int stride, pad, dilation, step;
  int first_tap[kMostPhases], taps[kMostPhases];

  // The phase whose positions tap r reaches.
  TORCHCONV_HOST_DEVICE int phase(int r) const {
    const int at = (r * dilation - pad) % stride;
    return at < 0 ? at + stride : at;
  }
  TORCHCONV_HOST_DEVICE int position(int phase, int r) const {
    return taps[phase] - 1 - (r - first_tap[phase]) / step;
  }
};

struct TurnedFilters {
  TurnedAxis h, w;

  TORCHCONV_HOST_DEVICE int64_t before(int phase_h, int phase_w) const {
    int64_t taps = 0;
    for (int i = 0; i < h.stride; ++i)
      for (int j = 0; j < w.stride; ++j)
        if (i < phase_h || (i == phase_h && j < phase_w)) taps += h.taps[i] * w.taps[j];
    return taps;
  }
  TORCHCONV_HOST_DEVICE TurnedTap tap(int r, int s) const {
    const int i = h.phase(r), j = w.phase(s);
    return {before(i, j), h.position(i, r) * w.taps[j] + w.position(j, s), h.taps[i] * w.taps[j]};
  }
};

inline TurnedFilters turned_filters(const ConvProblem& p) {
  const auto axis = [](int64_t x, int64_t z, int64_t taps, int64_t stride, int64_t pad,
                       int64_t dilation) {
    TurnedAxis turned{static_cast<int>(stride),
                      static_cast<int>(pad),
                      static_cast<int>(dilation),
                      static_cast<int>(stride / std::gcd(stride, dilation)),
                      {},
                      {}};
    for (int64_t i = 0; i < stride; ++i) {
      const PhaseAxis phase = phase_axis(x, z, taps, stride, pad, dilation, i);
      turned.first_tap[i] = static_cast<int>(phase.tap);
      turned.taps[i] = static_cast<int>(phase.gather.taps);
    }
    return turned;
  };
  return {axis(p.H, p.P, p.R, p.stride_h, p.pad_top, p.dilation_h),
          axis(p.W, p.Q, p.S, p.stride_w, p.pad_left, p.dilation_w)};
}

// The corners of the box of image positions that the first tap visits, as distances from the
// image's corners, are bytes in a tensor map; so are the distances of the other taps from it.
inline bool axis_fits(const GatherAxis& a) {
  const int64_t span = (a.taps - 1) * a.dilation;
  const int64_t before = -a.pad;
  const int64_t after = pad_after(a) - span;
  return a.image < INT32_MAX && a.stride <= 8 && span < 255 && before >= -128 && before <= 127 &&
         after >= -128 && after <= 127;
}

// Positions count in an int with room for the last tiles; strides are below 2^40 bytes.
inline bool gather_fits(const Gather& g, int64_t bytes) {
  constexpr int64_t kMostPositions = INT32_MAX - 1024, kMostBytes = int64_t{1} << 40;
  const int64_t positions = g.N * g.h.outputs * g.w.outputs;
  return axis_fits(g.h) && axis_fits(g.w) && positions <= kMostPositions &&
         g.N * g.h.image * g.w.image <= kMostPositions && g.C < INT32_MAX && g.K < INT32_MAX &&
         g.h.image * g.w.image * g.C * bytes < kMostBytes && g.out_n * bytes < kMostBytes &&
         g.h.taps * g.w.taps * g.C * bytes < kMostBytes &&
         ceil_div(positions, 128) * ceil_div(g.K, 64) < INT32_MAX / 4;
}

// Whether kernels start while the one before them ends: it costs more than it saves where windows
// of several taps have few channels and filters.
inline bool gains_by_early_start(int64_t C, int64_t K, int64_t taps) {
  return C > 64 || K > 64 || taps == 1;
}

// The share of a dimension's tiles that is not padding.
inline double filled(int64_t size, int64_t tile) {
  return static_cast<double>(size) / static_cast<double>(round_up(size, tile));
}

// Cycles of a multiprocessor: what a tile of the result takes for each tile of its sum, of 128
// bytes a row, and beside them.
struct TileCost {
  int64_t step, rest;
};

// How long `units` clusters of tiles take that run `resident` at a time.
inline int64_t rounds_cost(int64_t units, int64_t resident, int64_t steps, const TileCost& cost) {
  return ceil_div(units, std::max<int64_t>(resident, 1)) * (steps * cost.step + cost.rest);
}

// Clusters of blocks, one on a multiprocessor, that run at a time: each in one part of the device,
// of 16 or 18 multiprocessors.
inline int64_t resident_clusters(int64_t multiprocessors, int64_t size) {
  const int64_t usable = size > 2 ? multiprocessors / 16 * 16 : multiprocessors;
  return std::max<int64_t>(usable / size, 1);
}

// Tiles of the gather, positions by filters: wide ones need the least memory traffic, narrow ones
// fill more multiprocessors. Two of the narrowest run at a time, at half the speed. Clusters are of
// neighbours in positions and in filters. Those of four are for a gather that needs no second round
// of them (measured: 512 channels and filters, 3x3, 64 x 7x7 take 0.86 of the time of clusters of
// two, 64 x 14x14 in more rounds 1.2).
struct GatherTile {
  int64_t positions, filters;
  int64_t cluster_m, cluster_n;
  TileCost cost;

  // What one launch computes is counted in runs: the positions of a cluster.
  int64_t run() const { return positions * cluster_m; }
  int64_t units(int64_t runs, int64_t K) const { return runs * ceil_div(K, filters * cluster_n); }
  bool of_one_round() const { return cluster_n > 1; }
};
constexpr GatherTile kGatherTiles[] = {
    {128, 256, 2, 1, {1100, 3000}}, {128, 128, 2, 1, {680, 1800}}, {128, 64, 2, 1, {400, 900}},
    {128, 128, 2, 2, {560, 1800}},  {192, 128, 2, 1, {880, 2400}},
};
constexpr int kGatherTileCount = static_cast<int>(std::size(kGatherTiles));

// What stands for the tile where a residual is loaded, too.
constexpr int kResidualTile = 1;

// A part of the gather's positions that one launch computes: `runs` of the tile's from `first` on.
struct GatherPart {
  int tile;
  int64_t first, runs;
};
struct GatherParts {
  GatherPart part[2];
  int count;
};

// The fastest tiles for the gather: one for all of it, or, where that leaves multiprocessors
// without work in the end, one for whole rounds of them and another for the rest.
inline GatherParts gather_parts(const Gather& g, int64_t bytes, int64_t multiprocessors) {
  constexpr int64_t kLaunch = 3000;
  const int64_t positions = g.N * g.h.outputs * g.w.outputs;
  const int64_t steps = g.h.taps * g.w.taps * ceil_div(g.C, 128 / bytes);
  GatherParts best{};
  int64_t best_cost = 0;
  const auto consider = [&](const GatherParts& parts, int64_t cost) {
    if (best.count == 0 || cost < best_cost) best = parts, best_cost = cost;
  };
  const auto resident = [&](const GatherTile& tile) {
    return resident_clusters(multiprocessors, tile.cluster_m * tile.cluster_n);
  };
  const auto cost_of = [&](const GatherTile& tile, int64_t runs) {
    return rounds_cost(tile.units(runs, g.K), resident(tile), steps, tile.cost);
  };
  for (int i = 0; i < kGatherTileCount; ++i) {
    const GatherTile& tile = kGatherTiles[i];
    const int64_t runs = ceil_div(positions, tile.run());
    if (tile.of_one_round() && tile.units(runs, g.K) > resident(tile)) continue;
    consider({{{i, 0, runs}, {}}, 1}, cost_of(tile, runs));
  }
  for (int i = 0; i < kGatherTileCount; ++i) {
    const GatherTile& tile = kGatherTiles[i];
    if (tile.of_one_round()) continue;
    const int64_t runs = ceil_div(positions, tile.run()), units_of_run = tile.units(1, g.K);
    // In whole rounds.
    const int64_t whole = runs * units_of_run / resident(tile) * resident(tile) / units_of_run;
    if (whole == 0 || whole == runs) continue;
    for (int j = 0; j < kGatherTileCount; ++j) {
      const GatherTile& other = kGatherTiles[j];
      if (other.of_one_round() || other.run() != tile.run()) continue;
      consider({{{i, 0, whole}, {j, whole, runs - whole}}, 2},
               cost_of(tile, whole) + cost_of(other, runs - whole) + kLaunch);
    }
  }
  return best;
}

// A gather of few channels whose pixels are loaded once for all taps, with a halo (see
// cutlass_sm90_halo.cu), in tiles of whole rows of outputs.
constexpr int kHaloTaps = 9, kHaloOutputs = 256, kHaloPixels = 352;
constexpr int64_t kMostOfBox = 256;  // pixels along an axis of what TMA loads at once

struct HaloTile {
  int64_t rows, columns;  // of outputs, and of pixels a row in shared memory
};

inline HaloTile halo_tile(const Gather& g) {
  const int64_t columns = g.w.outputs + g.w.taps - 1;
  const int64_t most = std::min(kHaloOutputs / columns, kMostOfBox - (g.h.taps - 1));
  return {std::min(most, g.h.outputs), columns};
}

// By a sample's shape alone.
inline bool takes_halo(const Gather& g, int64_t bytes) {
  constexpr double kFilled = 0.75;
  if (bytes != 2 || g.C > 64 || g.K > 64 || g.h.stride != 1 || g.w.stride != 1) return false;
  if ((g.h.taps > 1 && g.h.dilation != 1) || (g.w.taps > 1 && g.w.dilation != 1)) return false;
  if (g.h.taps * g.w.taps < 4 || g.h.taps * g.w.taps > kHaloTaps) return false;
  const bool dense =
      g.out_q == g.K && g.out_p == g.K * g.w.outputs && g.out_n == g.K * g.w.outputs * g.h.outputs;
  if (!dense || g.w.outputs + g.w.taps - 1 > kHaloOutputs) return false;
  const HaloTile tile = halo_tile(g);
  const int64_t tiles = ceil_div(g.h.outputs, tile.rows);
  return (tile.rows + g.h.taps - 1) * tile.columns <= kHaloPixels && g.N * tiles < INT32_MAX / 4 &&
         static_cast<double>(g.h.outputs * g.w.outputs) >= kFilled * kHaloOutputs * tiles;
}

// wgrad: clusters of tiles of the result, each a sum over `tiles` tiles of 64 positions. A share is
// what a cluster of blocks computes at one time: the sums of the first results whole, which fill
// the multiprocessors in whole rounds, and of the others a part of `steps` tiles, one of `splits`.
// The parts of a result are added by another kernel. Shares that follow each other are at the same
// positions, so that neighbouring multiprocessors, which run together, ask for the same memory: in
// another order it comes from the cache once for each of them. There are as many shares as fill the
// multiprocessors of an H100 best: their number must not depend on the device.
//
// Tensor cores round each addition towards zero, so that they add kMostTilesOfSum tiles at most;
// these sums are added in float32, in order, with rounding to nearest, and so are the parts.
constexpr int kMostTilesOfSum = 64;

struct WgradPart {
  int64_t result, slot;  // the slot-th part of this result
  int64_t first, count;  // tiles of the sum
};

struct WgradShares {
  int64_t tile_k, tile_c;  // of a block
  int64_t cluster;         // tiles in K that share what they load of x
  int64_t results, tiles;
  int64_t whole;  // results that are one share each
  int64_t splits, steps;

  TORCHCONV_HOST_DEVICE int64_t shares() const { return whole + (results - whole) * splits; }
  TORCHCONV_HOST_DEVICE int64_t parts(int64_t result) const { return result < whole ? 1 : splits; }
  TORCHCONV_HOST_DEVICE WgradPart part(int64_t share) const {
    if (share < whole) return {share, 0, 0, tiles};
    const int64_t rest = results - whole, slot = (share - whole) / rest;
    const int64_t first = slot * steps;
    return {share - slot * rest, slot, first, steps < tiles - first ? steps : tiles - first};
  }
};

inline WgradShares wgrad_shares(const ConvProblem& p) {
  constexpr int64_t kMostSteps = 256 * kMostTilesOfSum, kFewestSteps = 8;
  constexpr int64_t kMultiprocessors = 132, kRounds = 6, kBytesOfCycle = 3000;
  constexpr int64_t kMostBytes = int64_t{256} << 20;  // of all parts, if it may be
  const bool wide = p.K > 64 && p.C > 64;
  const int64_t tile = wide ? 128 : 64, cluster = p.K > 128 && wide ? 2 : 1;
  const int64_t tiles_c = ceil_div(p.C, tile) * p.R * p.S;  // in turn with the taps
  const TileCost cost = !wide          ? TileCost{1200, 4000}
                        : cluster == 2 ? TileCost{680, 2500}
                                       : TileCost{820, 2500};
  const int64_t resident =
      wide ? resident_clusters(kMultiprocessors, cluster) : 3 * kMultiprocessors;
  const int64_t results = ceil_div(p.K, tile * cluster) * tiles_c;
  const int64_t tiles = ceil_div(p.N * p.P * p.Q, 64);
  const int64_t bytes = p.K * p.R * p.S * p.C * 4;
  const int64_t least = ceil_div(tiles, kMostSteps);
  const int64_t most = std::max(least, std::min(tiles / kFewestSteps, kMostBytes / bytes));
  WgradShares best{};
  int64_t best_cost = 0;
  const auto consider = [&](int64_t whole, int64_t wanted) {
    const int64_t steps = ceil_div(tiles, std::clamp(wanted, least, most));
    const WgradShares s{tile, tile, cluster, results, tiles, whole, ceil_div(tiles, steps), steps};
    // A part is written, and read to be added.
    const int64_t total = rounds_cost(whole, resident, tiles, cost) +
                          rounds_cost(s.shares() - whole, resident, steps, cost) +
                          s.shares() * cluster * tile * tile * 8 / kBytesOfCycle;
    if (best_cost == 0 || total < best_cost) best = s, best_cost = total;
  };
  // As many parts of each result, in rounds; or parts of those of the last round alone.
  for (int64_t rounds = 1; rounds <= kRounds; ++rounds) consider(0, rounds * resident / results);
  const int64_t whole = results / resident * resident;
  if (whole != 0 && whole != results && least == 1) consider(whole, resident / (results - whole));
  return best;
}

// wgrad in TF32: tiles of (r, s, c) in slabs of 32 channels, 4 a block, 8 a cluster, by `filters`.
// The sum over pixels, 32 a step, is divided into parts of `steps` steps, which fill the
// multiprocessors of an H100 best; another kernel adds the parts.
struct WgradTf32Shares {
  bool turns;  // columns are turned in shared memory, instead of dz transposed before
  bool swaps;  // rows are filters, and columns channels
  int64_t filters, clusters_m;
  int64_t parts, steps;
  int64_t pitch;  // of the transposed dz, in elements
};

inline WgradTf32Shares wgrad_tf32_shares(const ConvProblem& p) {
  // Products that are added by tensor cores one after the other, and the fewest worth a part.
  constexpr int64_t kMostSteps = 256, kFewestSteps = 16;
  constexpr int64_t kMultiprocessors = 132, kRounds = 8, kBytesOfCycle = 3000;
  const bool turns = p.R * p.S == 1 && std::min(p.C, p.K) <= 64;
  const bool swaps = turns && p.C < p.K;
  const int64_t rows = swaps ? p.K : p.R * p.S * round_up(p.C, 32), columns = swaps ? p.C : p.K;
  const int64_t pixels = p.N * p.P * p.Q, steps = ceil_div(pixels, 32);
  const int64_t filters = columns > 128 ? 256 : columns > 64 ? 128 : 64;
  // Two of narrow tiles run at a time.
  const TileCost cost = filters == 256   ? TileCost{1150, 7000}
                        : filters == 128 ? TileCost{700, 5000}
                                         : TileCost{1000, 7000};
  const int64_t clusters_m = ceil_div(rows, 256);
  const int64_t tiles = clusters_m * ceil_div(columns, filters);
  const int64_t resident = kMultiprocessors / (filters == 64 ? 1 : 2);
  const int64_t least = ceil_div(steps, kMostSteps);
  const int64_t most = std::max(least, steps / kFewestSteps);
  WgradTf32Shares best{};
  int64_t best_cost = 0;
  for (int64_t rounds = 1; rounds <= kRounds; ++rounds) {
    const int64_t of_part = ceil_div(steps, std::clamp(rounds * resident / tiles, least, most));
    const int64_t parts = ceil_div(steps, of_part);
    // A part is written, and read to be added.
    const int64_t total = rounds_cost(parts * tiles, resident, of_part, cost) +
                          parts * p.K * p.R * p.S * p.C * 8 / kBytesOfCycle;
    if (best_cost != 0 && total >= best_cost) continue;
    best = {turns, swaps, filters, clusters_m, parts, of_part, round_up(pixels, 4)};
    best_cost = total;
  }
  return best;
}

// Whether the pass is one of ours, and uses the multiplications well: fprop is judged by a sample's
// shape alone.
inline bool takes(const ConvProblem& p, Pass pass, bool preactivation, bool residual,
                  int capability) {
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const bool tf32 = p.dtype == DType::kFloat32;
  const int64_t bytes = bytes_of(p.dtype), lanes = 16 / bytes;
  if (capability != 90 || !(half || tf32)) return false;
  if (p.groups != 1 || p.flip || p.layout != Layout::kNHWC || p.weight_layout != Layout::kNHWC)
    return false;
  if (p.N <= 0 || p.C <= 0 || p.K <= 0 || p.P <= 0 || p.Q <= 0) return false;
  if (p.C % lanes != 0 || p.K % lanes != 0) return false;

  const auto small = [](int64_t pad, int64_t span) {
    return std::abs(pad) < (1 << 20) && span < (1 << 20);
  };
  constexpr double kFilled = 0.5;
  const int64_t tile_of_sum = 128 / bytes;
  switch (pass) {
    case Pass::kFprop: {
      const bool clamps = p.activation == Activation::kNone || p.activation == Activation::kReLU ||
                          p.activation == Activation::kReLU6;
      return clamps && !preactivation && gather_fits(fprop_gather(p), bytes) &&
             filled(p.C, tile_of_sum) *
                     filled(p.K, residual ? kGatherTiles[kResidualTile].filters : 64) >=
                 kFilled;
    }
    case Pass::kDgrad: {
      if (p.stride_h > kMostPhases || p.stride_w > kMostPhases ||
          p.stride_h * p.stride_w > kMostPhases || p.N * p.H * p.W > INT32_MAX)
        return false;
      if (!small(p.pad_top, p.dilation_h * (p.R - 1)) ||
          !small(p.pad_left, p.dilation_w * (p.S - 1)))
        return false;
      for (int64_t h = 0; h < p.stride_h; ++h)
        for (int64_t w = 0; w < p.stride_w; ++w) {
          const Phase phase = dgrad_phase(p, h, w);
          if (!phase.empty() && !phase.zero() && !gather_fits(phase.gather, bytes)) return false;
        }
      return filled(p.K, tile_of_sum) * filled(p.C, 64) >= kFilled;
    }
    case Pass::kWgrad: {
      if (!half) {
        // Transposing dz takes as long as so many products of each of its elements.
        constexpr int64_t kLeastWeights = 512, kLeastColumns = 48, kLeastRows = 192;
        const WgradTf32Shares s = wgrad_tf32_shares(p);
        const bool worth =
            s.turns ? std::min(p.K, p.C) >= kLeastColumns && std::max(p.K, p.C) >= kLeastRows
                    : p.K >= kLeastColumns && p.R * p.S * p.C >= kLeastWeights &&
                          filled(p.K, s.filters) * filled(p.C, 32) >= kFilled;
        return worth && gather_fits(fprop_gather(p), bytes) && p.K * p.R * p.S * p.C <= INT32_MAX &&
               2 * s.clusters_m * s.parts * ceil_div(p.K, s.filters) <= INT32_MAX;
      }
      const WgradShares s = wgrad_shares(p);
      // What is added four at a time counts in 31 bits.
      return gather_fits(fprop_gather(p), bytes) && p.K * p.R * p.S * (p.C / 4) <= INT32_MAX &&
             filled(p.K, s.tile_k) * filled(p.C, s.tile_c) >= kFilled;
    }
  }
  return false;
}

}  // namespace torchconv::cuda::sm90
