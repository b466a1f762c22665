// Exact fprop and dgrad on CUDA cores: which kernel, tile and how many slices of the terms, and the
// launches of simt_gather_kernel.h. No choice changes a bit of the result, so all may look at the
// batch and the device.
#include <algorithm>
#include <cstddef>

#include "core/range.h"
#include "cuda/conv_passes.h"
#include "cuda/simt_direct.h"
#include "cuda/simt_few_dgrad.h"
#include "cuda/simt_gather_kernel.h"
#include "cuda/simt_masked.h"
#include "cuda/simt_planes.h"

namespace torchconv::cuda {
namespace {

// Fewer channels a group than this leave a tile so empty that a thread an output is no slower.
constexpr int64_t kFewChannels = 5;

// Chunk sums of split tiles take no more memory than this.
constexpr int64_t kMostScratch = int64_t{256} << 20;

template <typename W>
using LargeTile = SimtTile<W, 128, 128, 8, 8, 2>;
template <typename W>
using MediumTile = SimtTile<W, 64, 128, 8, 8, 4>;
template <typename W>
using SmallTile = SimtTile<W, 64, 64, 8, 4, std::is_same_v<W, double> ? 2 : 4>;
template <typename W>
using FlatTile = SimtTile<W, 32, 128, 4, 8, 4>;

struct Grid {
  int64_t pixels, phases, most_chunks;
};

template <typename Tile>
int64_t tiles_of(const SimtView& v, const Grid& grid) {
  return ceil_div(v.M, Tile::kM) * ceil_div(grid.pixels, Tile::kN) * v.groups * grid.phases;
}

struct Plan {
  double cost;  // of the multiprocessor that ends last, in elements of a tile times chunks
  int slices;
};

// The slices of the terms that end soonest. A multiprocessor needs eight warps to hide latencies; a
// slice has a beginning; chunks' sums are written and read, in a launch more.
template <typename Tile>
Plan plan_slices(const SimtView& v, const Grid& grid, int64_t multiprocessors) {
  // The share of FMAs in what a thread executes, by its tile.
  constexpr double kShare = Tile::kThreadM * Tile::kThreadN < 64 ? 0.7
                            : Tile::kM < 128                     ? 0.75
                                                                 : 0.8;
  constexpr int64_t kMost = 32;
  const double area = Tile::kM * Tile::kN;
  const int64_t tiles = tiles_of<Tile>(v, grid), chunks = std::max<int64_t>(grid.most_chunks, 1);
  const int64_t bytes =
      tiles * chunks * Tile::kM * Tile::kN * static_cast<int64_t>(sizeof(typename Tile::Wide));
  Plan best{};
  for (int64_t slices = 1; slices <= std::min(chunks, kMost); ++slices) {
    const int64_t each = ceil_div(chunks, slices);
    if (slices > 1 && (bytes > kMostScratch || ceil_div(chunks, each) != slices)) continue;
    const int64_t blocks = ceil_div(tiles * slices, multiprocessors);
    const int64_t warps = std::min<int64_t>(blocks, Tile::kBlocks) * Tile::kThreads / 32;
    const double speed = kShare * std::min(1.0, 0.5 + static_cast<double>(warps) / 16);
    double cost = static_cast<double>(blocks) * (static_cast<double>(each) + 0.15) * area / speed;
    if (slices > 1)
      cost += 5000 + 0.2 * area * static_cast<double>(tiles * chunks) /
                         static_cast<double>(multiprocessors);
    if (slices == 1 || cost < best.cost) best = {cost, static_cast<int>(slices)};
  }
  return best;
}

template <typename T, typename Tile>
void run(SimtGather<T>& p, const Grid& grid, bool quads, const T* w, const Queue& queue) {
  p.channels = channels_together(p.view);
  p.weights = pack_weights<T>(p.view, w, Tile::kM, queue);
  const int64_t tiles = tiles_of<Tile>(p.view, grid);
  const int64_t tile_sums = Tile::kM * Tile::kN;
  p.m_tiles = static_cast<unsigned>(ceil_div(p.view.M, Tile::kM));
  p.n_tiles = static_cast<unsigned>(ceil_div(grid.pixels, Tile::kN));
  p.most_chunks = static_cast<int>(grid.most_chunks);
  const int slices =
      p.samples != nullptr ? 1 : plan_slices<Tile>(p.view, grid, queue.multiprocessors).slices;
  p.chunks_a_slice = static_cast<int>(ceil_div(std::max<int64_t>(grid.most_chunks, 1), slices));
  p.chunk_sums =
      slices > 1 ? queue.scratch<Wide<T>>(tiles * grid.most_chunks * tile_sums) : nullptr;
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
  if (slices > 1)
    launch(quads ? simt_gather<T, Tile, true, true> : simt_gather<T, Tile, false, true>, blocks,
           Tile::kThreads, static_cast<int>(offsetof(typename Tile::Shared, sums)), queue, p);
  else
    launch(quads ? simt_gather<T, Tile, true, false> : simt_gather<T, Tile, false, false>, blocks,
           Tile::kThreads, static_cast<int>(sizeof(typename Tile::Shared)), queue, p);
  if (slices > 1)
    launch(simt_gather_finish<T, Tile>, dim3(blocks.x, Tile::kSlots), Tile::kThreads, 0, queue, p);
}

template <typename T>
void gather(const SimtView& v, const T* source, const T* w, const Epilogue<T>& epilogue,
            const Queue& queue, const int* samples = nullptr) {
  SimtGather<T> p{};
  p.view = v;
  p.source = source;
  p.epilogue = epilogue;
  p.samples = samples;

  const bool one_phase = v.rows.phases * v.columns.phases == 1;
  const int64_t plane = int64_t{v.rows.most_grid} * v.columns.most_grid;
  const bool aligned_target = aligned<T>(epilogue.y, 4) && aligned<T>(epilogue.preactivation, 4) &&
                              aligned<T>(epilogue.residual, 4);
  const bool whole = one_phase && v.rows.target_step == 1 && v.columns.target_step == 1;
  p.dense = whole && v.N * plane < (int64_t{1} << 31);
  if (p.dense) p.plane = Divisor(plane);
  p.along_m = v.target.c == 1;
  p.store_quads = aligned_target && (p.along_m ? v.M % 4 == 0 : whole && plane % 4 == 0);
  const bool quads = v.source.c == 1 && v.C % 4 == 0 && aligned<T>(source, 4);

  Grid grid{v.N * plane, int64_t{v.rows.phases} * v.columns.phases, 0};
  for (int a = 0; a < v.rows.phases; ++a)
    for (int b = 0; b < v.columns.phases; ++b)
      grid.most_chunks = std::max(
          grid.most_chunks,
          ceil_div(v.C * v.rows.phase[a].taps * v.columns.phase[b].taps, LargeTile<float>::kChunk));

  if constexpr (std::is_same_v<T, float>) {
    const auto cost = [&](auto tile) {
      return plan_slices<decltype(tile)>(v, grid, queue.multiprocessors).cost;
    };
    const double large = cost(LargeTile<float>{}), medium = cost(MediumTile<float>{});
    const double small = cost(SmallTile<float>{}), flat = cost(FlatTile<float>{});
    const double least = std::min({large, medium, small, flat});
    if (samples == nullptr && simt_planes_takes(v, epilogue.y, queue) &&
        simt_planes_cost(v, queue) <= least)
      return simt_planes(v, source, w, epilogue, queue);
    if (large == least && large_tiles_fit(queue))
      return run<T, LargeTile<float>>(p, grid, quads, w, queue);
    if (medium == least || large == least)
      return run<T, MediumTile<float>>(p, grid, quads, w, queue);
    if (flat == least) return run<T, FlatTile<float>>(p, grid, quads, w, queue);
  }
  run<T, SmallTile<Wide<T>>>(p, grid, quads, w, queue);
}

// M channels of the target and C of the source in a group.
bool tiles_fit(const ConvProblem& p, int64_t M, int64_t C) {
  if (!simt_fits(p) || M < kFewChannels) return false;
  // The packed weights, with what fills rows and phases.
  const int64_t row = ceil_div(M, LargeTile<float>::kM) * LargeTile<float>::kM;
  const int64_t terms = C * p.R * p.S + 8 * SimtAxis::kPhases * SimtAxis::kPhases;
  return row < (int64_t{1} << 32) / terms / p.groups;
}

}  // namespace

void simt_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                const void* residual, void* y, void* preactivation, const Queue& queue) {
  if (p.N * p.K * p.P * p.Q == 0) return;
  const bool integer = p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64 &&
                       p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16;
  if (integer || p.C == 0 || !tiles_fit(p, p.K / p.groups, p.C / p.groups))
    return simt_direct_fprop(p, x, w, bias, residual, y, preactivation, queue);
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather<T>(fprop_view(p), static_cast<const T*>(x), static_cast<const T*>(w),
              {static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(preactivation),
               p.activation, static_cast<const T*>(residual)},
              queue);
  });
}

