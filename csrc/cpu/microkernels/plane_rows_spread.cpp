// The input gradient of a depthwise convolution with a stride of 2, all four residues at a time. A
// row of dz reaches R rows of dx, in each of which the even and the odd columns take the taps of
// their residue; their sums are interleaved in registers, so every row of dx is written once and
// whole.
#include "cpu/microkernels/plane_rows_spread.h"

#include "core/range.h"
#include "cpu/conv_pack.h"
#include "cpu/lane_range.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

template <int kFirst, typename Type, int... I>
TORCHCONV_INLINE Type interleave(Type a, Type b, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  return shuffle<((kFirst + I) / 2 + (I % 2 == 0 ? 0 : kN))...>(a, b);
}

template <typename A, int R>
void spread_strip(const PlaneRows p, const PlaneRowsSum<A> t, int64_t column, int64_t plane,
                  int64_t planes) {
  using V = Vec<A>;
  using Type = typename V::Type;
  constexpr int N = V::kLanes;
  constexpr auto kIndex = std::make_integer_sequence<int, N>();
  // Taps s = 2m + e of residue e read a source m to the left of where its first tap does: for the
  // second residue this is kOdd further left.
  constexpr int kOdd = R / 2 % 2, kLoads = (R + 1) / 2;
  const int64_t q = column / 2 + p.pad_w / 2 + kOdd,
                left = std::min(p.columns - column, int64_t{N}),
                right = std::clamp<int64_t>(p.columns - column - N, 0, N);
  LaneRange<A, N> lanes[kLoads];
  unroll<kLoads>([&](auto m) TORCHCONV_INLINE_LAMBDA {
    lanes[m] = LaneRange<A, N>::of(p.left - q + m, p.right - q + m);
  });
  const bool whole = right == N, streams = t.streams && whole;
  for (const int64_t end = plane + planes; plane < end; ++plane) {
    A weights[R * R];
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < R; ++s)
        weights[r * R + s] =
            t.weights[plane * t.weight_plane + r * t.weight_row + s * t.weight_column];
    Type sum[R][2];
    unroll<R>([&](auto r) TORCHCONV_INLINE_LAMBDA { sum[r][0] = sum[r][1] = Type{}; });
    const A* src = t.src + plane * t.src_plane;
    A* out = t.out + plane * t.out_plane + column;
    const int64_t last = floor_div(t.last - 1 + p.pad_h, 2);
    for (int64_t y = floor_div(t.first + p.pad_h - (R - 1), 2); y <= last; ++y) {
      if (y >= p.top && y < p.bottom) {
        const A* row = src + y * p.pitch + q;
        Type x[kLoads];
        unroll<kLoads>([&](auto m) TORCHCONV_INLINE_LAMBDA { x[m] = lanes[m].load(row - m); });
        unroll<R * R>([&](auto tap) TORCHCONV_INLINE_LAMBDA {
          constexpr int s = tap % R;
          sum[tap / R][s % 2] += V::broadcast(weights[tap]) * x[s / 2 + s % 2 * kOdd];
        });
      }
      unroll<2>([&](auto r) TORCHCONV_INLINE_LAMBDA {
        const int64_t h = 2 * y + r - p.pad_h;
        if (h < t.first || h >= t.last) return;
        const Type a = interleave<0>(sum[r][kOdd], sum[r][1 - kOdd], kIndex);
        const Type b = interleave<N>(sum[r][kOdd], sum[r][1 - kOdd], kIndex);
        A* to = out + h * t.out_pitch;
        if (streams) {
          stream_bytes(to, a);
          stream_bytes(to + N, b);
        } else if (whole) {
          V::store(to, a);
          V::store(to + N, b);
        } else {
          V::store_partial(to, a, left);
          V::store_partial(to + N, b, right);
        }
      });
      unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
        if constexpr (i / 2 + 2 < R)
          sum[i / 2][i % 2] = sum[i / 2 + 2][i % 2];
        else
          sum[i / 2][i % 2] = Type{};
      });
    }
  }
  if (streams) stream_fence();
}

template <typename A, int R>
void spread_planes(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  constexpr int64_t kWidth = 2 * kLanes<A>;
  if (p.columns <= kWidth) return spread_strip<A, R>(p, t, 0, 0, t.planes);
  for (int64_t plane = 0; plane < t.planes; ++plane)
    for (int64_t column = 0; column < p.columns; column += kWidth)
      spread_strip<A, R>(p, t, std::min(column, (p.columns - kWidth + 1) / 2 * 2), plane, 1);
}

}  // namespace

template <typename A>
void plane_rows_spread(const PlaneRows& p, const PlaneRowsSum<A>& t) {
  if (p.R == 3) return spread_planes<A, 3>(p, t);
  if (p.R == 5) return spread_planes<A, 5>(p, t);
  spread_planes<A, 7>(p, t);
}

template void plane_rows_spread(const PlaneRows&, const PlaneRowsSum<float>&);
template void plane_rows_spread(const PlaneRows&, const PlaneRowsSum<double>&);

}  // namespace torchconv::cpu
