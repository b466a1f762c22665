// channel_columns_dot: rolling columns of dz meet every source pixel of the kernel's rows, with the
// sums of as many of these as there is room for in registers.
#include <algorithm>

#include "cpu/microkernels/channel_columns.h"
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// Rows [kFirst, kEnd) of the kernel, for kV neighbouring vectors of channels.
template <typename T, int R, int kStep, int kV, int kFirst, int kEnd>
void dot_rows(const ChannelColumns& p, const ChannelColumnsDot<T>& t, int64_t lane, Wide<T>* sums) {
  using V = WideVec<T>;
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  constexpr int kColumns = (R + kStep - 1) / kStep, kHeld = kEnd - kFirst;
  Type sum[kV][kHeld][R];
  unroll<kV * kHeld * R>(
      [&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i / (kHeld * R)][i / R % kHeld][i % R] = Type{}; });
  const int64_t left = p.left, right = p.right, pitch = p.pitch;
  // Each vector fetches its part, as many lines at a column of dz as it reads of new ones.
  constexpr int64_t kFetched = kStep * kStep * kV;
  const bool fetches = kFirst == 0 && t.next_dz != nullptr;
  const int64_t fetched = lane * (t.last - t.first) * p.columns;
  const T* next_dz = fetches ? t.next_dz + fetched : nullptr;
  const T* next_src = fetches ? t.next_src + fetched * kStep * kStep : nullptr;
  for (int64_t i = t.first; i < t.last; ++i) {
    const T* rows[kHeld];
    unroll<kHeld>([&](auto r) TORCHCONV_INLINE_LAMBDA {
      const int64_t h = i * kStep + t.first_h + kFirst + r;
      rows[r] = h >= 0 && h < t.rows ? t.src + h * t.src_row + lane : nullptr;
    });
    const T* dz = t.dz + i * t.dz_row + lane;
    Type gradient[kV][kColumns];
    unroll<kV * kColumns>(
        [&](auto i) TORCHCONV_INLINE_LAMBDA { gradient[i / kColumns][i % kColumns] = Type{}; });
    int64_t at = 0, y = 0;
    for (int64_t rest = p.columns; rest > 1 - kColumns; --rest, dz += t.dz_column) {
      unroll<kV>([&](auto v) TORCHCONV_INLINE_LAMBDA {
        unroll<kColumns - 1>([&](auto m) TORCHCONV_INLINE_LAMBDA {
          gradient[v][kColumns - 1 - m] = gradient[v][kColumns - 2 - m];
        });
        gradient[v][0] = rest > 0 ? V::load(dz + v * kL) : Type{};
      });
      if (fetches) {
        unroll<kV>([&](auto l)
                       TORCHCONV_INLINE_LAMBDA { __builtin_prefetch(next_dz + l * kL, 0, 2); });
        unroll<kFetched>(
            [&](auto l) TORCHCONV_INLINE_LAMBDA { __builtin_prefetch(next_src + l * kL, 0, 2); });
        next_dz += kV * kL;
        next_src += kFetched * kL;
      }
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        if (y >= left && y < right)
          unroll<kHeld>([&](auto r) TORCHCONV_INLINE_LAMBDA {
            if (rows[r] == nullptr) return;
            unroll<kV>([&](auto v) TORCHCONV_INLINE_LAMBDA {
              const Type x = V::load(rows[r] + at + v * kL);
              unroll<kColumns>([&](auto m) TORCHCONV_INLINE_LAMBDA {
                constexpr int s = phase + m * kStep;
                if constexpr (s < R) sum[v][r][s] += gradient[v][m] * x;
              });
            });
          });
        ++y;
        at += pitch;
      });
    }
  }
  unroll<kV * kHeld * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
    constexpr int v = i / (kHeld * R), tap = i % (kHeld * R);
    Wide<T>* to = sums + (kFirst * R + tap) * t.sum_step + v * kL;
    W::store(to, W::load(to) + sum[v][tap / R][tap % R]);
  });
}

// Rows of the kernel whose sums are held at a time.
constexpr int rows_held(int R, int step) {
  const int columns = (R + step - 1) / step;
  int held = 1;
  while (held < R && R * (held + 1) + columns + 1 <= kVectorRegisters) ++held;
  const int passes = (R + held - 1) / held;
  return (R + passes - 1) / passes;
}

// Vectors of channels that are walked together: two of them where the sums of both have room in
// registers, at about half the loads' addresses and conditions.
constexpr int vectors_held(int R, int step) {
  return 2 * (R * R + (R + step - 1) / step) + 1 <= kVectorRegisters ? 2 : 1;
}

template <typename T, int R, int kStep, int kV, int kFirst = 0>
void dot(const ChannelColumns& p, const ChannelColumnsDot<T>& t, int64_t lane, Wide<T>* sums) {
  constexpr int kEnd = std::min(R, kFirst + rows_held(R, kStep));
  dot_rows<T, R, kStep, kV, kFirst, kEnd>(p, t, lane, sums);
  if constexpr (kEnd < R) dot<T, R, kStep, kV, kEnd>(p, t, lane, sums);
}

// The last vector has sums of its own.
template <typename T, int R, int kStep>
void dot_vectors(const ChannelColumns& p, const ChannelColumnsDot<T>& t) {
  constexpr int64_t kL = WideVec<T>::kLanes;
  constexpr int kV = vectors_held(R, kStep);
  int64_t lane = 0;
  if constexpr (kV > 1)
    for (; lane + kV * kL <= p.channels; lane += kV * kL)
      dot<T, R, kStep, kV>(p, t, lane, t.sums + lane);
  for (; lane < p.channels; lane += kL)
    dot<T, R, kStep, 1>(p, t, std::min(lane, p.channels - kL), t.sums + lane);
}

}  // namespace

template <typename T>
void channel_columns_dot(const ChannelColumns& p, const ChannelColumnsDot<T>& t) {
  const bool one = p.step == 1;
  if (p.R == 3) return one ? dot_vectors<T, 3, 1>(p, t) : dot_vectors<T, 3, 2>(p, t);
  if (p.R == 5) return one ? dot_vectors<T, 5, 1>(p, t) : dot_vectors<T, 5, 2>(p, t);
  dot_vectors<T, 7, 1>(p, t);
}

template void channel_columns_dot(const ChannelColumns&, const ChannelColumnsDot<float>&);
template void channel_columns_dot(const ChannelColumns&, const ChannelColumnsDot<double>&);
template void channel_columns_dot(const ChannelColumns&, const ChannelColumnsDot<BFloat16>&);
template void channel_columns_dot(const ChannelColumns&, const ChannelColumnsDot<Float16>&);

}  // namespace torchconv::cpu
