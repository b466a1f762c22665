// The transposition of matrices in tiles, for the files that instantiate it: a block moves a tile
// through shared memory, so that its reads run along the source and its writes along the target, 16
// bytes a thread where the sizes and addresses allow. Half types are paired on the way, so that
// shared memory is met by whole words. Bound by memory.
#pragma once

#include "core/range.h"
#include "cuda/early_launch.h"
#include "cuda/element.h"

namespace torchconv::cuda {

inline constexpr int kTransposeThreads = 256;

// As bits: a copy is the same for every type of a size.
template <int Bytes>
using Bits =
    std::conditional_t<Bytes == 8, uint64_t, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>;

struct Transpose {
  int64_t A, B;
  unsigned a_tiles, b_tiles;
};

// Where target[n, b, 0] is in a target of dense rows in turn.
struct RowsInTurn {
  int64_t A, B;
  __device__ __forceinline__ int64_t operator()(int64_t n, int64_t b) const {
    return (n * B + b) * A;
  }
};

// Elements of a word that lie side by side along A, and a tile's words along A.
template <typename T>
inline constexpr int kPair = sizeof(T) == 2 ? 2 : 1;
template <typename T>
using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <typename T>
inline constexpr int kSide = sizeof(T) == 8 ? 32 : 64;  // of a tile, in elements

// Read: source rows a, Lanes elements along B a thread; of half types two rows, whose elements make
// words. Written: target rows b, the words along A, at rows(n, b), which the tile's first threads
// find, one each.
template <typename T, bool kWideReads, bool kWideWrites, typename Rows>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_tiles(const __grid_constant__ Transpose p, const __grid_constant__ Rows rows,
                    const T* source, T* target) {
  constexpr int kEnd = kSide<T>, kRows = kEnd / kPair<T>;
  constexpr int kRead = kWideReads ? kLanes<T> : 1;
  constexpr int kWrite = kWideWrites ? kLanes<T> : kPair<T>;
  // One word more, so that a column meets all banks.
  __shared__ Word<T> tile[kRows][kEnd + 1];
  __shared__ int64_t row_of[kEnd];
  begin_early();
  unsigned rest = blockIdx.x;
  const int64_t b0 = int64_t{rest % p.b_tiles} * kEnd;
  rest /= p.b_tiles;
  const int64_t a0 = int64_t{rest % p.a_tiles} * kEnd, n = rest / p.a_tiles;
  const T* from = source + n * p.A * p.B;
  if (threadIdx.x < kEnd && b0 + threadIdx.x < p.B) row_of[threadIdx.x] = rows(n, b0 + threadIdx.x);
#pragma unroll 4
  for (int unit = threadIdx.x; unit < kRows * (kEnd / kRead); unit += kTransposeThreads) {
    const int row = unit / (kEnd / kRead), column = unit % (kEnd / kRead) * kRead;
    const int64_t a = a0 + row * kPair<T>, b = b0 + column;
    if (a >= p.A || b >= p.B) continue;
    using Elements = Vector<T, kRead>;
    const Elements first = *reinterpret_cast<const Elements*>(from + a * p.B + b);
    if constexpr (kPair<T> == 2) {
      Elements second{};
      if (a + 1 < p.A) second = *reinterpret_cast<const Elements*>(from + (a + 1) * p.B + b);
#pragma unroll
      for (int i = 0; i < kRead; ++i)
        tile[row][column + i] = first.element[i] | static_cast<uint32_t>(second.element[i]) << 16;
    } else {
#pragma unroll
      for (int i = 0; i < kRead; ++i) tile[row][column + i] = first.element[i];
    }
  }
  __syncthreads();
  constexpr int kWords = kWrite / kPair<T>;  // of a thread
#pragma unroll 4
  for (int unit = threadIdx.x; unit < kEnd * (kRows / kWords); unit += kTransposeThreads) {
    const int column = unit / (kRows / kWords), row = unit % (kRows / kWords) * kWords;
    const int64_t a = a0 + row * kPair<T>, b = b0 + column;
    if (a >= p.A || b >= p.B) continue;
    Vector<Word<T>, kWords> words;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words.element[i] = tile[row + i][column];
    T* place = target + row_of[column] + a;
    if constexpr (kWideWrites) {
      *reinterpret_cast<Vector<Word<T>, kWords>*>(place) = words;
    } else if constexpr (kPair<T> == 2) {
      place[0] = static_cast<T>(words.element[0]);
      if (a + 1 < p.A) place[1] = static_cast<T>(words.element[0] >> 16);
    } else {
      place[0] = words.element[0];
    }
  }
}

// target's row rows(n, b) = source[n, :, b], for N matrices of A x B elements.
template <typename T, bool kWideReads, bool kWideWrites, typename Rows>
void launch_transpose(const T* source, T* target, int64_t N, int64_t A, int64_t B, const Rows& rows,
                      const Queue& queue) {
  const Transpose p{A, B, static_cast<unsigned>(ceil_div(A, kSide<T>)),
                    static_cast<unsigned>(ceil_div(B, kSide<T>))};
  launch_early(transpose_tiles<T, kWideReads, kWideWrites, Rows>,
               dim3(static_cast<unsigned>(N * p.a_tiles * p.b_tiles)), dim3(kTransposeThreads), 0,
               queue, p, rows, source, target);
}

}  // namespace torchconv::cuda
