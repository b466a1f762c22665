// How grouped_mma.h's problems are cut into tiles and blocks: by an estimate of the cycles that
// shared memory, tensor cores and the staging of surroundings take.
#include <algorithm>
#include <climits>

#include "core/range.h"
#include "cuda/grouped_mma_kernel.h"
#include "cuda/grouped_mma_plan.h"
#include "cuda/grouped_mma_wgrad_kernel.h"
#include "cuda/mma_gather_kernel.h"
#include "cuda/shared_memory.h"

namespace torchconv::cuda {

namespace {

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
  constexpr int kMostStaged = 2048;
  const int step_h = backward ? h.stride : 1, step_w = backward ? w.stride : 1;
  int last_columns = 0;
  for (int cuts = 1; cuts <= std::min(w.outputs, 64); ++cuts) {
    const int columns =
        static_cast<int>(std::min<int64_t>(round_up(ceil_div(w.outputs, cuts), step_w), w.outputs));
    const int most_pixels = cuts > 1 ? 256 : 640;
    if (columns == last_columns || columns > most_pixels) continue;
    if (cuts > 1 && columns < 8) break;
    last_columns = columns;
    const Reach across = reach_of(w, backward, columns);
    for (int rows = std::min(step_h, h.outputs);; rows = std::min(rows + step_h, h.outputs)) {
      const Reach down = reach_of(h, backward, rows);
      if (rows * columns > most_pixels || down.extent * across.extent > kMostStaged ||
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
        if (images * rows * columns > most_pixels || images * halo.h * halo.pitch > kMostStaged)
          break;
        fits = f(PixelTile{images, rows, columns}, halo);
      }
      if (!fits || rows == h.outputs) break;
    }
  }
}

// Estimates of a block's work on one tile: instructions, passes through shared memory and mmas.
// Where several blocks share a multiprocessor, the slowest counts; one has them after each other in
// part. `warps` are those of all blocks.
struct Work {
  double instructions, passes, products;
  double cycles(int blocks, int warps) const {
    const double issue = instructions / (0.9 + 0.075 * warps), multiply = 1.6 * products;
    const double slowest = std::max({issue, passes, multiply});
    return blocks > 1 ? slowest : (slowest + issue + passes + multiply) / 2;
  }
};
// Instructions to copy a pixel of 128 bytes, for a warp to go on to the next tile, to list a pixel.
constexpr double kCopy = 4.2, kNextTile = 120, kList = 12;
// Blocks side by side take turns, and hide each other's latencies and barriers.
double turn_of(int blocks, int warps, const Work& work) {
  constexpr double kLatency = 1200;
  const double cycles = work.cycles(blocks, blocks * warps);
  return std::max(blocks * cycles, cycles + kLatency);
}

int64_t tiles_of(const PixelTile& tile, int batch, const MmaAxis& h, const MmaAxis& w) {
  return ceil_div(batch, tile.images) * ceil_div(h.outputs, tile.rows) *
         ceil_div(w.outputs, tile.columns);
}

// What is chosen of a tile. Block indices must fit.
template <typename Problem>
bool set_tile(Problem& p, const PixelTile& tile, const Halo& halo, int64_t parts) {
  constexpr int64_t kMostBlocks = 65535;
  p.tile = tile, p.halo = halo;
  p.halo.by_scale = Divisor(halo.scale_w);
  p.halo.divisors = {Divisor(halo.w), Divisor(halo.h)};
  const int64_t tiles = tiles_of(tile, p.batch, p.h, p.w);
  p.tiles.columns = static_cast<int32_t>(ceil_div(p.w.outputs, tile.columns));
  p.tiles.rows = static_cast<int32_t>(ceil_div(p.h.outputs, tile.rows));
  p.tiles.by = {Divisor(p.tiles.columns), Divisor(p.tiles.rows)};
  p.tiles.parts = static_cast<int32_t>(parts);
  p.tiles.least = static_cast<int32_t>(tiles / parts);
  p.tiles.longer = static_cast<int32_t>(tiles % parts);
  return parts <= kMostBlocks;
}

// Phases of an axis, as the kernel has them; the most taps of one.
int64_t set_phases(GatherAxis& to, const MmaAxis& axis, bool backward) {
  int64_t most = 0;
  for (int phase = 0; phase < axis.phases; ++phase) {
    const AxisPhase a = phase_of(axis, backward, phase);
    to.scale = a.scale, to.output_step = a.output_step, to.tap_step = a.tap_step;
    to.move = a.move;
    to.phase[phase] = {static_cast<int16_t>(a.first_tap), static_cast<int16_t>(a.taps), 0};
    most = std::max<int64_t>(most, a.taps);
  }
  return most;
}
void set_from(GatherAxis& to, const MmaAxis& axis, bool backward, int first) {
  for (int phase = 0; phase < axis.phases; ++phase)
    if (to.phase[phase].taps > 0)
      to.phase[phase].from = static_cast<int16_t>(phase_of(axis, backward, phase).base - first);
}

GatherShared shared_of(const GroupedGather& p, int buffers) {
  GatherShared s{};
  s.buffer_bytes = p.tile.images * p.halo.h * p.halo.pitch * kPixelBytes;
  s.staged = p.tile.images * p.halo.h * p.halo.w;
  s.listed = p.phases * p.pieces * p.piece;
  s.halves = p.phases * p.phase_halves;
  const auto after = [](int at, int count, size_t size) {
    return at + count * static_cast<int>(size);
  };
  s.out_at = buffers * s.buffer_bytes;
  s.staged_at = after(s.out_at, s.listed, kPixelBytes);
  s.filters_at = after(s.staged_at, s.staged, sizeof(StagedPixel));
  s.stored_at = after(s.filters_at, p.c.slab_units * kUnitChannels, p.filter_bytes);
  s.halves_at = after(s.stored_at, s.listed, sizeof(StoredPixel));
  s.listed_at = after(s.halves_at, s.halves, sizeof(StagedHalf));
  s.bytes = after(s.listed_at, s.listed, sizeof(uint32_t));
  return s;
}

// Steps of the warp that has most: those of a block wait for each other.
int most_steps(const GroupedGather& p, int abreast, int rounds) {
  if (p.phases == 1) return rounds * ((p.halves[0] + 1) / 2);
  int most = 0;
  for (int warp = 0; warp < abreast; ++warp) {
    int steps = 0;
    for (int round = 0; round < rounds; ++round) {
      const int piece = piece_of(round, warp, abreast);
      if (piece < p.phases * p.pieces) steps += (p.halves[piece / p.pieces] + 1) / 2;
    }
    most = std::max(most, steps);
  }
  return most;
}

}  // namespace

