// plane_rows_sum for steps of 1 and 2: rolling sums of up to R output rows.
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/microkernels/plane_rows_spread.h"
#include "cpu/microkernels/plane_rows_steps.h"

namespace torchconv::cpu {
namespace {

// The most rows whose sums have room in registers beside the weights of a kernel of 3.
constexpr int kSmallRows = 7;

template <typename A, int N, int R, int kStep, int kStrips>
void sum_strips(const PlaneRows p, const PlaneRowsSum<A> t, const int64_t (&first)[kStrips],
                int64_t plane, int64_t planes) {
  using V = Vec<A, N>;
  using Type = typename V::Type;
  using Source = StripSource<A, N, R, kStep>;
  // Output rows that a source row reaches.
  constexpr int kRows = (R + kStep - 1) / kStep;
  // All weights stay in registers, where there is room.
  constexpr bool kHeld = R == 3 || R * R + kRows * kStrips + 2 <= kVectorRegisters;
  // With the widest registers a masked store is as fast as a whole one, and faster than to ask.
  constexpr bool kStoresWhole = kVectorBytes < 64;
  const auto rows_there = static_cast<uint64_t>(std::max<int64_t>(p.bottom - p.top, 0));
  const auto there = LaneRange<A, N>::of(0, p.columns);
  Source source[kStrips];
  for (int k = 0; k < kStrips; ++k) source[k] = Source(p, first[k]);
  for (const int64_t end = plane + planes; plane < end; ++plane) {
    const A* w = t.weights + plane * t.weight_plane;
    A weights[R * R];
    Type held[kHeld ? R * R : 1];
#pragma GCC unroll 7
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 7
      for (int s = 0; s < R; ++s) {
        weights[r * R + s] = w[r * t.weight_row + s * t.weight_column];
        if constexpr (kHeld) held[r * R + s] = V::broadcast(weights[r * R + s]);
      }
    }
    const Type start = V::broadcast(t.bias != nullptr ? t.bias[plane] : A{0});
    Type sum[kRows][kStrips];
#pragma GCC unroll 7
    for (int m = 0; m < kRows; ++m)
      for (int k = 0; k < kStrips; ++k) sum[m][k] = start;
    const A* row = t.src + plane * t.src_plane + t.first * kStep * p.pitch;
    auto y = static_cast<uint64_t>(t.first * kStep - p.top);  // of the rows that are there
    A* out = t.out + plane * t.out_plane + (t.first - (kRows - 1)) * t.out_pitch;
    for (int64_t done = 1 - kRows; done < t.last - t.first; ++done, out += t.out_pitch) {
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        if (y < rows_there) {
          typename Source::Row rows[kStrips];
          unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA { rows[k] = source[k].row(row); });
          unroll<R>([&](auto s) TORCHCONV_INLINE_LAMBDA {
            Type x[kStrips];
            unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
              x[k] = source[k].template column<s>(rows[k]);
            });
            unroll<kRows * kStrips>([&](auto i) TORCHCONV_INLINE_LAMBDA {
              constexpr int m = i / kStrips, k = i % kStrips, kTap = (phase + m * kStep) * R + s;
              if constexpr (kTap < R * R)
                sum[m][k] += (kHeld ? held[kHeld ? kTap : 0] : V::broadcast(weights[kTap])) * x[k];
            });
          });
        }
        ++y;
        row += p.pitch;
      });
      if (done >= 0) {
        unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
          const Type y = t.template clamped<N>(sum[kRows - 1][k]);
          if (kStrips > 1 || (kStoresWhole && p.columns >= N))
            V::store(out + first[k], y);
          else
            there.store(out + first[k], y);
        });
      }
#pragma GCC unroll 2
      for (int k = 0; k < kStrips; ++k) {
#pragma GCC unroll 6
        for (int m = kRows - 1; m > 0; --m) sum[m][k] = sum[m - 1][k];
        sum[0][k] = start;
      }
    }
  }
}

