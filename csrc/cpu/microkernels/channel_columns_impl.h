// The loops of channel_columns_sum and channel_columns_spread. V loads and stores vectors of T: a
// WideVec<T>, or what takes its place for the instructions that a file is compiled for.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "core/range.h"
#include "cpu/microkernels/channel_columns.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// f(lane) for the vectors of channels from `lane` on.
template <int kL, typename F>
TORCHCONV_INLINE void for_vectors(int64_t lane, int64_t channels, F&& f) {
  for (; lane < channels; lane += kL) f(std::min(lane, channels - kL));
}

// Vectors of channels that are walked together: of bfloat16 and float16 those of a cache line, half
// of which would else be fetched again for the next, where their sums have room in registers.
template <typename T>
constexpr int columns_together(int S) {
  return kVectorBytes == 64 && sizeof(T) == 2 && S <= 3 ? 2 : 1;
}

// How a vector of channels is loaded and stored.
template <typename T>
struct ChannelVec : WideVec<T> {
  using Type = typename WideVec<T>::Type;
  static constexpr bool kAnyKernel =
      std::is_same_v<T, float> || (std::is_same_v<T, BFloat16> && kVectorBytes < 64);
  // Neighbouring vectors.
  template <int kV>
  static TORCHCONV_INLINE void store(T* p, const Type (&v)[kV], bool streams) {
    unroll<kV>([&](auto i) TORCHCONV_INLINE_LAMBDA {
      WideVec<T>::store(p + i * WideVec<T>::kLanes, v[i], streams);
    });
  }
};

// Where the lines of a vector of channels go.
template <typename T, typename V>
class Outputs {
 public:
  using Type = typename V::Type;

  TORCHCONV_INLINE Outputs(const ChannelColumnsSum<T>& t, int64_t lane)
      : streams_(t.streams), clamps_(t.clamps), most_(V::broadcast(t.most)) {
    unroll<kColumnLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
      out_[line] = t.out[line] != nullptr ? t.out[line] + lane : nullptr;
      wide_[line] = t.wide[line] != nullptr ? t.wide[line] + lane : nullptr;
    });
  }

  TORCHCONV_INLINE bool there(int line) const { return out_[line] != nullptr; }
  // Neighbouring vectors. `at` and `wide_at`: of the column.
  template <int kV>
  TORCHCONV_INLINE void store(int line, int64_t at, [[maybe_unused]] int64_t wide_at,
                              Type (&v)[kV]) const {
    if (clamps_) unroll<kV>([&](auto i) TORCHCONV_INLINE_LAMBDA { v[i] = clamped(v[i], most_); });
    if constexpr (!std::is_same_v<T, Wide<T>>)
      if (wide_[line] != nullptr)
        return unroll<kV>([&](auto i) TORCHCONV_INLINE_LAMBDA {
          V::Registers::store(wide_[line] + wide_at + i * V::kLanes, v[i]);
        });
    V::store(out_[line] + at, v, streams_);
  }

 private:
  T* out_[kColumnLines];
  Wide<T>* wide_[kColumnLines];
  bool streams_, clamps_;
  Type most_;
};

