// plane_rows_sum for steps of 1 and 2: rolling sums of up to R output rows.
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/microkernels/plane_rows_spread.h"
#include "cpu/microkernels/plane_rows_steps.h"

namespace torchconv::cpu {
namespace {

// With the widest registers a masked store is as fast as a whole one, and faster than to ask.
constexpr bool kStoresWhole = kVectorBytes < 64;

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
  const auto rows_there = static_cast<uint64_t>(std::max<int64_t>(p.bottom - p.top, 0));
  const auto there = LaneRange<A, N>::of(0, p.columns);
  const int64_t ahead = t.ahead;
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
          if (ahead != 0)
            unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA { source[k].fetch(row + ahead); });
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

template <typename V, typename A, int R>
TORCHCONV_INLINE void load_weights(const A* tap, int64_t row, int64_t column,
                                   typename V::Type (&weights)[R][R]) {
  unroll<R>([&](auto r) TORCHCONV_INLINE_LAMBDA {
    unroll<R>([&](auto s)
                  TORCHCONV_INLINE_LAMBDA { weights[r][s] = V::broadcast(tap[s * column]); });
    tap += row;
    keep_address(tap);
  });
}

// A row of outputs of some strips, `apart` from each other; a single one may be short of columns.
template <typename V, int kStrips, typename A, typename Lanes>
TORCHCONV_INLINE void store_strips(const PlaneRows& p, const Lanes& there, bool clamps,
                                   typename V::Type most, const typename V::Type (&sums)[kStrips],
                                   A* out, int64_t apart) {
  unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
    const typename V::Type y = clamps ? clamped(sums[k], most) : sums[k];
    if (kStrips > 1 || (kStoresWhole && p.columns >= V::kLanes))
      V::store(out + k * apart, y);
    else
      there.store(out, y);
  });
}

// A kernel of 3 with a step of 1, whose weights and sums all stay in registers: the strip of some
// planes that begins at `column`, and with two strips the one `apart` from it.
template <typename A, int N, int kStrips>
void sum_three_rows(const PlaneRows& p, const PlaneRowsSum<A>& t, int64_t column, int64_t apart) {
  using V = Vec<A, N>;
  using Type = typename V::Type;
  using Lanes = LaneRange<A, N>;
  constexpr int R = 3;
  Lanes inside[R][kStrips];
  unroll<R * kStrips>([&](auto i) TORCHCONV_INLINE_LAMBDA {
    const int64_t from = column + i % kStrips * apart + i / kStrips * p.dilation;
    inside[i / kStrips][i % kStrips] = Lanes::of(p.left - from, p.right - from);
  });
  const auto there = Lanes::of(0, p.columns);
  // The source rows that reach the outputs; the first ones finish none of them, and the last ones
  // may leave outputs that read nothing below them.
  const Range source{std::max(t.first, p.top),
                     std::max({t.first, p.top, std::min(t.last + R - 1, p.bottom)})};
  const int64_t above = std::clamp<int64_t>(source.begin - (t.first + R - 1), 0, t.last - t.first);
  const int64_t opening = std::clamp<int64_t>(t.first + R - 1 - source.begin, 0, source.size());
  const int64_t rows = source.size() - opening, rest = t.last - t.first - above - rows;
  const int64_t pitch = p.pitch, gap = p.dilation, out_pitch = t.out_pitch, ahead = t.ahead;
  const int64_t weight_row = t.weight_row, weight_column = t.weight_column;
  const bool clamps = t.clamps;
  const Type most = V::broadcast(t.most);
  const A* filter = t.weights;
  const A* src = t.src + source.begin * pitch + column;
  A* dst = t.out + t.first * out_pitch + column;
  for (int64_t plane = 0; plane < t.planes; ++plane) {
    Type weights[R][R];
    load_weights<V>(filter, weight_row, weight_column, weights);
    const Type start = V::broadcast(t.bias != nullptr ? t.bias[plane] : A{0});
    const A* row = src;
    A* out = dst;
    filter += t.weight_plane;
    src += t.src_plane;
    dst += t.out_plane;
    // Of the outputs that a row is the last, the middle and the first one of.
    Type last[kStrips], middle[kStrips], first[kStrips];
    unroll<kStrips>([&](auto k)
                        TORCHCONV_INLINE_LAMBDA { last[k] = middle[k] = first[k] = start; });
    const auto roll = [&]() TORCHCONV_INLINE_LAMBDA {
      unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
        last[k] = middle[k];
        middle[k] = first[k];
        first[k] = start;
      });
    };
    const auto add_row = [&]() TORCHCONV_INLINE_LAMBDA {
      roll();
      if (ahead != 0)
        unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
          __builtin_prefetch(row + k * apart + ahead, 0, 2);
        });
      unroll<R * kStrips>([&](auto i) TORCHCONV_INLINE_LAMBDA {
        constexpr int s = i / kStrips, k = i % kStrips;
        const Type x = inside[s][k].load(row + k * apart + s * gap);
        last[k] += weights[2][s] * x;
        middle[k] += weights[1][s] * x;
        first[k] += weights[0][s] * x;
      });
      row += pitch;
    };
    const auto store = [&]() TORCHCONV_INLINE_LAMBDA {
      store_strips<V>(p, there, clamps, most, last, out, apart);
      out += out_pitch;
    };
    for (int64_t i = 0; i < above; ++i) store();
    for (int64_t i = -opening; i < rows; ++i) {
      add_row();
      if (i >= 0) store();
    }
    for (int64_t i = 0; i < rest; ++i) {
      roll();
      store();
    }
  }
}

