// The register tile of the exact product on CUDA cores, which simt_gather_kernel.h and
// simt_wgrad.cu share: a block multiplies a panel of M rows by a panel of N columns that stand in
// shared memory, eight terms at a time, while the next eight are on their way to registers.
//
// A warp is 4 x 8 threads; a thread owns kRows x kColumns sums, in quads of four neighbours, so
// that what it reads of a panel is 16 bytes and a warp's reads meet no bank twice. The layout is
// that of CUTLASS's SIMT kernels (Kerr and others, CUTLASS: Fast Linear Algebra in CUDA C++, 2017).
//
// A sum is taken in chunks of kChunk terms, and the chunks' sums are added: rounding grows with the
// root of the number of terms, which is kept small on both levels (Higham, Accuracy and Stability
// of Numerical Algorithms, 2002, section 4.2). Which thread or block forms a chunk changes no bit.
#pragma once

#include "cuda/element.h"

namespace torchconv::cuda {

// What is known of one term or one column, of which both together name an element of the image:
// its address in bytes, and its place, which must be inside.
struct alignas(8) ImagePoint {
  int h, w;
};
struct alignas(16) Reach {
  int64_t bytes;
  ImagePoint at;
};

// A place from which no sum with another's lies in an image.
inline constexpr int kNowhere = -(1 << 30);

// Those that a block adds up, and the one at which it is, which begins as first - 1. In shared
// memory: a thread of the large tile has no register for them.
struct SimtChunks {
  int first, last, current;
};

template <typename W, int M, int N, int ThreadM, int ThreadN, int Blocks>
struct SimtTile {
  static constexpr int kM = M, kN = N, kTerms = 8, kChunk = 256;
  static constexpr int kThreadM = ThreadM, kThreadN = ThreadN;
  static constexpr int kThreads = (M / ThreadM) * (N / ThreadN);
  static constexpr int kBlocks = Blocks;  // that a multiprocessor is meant to hold
  static constexpr int kSlots = ThreadM * ThreadN / 4;
  using Wide = W;
  using Quad = Vector<W, 4>;

  // Rows are four elements longer, so that a column of eight terms meets eight banks.
  struct Shared {
    Reach reach[kChunk];
    ImagePoint column[N];
    W a[2][kTerms][M + 4];
    W b[2][kTerms][N + 4];
    Quad sums[kSlots][kThreads];
  };

  // The position in the tile of a thread's first quads, and of its i-th row or column.
  static __device__ __forceinline__ int first_m() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return (warp / (N / ThreadN / 8) * 4 + lane / 8) * 4;
  }
  static __device__ __forceinline__ int first_n() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return (warp % (N / ThreadN / 8) * 8 + lane % 8) * 4;
  }
  static __device__ __forceinline__ int quad_m(int quad) {
    return first_m() + quad * (M / (ThreadM / 4));
  }
  static __device__ __forceinline__ int quad_n(int quad) {
    return first_n() + quad * (N / (ThreadN / 4));
  }

  struct Sums {
    W at[ThreadM][ThreadN];

    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < ThreadM; ++i)