// sum[vector][line][column] += the taps of kPhase in the source rows that are there, of a kernel of
// any number of rows, whose weights are read from memory. One of them is there.
template <typename V, int S, int kStep, int kPhase, typename T, int kV, int kColumns>
TORCHCONV_INLINE void add_rows(const ChannelColumns& p, const ChannelColumnsSum<T>& t, const T* src,
                               const Wide<T>* weights,
                               typename V::Type (&sum)[kV][kColumnLines][kColumns]) {
  using W = typename V::Registers;
  constexpr int kTaps = (S - kPhase + kStep - 1) / kStep, kL = V::kLanes;
  const int64_t vector = p.R * S * kL, row = t.src_row;
  const int64_t begin = __builtin_ctz(t.rows), end = 32 - __builtin_clz(t.rows);
  const int64_t shared = std::min<int64_t>(std::max<int64_t>(begin, kStep), end);
  const int64_t second = std::clamp<int64_t>(p.R, shared, end);
  // Source rows [from, to), of which the lines [kFirst, kLast] read.
  const auto add = [&](int64_t from, int64_t to, auto first, auto last) TORCHCONV_INLINE_LAMBDA {
    constexpr int kFirst = decltype(first)::value, kLast = decltype(last)::value;
    const T* x = src + from * row;
    const Wide<T>* w = weights + (from * S + kPhase) * kL;
    for (int64_t source = from; source < to; ++source, x += row, w += S * kL)
      unroll<kV>([&](auto v) TORCHCONV_INLINE_LAMBDA {
        typename V::Type value = V::load(x + v * kL);
        if constexpr (kTaps > 1 || kFirst < kLast) keep_in_register(value);
        unroll<(kLast - kFirst + 1) * kTaps>([&](auto i) TORCHCONV_INLINE_LAMBDA {
          constexpr int line = kFirst + i / kTaps, m = i % kTaps;
          sum[v][line][m] += W::load(w + v * vector + (m - line * S) * kStep * kL) * value;
        });
      });
  };
  constexpr std::integral_constant<int, 0> kUpper;
  constexpr std::integral_constant<int, 1> kLower;
  add(begin, std::min<int64_t>(shared, p.R), kUpper, kUpper);
  add(shared, second, kUpper, kLower);
  add(std::max<int64_t>(second, kStep), end, kLower, kLower);
}

// R rows, or any number of them where R is 0, of S columns. kWhole: all source rows are there.
template <typename T, typename V, int R, int S, int kStep, int kV, bool kWhole>
void sum_lines(const ChannelColumns& p, const ChannelColumnsSum<T>& t, int64_t lane) {
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int kLines = kColumnLines;
  constexpr int kColumns = (S + kStep - 1) / kStep;  // output columns that a source column reaches
  // Few weights stay in registers; of many, the rows that the second line needs again.
  constexpr bool kHeld = R > 0 && R * S <= 9 && kV == 1;
  constexpr int64_t kL = V::kLanes;
  const Wide<T>* weights = t.weights + ceil_div(lane, kL) * kL * p.R * S;
  Type held[kHeld ? R * S : 1];
  if constexpr (kHeld)
    unroll<R * S>([&](auto i) TORCHCONV_INLINE_LAMBDA { held[i] = W::load(weights + i * kL); });
  const Outputs<T, V> outputs(t, lane);
  const int64_t columns = p.columns, pitch = p.pitch, row = t.src_row;
  const uint32_t there = t.rows;
  // Of no row none is read.
  const auto columns_there =
      there == 0 ? 0 : static_cast<uint64_t>(std::max<int64_t>(p.right - p.left, 0));
  // Each vector fetches its part of what is read next in the order of memory.
  constexpr int64_t kFetched = kLines * kStep * kV * kL * int64_t{sizeof(T)};  // by a column
  const char* next = reinterpret_cast<const char*>(t.next);
  if (next != nullptr) next += lane / kL * static_cast<int64_t>(columns_there) * (kFetched / kV);
  // Once for each line; those that a step writes whole are not waited for.
  const bool fetches_out =
      kV == 1 && t.next_out[0] != nullptr && lane * int64_t{sizeof(T)} % 64 == 0;
  const T* next_out[kLines];
  unroll<kLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
    next_out[line] = fetches_out ? t.next_out[line] + lane : nullptr;
  });
  Type start[kV];
  Type sum[kV][kLines][kColumns];
  unroll<kV>([&](auto v) TORCHCONV_INLINE_LAMBDA {
    start[v] = W::load(t.start + lane + v * kL);
    unroll<kLines * kColumns>(
        [&](auto i) TORCHCONV_INLINE_LAMBDA { sum[v][i / kColumns][i % kColumns] = start[v]; });
  });
  const T* src = t.src + lane;
  auto y = static_cast<uint64_t>(-p.left);  // of the columns that are there
  const int64_t out_step = t.out_step;
  int64_t out = (1 - kColumns) * out_step;
  for (int64_t done = 1 - kColumns; done < columns; ++done) {
    unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
      if (y < columns_there) {
        if (next != nullptr) {
          unroll<(kFetched + 63) / 64>(
              [&](auto i) TORCHCONV_INLINE_LAMBDA { __builtin_prefetch(next + i * 64, 0, 2); });
          next += kFetched;
        }
        // By its type: GCC 13.3 of Ubuntu 24.04 crashes on `phase` itself here.
        constexpr int kPhase = decltype(phase)::value;
        if constexpr (R == 0) {
          add_rows<V, S, kStep, kPhase>(p, t, src, weights, sum);
        } else {
          constexpr int kTaps = (S - kPhase + kStep - 1) / kStep;
          constexpr int kSources = R + (kLines - 1) * kStep;
          Type kept[kV][kStep][kTaps];
          unroll<kSources>([&](auto source) TORCHCONV_INLINE_LAMBDA {
            Type row_weights[kV][kTaps];
            if constexpr (source < R)
              unroll<kV * kTaps>([&](auto i) TORCHCONV_INLINE_LAMBDA {
                constexpr int v = i / kTaps, m = i % kTaps, tap = source * S + kPhase + m * kStep;
                if constexpr (kHeld)
                  row_weights[v][m] = held[tap];
                else
                  row_weights[v][m] = W::load(weights + (tap + v * R * S) * kL);
              });
            if (kWhole || (there >> source & 1) != 0) {
              unroll<kV>([&](auto v) TORCHCONV_INLINE_LAMBDA {
                Type x = V::load(src + source * row + v * kL);
                if constexpr (kTaps > 1 || (source >= kStep && source < R)) keep_in_register(x);
                unroll<kTaps>([&](auto m) TORCHCONV_INLINE_LAMBDA {
                  if constexpr (source < R) sum[v][0][m] += row_weights[v][m] * x;
                  if constexpr (source >= kStep) sum[v][1][m] += kept[v][source % kStep][m] * x;
                });
              });
            }
            if constexpr (source < R)
              unroll<kV * kTaps>([&](auto i) TORCHCONV_INLINE_LAMBDA {
                constexpr int v = i / kTaps, m = i % kTaps;
                kept[v][source % kStep][m] = row_weights[v][m];
              });
          });
        }
      }
      ++y;
      src += pitch;
    });
    if (done >= 0) {
      if (fetches_out)
        unroll<kLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
          __builtin_prefetch(next_out[line] + out, 1, 2);
        });
      unroll<kLines>([&](auto line) TORCHCONV_INLINE_LAMBDA {
        if (line > 0 && !outputs.there(line)) return;
        Type done_sums[kV];
        unroll<kV>([&](auto v)
                       TORCHCONV_INLINE_LAMBDA { done_sums[v] = sum[v][line][kColumns - 1]; });
        outputs.store(line, out, done * t.wide_step, done_sums);
      });
    }
    out += out_step;
    unroll<kV * kLines>([&](auto i) TORCHCONV_INLINE_LAMBDA {
      constexpr int v = i / kLines, line = i % kLines;
      unroll<kColumns - 1>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        sum[v][line][kColumns - 1 - m] = sum[v][line][kColumns - 2 - m];
      });
      sum[v][line][0] = start[v];
    });
  }
}

