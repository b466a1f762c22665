// Sums of any kernel and step. Vectors lie along the source's columns, which need not be parted by
// the step: lane w of a vector of weights is the tap that column w has in its output, so that the
// columns of a step are added up lane by lane over all rows of the kernel, and only these sums are
// parted and added to each other. A kernel wider than the step takes the source again, moved by a
// step, for every further step of its columns; columns that then have no tap are zero, for they may
// be infinite. Rows outside the source are rows of zeros, so that output rows go a few at a time.
//
// The gradient's sums meet the source in the same way: a row of dz is spread, each element to the
// columns of its step, and a lane of a sum belongs to the tap that its column has.
#include "cpu/microkernels/plane_rows_steps.h"

#include <algorithm>
#include <vector>

#include "cpu/conv_pack.h"
#include "cpu/lane_range.h"
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// Output rows that share their loads of the weights.
constexpr int kTogether = 4;

// Stands for source rows that are not there.
template <typename A>
class ZeroRow {
 public:
  explicit ZeroRow(const PlaneRows& p)
      : first_(std::min<int64_t>(p.left, 0)),
        zeros_(static_cast<size_t>(std::max<int64_t>(p.right - first_, 0))) {}
  const A* row() const { return zeros_.data() - first_; }

 private:
  int64_t first_;
  std::vector<A> zeros_;
};

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
        zeros_(p),
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
      rows_[i] = there ? t_.src + plane * t_.src_plane + y * p_.pitch : zeros_.row();
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
  int64_t shifts_;  // of the source, by a step each, that reach all columns of the kernel
  ZeroRow<A> zeros_;
  std::vector<const A*> rows_;  // of the source, or zeros_
  LaneIndex<A> taps_[kMostVectors * N];
  alignas(64) A weights_[kMostVectors * kMostStepsRows * N];
};

template <typename A, int kStep>
void sum_steps(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  StepSums<A, kStep> sums(p, t);
  for (int64_t plane = 0; plane < t.planes; ++plane) sums.run(plane);
}

// Which element of dz, from that of its first lane on, a lane of a part of a step's columns takes.
template <typename A, int kStep>
struct SpreadLanes {
  LaneIndex<A> lanes[kStep][kLanes<A>];
  SpreadLanes() {
    for (int part = 0; part < kStep; ++part)
      for (int i = 0; i < kLanes<A>; ++i) lanes[part][i] = (part * kLanes<A> % kStep + i) / kStep;
  }
};

template <typename A, int kStep>
void dot_steps(const PlaneRows& p, const PlaneRowsDot<A>& t) {
  using V = Vec<A>;
  using Type = typename V::Type;
  using Lanes = LaneRange<A, V::kLanes>;
  constexpr int N = V::kLanes, kTerms = kMostStepsTerms;
  static const SpreadLanes<A, kStep> spread;
  const int64_t shifts = ceil_div(p.R, kStep), terms = p.R * shifts;
  int64_t r[kTerms], shift[kTerms];
  for (int64_t i = 0; i < kTerms; ++i) {
    r[i] = std::min(i, terms - 1) / shifts;  // the last one fills up
    shift[i] = std::min(i, terms - 1) % shifts * kStep;
  }
  const ZeroRow<A> zeros(p);
  for (int64_t channel = 0; channel < t.channels; ++channel) {
    Type sums[kTerms][kStep];
    for (int part = 0; part < kStep; ++part) {
      Type sum[kTerms];
      unroll<kTerms>([&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i] = Type{}; });
      const auto lanes = Vec<LaneIndex<A>>::load(spread.lanes[part]);
      for (int64_t strip = t.begin; strip < t.end; ++strip) {
        const int64_t column = (strip * kStep + part) * N, j = column / kStep;
        if (j >= p.columns) break;
        const auto there = Lanes::of(0, p.columns - j);
        Lanes inside[kTerms];
        unroll<kTerms>([&](auto i) TORCHCONV_INLINE_LAMBDA {
          inside[i] = Lanes::of(p.left - column - shift[i], p.right - column - shift[i]);
        });
        for (int64_t plane = 0; plane < t.planes; ++plane) {
          const A* src = t.src + channel * t.src_channel + plane * t.src_plane;
          const A* dz = t.dz + channel * t.dz_channel + plane * t.dz_plane + j;
          for (int64_t i = t.first; i < t.last; ++i) {
            Type gradient = there.load(dz + i * t.dz_pitch);
            if constexpr (kStep > 1) gradient = permute(gradient, lanes);
            unroll<kTerms>([&](auto k) TORCHCONV_INLINE_LAMBDA {
              const int64_t y = i * kStep + r[k];
              const A* row = y >= p.top && y < p.bottom ? src + y * p.pitch : zeros.row();
              sum[k] += gradient * inside[k].load(row + column + shift[k]);
            });
          }
        }
      }
      unroll<kTerms>([&](auto i) TORCHCONV_INLINE_LAMBDA { sums[i][part] = sum[i]; });
    }
    double* totals = t.totals + channel * p.R * p.R;
    for (int64_t i = 0; i < terms; ++i)
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        const int64_t s = shift[i] + phase;
        if (s < p.R)
          totals[r[i] * p.R + s] += static_cast<double>(
              add_lanes<A, N>(collect_lanes<PhaseLanes<kStep, phase, N>, N>(sums[i])));
      });
  }
}

}  // namespace

template <typename A>
void plane_rows_steps_dot(const PlaneRows& p, const PlaneRowsDot<A>& t) {
  if (p.step == PlaneRows::kOne) return dot_steps<A, 1>(p, t);
  if (p.step == PlaneRows::kTwo) return dot_steps<A, 2>(p, t);
  if (p.step == PlaneRows::kThree) return dot_steps<A, 3>(p, t);
  dot_steps<A, 4>(p, t);
}

template void plane_rows_steps_dot(const PlaneRows&, const PlaneRowsDot<float>&);
template void plane_rows_steps_dot(const PlaneRows&, const PlaneRowsDot<double>&);

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