// The same with a step of 2. A row's even and odd columns are parted about the kernel's middle
// column; those of its first column are the last one's moved by a lane.
template <typename A, int N, int kStrips>
void sum_three_rows_by_two(const PlaneRows& p, const PlaneRowsSum<A>& t, int64_t column,
                           int64_t apart) {
  using V = Vec<A, N>;
  using Type = typename V::Type;
  using Lanes = LaneRange<A, N>;
  constexpr int R = 3;
  constexpr auto kIndex = std::make_integer_sequence<int, N>();
  Lanes low[kStrips], high[kStrips], before[kStrips];
  unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
    const int64_t middle = 2 * (column + k * apart) + 1;
    low[k] = Lanes::of(p.left - middle, p.right - middle);
    high[k] = Lanes::of(p.left - middle - N, p.right - middle - N);
    before[k] = Lanes::of(p.left < middle ? N - 1 : N, p.right - middle + N);
  });
  const auto there = Lanes::of(0, p.columns);
  const int64_t pitch = p.pitch, out_pitch = t.out_pitch, last = t.last, ahead = t.ahead;
  const int64_t weight_row = t.weight_row, weight_column = t.weight_column;
  const bool clamps = t.clamps;
  const Type most = V::broadcast(t.most);
  const A* filter = t.weights;
  const A* src = t.src + (2 * t.first - 1) * pitch + 2 * column + 1;
  A* dst = t.out + t.first * out_pitch + column;
  for (int64_t plane = 0; plane < t.planes; ++plane) {
    Type weights[R][R];
    load_weights<V>(filter, weight_row, weight_column, weights);
    const Type start = V::broadcast(t.bias != nullptr ? t.bias[plane] : A{0});
    const A* row = src;
    A* out = dst;
    filter += t.weight_plane;
    src += t.src_plane;
    dst += t.out_plane;
    Type sum[kStrips], next[kStrips];
    unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA { sum[k] = next[k] = start; });
    // f(k, x0, x1, x2) with the sources of the kernel's columns.
    const auto for_columns = [&](auto&& f) TORCHCONV_INLINE_LAMBDA {
      unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
        const A* at = row + 2 * k * apart;
        const Type a = low[k].load(at), b = high[k].load(at + N);
        if (ahead != 0) {
          __builtin_prefetch(at + ahead, 0, 2);
          __builtin_prefetch(at + ahead + N, 0, 2);
        }
        const Type odd = alternate_lanes<1>(a, b, kIndex);
        f(k, consecutive_lanes<A, N, N - 1>(before[k].load(at - N), odd),
          alternate_lanes<0>(a, b, kIndex), odd);
      });
    };
    const auto add_middle = [&]() TORCHCONV_INLINE_LAMBDA {
      for_columns([&](auto k, Type x0, Type x1, Type x2) TORCHCONV_INLINE_LAMBDA {
        sum[k] += weights[1][0] * x0;
        sum[k] += weights[1][1] * x1;
        sum[k] += weights[1][2] * x2;
      });
    };
    const auto add_shared = [&]() TORCHCONV_INLINE_LAMBDA {
      for_columns([&](auto k, Type x0, Type x1, Type x2) TORCHCONV_INLINE_LAMBDA {
        sum[k] += weights[2][0] * x0;
        next[k] += weights[0][0] * x0;
        sum[k] += weights[2][1] * x1;
        next[k] += weights[0][1] * x1;
        sum[k] += weights[2][2] * x2;
        next[k] += weights[0][2] * x2;
      });
    };
    const auto roll = [&]() TORCHCONV_INLINE_LAMBDA {
      unroll<kStrips>([&](auto k) TORCHCONV_INLINE_LAMBDA {
        sum[k] = next[k];
        next[k] = start;
      });
    };
    const auto store = [&]() TORCHCONV_INLINE_LAMBDA {
      store_strips<V>(p, there, clamps, most, sum, out, apart);
      out += out_pitch;
      roll();
    };
    const auto is_there = [&](int64_t y) { return y >= p.top && y < p.bottom; };
    // The first time for the sums of the first output alone.
    for (int64_t i = t.first - 1; i < last; ++i) {
      if (i >= t.first && is_there(2 * i + 1)) add_middle();
      row += pitch;
      if (is_there(2 * i + 2)) add_shared();
      row += pitch;
      if (i >= t.first)
        store();
      else
        roll();
    }
  }
}

