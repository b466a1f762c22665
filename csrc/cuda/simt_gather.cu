// Exact fprop and dgrad on CUDA cores: which tile and how many slices of the terms, and the launches
// of simt_gather_kernel.h. Neither choice changes a bit of the result, so both may look at the batch
// and the device.
#include <algorithm>

#include "cuda/conv_passes.h"
#include "cuda/simt_direct.h"
#include "cuda/simt_gather_kernel.h"

namespace torchconv::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fewer channels a group than this leave a tile so empty that a thread an output is no slower.
constexpr int64_t kFewChannels = 5;

// Chunk sums of split tiles take no more memory than this.
constexpr int64_t kMostScratch = int64_t{256} << 20;

template <typename W>
using LargeTile = SimtTile<W, 128, 128, 8, 8, 2>;
template <typename W>
using SmallTile = SimtTile<W, 64, 64, 8, 4, std::is_same_v<W, double> ? 2 : 4>;
template <typename W>
using FlatTile = SimtTile<W, 32, 128, 4, 8, 4>;

// The slices that end soonest: whole waves of blocks, of which a split one also writes and reads its
// chunks' sums.
int slices_of(int64_t tiles, int64_t chunks, int64_t slots, int64_t bytes_a_chunk) {
  if (tiles * chunks * bytes_a_chunk > kMostScratch) return 1;
  int64_t best = 1;
  double least = 0;
  for (int64_t slices = 1; slices <= std::min<int64_t>(chunks, 64); ++slices) {
    const int64_t each = ceil_div(chunks, slices);
    if (slices > 1 && ceil_div(chunks, each) != slices) continue;
    const double waves = static_cast<double>(ceil_div(tiles * slices, slots));
    double cost = waves * (static_cast<double>(each) + 0.3);
    if (slices > 1)
      cost = cost * 1.05 + 0.5 + 0.05 * static_cast<double>(tiles * chunks) /
                                     static_cast<double>(slots);
    if (slices == 1 || cost < least) best = slices, least = cost;
  }
  return static_cast<int>(best);
}

// Rows of whole panels of panel_m channels.
template <typename T>
void pack(const SimtView& v, const T* w, int64_t panel_m, SimtGather<T>& p, const Queue& queue) {
  SimtPacked<Wide<T>>& packed = p.weights;
  p.channels = channels_together(v.source.c == 1, v.C);
  packed.width = static_cast<uint32_t>(ceil_div(v.M, panel_m) * panel_m);
  packed.column_phases = v.columns.phases;
  uint32_t steps = 0, most_steps = 0;
  for (int a = 0; a < v.rows.phases; ++a) {
    for (int b = 0; b < v.columns.phases; ++b) {
      packed.first[a * v.columns.phases + b] = steps;
      const int64_t taps = int64_t{v.rows.phase[a].taps} * v.columns.phase[b].taps;
      const auto these = static_cast<uint32_t>(ceil_div(taps * v.C, 8));
      steps += these;
      most_steps = std::max(most_steps, these);
    }
  }
  packed.group_size = steps * 8 * packed.width;
  if (steps == 0) return;
  packed.data = queue.scratch<Wide<T>>(v.groups * int64_t{packed.group_size});
  SimtWeights from{};
  from.rows = v.rows, from.columns = v.columns;
  from.group = v.weight_group, from.m = v.weight_m, from.c = v.weight_c;
  from.row = v.weight_row, from.column = v.weight_column;
  from.C = static_cast<int>(v.C), from.M = static_cast<int>(v.M);
  from.channels = p.channels;
  // In dgrad a target channel is a filter's channel, and nearer to the next one than a filter.
  from.along_m = v.weight_m < v.weight_c;
  from.m_tiles = static_cast<unsigned>(packed.width / 32);
  from.groups = static_cast<unsigned>(v.groups);
  const int64_t panels = int64_t{from.m_tiles} * v.groups;
  launch(simt_pack_weights<T>,
         dim3(static_cast<unsigned>(panels * ceil_div(most_steps, 4)),
              static_cast<unsigned>(v.rows.phases * v.columns.phases)),
         256, 0, queue, from, packed, w);
}

struct Grid {
  int64_t pixels, phases, most_chunks;
};

template <typename Tile>
int64_t tiles_of(const SimtView& v, const Grid& grid) {
  return ceil_div(v.M, Tile::kM) * ceil_div(grid.pixels, Tile::kN) * v.groups * grid.phases;
}

