// Grouped convolution on tensor cores for 16-bit types in NHWC, with as many filters as channels a
// group: 1, 2, 4 or a multiple of 8 up to 64. grouped_mma.cu prepares the problems.
//
// Channels come in units of 8, which are 16 bytes. Groups of 8 or more are whole units; narrower
// ones share one, with zeros for the weights between them. A reduction runs over halves, (tap,
// unit) pairs of 8 terms, two of which make one mma of 16: so groups of 8 waste nothing but the
// half that an odd number of taps leaves.
//
// A block has a slab of up to 8 units, 128 bytes of each pixel, and passes over tiles of outputs,
// images x rows x columns. It stages the next tile's pixels with their surroundings while it
// computes on one. All tiles of a problem look alike, so where a pixel comes from, where it is
// staged and where an output finds it stand in tables that a block makes once; a tile's products
// then take its outputs as a list, whose places are no matter. Of a stride, the columns of each
// residue lie together, so that what neighbouring outputs read are neighbours too.
//
// Bound: reading the image and writing the output once.
#pragma once

#include "cuda/activation.h"
#include "cuda/mma_gather.h"

namespace torchconv::cuda {

inline constexpr int kUnitBytes = 16, kUnitChannels = 8, kSlabUnits = 8;
// Of a staged pixel: the same unit of 8 neighbours meets all banks.
inline constexpr int kPixelBytes = kSlabUnits * kUnitBytes + 16;

// A tile of outputs.
struct PixelTile {
  int32_t images, rows, columns;
};

// Division by the columns and the rows of what a table lists.
struct PixelDivisors {
  Divisor columns, rows;
};

// All tiles of a batch of planes, in as many parts as there are blocks for a slab, of which the
// first `longer` have one more than the others.
struct TileParts {
  int32_t columns, rows;  // of tiles
  PixelDivisors by;
  int32_t parts, least, longer;
};

// What both directions and the weights' gradient have of the channels.
struct GroupedChannels {
  int32_t channels, group;                 // all, and of one group
  int32_t slabs, slab_units, group_units;  // units: at least 1 a group
  Divisor by_group_units;
};

// The pixels of the source that one image's outputs of a tile reach: those of the first tile from
// (first_h, first_w) on, those of the next step_h rows or step_w columns on. Columns lie in runs,
// one for each residue modulo scale_w, which is how far apart neighbouring outputs are.
struct Halo {
  int32_t first_h, first_w, step_h, step_w, h, w;
  int32_t run, pitch;  // columns of a run, and of a staged line
  int32_t scale_w;
  Divisor by_scale;
  PixelDivisors divisors;
};

// An axis of the outputs backward has phases, residues modulo the stride that have taps of their
// own; a block computes all of a tile. `from`: the pixel of the halo that the phase's first output
// finds at its first tap.
inline constexpr int kMostPhases = 16;
struct GatherPhase {
  int16_t first_tap, taps, from;
};
// How it moves from an output or a tap of a phase to the next.
struct GatherAxis {
  int32_t scale, output_step, tap_step, move;
  GatherPhase phase[kMostPhases];
};

// What a block of the gather has in shared memory: counts, and bytes from the beginning.
struct GatherShared {
  int32_t buffer_bytes, staged, listed, halves;
  int32_t out_at, staged_at, filters_at, stored_at, halves_at, listed_at, bytes;
};

// The forward pass, or with `backward` the gradient by the image: see mma_gather.h for the axes.
struct GroupedGather {
  const void* image;
  const void* filters;
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  bool backward;
  PixelTile tile;
  Halo halo;
  TileParts tiles;
  GatherShared shared;
  GatherAxis along_h, along_w;
  int32_t buffers;                // one where every part is one tile
  int32_t phases, pieces, piece;  // pieces of a phase, of as many outputs
  int32_t phase_halves;           // in the table, of each phase, four by four
  int32_t filter_bytes;           // in shared memory
  int32_t abreast, rounds;        // warps that share a tile's pieces, and pieces of each
  int16_t halves[kMostPhases];
  Divisor by_cells, by_warps, by_pieces, by_listed, by_phase_halves, by_phases_w;
  PixelDivisors by_phase;  // by the outputs of a phase in a tile, where they are most
};

template <typename T>
void run_grouped_gather(const GroupedGather& p, const Epilogue<T>& epilogue, const Queue& queue);
extern template void run_grouped_gather(const GroupedGather&, const Epilogue<Half>&, const Queue&);
extern template void run_grouped_gather(const GroupedGather&, const Epilogue<BFloat16>&,
                                        const Queue&);

// Both kernels of the pass.
struct GroupedWgrad {
  const void* dz;
  const void* x;
  float* sums;  // parts x slabs x jobs x a warp's sums
  void* dw;
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  PixelTile tile;
  PixelDivisors by_tile;
  Halo halo;
  TileParts tiles;
  int32_t buffers;
  int32_t jobs, chunks;  // jobs of a slab, a warp each; of them for each tile of filters
  int32_t block_jobs, job_blocks, slices;  // of a block: jobs x slices of a tile's pixels
  Divisor by_jobs, by_chunks, by_block_jobs, by_taps_w, by_group;
};

template <typename T>
void run_grouped_wgrad(GroupedWgrad p, const Queue& queue);
extern template void run_grouped_wgrad<Half>(GroupedWgrad, const Queue&);
extern template void run_grouped_wgrad<BFloat16>(GroupedWgrad, const Queue&);

}  // namespace torchconv::cuda
