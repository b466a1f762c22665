// Sums of any kernel and step. Vectors lie along the source's columns, which need not be parted by
// the step: lane w of a vector of weights is the tap that column w has in its output, so that the
// columns of a step are added up lane by lane over all rows of the kernel, and only these sums are
// parted and added to each other. A kernel wider than the step takes the source again, moved by a
// step, for every further step of its columns; columns that then have no tap are zero, for they may
// be infinite. Rows outside the source are rows of zeros, so that output rows go a few at a time.
#include "cpu/microkernels/plane_rows_steps.h"

#include <algorithm>
#include <vector>

#include "cpu/conv_pack.h"
#include "cpu/lane_range.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// Output rows that share their loads of the weights.
constexpr int kTogether = 4;

template <typename A, int kStep>
class StepSums {
 public:
  static constexpr int N = kLanes<A>;
  using V = Vec<A>;
  using Type = typename V::Type;
  using Lanes = LaneRange<A, N>;
  using Bits = typename Vec<LaneIndex<A>>::Type;

  StepSums(const PlaneRows& p, const PlaneRowsSum<A>& t)
      : p_(p),
        t_(t),
        shifts_(ceil_div(p.R, kStep)),
        zeros_(static_cast<size_t>(std::max<int64_t>(p.right, 0))),
        rows_(static_cast<size_t>((t.last - t.first - 1) * kStep + p.R)) {
    for (int64_t i = 0; i < shifts_ * kStep * N; ++i) {
      const int64_t s = i / (kStep * N) * kStep + i % (kStep * N) % kStep;
      taps_[i] = static_cast<LaneIndex<A>>(std::min(s, p.R));  // R: none
    }
  }

  void run(int64_t plane) {
    pack(t_.weights + plane * t_.weight_plane);
    for (size_t i = 0; i < rows_.size(); ++i) {
      const int64_t y = t_.first * kStep + static_cast<int64_t>(i);
      const bool there = y >= p_.top && y < p_.bottom;
      rows_[i] = there ? t_.src + plane * t_.src_plane + y * p_.pitch : zeros_.data();
    }
    A* out = t_.out + plane * t_.out_plane + t_.first * t_.out_pitch;
    const Type start = V::broadcast(t_.bias != nullptr ? t_.bias[plane] : A{0});
    const int64_t count = t_.last - t_.first;
    // The last rows overlap those before them.
    if (count >= kTogether)
      for (int64_t i = 0; i < count; i += kTogether)
        sum_rows<kTogether>(std::min(i, count - kTogether), start, out);
    else
      for (int64_t i = 0; i < count; ++i) sum_rows<1>(i, start, out);
  }

 private:
  // [shift][part of a step][row of the kernel]
  void pack(const A* w) {
    for (int64_t r = 0; r < p_.R; ++r) {
      A row[N > kMostStepsRows ? N : kMostStepsRows + 1] = {};
      for (int64_t s = 0; s < p_.R; ++s) row[s] = w[r * t_.weight_row + s * t_.weight_column];
      for (int64_t v = 0; v < shifts_ * kStep; ++v) {
        A* to = weights_ + (v * p_.R + r) * N;
        if constexpr (kStep == 1)
          V::store(to, V::broadcast(row[v]));
        else if constexpr (kPermutesLanes<A> && N > kMostStepsRows)
          V::store(to, permute(V::load(row), Vec<LaneIndex<A>>::load(taps_ + v * N)));
        else
          for (int l = 0; l < N; ++l) to[l] = row[taps_[v * N + l]];
      }
    }
  }

  template <int kRows>
  TORCHCONV_INLINE void sum_rows(int64_t i, Type start, A* out) const {
    const A* const* rows = rows_.data() + i * kStep;
    out += i * t_.out_pitch;
    for (int64_t column = 0; column < p_.columns; column += N, out += N) {
      const int64_t rest = std::min<int64_t>(p_.columns - column, N);
      Type sums[kRows][kStep] = {};
      for (int64_t part = 0; part * N < rest * kStep; ++part) {
        Type sum[kRows];
        unroll<kRows>([&](auto b) TORCHCONV_INLINE_LAMBDA { sum[b] = Type{}; });
        for (int64_t shift = 0; shift < shifts_; ++shift) {
          const int64_t from = column * kStep + part * N + shift * kStep;
          const auto lanes = Lanes::of(p_.left - from, p_.right - from);
          const int64_t v = shift * kStep + part;
          const A* w = weights_ + v * p_.R * N;
          if (kStep > 1 && (shift + 1) * kStep > p_.R) {
            const auto taken = Vec<LaneIndex<A>>::load(taps_ + v * N) <
                               Vec<LaneIndex<A>>::broadcast(static_cast<LaneIndex<A>>(p_.R));
            add_rows(rows, from, w, sum, [&](const A* x) TORCHCONV_INLINE_LAMBDA {
              return bit_cast<Type>(bit_cast<Bits>(lanes.load(x)) & taken);
            });
          } else {
            add_rows(rows, from, w, sum,
                     [&](const A* x) TORCHCONV_INLINE_LAMBDA { return lanes.load(x); });
          }
        }
        unroll<kRows>([&](auto b) TORCHCONV_INLINE_LAMBDA { sums[b][part] = sum[b]; });
      }
      const auto there = Lanes::of(0, rest);
      unroll<kRows>([&](auto b) TORCHCONV_INLINE_LAMBDA {
        Type y = start;
        unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
          y += collect_lanes<PhaseLanes<kStep, phase, N>, N>(sums[b]);
        });
        there.store(out + b * t_.out_pitch, t_.template clamped<N>(y));
      });
    }
  }

  template <int kRows, typename Load>
  TORCHCONV_INLINE void add_rows(const A* const* rows, int64_t from, const A* w, Type (&sum)[kRows],
                                 Load&& load) const {
    for (int64_t r = 0; r < p_.R; ++r, w += N) {
      const Type weight = V::load(w);
      unroll<kRows>([&](auto b) TORCHCONV_INLINE_LAMBDA {
        sum[b] += weight * load(rows[r + b * kStep] + from);
      });
    }
  }

  // Vectors of weights for each row of the kernel: shifts and the parts of a step.
  static constexpr int64_t kMostVectors = kMostStepsRows + kStep - 1;

  const PlaneRows p_;
  const PlaneRowsSum<A> t_;
  int64_t shifts_;        // of the source, by a step each, that reach all columns of the kernel
  std::vector<A> zeros_;  // a row
  std::vector<const A*> rows_;  // of the source, or zeros_
  LaneIndex<A> taps_[kMostVectors * N];
  alignas(64) A weights_[kMostVectors * kMostStepsRows * N];
};

template <typename A, int kStep>
void sum_steps(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  StepSums<A, kStep> sums(p, t);
  for (int64_t plane = 0; plane < t.planes; ++plane) sums.run(plane);
}

}  // namespace

template <typename A>
void plane_rows_steps(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if (p.step == PlaneRows::kOne) return sum_steps<A, 1>(p, t);
  if (p.step == PlaneRows::kTwo) return sum_steps<A, 2>(p, t);
  if (p.step == PlaneRows::kThree) return sum_steps<A, 3>(p, t);
  sum_steps<A, 4>(p, t);
}

template void plane_rows_steps(const PlaneRows&, const PlaneRowsSum<float>&);
template void plane_rows_steps(const PlaneRows&, const PlaneRowsSum<double>&);

}  // namespace torchconv::cpu
