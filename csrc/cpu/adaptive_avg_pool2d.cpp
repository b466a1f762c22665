// Adaptive average pooling, forward and backward, where it is not ordinary pooling's kernels that
// run (adaptive_window.h): sums over windows. Forward divides each sum by its window's size;
// backward divides each element of dy by that size and sums over the windows of the inverse rule
// (adaptive_window.h).
//
// Planes (NCHW): the rows of a window are summed with vectors along the row, then the columns one
// by one; a row whose window is that of the row before is copied. Pixels (NHWC): vectors over
// channels. Sums are taken in two levels, in float for bfloat16 and float16, and in an order that
// follows from the shape alone.
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "cpu/adaptive_window.h"
#include "cpu/pool2d.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// Sums over adaptive windows from images of in_h x in_w to out_h x out_w.
template <typename T, bool kBackward>
class AdaptiveSum {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using V = typename W::Type;
  static constexpr int kLanes = W::kLanes;

 public:
  AdaptiveSum(const AdaptiveProblem& p, const T* from, T* to)
      : images_(p.N),
        channels_(p.C),
        in_h_(kBackward ? p.P : p.H),
        in_w_(kBackward ? p.Q : p.W),
        out_h_(kBackward ? p.H : p.P),
        out_w_(kBackward ? p.W : p.Q),
        from_(from),
        to_(to),
        rows_(adaptive_windows(in_h_, out_h_)),
        columns_(adaptive_windows(in_w_, out_w_)) {
    // The windows that are averaged: their sizes, by output of the forward pooling.
    for (const Range& r : kBackward ? adaptive_windows(p.H, p.P) : rows_)
      heights_.push_back(static_cast<Lane>(r.size()));
    for (const Range& c : kBackward ? adaptive_windows(p.W, p.Q) : columns_)
      widths_.push_back(static_cast<Lane>(c.size()));
  }

