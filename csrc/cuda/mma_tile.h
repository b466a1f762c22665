// What the tensor-core kernels share: the shape of a block's tile, how its operands lie in shared
// memory, and the product of two staged slices.
//
// A block computes sums[M][N] of a tile, warp by warp, from slices of the reduction that are 64
// bytes deep (32 half elements, 16 floats). An operand is staged in one of two forms:
//   rows:    one row of 64 bytes for each of its M or N lines, the reduction inside;
//   columns: one row of M or N elements for each step of the reduction.
// Both are made of chunks of 16 bytes whose places within a row are permuted by an exclusive or, so
// that the eight rows that one ldmatrix reads, or the lanes that read words, meet 32 banks.
#pragma once

#include "cuda/tensor_core.h"

namespace torchconv::cuda {

inline constexpr int kSliceBytes = 64;
template <typename T>
inline constexpr int kSlice = kSliceBytes / static_cast<int>(sizeof(T));

template <int M, int N, int WarpsM, int WarpsN, int BlocksPerMultiprocessor, int Stages = 4>
struct Tile {
  static constexpr int kM = M, kN = N;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kBlocks = BlocksPerMultiprocessor;  // what the registers must leave room for
  static constexpr int kWarpsN = WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kGroupsM = kWarpM / 16, kGroupsN = kWarpN / 16;
  static constexpr int kStages = Stages;
  static constexpr int kStageBytes = (M + N) * kSliceBytes;
};

// The byte of a staged operand in the form of rows.
__device__ __forceinline__ int place_in_rows(int row, int byte) {
  return row * kSliceBytes + (((byte >> 4) ^ ((row >> 1) & 3)) << 4) + (byte & 15);
}

// The byte of a staged operand in the form of columns, whose rows have `pitch` bytes.
__device__ __forceinline__ int place_in_columns(int row, int byte, int pitch) {
  const int permuted = (byte >> 4) ^ (((row & 3) << 1) | ((row >> 2) & 1));
  return row * pitch + (permuted << 4) + (byte & 15);
}

// Fragments of 16 lines, half a slice deep, for one warp: as A, words 0..3; as B two groups of 8
// columns, words 0..1 and 2..3. `Extent` lines are staged, of which the warp has `Groups` times 16
// from first_line, a multiple of 32.
template <typename T, bool Columns, int Extent, int Groups, bool IsA>
class Fragments {
 public:
  __device__ __forceinline__ Fragments(int lane, int first_line) {
    // The matrix of eight rows whose row this lane addresses: its lines and its depth.
    const int matrix = lane >> 3;
    const int upper = IsA ? matrix & 1 : matrix >> 1, deeper = IsA ? matrix >> 1 : matrix & 1;
    if constexpr (!Columns) {
      place_[0] = place_in_rows(first_line + (lane & 7) + 8 * upper, 16 * deeper);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int group = 0; group < Groups; ++group)
        place_[group] = place_in_columns((lane & 7) + 8 * deeper,
                                         2 * (first_line + 16 * group + 8 * upper), kPitch);
    } else {
      // The permutation has 32 lines in its hands: further ones are at a constant distance.
#pragma unroll
      for (int eight = 0; eight < 4; ++eight)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          place_[2 * eight + half] = place_in_columns(
              (lane & 3) + 4 * half, 4 * (first_line + 8 * eight + (lane >> 2)), kPitch);
    }
  }

  __device__ __forceinline__ void load(uint32_t (&word)[4], SharedAddress staged, int step,
                                       int group) const {
    if constexpr (!Columns) {
      // The second half of a slice is two chunks on, which the permutation leaves together.
      load_matrices(word, at(staged, (place_[0] ^ (32 * step)) + 16 * group * kSliceBytes));
    } else if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(word, at(staged, place_[group] + 16 * step * kPitch));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int upper = IsA ? i & 1 : i >> 1, deeper = IsA ? i >> 1 : i & 1;
        const int eight = 2 * group + upper, place = place_[2 * (eight & 3) + deeper];
        word[i] = load_shared(at(staged, place + 128 * (eight >> 2) + 8 * step * kPitch));
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = round_to_tf32(word[i]);
    }
  }

 private:
  static constexpr int kPitch = Extent * static_cast<int>(sizeof(T));
  static __device__ __forceinline__ SharedAddress at(SharedAddress staged, int place) {
    return staged + static_cast<SharedAddress>(place);
  }
  int place_[!Columns ? 1 : sizeof(T) == 2 ? Groups : 8];
};

