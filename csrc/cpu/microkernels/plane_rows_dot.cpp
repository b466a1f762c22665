// plane_rows_dot: R rolling rows of dz meet every shifted row of the source, with the sums of as
// many taps in registers as there is room for.
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/microkernels/plane_rows_steps.h"

namespace torchconv::cpu {
namespace {

// Columns of the kernel whose sums are held at a time.
constexpr int columns_held(int R, int step) {
  const int rows = (R + step - 1) / step;
  int held = 1;
  while (held < R && R * (held + 1) + rows + 2 * step <= kVectorRegisters + 1) ++held;
  const int passes = (R + held - 1) / held;
  return (R + passes - 1) / passes;
}

// Columns [kFirst, kEnd) of the kernel.
template <typename A, int N, int R, int kStep, int kFirst, int kEnd>
void dot_columns(const PlaneRows p, const PlaneRowsDot<A> t) {
  using V = Vec<A, N>;
  using Type = typename V::Type;
  constexpr int kRows = (R + kStep - 1) / kStep, kHeld = kEnd - kFirst;
  StripSource<A, N, R, kStep> source(p, t.begin * N);
  const bool fetches = kFirst == 0 && t.src_ahead != 0;  // by the first of several passes
  for (int64_t channel = 0; channel < t.channels; ++channel) {
    Type sum[R][kHeld];
#pragma GCC unroll 32
    for (int i = 0; i < R * kHeld; ++i) sum[i / kHeld][i % kHeld] = Type{};
    for (int64_t strip = t.begin; strip < t.end; ++strip) {
      if (t.end - t.begin > 1) source = StripSource<A, N, R, kStep>(p, strip * N);
      const auto lanes = LaneRange<A, N>::of(0, p.columns - strip * N);
      for (int64_t plane = 0; plane < t.planes; ++plane) {
        int64_t y = t.first * kStep;
        const A* src = t.src + channel * t.src_channel + plane * t.src_plane + y * p.pitch;
        const A* dz =
            t.dz + channel * t.dz_channel + plane * t.dz_plane + strip * N + t.first * t.dz_pitch;
        Type gradient[kRows];
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) gradient[m] = Type{};
        for (int64_t left = t.last - t.first; left > 1 - kRows; --left, dz += t.dz_pitch) {
#pragma GCC unroll 16
          for (int m = kRows - 1; m > 0; --m) gradient[m] = gradient[m - 1];
          gradient[0] = left > 0 ? lanes.load(dz) : Type{};
          if (fetches) __builtin_prefetch(dz + t.dz_ahead, 0, 2);
          unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
            if (y >= p.top && y < p.bottom) {
              const auto row = source.row(src);
              if (fetches) source.fetch(src + t.src_ahead);
              unroll<kHeld>([&](auto s) TORCHCONV_INLINE_LAMBDA {
                const Type x = source.template column<kFirst + s>(row);
                unroll<kRows>([&](auto m) TORCHCONV_INLINE_LAMBDA {
                  constexpr int r = phase + m * kStep;
                  if constexpr (r < R) sum[r][s] += gradient[m] * x;
                });
              });
            }
            ++y;
            src += p.pitch;
          });
        }
      }
    }
    double* totals = t.totals + channel * R * R + kFirst;
#pragma GCC unroll 32
    for (int i = 0; i < R * kHeld; ++i)
      totals[i / kHeld * R + i % kHeld] +=
          static_cast<double>(add_lanes<A, N>(sum[i / kHeld][i % kHeld]));
  }
}

template <typename A, int N, int R, int kStep, int kFirst = 0>
void dot(const PlaneRows& p, const PlaneRowsDot<A>& t) {
  constexpr int kEnd = std::min(R, kFirst + columns_held(R, kStep));
  dot_columns<A, N, R, kStep, kFirst, kEnd>(p, t);
  if constexpr (kEnd < R) dot<A, N, R, kStep, kEnd>(p, t);
}

template <typename A, int N>
void dot_planes(const PlaneRows& p, const PlaneRowsDot<A>& t) {
  const bool one = p.step == PlaneRows::kOne;
  if (p.step > PlaneRows::kTwo || p.R % 2 == 0) return plane_rows_steps_dot<A>(p, t);
  if (p.R == 3) return one ? dot<A, N, 3, 1>(p, t) : dot<A, N, 3, 2>(p, t);
  if (p.R == 5) return one ? dot<A, N, 5, 1>(p, t) : dot<A, N, 5, 2>(p, t);
  dot<A, N, 7, 1>(p, t);
}

}  // namespace

template <typename A>
int64_t plane_rows_lanes(const PlaneRows& p) {
  return p.columns <= kNarrowLanes<A> ? kNarrowLanes<A> : kLanes<A>;
}

template <typename A>
void plane_rows_dot(const PlaneRows& p, const PlaneRowsDot<A>& t) {
  if (p.columns <= kNarrowLanes<A>) return dot_planes<A, kNarrowLanes<A>>(p, t);
  dot_planes<A, kLanes<A>>(p, t);
}

template int64_t plane_rows_lanes<float>(const PlaneRows&);
template int64_t plane_rows_lanes<double>(const PlaneRows&);
template void plane_rows_dot(const PlaneRows&, const PlaneRowsDot<float>&);
template void plane_rows_dot(const PlaneRows&, const PlaneRowsDot<double>&);

}  // namespace torchconv::cpu