bool plan_grouped_gather(GroupedGather& p, const Queue& queue) {
  p.phases = p.h.phases * p.w.phases;
  if (p.h.phases > kMostPhases || p.phases > kMostPhases) return false;
  if (std::max(p.h.taps, p.w.taps) > 1024) return false;
  const int64_t most_halves = set_phases(p.along_h, p.h, p.backward) *
                              set_phases(p.along_w, p.w, p.backward) * p.c.group_units;
  const int64_t cells = int64_t{p.h.taps} * p.w.taps * p.c.group_units;
  if (most_halves > 1024 || cells > 1024) return false;
  for (int phase = 0; phase < p.phases; ++phase)
    p.halves[phase] =
        static_cast<int16_t>(p.along_h.phase[phase / p.w.phases].taps *
                             p.along_w.phase[phase % p.w.phases].taps * p.c.group_units);
  p.phase_halves = std::max(static_cast<int32_t>(round_up(most_halves, 4)), 4);
  // An odd number of units: eight filters meet all banks.
  p.filter_bytes = static_cast<int32_t>(cells | 1) * kUnitBytes;

  const int tiles_at_once = outputs_at_once(p.c);
  const int registers_allow = tiles_at_once == 1 ? 3 : 2;
  const int most = shared_of_block(queue.capability);
  const int64_t multiprocessors = std::max(queue.multiprocessors, 1);
  const int abreast = std::max(kGatherWarps / (p.c.slab_units / tiles_at_once), 1);
  const int step_h = p.backward ? p.h.stride : 1, step_w = p.backward ? p.w.stride : 1;
  double best = 0;
  PixelTile chosen{};
  Halo halo_of_chosen{};
  int64_t chosen_parts = 0;
  GroupedGather g = p;
  for_each_tile(p.batch, p.h, p.w, p.backward, [&](const PixelTile& tile, const Halo& halo) {
    g.tile = tile, g.halo = halo;
    bool fits = false;
    // Where a tile's outputs are few, half a piece still makes two mmas of what is loaded.
    for (g.piece = 64; g.piece >= (tiles_at_once == 4 ? 32 : 64); g.piece /= 2) {
      g.pieces = static_cast<int32_t>(ceil_div(
          tile.images * ceil_div(tile.rows, step_h) * ceil_div(tile.columns, step_w), g.piece));
      const GatherShared layout = shared_of(g, 0);
      const int pairs = g.piece / 16;
      const int rounds = static_cast<int>(ceil_div(int64_t{g.phases} * g.pieces, abreast));
      const double all_rounds = kGatherWarps * rounds;
      const double all_steps = kGatherWarps * most_steps(g, abreast, rounds);
      const int copies = layout.staged + layout.listed;
      const Work work{all_steps * (pairs * (2 + tiles_at_once) + 4 + tiles_at_once) +
                          all_rounds * (50 + 12 * pairs * tiles_at_once) + kCopy * copies +
                          kGatherWarps * kNextTile,
                      all_steps * (4 * pairs + 2 * tiles_at_once) +
                          all_rounds * 2 * pairs * tiles_at_once + copies,
                      all_steps * pairs * tiles_at_once};
      const int64_t tiles = tiles_of(tile, p.batch, p.h, p.w);
      for (g.buffers = 1; g.buffers <= 2; ++g.buffers) {
        const int shared = layout.bytes + g.buffers * layout.buffer_bytes;
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
        chosen = tile, halo_of_chosen = halo, chosen_parts = parts;
        p.pieces = g.pieces, p.piece = g.piece, p.buffers = g.buffers;
      }
    }
    return fits;
  });
  if (best == 0 || !set_tile(p, chosen, halo_of_chosen, chosen_parts)) return false;
  set_from(p.along_h, p.h, p.backward, p.halo.first_h);
  set_from(p.along_w, p.w, p.backward, p.halo.first_w);
  p.shared = shared_of(p, p.buffers);
  p.abreast = abreast;
  p.rounds = static_cast<int32_t>(ceil_div(int64_t{p.phases} * p.pieces, abreast));
  p.by_cells = Divisor(cells);
  p.by_warps = Divisor(p.c.slab_units / tiles_at_once);
  p.by_pieces = Divisor(p.pieces);
  p.by_listed = Divisor(p.pieces * p.piece);
  p.by_phase_halves = Divisor(p.phase_halves);
  p.by_phases_w = Divisor(p.w.phases);
  p.by_phase = {Divisor(ceil_div(p.tile.columns, step_w)), Divisor(ceil_div(p.tile.rows, step_h))};
  return true;
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
    PixelTile chosen{1, 1, 1};
    Halo halo_of_chosen{};
    int64_t chosen_parts = 0;
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
      const int64_t tiles = tiles_of(tile, p.batch, p.h, p.w);
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
        chosen = tile, halo_of_chosen = halo, chosen_parts = parts;
        p.buffers = g.buffers;
      }
      return true;
    });
    p.by_tile = {Divisor(chosen.columns), Divisor(chosen.rows)};
    p.by_jobs = Divisor(p.jobs);
    p.by_chunks = Divisor(p.chunks);
    p.by_block_jobs = Divisor(p.block_jobs);
    p.by_taps_w = Divisor(p.w.taps);
    p.by_group = Divisor(p.c.group);
    return best != 0 && p.job_blocks < 65536 && set_tile(p, chosen, halo_of_chosen, chosen_parts);
  });
}

}  // namespace torchconv::cuda
