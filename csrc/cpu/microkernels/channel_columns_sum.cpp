// channel_columns_sum and channel_columns_spread.
#include <algorithm>

#include "core/range.h"
#include "cpu/microkernels/channel_columns.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// f(lane) for the vectors of channels.
template <int kL, typename F>
TORCHCONV_INLINE void for_vectors(int64_t channels, F&& f) {
  for (int64_t lane = 0; lane < channels; lane += kL) f(std::min(lane, channels - kL));
}

template <typename T>
TORCHCONV_INLINE void store_line(const ChannelColumnsSum<T>& t, int line, int64_t column,
                                 int64_t lane, typename WideVec<T>::Type v) {
  if (t.out[line] == nullptr) return;
  if (t.clamps) v = clamped(v, WideVec<T>::broadcast(t.most));
  if (t.wide[line] != nullptr)
    WideVec<T>::Registers::store(t.wide[line] + column * t.wide_step + lane, v);
  else
    WideVec<T>::store(t.out[line] + column * t.out_step + lane, v, t.streams);
}

template <typename T, int R, int kStep>
void sum_lines(const ChannelColumns& p, const ChannelColumnsSum<T>& t, int64_t lane) {
  using V = WideVec<T>;
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int kLines = kColumnLines, kSources = R + (kLines - 1) * kStep;
  constexpr int kColumns = (R + kStep - 1) / kStep;  // output columns that a source column reaches
  // Few weights stay in registers; of many, the rows that the second line needs again.
  constexpr bool kHeld = R == 3;
  const T* sources[kSources];
  unroll<kSources>([&](auto i) TORCHCONV_INLINE_LAMBDA { sources[i] = t.sources[i]; });
  const Wide<T>* weights = t.weights + lane;
  const int64_t weight_step = t.weight_step;
  Type held[kHeld ? R * R : 1];
  if constexpr (kHeld)
    unroll<R * R>([&](auto i)
                      TORCHCONV_INLINE_LAMBDA { held[i] = W::load(weights + i * weight_step); });
  const int64_t left = p.left, right = p.right, columns = p.columns, pitch = p.pitch;
  // Each vector fetches its part of what follows in the order of memory.
  constexpr int64_t kFetched = kLines * kStep * V::kLanes * int64_t{sizeof(T)};  // by a column
  const char* next = reinterpret_cast<const char*>(t.next);
  if (next != nullptr) next += lane / V::kLanes * (right - left) * kFetched;
  const Type start = W::load(t.start + lane);
  Type sum[kLines][kColumns];
  unroll<kLines * kColumns>(
      [&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i / kColumns][i % kColumns] = start; });
  int64_t at = lane, y = 0;
  for (int64_t done = 1 - kColumns; done < columns; ++done) {
    unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
      if (y >= left && y < right) {
        if (next != nullptr) {
          unroll<(kFetched + 63) / 64>(
              [&](auto i) TORCHCONV_INLINE_LAMBDA { __builtin_prefetch(next + i * 64, 0, 2); });
          next += kFetched;
        }
        // By its type: GCC 13.3 of Ubuntu 24.04 crashes on `phase` itself here.
        constexpr int kPhase = decltype(phase)::value;
        constexpr int kTaps = (R - kPhase + kStep - 1) / kStep;
        Type kept[kStep][kTaps];
        unroll<kSources>([&](auto source) TORCHCONV_INLINE_LAMBDA {
          Type row[kTaps];
          if constexpr (source < R)
            unroll<kTaps>([&](auto m) TORCHCONV_INLINE_LAMBDA {
              constexpr int tap = source * R + kPhase + m * kStep;
              if constexpr (kHeld)
                row[m] = held[tap];
              else
                row[m] = W::load(weights + tap * weight_step);
            });
          if (sources[source] != nullptr) {
            const Type x = V::load(sources[source] + at);
            unroll<kTaps>([&](auto m) TORCHCONV_INLINE_LAMBDA {
              if constexpr (source < R) sum[0][m] += row[m] * x;
              if constexpr (source >= kStep) sum[1][m] += kept[source % kStep][m] * x;
            });
          }
          if constexpr (source < R)
            unroll<kTaps>([&](auto m)
                              TORCHCONV_INLINE_LAMBDA { kept[source % kStep][m] = row[m]; });
        });
      }
      ++y;
      at += pitch;
    });
    if (done >= 0)
      unroll<kLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
        store_line(t, line, done, lane, sum[line][kColumns - 1]);
      });
    unroll<kLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
      unroll<kColumns - 1>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        sum[line][kColumns - 1 - m] = sum[line][kColumns - 2 - m];
      });
      sum[line][0] = start;
    });
  }
}

