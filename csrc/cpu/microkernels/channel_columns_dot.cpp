// channel_columns_dot: rolling columns of dz meet every source pixel of the kernel's rows, with the
// sums of as many of these as there is room for in registers.
#include <algorithm>

#include "cpu/microkernels/channel_columns.h"
#include "cpu/microkernels/plane_rows_impl.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// Rows [kFirst, kEnd) of the kernel.
template <typename T, int R, int kStep, int kFirst, int kEnd>
void dot_rows(const ChannelColumns& p, const ChannelColumnsDot<T>& t, int64_t lane, Wide<T>* sums) {
  using V = WideVec<T>;
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int kColumns = (R + kStep - 1) / kStep, kHeld = kEnd - kFirst;
  Type sum[kHeld][R];
  unroll<kHeld * R>([&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i / R][i % R] = Type{}; });
  const int64_t left = p.left, right = p.right, pitch = p.pitch;
  for (int64_t i = t.first; i < t.last; ++i) {
    const T* rows[kHeld];
    unroll<kHeld>([&](auto r) TORCHCONV_INLINE_LAMBDA {
      const int64_t h = i * kStep + t.first_h + kFirst + r;
      rows[r] = h >= 0 && h < t.rows ? t.src + h * t.src_row + lane : nullptr;
    });
    const T* dz = t.dz + i * t.dz_row + lane;
    Type gradient[kColumns];
    unroll<kColumns>([&](auto m) TORCHCONV_INLINE_LAMBDA { gradient[m] = Type{}; });
    int64_t at = 0, y = 0;
    for (int64_t rest = p.columns; rest > 1 - kColumns; --rest, dz += t.dz_column) {
      unroll<kColumns - 1>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        gradient[kColumns - 1 - m] = gradient[kColumns - 2 - m];
      });
      gradient[0] = rest > 0 ? V::load(dz) : Type{};
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        if (y >= left && y < right)
          unroll<kHeld>([&](auto r) TORCHCONV_INLINE_LAMBDA {
            if (rows[r] == nullptr) return;
            const Type x = V::load(rows[r] + at);
            unroll<kColumns>([&](auto m) TORCHCONV_INLINE_LAMBDA {
              constexpr int s = phase + m * kStep;
              if constexpr (s < R) sum[r][s] += gradient[m] * x;
            });
          });
        ++y;
        at += pitch;
      });
    }
  }
  unroll<kHeld * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
    Wide<T>* to = sums + (kFirst * R + i) * t.sum_step;
    W::store(to, W::load(to) + sum[i / R][i % R]);
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

template <typename T, int R, int kStep, int kFirst = 0>
void dot(const ChannelColumns& p, const ChannelColumnsDot<T>& t, int64_t lane, Wide<T>* sums) {
  constexpr int kEnd = std::min(R, kFirst + rows_held(R, kStep));
  dot_rows<T, R, kStep, kFirst, kEnd>(p, t, lane, sums);
  if constexpr (kEnd < R) dot<T, R, kStep, kEnd>(p, t, lane, sums);
}

// The last vector has sums of its own.
template <typename T, int R, int kStep>
void dot_vectors(const ChannelColumns& p, const ChannelColumnsDot<T>& t) {
  constexpr int64_t kL = WideVec<T>::kLanes;
  for (int64_t lane = 0; lane < p.channels; lane += kL)
    dot<T, R, kStep>(p, t, std::min(lane, p.channels - kL), t.sums + lane);
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
