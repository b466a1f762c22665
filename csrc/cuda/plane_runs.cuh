// Kernels over runs of NCHW planes: what depthwise convolution and pooling share.
//
// A block works on whole planes that follow each other in memory, or on a band of rows of one: in
// either case one run of elements, which lies in shared memory as it does in memory, whatever the
// width, and comes and goes by vectors of 16 bytes. A thread has a strip of kColumns neighbouring
// pixels of a row and rolls it down over the rows of its set, so that every loaded element serves
// all taps from registers, and is converted once.
#pragma once

#include <algorithm>

#include "cuda/gather.h"
#include "cuda/packed.h"
#include "cuda/tensor_core.h"

namespace torchconv::cuda {

// Of a block, at most.
constexpr int kStripThreads = 128;

struct PlaneRuns {
  Divisor bands;         // of a plane
  Divisor strips, sets;  // of a row; of a band
  int slots;             // planes of a block, 1 where there are several bands
  int band_rows, set_rows;
  int threads;
};

// kColumns outputs at once. kPairs: elements are loaded two at a time.
template <typename T_, int R_, int kColumns_, bool kPairs_, int kStride_ = 1>
struct Strip {
  using T = T_;
  static constexpr int R = R_, kColumns = kColumns_, kStride = kStride_;
  static constexpr int kWindow = (kColumns - 1) * kStride + R;
  static constexpr bool kPairs = kPairs_;
  // Pairs begin at even columns, and the window of "same" padding this many before the pair's end.
  static constexpr int kOdd = kPairs ? (R - 1) / 2 % 2 : 0;
  static constexpr int kStep = kPairs ? 2 : 1;
  static constexpr int kStore = kColumns % 2 == 0 ? kStep : 1;  // outputs that are stored at once
  static constexpr int kLoads = (kWindow + kOdd + kStep - 1) / kStep;

  // Element of the window at which load q begins.
  static constexpr int first(int q) { return q * kStep - kOdd; }
  // Whether load q can lie beyond an edge of the image: paddings are below R.
  static constexpr bool at_edge(int q) {
    return first(q) < R - 1 || first(q) + kStep > kWindow - R + 1;
  }

  // Bit q: whether load q is inside a row of `size` elements, of a window that begins at `column`.
  static __device__ __forceinline__ uint32_t inside(int column, int size) {
    uint32_t bits = 0;
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      if (static_cast<unsigned>(column + first(q)) < static_cast<unsigned>(size)) bits |= 1u << q;
    return bits;
  }

  // The window's elements of a row, zeros where it is not inside.
  static __device__ __forceinline__ void load(const T* window, bool row_inside, uint32_t inside,
                                              Wide<T> (&value)[kWindow]) {
    Packed<T, kStep> loaded[kLoads];
    const uint32_t bits = row_inside ? inside : 0;
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      loaded[q] = (at_edge(q) ? (bits >> q & 1) != 0 : row_inside)
                      ? *reinterpret_cast<const Packed<T, kStep>*>(window + first(q))
                      : Packed<T, kStep>{};
#pragma unroll
    for (int i = 0; i < kWindow; ++i)
      value[i] = loaded[(i + kOdd) / kStep].wide((i + kOdd) % kStep);
  }
};

// How far behind a multiple of 16 bytes p lies, in elements: a run's first element lies as far
// behind one in shared memory.
template <typename T>
__host__ __device__ __forceinline__ int lead_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kLanes<T>);
}

// Elements of shared memory for a run of `rows` rows of the last of some planes, and all rows of
// those before, wherever it begins.
template <typename T>
int64_t run_elements(int64_t planes, int64_t plane_rows, int64_t rows, int64_t width) {
  const int64_t count = ((planes - 1) * plane_rows + rows) * width;
  return (count + 2 * kLanes<T> - 2) / kLanes<T> * kLanes<T>;
}