// Planes of at most kRows rows and a vector: with all sums in registers there is nothing to roll,
// and a row takes half the instructions.
template <typename A, int N, int R, int kRows>
void sum_small_planes(const PlaneRows p, const PlaneRowsSum<A> t) {
  using V = Vec<A, N>;
  using Type = typename V::Type;
  const StripSource<A, N, R, 1> source(p, 0);
  const auto there = LaneRange<A, N>::of(0, p.columns);
  const int64_t rows = t.last - t.first;
  for (int64_t plane = 0; plane < t.planes; ++plane) {
    const A* w = t.weights + plane * t.weight_plane;
    Type weights[R * R];
#pragma GCC unroll 7
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 7
      for (int s = 0; s < R; ++s)
        weights[r * R + s] = V::broadcast(w[r * t.weight_row + s * t.weight_column]);
    }
    Type sum[kRows];
    const Type start = V::broadcast(t.bias != nullptr ? t.bias[plane] : A{0});
#pragma GCC unroll 7
    for (int i = 0; i < kRows; ++i) sum[i] = start;
    const A* src = t.src + plane * t.src_plane + t.first * p.pitch;
    unroll<kRows + R - 1>([&](auto y) TORCHCONV_INLINE_LAMBDA {
      if (t.first + y < p.top || t.first + y >= p.bottom) return;
      const auto row = source.row(src + y * p.pitch);
      unroll<R>([&](auto s) TORCHCONV_INLINE_LAMBDA {
        const Type x = source.template column<s>(row);
        unroll<R>([&](auto r) TORCHCONV_INLINE_LAMBDA {
          constexpr int i = y - r;
          if constexpr (i >= 0 && i < kRows) sum[i] += weights[r * R + s] * x;
        });
      });
    });
    A* out = t.out + plane * t.out_plane + t.first * t.out_pitch;
    unroll<kRows>([&](auto i) TORCHCONV_INLINE_LAMBDA {
      if (i < rows) there.store(out + i * t.out_pitch, t.template clamped<N>(sum[i]));
    });
  }
}

// The last strip overlaps the one before it.
template <typename A, int N, int R, int kStep>
void sum_planes(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if constexpr (N == kLanes<A>) {  // narrower vectors are for planes of one strip
    const int64_t last = p.columns - N, strips = ceil_div(p.columns, N);
    for (int64_t plane = 0; plane < t.planes && strips > 1; ++plane) {
      for (int64_t k = 0; k + 1 < strips; k += 2)
        sum_strips<A, N, R, kStep, 2>(p, t, {std::min(k * N, last), std::min((k + 1) * N, last)},
                                      plane, 1);
      if (strips % 2 == 1) sum_strips<A, N, R, kStep, 1>(p, t, {last}, plane, 1);
    }
    if (strips > 1) return;
  } else if constexpr (R == 3 && kStep == 1) {
    if (t.last - t.first <= kSmallRows) return sum_small_planes<A, N, R, kSmallRows>(p, t);
  }
  sum_strips<A, N, R, kStep, 1>(p, t, {0}, 0, t.planes);
}

template <typename A, int N>
void sum(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if (p.step == PlaneRows::kSpread) return plane_rows_spread<A>(p, t);
  const bool one = p.step == PlaneRows::kOne, rolls = one ? p.R % 2 == 1 : p.R == 3 || p.R == 5;
  if (!rolls || p.R == 1 || p.step > PlaneRows::kTwo) return plane_rows_steps<A>(p, t);
  if (p.R == 3) return one ? sum_planes<A, N, 3, 1>(p, t) : sum_planes<A, N, 3, 2>(p, t);
  if (p.R == 5) return one ? sum_planes<A, N, 5, 1>(p, t) : sum_planes<A, N, 5, 2>(p, t);
  sum_planes<A, N, 7, 1>(p, t);
}

}  // namespace

template <typename A>
void plane_rows_sum(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if (p.columns <= kNarrowLanes<A>) return sum<A, kNarrowLanes<A>>(p, t);
  sum<A, kLanes<A>>(p, t);
}

template void plane_rows_sum(const PlaneRows&, const PlaneRowsSum<float>&);
template void plane_rows_sum(const PlaneRows&, const PlaneRowsSum<double>&);

}  // namespace torchconv::cpu