// Strips from left to right, two at a time. The last one overlaps the one before it.
template <typename A, int N, int kStep>
void sum_planes_of_three(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  constexpr auto kOne = kStep == 1 ? sum_three_rows<A, N, 1> : sum_three_rows_by_two<A, N, 1>;
  if (p.columns <= N) return kOne(p, t, 0, 0);
  if constexpr (N == kLanes<A>) {  // narrower vectors are for planes of one strip
    constexpr auto kTwo = kStep == 1 ? sum_three_rows<A, N, 2> : sum_three_rows_by_two<A, N, 2>;
    const int64_t last = p.columns - N;
    for (int64_t column = 0; column < p.columns; column += 2 * N)
      if (column >= last)
        kOne(p, t, last, 0);
      else
        kTwo(p, t, column, std::min<int64_t>(N, last - column));
  }
}

// The last strip overlaps the one before it.
template <typename A, int N, int R, int kStep>
void sum_planes(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if constexpr (N == kLanes<A>) {  // narrower vectors are for planes of one strip
    const int64_t last = p.columns - N, strips = ceil_div(p.columns, N);
    if constexpr (R < 7 || kStep == 1) {
      if (strips == 2) return sum_strips<A, N, R, kStep, 2>(p, t, {0, last}, 0, t.planes);
      for (int64_t plane = 0; plane < t.planes && strips > 1; ++plane) {
        for (int64_t k = 0; k + 1 < strips; k += 2)
          sum_strips<A, N, R, kStep, 2>(p, t, {std::min(k * N, last), std::min((k + 1) * N, last)},
                                        plane, 1);
        if (strips % 2 == 1) sum_strips<A, N, R, kStep, 1>(p, t, {last}, plane, 1);
      }
    } else {  // the most to compile
      for (int64_t k = 0; k < strips && strips > 1; ++k)
        sum_strips<A, N, R, kStep, 1>(p, t, {std::min(k * N, last)}, 0, t.planes);
    }
    if (strips > 1) return;
  }
  sum_strips<A, N, R, kStep, 1>(p, t, {0}, 0, t.planes);
}

template <typename A, int N>
void sum(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if (p.step == PlaneRows::kSpread) return plane_rows_spread<A>(p, t);
  // A kernel of 7 with a step of 2 is too rare in double to be worth its compilation.
  constexpr bool kSevenByTwo = sizeof(A) == 4;
  const bool one = p.step == PlaneRows::kOne;
  const bool rolls = p.R % 2 == 1 && p.R > 1 && (one || p.R < 7 || kSevenByTwo);
  if (!rolls || p.step > PlaneRows::kTwo) return plane_rows_steps<A>(p, t);
  if (p.R == 3)
    return one ? sum_planes_of_three<A, N, 1>(p, t) : sum_planes_of_three<A, N, 2>(p, t);
  if (p.R == 5) return one ? sum_planes<A, N, 5, 1>(p, t) : sum_planes<A, N, 5, 2>(p, t);
  if constexpr (kSevenByTwo)
    if (!one) return sum_planes<A, N, 7, 2>(p, t);
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