#pragma unroll
        for (int j = 0; j < ThreadN; ++j) at[i][j] = W{0};
    }

    // Eight terms more. Row after row there and back, so that an FMA reads one factor that the one
    // before it has read: registers have no bandwidth for three.
    __device__ __forceinline__ void multiply(const Shared& shared, int buffer) {
      const int m = first_m(), n = first_n();
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        Quad a[ThreadM / 4], b[ThreadN / 4];
#pragma unroll
        for (int i = 0; i < ThreadM / 4; ++i)
          a[i] =
              *reinterpret_cast<const Quad*>(&shared.a[buffer][term][m + i * (M / (ThreadM / 4))]);
#pragma unroll
        for (int j = 0; j < ThreadN / 4; ++j)
          b[j] =
              *reinterpret_cast<const Quad*>(&shared.b[buffer][term][n + j * (N / (ThreadN / 4))]);
#pragma unroll
        for (int i = 0; i < ThreadM; ++i)
#pragma unroll
          for (int step = 0; step < ThreadN; ++step) {
            const int j = i % 2 != 0 ? ThreadN - 1 - step : step;
            at[i][j] = fma(a[i / 4].element[i % 4], b[j / 4].element[j % 4], at[i][j]);
          }
      }
    }

    // Slot s holds four neighbours along N of one row, or with along_m along M of one column.
    template <typename F>
    __device__ __forceinline__ void each_slot(bool along_m, F&& f) {
      if (along_m) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int i = s / ThreadN * 4, j = s % ThreadN;
          f(s, at[i][j], at[i + 1][j], at[i + 2][j], at[i + 3][j]);
        }
      } else {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int i = s / (ThreadN / 4), j = s % (ThreadN / 4) * 4;
          f(s, at[i][j], at[i][j + 1], at[i][j + 2], at[i][j + 3]);
        }
      }
    }

    // To slots[s * kThreads], for every slot s.
    __device__ __forceinline__ void write(Quad* slots, bool along_m) {
      each_slot(along_m, [&](int s, W x, W y, W z, W w) { slots[s * kThreads] = {{x, y, z, w}}; });
    }
    // The same along N to this thread's own memory. Pairs are turned: then ptxas keeps sums of even
    // columns in odd registers, and the other way round, and an FMA, whose factor of that column
    // came in a quad, reads both at once: a multiprocessor's registers have two banks.
    __device__ __forceinline__ void save(Quad* own) {
      each_slot(false, [&](int s, W x, W y, W z, W w) { own[s * kThreads] = {{y, x, w, z}}; });
    }
    __device__ __forceinline__ void add_saved(const Quad* own) {
      each_slot(false, [&](int s, W& x, W& y, W& z, W& w) {
        const Quad q = own[s * kThreads];
        x += q.element[1], y += q.element[0], z += q.element[3], w += q.element[2];
      });
    }
  };

  // Slot s of saved sums.
  static __device__ __forceinline__ Quad saved(const Quad* own, int s, bool along_m) {
    if (!along_m) {
      const Quad q = own[s * kThreads];
      return {{q.element[1], q.element[0], q.element[3], q.element[2]}};
    }
    const int column = s % ThreadN;
    const Quad* first = own + (s / ThreadN * ThreadN + column / 4) * kThreads;
    Quad q;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q.element[i] = first[i * (ThreadN / 4) * kThreads].element[column % 4 ^ 1];
    return q;
  }

  // The tile's element that slot s of this thread begins with.
  static __device__ __forceinline__ int slot_m(int s, bool along_m) {
    return along_m ? quad_m(s / ThreadN) : quad_m(s / (ThreadN / 4) / 4) + s / (ThreadN / 4) % 4;
  }
  static __device__ __forceinline__ int slot_n(int s, bool along_m) {
    return along_m ? quad_n(s % ThreadN / 4) + s % ThreadN % 4 : quad_n(s % (ThreadN / 4));
  }

  // Sums of chunks.first, ..., chunks.last - 1. begin(chunk) fills the table shared.reach and
  // returns the chunk's number of terms; load(s) fetches step s of it to registers, and
  // store(buffer) writes those to the panels. A chunk's sums are added to those before it, or with
  // kApart they are what `sums` holds when keep(chunk) is called, and shared.sums is not there.
  template <bool kApart, typename Loader, typename Keep>
  static __device__ __forceinline__ void run(Shared& shared, Loader& loader, SimtChunks& chunks,
                                             Sums& sums, Keep&& keep) {
    sums.clear();
    while (chunks.current + 1 < chunks.last) {
      const int next = chunks.current + 1;
      const int steps = (loader.begin(shared, next) + kTerms - 1) / kTerms;
      __syncthreads();
      if (threadIdx.x == 0) chunks.current = next;
      loader.load(shared, 0);
      loader.store(shared, 0);
      __syncthreads();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) loader.load(shared, step + 1);
        sums.multiply(shared, step % 2);
        if (step + 1 < steps) loader.store(shared, (step + 1) % 2);
        __syncthreads();
      }
      if constexpr (kApart) {
        keep(chunks.current);
        sums.clear();
      } else {
        if (chunks.current > chunks.first) sums.add_saved(&shared.sums[0][threadIdx.x]);
        if (chunks.current + 1 < chunks.last) {
          sums.save(&shared.sums[0][threadIdx.x]);
          sums.clear();
        }
      }
    }
  }
};

// Whether a block may have a tile of 128 x 128 or 64 x 160, whose shared memory takes 87 and 66 KB:
// Turing has 64.
inline bool large_tiles_fit(const Queue& queue) { return queue.capability != 75; }

// Terms in the order (block of channels, tap, channel in the block): what a term index names.
struct TermOrder {
  uint32_t channels, taps, columns;  // of a block; in all; in a row of the kernel

  __device__ __forceinline__ void split(uint32_t term, int& c, int& row, int& column) const {
    const uint32_t together = channels * taps, block = term / together;
    const uint32_t rest = term - block * together, tap = rest / channels;
    c = static_cast<int>(block * channels + (rest - tap * channels));
    row = static_cast<int>(tap / columns);
    column = static_cast<int>(tap % columns);
  }
};

}  // namespace torchconv::cuda