  void run_planes(const Parallel& pool) const {
    const int64_t bytes = (largest_window(in_h_, out_h_) * in_w_ + in_w_ + 2 * out_w_) *
                          static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, images_ * channels_ * out_h_, pool_grain(bytes),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<Lane> sums(in_w_ + kLanes);
                                for (int64_t i = begin; i < end; i++)
                                  plane_row(i, i == begin, sums.get());
                              });
  }

  void run_pixels(const Parallel& pool) const {
    const int64_t bytes = (largest_window(in_h_, out_h_) * largest_window(in_w_, out_w_) + 1) *
                          (ceil_div(channels_, kLanes) * kLanes) * static_cast<int64_t>(sizeof(T));
    parallel_for(pool, 0, images_ * out_h_ * out_w_, pool_grain(bytes),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; i++) pixel(i, i == begin);
                 });
  }

 private:
  static constexpr int64_t kBatch = 16;  // rows summed in registers before they join the total

  // Row i of the N * C * out_h; not `first` where row i - 1 is there already.
  void plane_row(int64_t i, bool first, Lane* sums) const {
    const int64_t row = i % out_h_;
    T* to = to_ + i * out_w_;
    if (!first && repeats(rows_, row)) {
      std::memcpy(to, to - out_w_, static_cast<size_t>(out_w_) * sizeof(T));
      return;
    }
    const T* plane = from_ + i / out_h_ * in_h_ * in_w_;
    int64_t w = 0;
    for (; w + kLanes <= in_w_; w += kLanes) sum_rows<false>(plane, at(rows_, row), w, sums);
    if (w < in_w_) sum_rows<true>(plane, at(rows_, row), w, sums);
    for (int64_t out = 0; out < out_w_; out++) {
      const Lane sum = sum_columns(sums, at(columns_, out));
      to[out] = from_wide<T>(kBackward ? sum : sum / (height(row) * width(out)));
    }
  }

  // Of several vectors lane by lane first.
  static Lane sum_columns(const Lane* sums, Range columns) {
    using L = Vec<Lane>;
    int64_t j = columns.begin;
    Lane sum{};
    if (columns.size() >= 2 * kLanes) {
      typename L::Type total = L::load(sums + j);
      for (j += kLanes; j + kLanes <= columns.end; j += kLanes) total += L::load(sums + j);
      Lane lanes[kLanes];
      L::store(lanes, total);
      for (int n = kLanes / 2; n > 0; n /= 2)
        for (int l = 0; l < n; l++) lanes[l] += lanes[l + n];
      sum = lanes[0];
    } else {
      sum = sums[j++];
    }
    for (; j < columns.end; j++) sum += sums[j];
    return sum;
  }

  template <bool kPartial>
  TORCHCONV_INLINE void sum_rows(const T* plane, Range rows, int64_t w, Lane* sums) const {
    V total{};
    for (int64_t r = rows.begin; r < rows.end;) {
      V sum{};
      for (const int64_t end = std::min(r + kBatch, rows.end); r < end; r++) {
        const T* from = plane + r * in_w_ + w;
        V v = kPartial ? W::load_partial(from, in_w_ - w) : W::load(from);
        if constexpr (kBackward) v /= W::broadcast(height(r));
        sum += v;
      }
      total += sum;
    }
    if constexpr (kBackward) {
      using Widths = Vec<Lane>;
      // Lanes past the row are 0 / 0 here, and not read.
      total /= kPartial ? Widths::load_partial(widths_.data() + w, in_w_ - w)
                        : Widths::load(widths_.data() + w);
    }
    Vec<Lane>::store(sums + w, total);
  }

  // Pixel i of the N * out_h * out_w; not `first` where pixel i - 1 is there already.
  void pixel(int64_t i, bool first) const {
    const int64_t column = i % out_w_, row = i / out_w_ % out_h_, n = i / out_w_ / out_h_;
    T* to = to_ + i * channels_;
    if (!first && repeats(columns_, column)) {
      std::memcpy(to, to - channels_, static_cast<size_t>(channels_) * sizeof(T));
      return;
    }
    const T* image = from_ + n * in_h_ * in_w_ * channels_;
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels_; c += 4 * kLanes)
      sum_window<4, false>(image + c, row, column, kLanes, to + c);
    for (; c + kLanes <= channels_; c += kLanes)
      sum_window<1, false>(image + c, row, column, kLanes, to + c);
    if (c < channels_) sum_window<1, true>(image + c, row, column, channels_ - c, to + c);
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void sum_window(const T* image, int64_t row, int64_t column, int64_t n,
                                   T* to) const {
    const Range rows = at(rows_, row), columns = at(columns_, column);
    V total[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; k++) total[k] = V{};
    for (int64_t r = rows.begin; r < rows.end; r++) {
      V sum[kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; k++) sum[k] = V{};
      for (int64_t s = columns.begin; s < columns.end; s++) {
        const T* from = image + (r * in_w_ + s) * channels_;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; k++) {
          V v = kPartial ? W::load_partial(from, n) : W::load(from + k * kLanes);
          if constexpr (kBackward) v /= W::broadcast(height(r) * width(s));
          sum[k] += v;
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; k++) total[k] += sum[k];
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; k++) {
      if constexpr (!kBackward) total[k] /= W::broadcast(height(row) * width(column));
      if constexpr (kPartial) {
        W::store_partial(to, total[k], n);
      } else {
        W::store(to + k * kLanes, total[k]);
      }
    }
  }

  Lane height(int64_t i) const { return heights_[static_cast<size_t>(i)]; }
  Lane width(int64_t i) const { return widths_[static_cast<size_t>(i)]; }

  int64_t images_, channels_, in_h_, in_w_, out_h_, out_w_;
  const T* from_;
  T* to_;
  std::vector<Range> rows_, columns_;  // of `from`, by row and column of `to`
  std::vector<Lane> heights_, widths_;
};

template <bool kBackward, typename T>
void sum_as(const AdaptiveProblem& p, const void* from, void* to, const Parallel& pool) {
  const AdaptiveSum<T, kBackward> sum(p, static_cast<const T*>(from), static_cast<T*>(to));
  if (runs_channels_last(p)) {
    sum.run_pixels(pool);
  } else {
    sum.run_planes(pool);
  }
}

template <bool kBackward>
void sum(const AdaptiveProblem& p, const void* from, void* to, const Parallel& pool) {
  switch (p.dtype) {
    case DType::kFloat32:
      return sum_as<kBackward, float>(p, from, to, pool);
    case DType::kFloat64:
      return sum_as<kBackward, double>(p, from, to, pool);
    case DType::kBFloat16:
      return sum_as<kBackward, BFloat16>(p, from, to, pool);
    case DType::kFloat16:
      return sum_as<kBackward, Float16>(p, from, to, pool);
    default:
      return;  // csrc/ops refuses the integer types
  }
}

}  // namespace

void adaptive_avg_pool2d(const AdaptiveProblem& p, const void* x, void* y, const Parallel& pool) {
  if (is_empty(p)) return;
  if (runs_as_ordinary(p)) return avg_pool2d(ordinary_pooling(p), x, y, pool);
  sum<false>(p, x, y, pool);
}

void adaptive_avg_pool2d_backward(const AdaptiveProblem& p, const void* dy, void* dx,
                                  const Parallel& pool) {
  if (is_empty(p)) return fill_zero(p, dx);
  if (divides_evenly(p)) return avg_pool2d_backward(ordinary_pooling(p), dy, dx, pool);
  sum<true>(p, dy, dx, pool);
}

}  // namespace torchconv::cpu