// Starts the copy of a run; the caller commits and waits. All threads call it.
template <typename T>
__device__ __forceinline__ void load_run(T* shared, const T* from, int count) {
  const int lead = lead_of(from);
  for (int i = static_cast<int>(threadIdx.x) * kLanes<T>; i < lead + count;
       i += static_cast<int>(blockDim.x) * kLanes<T>) {
    if (i >= lead && i + kLanes<T> <= lead + count) {
      copy_async<16>(shared_address(shared + i), from + (i - lead), true);
    } else {
      for (int v = i; v < i + kLanes<T>; ++v)
        if (v >= lead && v < lead + count) shared[v] = from[v - lead];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_run(const T* shared, T* to, int count) {
  const int lead = lead_of(to);
  for (int i = static_cast<int>(threadIdx.x) * kLanes<T>; i < lead + count;
       i += static_cast<int>(blockDim.x) * kLanes<T>) {
    if (i >= lead && i + kLanes<T> <= lead + count) {
      using V = Vector<T, kLanes<T>>;
      *reinterpret_cast<V*>(to + (i - lead)) = *reinterpret_cast<const V*>(shared + i);
    } else {
      for (int v = i; v < i + kLanes<T>; ++v)
        if (v >= lead && v < lead + count) to[v - lead] = shared[v];
    }
  }
}

// What a block has of its planes, by its number among the blocks of all planes.
struct PlaneRun {
  int row0, rows;        // output rows of the band
  int h_first, in_rows;  // rows of the input that they meet
};

template <typename S>
__host__ __device__ __forceinline__ PlaneRun run_of(const Gather& g, const PlaneRuns& t, int band) {
  PlaneRun run;
  run.row0 = band * t.band_rows;
  run.rows = g.h.out - run.row0 < t.band_rows ? g.h.out - run.row0 : t.band_rows;
  const int first = run.row0 * S::kStride + g.h.origin;
  const int end = first + (run.rows - 1) * S::kStride + S::R;
  run.h_first = first < 0 ? 0 : first > g.h.in ? g.h.in : first;
  run.in_rows = (end > g.h.in ? g.h.in : end) - run.h_first;
  if (run.in_rows < 0) run.in_rows = 0;
  return run;
}

// Whether strips of kColumns can compute g: one filter a channel, paddings below R.
template <typename S>
bool strips_take(const Gather& g) {
  const auto fits = [](const GatherAxis& axis) {
    const int before = -axis.origin, after = (axis.out - 1) * S::kStride + S::R - axis.in - before;
    return before >= 0 && before < S::R && after < S::R && axis.in > 0;
  };
  if (g.in_channels != 1 || g.out_channels != 1 || !fits(g.h) || !fits(g.w)) return false;
  if (g.w.out < S::kColumns || g.h.out == 0 || g.N == 0) return false;
  return !S::kPairs ||
         (g.w.in % 2 == 0 && (g.w.out % 2 == 0 || (S::kStride == 2 && S::kStore == 1)) &&
          -g.w.origin % 2 == S::kOdd);
}

// At most kStripThreads threads and, where a row allows, kGoodBytes of shared memory, of which rows
// of the input take `in_bytes` for each element, and rows of the output `out_bytes`. False where
// even one row needs more than kMostBytes.
template <typename S>
bool plane_runs(const Gather& g, int64_t in_bytes, int64_t out_bytes, PlaneRuns& t) {
  constexpr int64_t kMostBytes = 96 * 1024, kGoodBytes = 26 * 1024, kBandBytes = 52 * 1024;
  constexpr int64_t kMostThreads = kStripThreads, kGoodThreads = 64, kRows = 7, kFewRows = 5;
  constexpr int64_t kManyThreads = 132 * 512;
  const int64_t planes = g.N * g.groups, strips = ceil_div(g.w.out, S::kColumns);
  const auto bytes = [&](int64_t rows) {
    const int64_t in_rows = std::min<int64_t>((rows - 1) * S::kStride + S::R, g.h.in);
    return in_rows * g.w.in * in_bytes + rows * g.w.out * out_bytes;
  };
  int64_t rows = std::min<int64_t>(g.h.out, kRows);
  if (planes * strips * ceil_div(g.h.out, rows) < kManyThreads) rows = std::min(rows, kFewRows);
  int64_t sets = ceil_div(g.h.out, rows);
  const int64_t all = sets;
  for (int64_t bands = 2;
       sets > 1 && (bytes(sets * rows) > kBandBytes || sets * strips > kMostThreads); ++bands)
    sets = ceil_div(all, bands);
  if (sets == all) rows = ceil_div(g.h.out, sets);
  while (rows > 1 && bytes(sets * rows) > kBandBytes) --rows;
  if (bytes(sets * rows) > kMostBytes || strips > kMostThreads) return false;
  const int64_t band_rows = std::min<int64_t>(sets * rows, g.h.out);
  const int64_t bands = ceil_div(g.h.out, band_rows);
  int64_t slots = 1;
  if (bands == 1) {
    slots = std::min(kGoodThreads / (sets * strips), kGoodBytes / bytes(band_rows));
    slots = std::max<int64_t>(std::min<int64_t>(slots, planes), 1);
  }
  t.bands = Divisor(bands), t.strips = Divisor(strips), t.sets = Divisor(sets);
  t.slots = static_cast<int>(slots);
  t.band_rows = static_cast<int>(band_rows), t.set_rows = static_cast<int>(rows);
  t.threads = static_cast<int>(round_up(slots * sets * strips, 32));
  return true;
}

}  // namespace torchconv::cuda
