// How grouped_mma.h's problems are cut into tiles and blocks: by an estimate of the cycles that
// shared memory and the staging of surroundings take.
#include <algorithm>

#include "core/range.h"
#include "cuda/grouped_mma_plan.h"
#include "cuda/grouped_mma_tile.h"

namespace torchconv::cuda {
namespace {

// An axis of the phase that has most of everything.
struct WidestPhase {
  int32_t taps, move, scale, outputs;
};
WidestPhase widest(const MmaAxis& axis, bool backward) {
  if (!backward) return {axis.taps, axis.dilation, axis.stride, axis.outputs};
  const int step = axis.stride / axis.common;
  return {static_cast<int32_t>(ceil_div(axis.taps, step)), axis.dilation / axis.common, 1,
          static_cast<int32_t>(ceil_div(axis.outputs, axis.phases))};
}

// Shared memory that a block may have, in bytes; a multiprocessor has 1 KB more.
int shared_of_block(int capability) {
  if (capability == 80 || capability == 87) return 163 * 1024;
  return capability >= 90 && capability < 120 ? 227 * 1024 : 99 * 1024;
}

// Calls f(tile) for the tiles worth a look, up to 64 octets.
template <typename F>
void for_each_tile(int batch, int rows, int columns, F&& f) {
  const int octets = static_cast<int>(ceil_div(columns, 8));
  for (int wide = 1; wide <= std::min(octets, 8); ++wide)
    for (int high = 1; high <= std::min(rows, 32) && high * wide <= 64; ++high)
      for (int images = 1; images * high * wide <= 64; images *= 2) {
        f(OctetTile{images, high, wide});
        if (high < rows || wide < octets || images >= batch) break;
      }
}

// Of the weights' gradient, where the order of sums follows the tile: what every device has.
constexpr int kWgradShared = 99 * 1024;
constexpr int64_t kMostShared = int64_t{1} << 20;  // far more than there is

}  // namespace

bool plan_grouped_gather(GroupedGather& p, const Queue& queue) {
  const WidestPhase h = widest(p.h, p.backward), w = widest(p.w, p.backward);
  const int64_t halves = int64_t{h.taps} * w.taps * p.c.group_units;
  if (halves * 256 > kMostShared) return false;
  const int tiles_at_once = outputs_at_once(p.c);
  const int registers_allow = tiles_at_once == 2 ? 2 : 3;
  const int most = shared_of_block(queue.capability);
  p.steps = static_cast<int32_t>(ceil_div(halves, 2));
  p.scale_w = Divisor(w.scale);

  const int64_t multiprocessors = std::max(queue.multiprocessors, 1);
  const int64_t others = int64_t{p.c.slabs} * p.h.phases * p.w.phases;
  double best = 0;
  int64_t best_parts = 0;
  GroupedGather g = p;
  for_each_tile(p.batch, h.outputs, w.outputs, [&](const OctetTile& tile) {
    const Halo halo = halo_of(tile, h, w);
    const int64_t pixels = int64_t{tile.images} * halo.h * halo.pitch + 1;
    if (int64_t{halo.h} * halo.pitch > kMostShared || pixels * kPixelBytes > kMostShared) return;
    g.tile = tile;
    g.buffer_bytes = static_cast<int32_t>(pixels * kPixelBytes);
    const int shared = grouped_gather_shared(g);
    if (shared > most) return;
    const int blocks = std::min(registers_allow, (most + 1024) / (shared + 1024));
    const int64_t pieces = ceil_div(int64_t{tile.images} * tile.rows * tile.octets, 8);
    const int abreast = std::max(kGatherWarps / (p.c.slab_units / tiles_at_once), 1);
    // Cycles of shared memory for an mma's operands and of an epilogue; of the copies; of barriers
    // and addresses.
    const int64_t products = ceil_div(pieces, abreast) * kGatherWarps *
                             (p.steps * (16 + 2 * tiles_at_once) + 40 + 16 * tiles_at_once);
    const int64_t tiles = OctetTiles(tile, p.batch, h.outputs, w.outputs).count();
    const int64_t parts = std::clamp<int64_t>(multiprocessors * blocks / others, 1, tiles);
    // Blocks side by side hide each other's latencies and barriers.
    const double cost = static_cast<double>(ceil_div(tiles, parts) * (blocks + 1)) *
                        static_cast<double>(products + 4 * pixels + 600);
    if (best_parts != 0 && cost >= best) return;
    best = cost, best_parts = parts;
    p.tile = tile, p.buffer_bytes = g.buffer_bytes;
  });
  p.parts = static_cast<int32_t>(best_parts);
  return best_parts != 0 && others * best_parts < (int64_t{1} << 31);
}

bool plan_grouped_wgrad(GroupedWgrad& p) {
  const StagedAxis h = staged(p.h), w = staged(p.w);
  const int64_t halves = int64_t{h.taps} * w.taps * p.c.group_units;
  const int tiles_at_once = outputs_at_once(p.c);
  p.chunks = static_cast<int32_t>(ceil_div(ceil_div(halves, 2), kWgradPairs));
  p.jobs = p.c.slab_units / tiles_at_once * p.chunks;
  p.scale_w = Divisor(w.scale);

  double best = 0;
  int64_t best_tiles = 0;
  GroupedWgrad g = p;
  for_each_tile(p.batch, p.h.outputs, p.w.outputs, [&](const OctetTile& tile) {
    const Halo halo = halo_of(tile, h, w);
    const int64_t pixels = int64_t{tile.images} * halo.h * halo.pitch;
    if (int64_t{halo.h} * halo.pitch > kMostShared || pixels * kPixelBytes > kMostShared) return;
    g.tile = tile;
    g.halo_bytes = static_cast<int32_t>(pixels * kPixelBytes);
    if (grouped_wgrad_shared(g) > kWgradShared) return;
    const int64_t pairs = ceil_div(int64_t{tile.images} * tile.rows * tile.octets, 2);
    const int64_t products =
        pairs * 8 * (4 * kWgradPairs + 4 * ((tiles_at_once + 1) / 2) + 2 * tiles_at_once);
    const int64_t tiles = OctetTiles(tile, p.batch, p.h.outputs, p.w.outputs).count();
    const double cost = static_cast<double>(tiles) *
                        static_cast<double>(products + 4 * (pixels + 16 * pairs) + 400);
    if (best_tiles != 0 && cost >= best) return;
    best = cost, best_tiles = tiles;
    p.tile = tile, p.halo_bytes = g.halo_bytes;
  });
  if (best_tiles == 0) return false;
  // As many blocks as a large device has room for at once, by the shape alone.
  const int64_t others = int64_t{p.c.slabs} * ceil_div(p.jobs, 8);
  const int64_t slots = tiles_at_once == 4 ? 132 : 264;
  p.parts = static_cast<int32_t>(std::clamp<int64_t>(slots / others, 1, best_tiles));
  const int64_t sums = int64_t{p.c.slabs} * p.jobs * tiles_at_once * (kWgradPairs * 128);
  return sums < (int64_t{1} << 30) && others * p.parts < (int64_t{1} << 31);
}

}  // namespace torchconv::cuda