// A warp's sums: groups of 16 rows by groups of 8 columns, as mma has them.
template <typename Tile>
struct Sums {
  float value[Tile::kGroupsM][2 * Tile::kGroupsN][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i)
#pragma unroll
      for (int j = 0; j < 2 * Tile::kGroupsN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) value[i][j][e] = 0.0f;
  }

  // f(row, column, two neighbouring sums) for all of the warp's, from its corner of the tile.
  template <typename F>
  __device__ __forceinline__ void for_each_pair(int lane, F&& f) const {
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int j = 0; j < 2 * Tile::kGroupsN; ++j)
          f(16 * i + 8 * upper + (lane >> 2), 8 * j + 2 * (lane & 3), value[i][j][2 * upper],
            value[i][j][2 * upper + 1]);
  }
};

// sums += a slice of A * a slice of B. Calls meanwhile() where the first fragments are on their
// way.
template <typename T, typename Tile, typename A, typename B, typename Meanwhile>
__device__ __forceinline__ void multiply_slice(Sums<Tile>& sums, const A& a, SharedAddress staged_a,
                                               const B& b, SharedAddress staged_b,
                                               Meanwhile&& meanwhile) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t fragments_a[Tile::kGroupsM][4], fragments_b[Tile::kGroupsN][4];
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i) a.load(fragments_a[i], staged_a, step, i);
#pragma unroll
    for (int j = 0; j < Tile::kGroupsN; ++j) b.load(fragments_b[j], staged_b, step, j);
    if (step == 0) meanwhile();
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kGroupsN; ++j) {
        mma<T>(sums.value[i][2 * j], fragments_a[i], fragments_b[j][0], fragments_b[j][1]);
        mma<T>(sums.value[i][2 * j + 1], fragments_a[i], fragments_b[j][2], fragments_b[j][3]);
      }
  }
}

// --- staging -------------------------------------------------------------------------------------

// A pixel's place in an image that taps move about in: the address of its first channel where the
// tap moves nothing, and its coordinates, which may lie outside.
struct alignas(16) Place {
  uint64_t address;
  int32_t h, w;
};
inline constexpr int32_t kNowhere = -(1 << 30);  // no tap moves this into an image

// Where an element is in global memory, and whether it is; otherwise it counts as zero.
struct Source {
  uint64_t address;
  bool valid;
};

// Of conditions that all threads evaluate, so that no branch keeps a load from starting.
__device__ __forceinline__ bool all_of(bool a, bool b, bool c = true) { return a & b & c; }

__device__ __forceinline__ bool within(int32_t i, int32_t size) {
  return static_cast<uint32_t>(i) < static_cast<uint32_t>(size);
}

// Elements that one thread stages at once: a chunk of 16 bytes where Vectors, otherwise a word.
template <typename T, bool Vectors>
struct Unit {
  static constexpr int kBytes = Vectors ? 16 : 4;
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  // Units that begin at any element: each of two half elements has an address of its own.
  static constexpr int kAddresses = !Vectors && sizeof(T) == 2 ? 2 : 1;
};

// Stages `Count` units; loads, where the hardware cannot copy, all before the first store:
// source(i, e) is that of element e of unit i, and to(i) its place.
template <typename T, bool Vectors, int Count, typename SourceOf, typename To>
__device__ __forceinline__ void stage_units(SourceOf&& source, To&& to) {
  using U = Unit<T, Vectors>;
  if constexpr (U::kAddresses == 1) {
    Source from[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) from[i] = source(i, 0);
#pragma unroll
    for (int i = 0; i < Count; ++i)
      copy_async<U::kBytes>(to(i), reinterpret_cast<const void*>(from[i].address), from[i].valid);
  } else {
    uint32_t word[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      word[i] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Source from = source(i, e);
        if (from.valid)
          word[i] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(from.address))} << (16 * e);
      }
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) store_shared(to(i), word[i]);
  }
}

// Runs `slices` slices through the stages: load(slice, stage) starts the copies of one (beyond the
// last too: of zeros, so that no branch keeps it apart from the products) and
// multiply(stage, meanwhile) consumes one and calls meanwhile() on the way.
template <int Stages, typename Load, typename Multiply>
__device__ __forceinline__ void run_pipeline(int slices, Load&& load, Multiply&& multiply) {
  for (int slice = 0; slice < Stages - 1; ++slice) {
    if (slice < slices) load(slice, slice);
    copy_async_commit();
  }
  for (int slice = 0; slice < slices; ++slice) {
    copy_async_wait<Stages - 2>();
    __syncthreads();
    multiply(slice % Stages, [&] {
      const int ahead = slice + Stages - 1;
      load(ahead, ahead % Stages);
      copy_async_commit();
    });
  }
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace torchconv::cuda