void simt_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx, const Queue& queue) {
  if (p.N * p.C == 0) return;
  if (p.K > 0 && simt_few_dgrad_takes(p)) return simt_few_dgrad(p, dz, w, dx, queue);
  const int64_t row_phases = std::min(p.stride_h, p.H), column_phases = std::min(p.stride_w, p.W);
  const int64_t most = int64_t{SimtAxis::kPhases} * SimtAxis::kPhases * 16;
  if (!tiles_fit(p, p.C / p.groups, p.K / p.groups) || row_phases > most / column_phases)
    return simt_direct_dgrad(p, dz, w, dx, queue);
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t a = 0; a < row_phases; a += SimtAxis::kPhases)
      for (int64_t b = 0; b < column_phases; b += SimtAxis::kPhases)
        gather<T>(dgrad_view(p, a, b), static_cast<const T*>(dz), static_cast<const T*>(w),
                  {nullptr, static_cast<T*>(dx), nullptr, Activation::kNone}, queue);
  });
}

void simt_fprop_of(const int* samples, const ConvProblem& p, const void* x, const void* w,
                   const void* bias, const void* residual, void* y, void* preactivation,
                   const Queue& queue) {
  gather<float>(
      fprop_view(p), static_cast<const float*>(x), static_cast<const float*>(w),
      {static_cast<const float*>(bias), static_cast<float*>(y), static_cast<float*>(preactivation),
       p.activation, static_cast<const float*>(residual)},
      queue, samples);
}

void simt_dgrad_of(const int* samples, const ConvProblem& p, const void* dz, const void* w,
                   void* dx, const Queue& queue) {
  gather<float>(dgrad_view(p, 0, 0), static_cast<const float*>(dz), static_cast<const float*>(w),
                {nullptr, static_cast<float*>(dx), nullptr, Activation::kNone}, queue, samples);
}

}  // namespace torchconv::cuda