template <typename T, typename Tile>
void run(SimtGather<T>& p, const Grid& grid, bool quads, const T* w, const Queue& queue) {
  pack(p.view, w, Tile::kM, p, queue);
  const int64_t tiles = tiles_of<Tile>(p.view, grid);
  const int64_t tile_sums = Tile::kM * Tile::kN;
  p.m_tiles = static_cast<unsigned>(ceil_div(p.view.M, Tile::kM));
  p.n_tiles = static_cast<unsigned>(ceil_div(grid.pixels, Tile::kN));
  p.most_chunks = static_cast<int>(grid.most_chunks);
  const int slices = slices_of(tiles, grid.most_chunks, int64_t{queue.multiprocessors} * Tile::kBlocks,
                               tile_sums * static_cast<int64_t>(sizeof(Wide<T>)));
  p.chunks_a_slice = static_cast<int>(ceil_div(std::max<int64_t>(grid.most_chunks, 1), slices));
  p.chunk_sums =
      slices > 1 ? queue.scratch<Wide<T>>(tiles * grid.most_chunks * tile_sums) : nullptr;
  const int bytes = static_cast<int>(sizeof(typename Tile::Shared));
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
  launch(quads ? simt_gather<T, Tile, true> : simt_gather<T, Tile, false>, blocks, Tile::kThreads,
         bytes, queue, p);
  if (slices > 1)
    launch(simt_gather_finish<T, Tile>, dim3(blocks.x, Tile::kSlots), Tile::kThreads, 0, queue, p);
}

template <typename T>
void gather(const SimtView& v, const T* source, const T* w, const Epilogue<T>& epilogue,
            const Queue& queue) {
  SimtGather<T> p{};
  p.view = v;
  p.source = source;
  p.epilogue = epilogue;

  const bool one_phase = v.rows.phases * v.columns.phases == 1;
  const int64_t plane = int64_t{v.rows.most_grid} * v.columns.most_grid;
  const bool aligned_target =
      aligned<T>(epilogue.y, 4) &&
      (epilogue.preactivation == nullptr || aligned<T>(epilogue.preactivation, 4));
  p.along_m = v.target.c == 1;
  p.store_quads = aligned_target && (p.along_m ? v.M % 4 == 0
                                               : one_phase && v.rows.target_step == 1 &&
                                                     v.columns.target_step == 1 && plane % 4 == 0);
  const bool quads = v.source.c == 1 && v.C % 4 == 0 && aligned<T>(source, 4);

  Grid grid{v.N * plane, int64_t{v.rows.phases} * v.columns.phases, 0};
  for (int a = 0; a < v.rows.phases; ++a)
    for (int b = 0; b < v.columns.phases; ++b)
      grid.most_chunks = std::max(
          grid.most_chunks,
          ceil_div(v.C * v.rows.phase[a].taps * v.columns.phase[b].taps, LargeTile<float>::kChunk));

  if constexpr (std::is_same_v<T, float>) {
    using Large = LargeTile<float>;
    if (v.M <= 32) return run<T, FlatTile<float>>(p, grid, quads, w, queue);
    // The large tile computes with the least traffic, where few of its rows are empty and slices
    // keep the device busy.
    const int64_t busy = tiles_of<Large>(v, grid) * std::max<int64_t>(grid.most_chunks, 1);
    if (ceil_div(v.M, Large::kM) * Large::kM * 7 <= ceil_div(v.M, 64) * 64 * 8 &&
        busy >= queue.multiprocessors && grid.pixels > 64)
      return run<T, Large>(p, grid, quads, w, queue);
  }
  run<T, SmallTile<Wide<T>>>(p, grid, quads, w, queue);
}

bool tiles_fit(const ConvProblem& p, int64_t channels) {
  return simt_fits(p) && channels >= kFewChannels;
}

}  // namespace

void simt_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                void* preactivation, const Queue& queue) {
  if (p.N * p.K * p.P * p.Q == 0) return;
  const bool integer = p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64 &&
                       p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16;
  if (integer || p.C == 0 || !tiles_fit(p, p.K / p.groups))
    return simt_direct_fprop(p, x, w, bias, y, preactivation, queue);
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather<T>(fprop_view(p), static_cast<const T*>(x), static_cast<const T*>(w),
              {static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(preactivation),
               p.activation},
              queue);
  });
}

void simt_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx, const Queue& queue) {
  if (p.N * p.C == 0) return;
  const int64_t row_phases = std::min(p.stride_h, p.H), column_phases = std::min(p.stride_w, p.W);
  const int64_t most = int64_t{SimtAxis::kPhases} * SimtAxis::kPhases * 16;
  if (!tiles_fit(p, p.C / p.groups) || row_phases > most / column_phases)
    return simt_direct_dgrad(p, dz, w, dx, queue);
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t a = 0; a < row_phases; a += SimtAxis::kPhases)
      for (int64_t b = 0; b < column_phases; b += SimtAxis::kPhases)
        gather<T>(dgrad_view(p, a, b), static_cast<const T*>(dz), static_cast<const T*>(w),
                  {nullptr, static_cast<T*>(dx), nullptr, Activation::kNone}, queue);
  });
}

}  // namespace torchconv::cuda
