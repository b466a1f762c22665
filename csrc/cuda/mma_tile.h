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

template <int M, int N, int WarpsM, int WarpsN, int BlocksPerMultiprocessor>
struct Tile {
  static constexpr int kM = M, kN = N;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kBlocks = BlocksPerMultiprocessor;  // what the registers must leave room for
  static constexpr int kWarpsN = WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kGroupsM = kWarpM / 16, kGroupsN = kWarpN / 16;
  static constexpr int kStages = 4;
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
// columns, words 0..1 and 2..3. `Extent` lines are staged.
template <typename T, bool Columns, int Extent, bool IsA>
class Fragments {
 public:
  __device__ __forceinline__ Fragments(int lane, int first_line) : first_line_(first_line) {
    // The matrix of eight rows whose row this lane addresses: its lines and its depth.
    const int matrix = lane >> 3;
    const int upper = IsA ? matrix & 1 : matrix >> 1, deeper = IsA ? matrix >> 1 : matrix & 1;
    if constexpr (!Columns)
      line_ = (lane & 7) + 8 * upper, depth_ = deeper;
    else if constexpr (sizeof(T) == 2)
      line_ = upper, depth_ = (lane & 7) + 8 * deeper;
    else
      line_ = lane >> 2, depth_ = lane & 3;
  }

  __device__ __forceinline__ void load(uint32_t (&word)[4], SharedAddress staged, int step,
                                       int group) const {
    if constexpr (!Columns) {
      const int row = first_line_ + 16 * group + line_;
      load_matrices(word, staged + place_in_rows(row, 32 * step + 16 * depth_));
    } else if constexpr (sizeof(T) == 2) {
      const int chunk = first_line_ / 8 + 2 * group + line_;
      load_matrices_transposed(word,
                               staged + place_in_columns(16 * step + depth_, 16 * chunk, kPitch));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int upper = IsA ? i & 1 : i >> 1, deeper = IsA ? i >> 1 : i & 1;
        const int line = first_line_ + 16 * group + 8 * upper + line_;
        word[i] = load_shared(staged +
                              place_in_columns(8 * step + 4 * deeper + depth_, 4 * line, kPitch));
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = round_to_tf32(word[i]);
    }
  }

 private:
  static constexpr int kPitch = Extent * static_cast<int>(sizeof(T));
  int first_line_, line_, depth_;
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

// sums += a slice of A * a slice of B.
template <typename T, typename Tile, typename A, typename B>
__device__ __forceinline__ void multiply_slice(Sums<Tile>& sums, const A& a, SharedAddress staged_a,
                                               const B& b, SharedAddress staged_b) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t fragments_a[Tile::kGroupsM][4], fragments_b[Tile::kGroupsN][4];
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i) a.load(fragments_a[i], staged_a, step, i);
#pragma unroll
    for (int j = 0; j < Tile::kGroupsN; ++j) b.load(fragments_b[j], staged_b, step, j);
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

// A pixel's place in an image that taps move about in: its element's offset where the tap moves
// nothing, and its coordinates, which may lie outside.
struct alignas(16) Place {
  int64_t offset;
  int32_t h, w;
};
inline constexpr int32_t kNowhere = -(1 << 30);  // no tap moves this into an image

// Elements that one thread stages at once: a chunk of 16 bytes where Vectors, otherwise a word.
template <typename T, bool Vectors>
struct Unit {
  static constexpr int kBytes = Vectors ? 16 : 4;
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  // Units that begin at any element: each of two half elements has an address of its own.
  static constexpr int kAddresses = !Vectors && sizeof(T) == 2 ? 2 : 1;
};

// Stages `Count` units, all loads before the first store where the hardware cannot copy:
// address(i, e) is that of element e of unit i, or null for a zero, and to(i) its place.
template <typename T, bool Vectors, int Count, typename Address, typename To>
__device__ __forceinline__ void stage_units(const T* any, Address&& address, To&& to) {
  using U = Unit<T, Vectors>;
  if constexpr (U::kAddresses == 1) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const T* from = address(i, 0);
      copy_async<U::kBytes>(to(i), from == nullptr ? any : from, from != nullptr);
    }
  } else {
    uint32_t word[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      word[i] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto* from = reinterpret_cast<const uint16_t*>(address(i, e));
        if (from != nullptr) word[i] |= static_cast<uint32_t>(__ldg(from)) << (16 * e);
      }
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) store_shared(to(i), word[i]);
  }
}

// Runs `slices` slices through the stages: load(slice, stage) starts the copies of one, and
// multiply(slice, stage) consumes it.
template <int Stages, typename Load, typename Multiply>
__device__ __forceinline__ void run_pipeline(int slices, Load&& load, Multiply&& multiply) {
  for (int slice = 0; slice < Stages - 1; ++slice) {
    if (slice < slices) load(slice, slice);
    copy_async_commit();
  }
  for (int slice = 0; slice < slices; ++slice) {
    copy_async_wait<Stages - 2>();
    __syncthreads();
    const int ahead = slice + Stages - 1;
    if (ahead < slices) load(ahead, ahead % Stages);
    copy_async_commit();
    multiply(slice, slice % Stages);
  }
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace torchconv::cuda