template <typename T, typename V, int R>
void spread_lines(const ChannelColumns& p, const ChannelColumnsSum<T>& t, int64_t lane) {
  using W = typename V::Registers;
  using Type = typename V::Type;
  constexpr int kSources = (R + 1) / 2, kL = V::kLanes;
  const Wide<T>* weights = t.weights + ceil_div(lane, kL) * kL * R * R;
  Type sum[2][R];
  unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA { sum[i / R][i % R] = Type{}; });
  const Outputs<T, V> outputs(t, lane);
  const T* next = t.next;
  const int64_t last = floor_div(p.columns - 1 + p.pad_w, 2);
  for (int64_t q = floor_div(p.pad_w - (R - 1), 2); q <= last; ++q) {
    if (next != nullptr && q >= p.left && q < p.right)
      __builtin_prefetch(next + q * p.pitch + lane);
    if (q >= p.left && q < p.right)
      unroll<kSources>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        if ((t.rows >> m & 1) == 0) return;
        const Type x = V::load(t.src + m * t.src_row + q * p.pitch + lane);
        unroll<2 * R>([&](auto i) TORCHCONV_INLINE_LAMBDA {
          constexpr int line = i / R, s = i % R, r = 2 * m + line;
          if constexpr (r < R) sum[line][s] += W::load(weights + (r * R + s) * kL) * x;
        });
      });
    unroll<2>([&](auto e) TORCHCONV_INLINE_LAMBDA {
      const int64_t w = 2 * q + e - p.pad_w;
      if (w < 0 || w >= p.columns) return;
      unroll<2>([&](auto line) TORCHCONV_INLINE_LAMBDA {
        Type done[1] = {sum[line][e]};
        if (outputs.there(line)) outputs.store(line, w * t.out_step, w * t.wide_step, done);
      });
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

template <typename T, typename V, int R, int S, int kStep, bool kWhole = false>
void sum_vectors(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  constexpr int kV = columns_together<T>(S), kLanes = kV * V::kLanes;
  const int64_t together = kV == 1 ? 0 : p.channels / kLanes * kLanes;
  if constexpr (kV > 1)
    for_vectors<kLanes>(
        0, together, [&](int64_t lane) { sum_lines<T, V, R, S, kStep, kV, kWhole>(p, t, lane); });
  for_vectors<V::kLanes>(together, p.channels, [&](int64_t lane) {
    sum_lines<T, V, R, S, kStep, 1, kWhole>(p, t, lane);
  });
}

template <typename T, typename V, int R>
void spread_vectors(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  for_vectors<V::kLanes>(0, p.channels, [&](int64_t lane) { spread_lines<T, V, R>(p, t, lane); });
}

template <typename T, typename V, int... kIndex>
void sum_any_rows(const ChannelColumns& p, const ChannelColumnsSum<T>& t,
                  std::integer_sequence<int, kIndex...>) {
  using Kernel = void (*)(const ChannelColumns&, const ChannelColumnsSum<T>&);
  static constexpr Kernel kTable[3][sizeof...(kIndex)] = {{sum_vectors<T, V, 0, kIndex + 1, 1>...},
                                                          {sum_vectors<T, V, 0, kIndex + 1, 2>...},
                                                          {sum_vectors<T, V, 1, kIndex + 1, 1>...}};
  kTable[p.step == 1 && p.R == 1 ? 2 : p.step - 1][p.S - 1](p, t);
}

// Of other kernels than sum_columns has by itself.
template <typename T, typename V>
void sum_other_columns(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  const bool one = p.step == 1;
  if (p.step == 3) return sum_vectors<T, V, 3, 3, 3>(p, t);
  if (p.step == 4) return sum_vectors<T, V, 4, 4, 4>(p, t);
  if (p.R == 2 && p.S == 2)
    return one ? sum_vectors<T, V, 2, 2, 1>(p, t) : sum_vectors<T, V, 2, 2, 2>(p, t);
  if (p.R == 4 && p.S == 4)
    return one ? sum_vectors<T, V, 4, 4, 1>(p, t) : sum_vectors<T, V, 4, 4, 2>(p, t);
  if (one && p.R == 3 && p.S == 1) return sum_vectors<T, V, 3, 1, 1>(p, t);
  sum_any_rows<T, V>(p, t, std::make_integer_sequence<int, kMostColumns>());
}

template <typename T, typename V>
void sum_columns(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  const bool one = p.step == 1, square = p.R == p.S && p.step <= 2;
  // Few products do not hide the tests of rows that may not be there.
  if (square && p.R == 3 && p.step == 2 && t.rows == (1U << (3 + 2)) - 1)
    return sum_vectors<T, V, 3, 3, 2, true>(p, t);
  if (square && p.R == 3)
    return one ? sum_vectors<T, V, 3, 3, 1>(p, t) : sum_vectors<T, V, 3, 3, 2>(p, t);
  if (square && p.R == 5)
    return one ? sum_vectors<T, V, 5, 5, 1>(p, t) : sum_vectors<T, V, 5, 5, 2>(p, t);
  if (one && square && p.R == 7) return sum_vectors<T, V, 7, 7, 1>(p, t);
  if constexpr (V::kAnyKernel)
    sum_other_columns<T, V>(p, t);
  else
    std::abort();  // columns_of_any_kernel says no
}

template <typename T, typename V>
void spread_columns(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  if (p.R == 3) return spread_vectors<T, V, 3>(p, t);
  if (p.R == 5) return spread_vectors<T, V, 5>(p, t);
  spread_vectors<T, V, 7>(p, t);
}

}  // namespace
}  // namespace torchconv::cpu