template <typename T, int R>
void spread_lines(const ChannelColumns& p, const ChannelColumnsSum<T>& t, int64_t lane) {
  using V = WideVec<T>;
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int kSources = (R + 1) / 2;
  const Wide<T>* weights = t.weights + lane;
  Type sum[2][R];
  unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i / R][i % R] = Type{}; });
  const T* next = t.next;
  const int64_t last = floor_div(p.columns - 1 + p.pad_w, 2);
  for (int64_t q = floor_div(p.pad_w - (R - 1), 2); q <= last; ++q) {
    if (next != nullptr && q >= p.left && q < p.right)
      __builtin_prefetch(next + q * p.pitch + lane);
    if (q >= p.left && q < p.right)
      unroll<kSources>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        if (t.sources[m] == nullptr) return;
        const Type x = V::load(t.sources[m] + q * p.pitch + lane);
        unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
          constexpr int line = i / R, s = i % R, r = 2 * m + line;
          if constexpr (r < R) sum[line][s] += W::load(weights + (r * R + s) * t.weight_step) * x;
        });
      });
    unroll<2>([&](auto e) TORCHCONV_INLINE_LAMBDA {
      const int64_t w = 2 * q + e - p.pad_w;
      if (w < 0 || w >= p.columns) return;
      store_line(t, 0, w, lane, sum[0][e]);
      store_line(t, 1, w, lane, sum[1][e]);
    });
    unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
      constexpr int line = i / R, s = i % R;
      if constexpr (s + 2 < R)
        sum[line][s] = sum[line][s + 2];
      else
        sum[line][s] = Type{};
    });
  }
}

template <typename T, int R, int kStep>
void sum_vectors(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  for_vectors<WideVec<T>::kLanes>(p.channels,
                                  [&](int64_t lane) { sum_lines<T, R, kStep>(p, t, lane); });
}

template <typename T, int R>
void spread_vectors(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  for_vectors<WideVec<T>::kLanes>(p.channels,
                                  [&](int64_t lane) { spread_lines<T, R>(p, t, lane); });
}

}  // namespace

template <typename T>
void channel_columns_sum(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  const bool one = p.step == 1;
  if (p.R == 3) return one ? sum_vectors<T, 3, 1>(p, t) : sum_vectors<T, 3, 2>(p, t);
  if (p.R == 5) return one ? sum_vectors<T, 5, 1>(p, t) : sum_vectors<T, 5, 2>(p, t);
  sum_vectors<T, 7, 1>(p, t);
}

template <typename T>
void channel_columns_spread(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  if (p.R == 3) return spread_vectors<T, 3>(p, t);
  if (p.R == 5) return spread_vectors<T, 5>(p, t);
  spread_vectors<T, 7>(p, t);
}

#define TORCHCONV_CHANNEL_COLUMNS(T)                                                     \
  template void channel_columns_sum(const ChannelColumns&, const ChannelColumnsSum<T>&); \
  template void channel_columns_spread(const ChannelColumns&, const ChannelColumnsSum<T>&);
TORCHCONV_CHANNEL_COLUMNS(float)
TORCHCONV_CHANNEL_COLUMNS(double)
TORCHCONV_CHANNEL_COLUMNS(BFloat16)
TORCHCONV_CHANNEL_COLUMNS(Float16)
#undef TORCHCONV_CHANNEL_COLUMNS

}  // namespace torchconv::cpu
