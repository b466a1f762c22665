// How grouped_mma.h's problems are cut into tiles and blocks: by an estimate of the cycles that
// shared memory, tensor cores and the staging of surroundings take.
#include <algorithm>
#include <climits>

#include "core/range.h"
#include "cuda/grouped_mma_kernel.h"
#include "cuda/grouped_mma_plan.h"
#include "cuda/grouped_mma_wgrad_kernel.h"

namespace torchconv::cuda {
namespace {

// Shared memory that a block may have, in bytes; a multiprocessor has 1 KB more.
int shared_of_block(int capability) {
  if (capability == 80 || capability == 87) return 163 * 1024;
  return capability >= 90 && capability < 120 ? 227 * 1024 : 99 * 1024;
}

struct Reach {
  int64_t first, extent;
};
Reach reach_of(const MmaAxis& axis, bool backward, int outputs) {
  int64_t first = INT_MAX, last = INT_MIN;
  for (int phase = 0; phase < axis.phases; ++phase) {
    const AxisPhase a = phase_of(axis, backward, phase);
    if (a.taps == 0) continue;
    const int count = backward ? (outputs - 1 - phase) / axis.stride + 1 : outputs;
    const int64_t moved = int64_t{a.taps - 1} * a.move;
    first = std::min(first, a.base + std::min<int64_t>(moved, 0));
    last = std::max(last, a.base + int64_t{count - 1} * a.scale + std::max<int64_t>(moved, 0));
  }
  return first > last ? Reach{0, 1} : Reach{first, last - first + 1};
}

// Calls f(tile, halo) for the tiles worth a look, of which rows and columns are all or multiples of
// a step, larger ones until f returns that shared memory does not hold one.
template <typename F>
void for_each_tile(int batch, const MmaAxis& h, const MmaAxis& w, bool backward, F&& f) {
  constexpr int kMostPixels = 640, kMostStaged = 2048;
  const int step_h = backward ? h.stride : 1, step_w = backward ? w.stride : 1;
  int last_columns = 0;
  for (int cuts = 1; cuts <= std::min(w.outputs, 64); ++cuts) {
    const int columns =
        static_cast<int>(std::min<int64_t>(round_up(ceil_div(w.outputs, cuts), step_w), w.outputs));
    if (columns == last_columns || columns > kMostPixels) continue;
    if (cuts > 1 && columns < 8) break;
    last_columns = columns;
    const Reach across = reach_of(w, backward, columns);
    for (int rows = std::min(step_h, h.outputs);; rows = std::min(rows + step_h, h.outputs)) {
      const Reach down = reach_of(h, backward, rows);
      if (rows * columns > kMostPixels || down.extent * across.extent > kMostStaged ||
          std::max(down.extent, across.extent) >= kMostRows)
        break;
      const int scale = backward ? 1 : w.stride;
      const int width = static_cast<int>(across.extent), run = (width - 1) / scale + 1;
      const Halo halo{static_cast<int32_t>(down.first),
                      static_cast<int32_t>(across.first),
                      backward ? rows / h.stride : rows * h.stride,
                      backward ? columns / w.stride : columns * w.stride,
                      static_cast<int32_t>(down.extent),
                      width,
                      run,
                      width < scale ? width : (scale - 1) * run + width / scale,
                      scale,
                      {},
                      {}};
      const bool whole = rows == h.outputs && columns == w.outputs;
      bool fits = true;
      for (int images = 1; fits && (images == 1 || (whole && images <= batch)); ++images) {
        if (images * rows * columns > kMostPixels || images * halo.h * halo.pitch > kMostStaged)
          break;
        fits = f(PixelTile{images, rows, columns}, halo);
      }
      if (!fits || rows == h.outputs) break;
    }
  }
}

// Estimates of a block's work on one tile: instructions, passes through shared memory and mmas, of
// which the slowest counts. `warps` of all blocks share a multiprocessor.
struct Work {
  double instructions, passes, products;
  double cycles(int warps) const {
    return std::max({instructions / (0.9 + 0.075 * warps), passes, 1.6 * products});
  }
};
// Instructions to copy a pixel of 128 bytes, for a warp to go on to the next tile, to list a pixel.
constexpr double kCopy = 4.2, kNextTile = 120, kList = 12;
// Blocks side by side take turns, and hide each other's latencies and barriers.
double turn_of(int blocks, int warps, const Work& work) {
  constexpr double kLatency = 1200;
  const double cycles = work.cycles(blocks * warps);
  return std::max(blocks * cycles, cycles + kLatency);
}

// What is chosen of a tile.
template <typename Problem>
void set_tile(Problem& p, const PixelTile& tile, const Halo& halo) {
  p.tile = tile, p.halo = halo;
  p.tile_divisors = {Divisor(tile.columns), Divisor(tile.rows)};
  p.halo.by_scale = Divisor(halo.scale_w);
  p.halo.divisors = {Divisor(halo.w), Divisor(halo.h)};
}

}  // namespace

bool plan_grouped_gather(GroupedGather& p, const Queue& queue) {
  p.phases = p.h.phases * p.w.phases;
  if (p.h.phases > kMostPhases || p.phases > kMostPhases) return false;
  int64_t steps = 0, listed = 0;
  for (int phase = 0; phase < p.phases; ++phase) {
    const int64_t halves = int64_t{phase_of(p.h, p.backward, phase / p.w.phases).taps} *
                           phase_of(p.w, p.backward, phase % p.w.phases).taps * p.c.group_units;
    if (halves > 2048) return false;
    p.first_half[phase] = static_cast<int16_t>(listed);
    p.halves[phase] = static_cast<int16_t>(halves);
    steps += (halves + 1) / 2;
    listed += round_up(halves, 4);
  }
  if (listed > 4096) return false;
  p.first_half[p.phases] = static_cast<int16_t>(listed);

  p.by_cells = Divisor(int64_t{p.h.taps} * p.w.taps * p.c.group_units);
  const int tiles_at_once = outputs_at_once(p.c);
  const int registers_allow = tiles_at_once == 1 ? 3 : 2;
  const int most = shared_of_block(queue.capability);
  const int64_t multiprocessors = std::max(queue.multiprocessors, 1);
  const int abreast = std::max(kGatherWarps / (p.c.slab_units / tiles_at_once), 1);
  const int step_h = p.backward ? p.h.stride : 1, step_w = p.backward ? p.w.stride : 1;
  double best = 0;
  GroupedGather g = p;
  for_each_tile(p.batch, p.h, p.w, p.backward, [&](const PixelTile& tile, const Halo& halo) {
    g.tile = tile, g.halo = halo;
    bool fits = false;
    // Where a tile's outputs are few, half a piece still makes two mmas of what is loaded.
    for (g.piece = 64; g.piece >= (tiles_at_once == 4 ? 32 : 64); g.piece /= 2) {
      g.pieces = static_cast<int32_t>(ceil_div(
          tile.images * ceil_div(tile.rows, step_h) * ceil_div(tile.columns, step_w), g.piece));
      const GatherShared layout(g);
      const int pairs = g.piece / 16;
      const double rounds =
          static_cast<double>(kGatherWarps * ceil_div(int64_t{g.phases} * g.pieces, abreast));
      const double steps_of_piece = static_cast<double>(steps) / g.phases;
      const int copies = layout.staged + layout.listed;
      const Work work{
          rounds * (steps_of_piece * (pairs * (2 + tiles_at_once) + 4 + tiles_at_once) + 50 +
                    12 * pairs * tiles_at_once) +
              kCopy * copies + kGatherWarps * kNextTile,
          rounds * (steps_of_piece * (4 * pairs + 2 * tiles_at_once) + 2 * pairs * tiles_at_once) +
              copies,
          rounds * steps_of_piece * pairs * tiles_at_once};
      const int64_t tiles = PixelTiles(tile, p.batch, p.h.outputs, p.w.outputs).count();
      for (g.buffers = 1; g.buffers <= 2; ++g.buffers) {
        const int shared = layout.bytes(g.buffers);
        if (shared > most) break;
        fits = true;
        const int blocks = std::min(registers_allow, (most + 1024) / (shared + 1024));
        const int64_t parts = std::clamp<int64_t>(multiprocessors * blocks / p.c.slabs, 1, tiles);
        const int64_t turns = ceil_div(tiles, parts);
        if (g.buffers == 1 && turns > 1) continue;
        const double cost = static_cast<double>(turns) * turn_of(blocks, kGatherWarps, work) +
                            blocks * kList * copies / 2;
        if (best != 0 && cost >= best) continue;
        best = cost;
        set_tile(p, tile, halo);
        p.pieces = g.pieces, p.piece = g.piece;
        p.buffers = g.buffers;
        p.parts = static_cast<int32_t>(parts);
      }
    }
    return fits;
  });
  return best != 0 && int64_t{p.c.slabs} * p.parts < (int64_t{1} << 31);
}

bool plan_grouped_wgrad(GroupedWgrad& p, const Queue& queue) {
  return with_wgrad_shape(p.c, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t halves = int64_t{p.h.taps} * p.w.taps * p.c.group_units;
    p.chunks = static_cast<int32_t>(ceil_div(ceil_div(halves, 2), Shape::kPairs));
    p.jobs = p.c.slab_units / Shape::kTiles * p.chunks;
    p.block_jobs = std::min(p.jobs, Shape::kWarps);
    p.job_blocks = static_cast<int32_t>(ceil_div(p.jobs, p.block_jobs));
    p.slices = Shape::kWarps / p.block_jobs;
    const int64_t others = int64_t{p.c.slabs} * p.job_blocks;
    const int64_t sums = int64_t{p.c.slabs} * p.jobs * Shape::kVectors;
    if (sums >= (int64_t{1} << 29)) return false;

    const int most = shared_of_block(queue.capability), reduced = slice_bytes<Shape>(p);
    double best = 0;
    GroupedWgrad g = p;
    for_each_tile(p.batch, p.h, p.w, false, [&](const PixelTile& tile, const Halo& halo) {
      g.tile = tile, g.halo = halo;
      const WgradShared layout(g);
      const double rounds =
          static_cast<double>(ceil_div(layout.padded / 16, p.slices) * p.slices * p.block_jobs);
      const int copies = layout.staged_x + layout.staged_dz;
      const Work work{rounds * (Shape::kPairs * (2 + Shape::kTiles) + 11) + kCopy * copies +
                          Shape::kWarps * kNextTile,
                      rounds * (4 * Shape::kPairs + 4 * ((Shape::kTiles + 1) / 2)) + copies,
                      rounds * Shape::kPairs * Shape::kTiles};
      const int64_t tiles = PixelTiles(tile, p.batch, p.h.outputs, p.w.outputs).count();
      // As many parts as a large device has room for at once, and as chains of sums allow, by the
      // shape alone.
      const int64_t pixels = int64_t{tile.images} * tile.rows * tile.columns;
      const int64_t chains =
          ceil_div(tiles, std::max<int64_t>(kGroupedChainPixels * p.slices / pixels, 1));
      for (g.buffers = 1; g.buffers <= 2; ++g.buffers) {
        const int shared = layout.bytes(g.buffers, reduced);
        if (shared > most) return g.buffers > 1;
        const int blocks = std::min(Shape::kBlocks, (most + 1024) / (shared + 1024));
        const int64_t parts =
            std::clamp<int64_t>(std::max(132 * blocks / others, chains), 1, tiles);
        const int64_t turns = ceil_div(tiles, parts);
        if (g.buffers == 1 && turns > 1) continue;
        const double waves = static_cast<double>(ceil_div(others * parts, 132 * blocks));
        const double cost =
            waves * (static_cast<double>(turns) * turn_of(blocks, Shape::kWarps, work) +
                     blocks * kList * copies / 2);
        if (best != 0 && cost >= best) continue;
        best = cost;
        set_tile(p, tile, halo);
        p.buffers = g.buffers;
        p.parts = static_cast<int32_t>(parts);
      }
      return true;
    });
    return best != 0 && others * p.parts < (int64_t{1} << 31);
  });
}

}  // namespace torchconv::cuda
