// Pooling's forward for the windows of networks, as pool_bands.h has it, but a thread has few rows
// of outputs, loads all that they need before it folds anything, and is done: many short blocks,
// whose loads are under way all the time. Bound: bytes moved.
//
// Of selections values alone: with codes, threads would have too much to keep. Those of the half
// types are made for two elements at once.
#pragma once

#include "cuda/element_pairs.h"
#include "cuda/pool_bands.h"

namespace torchconv::cuda {

inline constexpr int kPatchThreads = 128;

// Outputs i and i + 1 of a thread, i = 2 * k: what they have at tap s.
template <typename Rule, int S, int kStep>
__device__ __forceinline__ uint32_t tap_pair(const ChannelRows<Rule, S, kStep>&,
                                             const typename ChannelRows<Rule, S, kStep>::Raw& raw,
                                             int k, int s) {
  return raw.tap[s].word[k];
}
template <typename Rule, int S, int kStep>
__device__ __forceinline__ uint32_t tap_pair(const PlaneRows<Rule, S, kStep>&,
                                             const typename PlaneRows<Rule, S, kStep>::Raw& raw,
                                             int k, int s) {
  using Rows = PlaneRows<Rule, S, kStep>;
  static_assert(kStep == 2, "no pair of columns is a word");
  const auto word = [&](int at) -> uint32_t {
    if (at < 0) return pair_of(raw.before[at + Rows::kPad], raw.before[at + Rows::kPad]);
    if (at >= Rows::kMiddle)
      return pair_of(raw.after[at - Rows::kMiddle], raw.after[at - Rows::kMiddle]);
    return raw.middle[at / Rows::n].word[at % Rows::n / 2];
  };
  const int low = 2 * k * kStep + s - Rows::kPad, high = low + kStep;
  const int odd_low = low < 0 ? 0 : low % 2, odd_high = high >= Rows::kMiddle ? 0 : high % 2;
  return pick(word(low), odd_low, word(high), odd_high);
}

// What two neighbouring windows of R x R taps select, as a pair.
template <typename T, int R, typename Tap>
__device__ __forceinline__ uint32_t select_pair(Tap&& tap) {
  const uint32_t none = pair_of(from_wide<T>(lowest<T>()), from_wide<T>(lowest<T>()));
  uint32_t best = none, sum = 0;  // NaN where an element is
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int s = 0; s < R; s++) {
      const uint32_t x = tap(r, s);
      sum = r == 0 && s == 0 ? x : add<T>(sum, x);
      best = choose(greater<T>(x, best), x, best);
    }
  }
  if (differ<T>(sum, sum) == 0) return best;
  best = none;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int s = 0; s < R; s++) {
      const uint32_t x = tap(r, s);
      best = choose(greater<T>(x, best) | differ<T>(x, x), x, best);
    }
  }
  return best;
}

// Rows of outputs that a thread has.
template <bool kPlanes>
inline constexpr int kPatchRows = kPlanes ? 1 : 2;

// Windows of R x R taps.
template <typename Rule, int R, int kStep, bool kPlanes>
__global__ void __launch_bounds__(kPatchThreads)
    pool_patches(PoolBands b, const typename Rule::Element* __restrict__ x,
                 typename Rule::Element* __restrict__ y) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  using Rows = std::conditional_t<kPlanes, PlaneRows<Rule, R, kStep>, ChannelRows<Rule, R, kStep>>;
  constexpr int n = kLanes<T>, kRows = kPatchRows<kPlanes>, kIn = (kRows - 1) * kStep + R;
  constexpr bool kPairs = Rule::kSelects && sizeof(T) == 2;
  int32_t rest =
      static_cast<int32_t>(blockIdx.x) * kPatchThreads + static_cast<int32_t>(threadIdx.x);
  if (rest >= b.threads) return;
  const int32_t group = b.by_groups.split(rest);
  const int32_t column = kPlanes ? group * n : b.by_columns.split(rest);
  const int32_t c = kPlanes ? 0 : group * n;
  const int32_t first_p = b.by_bands.split(rest) * kRows, image = rest;
  const Rows rows(b, x, image, column, c);
  const int32_t first_top = first_p * kStep - b.v.h.pad;
  typename Rows::Raw raw[kIn];
#pragma unroll
  for (int r = 0; r < kIn; r++) raw[r] = rows.load(first_top + r);

  State folded[kPairs ? 1 : kIn][n];
  if constexpr (!kPairs) {
#pragma unroll
    for (int r = 0; r < kIn; r++) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        folded[r][i] = Rule::first(Rows::value(raw[r], i, 0));
#pragma unroll
        for (int s = 1; s < R; s++) Rule::fold(folded[r][i], Rows::value(raw[r], i, s), s);
      }
    }
  }
  const BandDivision<R, R> divisors(b.v);
#pragma unroll
  for (int row = 0; row < kRows; row++) {
    const int32_t p = first_p + row, top = first_top + row * kStep;
    if (p >= b.v.h.out) break;
    uint32_t best[kPairs ? n / 2 : 1];
    State total[kPairs ? 1 : n];
    if constexpr (kPairs) {
#pragma unroll
      for (int k = 0; k < n / 2; k++)
        best[k] = select_pair<T, R>(
            [&](int r, int s) { return tap_pair(rows, raw[row * kStep + r], k, s); });
    } else {
#pragma unroll
      for (int i = 0; i < n; i++) {
        total[i] = folded[row * kStep][i];
#pragma unroll
        for (int r = 1; r < R; r++) Rule::join(total[i], folded[row * kStep + r][i], r * R);
      }
    }
    [[maybe_unused]] const int32_t row_factor = Rule::kSelects ? 1 : divisors.row_factor(top);
    const auto output = [&](int i) {
      if constexpr (kPairs)
        return i % 2 == 0 ? low_of<T>(best[i / 2]) : high_of<T>(best[i / 2]);
      else if constexpr (Rule::kSelects)
        return from_wide<T>(total[i].value);
      else
        return Rule::finish(
            total[i], divisors.of(row_factor, (kPlanes ? column + i : column) * kStep - b.v.w.pad));
    };
    const int32_t position = ((image * b.v.h.out + p) * b.v.w.out + column) * b.v.channels + c;
    store_band<kPlanes, false, R, T>(b, y, {}, position, p, column, output,
                                     [](int) { return uint32_t{0}; });
  }
}

template <typename Rule, int R, int kStep, bool kPlanes>
void launch_pool_patches(const PoolShape& s, int64_t images, const typename Rule::Element* x,
                         typename Rule::Element* y, const Queue& queue) {
  const PoolBands b =
      pool_bands_of<typename Rule::Element>(s, images, kPatchRows<kPlanes>, x, y, {});
  const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{b.threads}, int64_t{kPatchThreads})));
  launch(pool_patches<Rule, R, kStep, kPlanes>, grid, dim3(kPatchThreads), 0, queue, b, x, y);
}

// Runs pool_patches or pool_bands where there is an instance for the problem, and says whether.
template <typename Rule, bool kCodes>
bool run_pool_bands(const PoolShape& s, int64_t images, const typename Rule::Element* x,
                    typename Rule::Element* y, const SelectedOutput& selected, const Queue& queue) {
  using T = typename Rule::Element;
  if constexpr (sizeof(T) < 8) {
    constexpr int n = kLanes<T>;
    const auto run = [&](auto taps, auto step) {
      constexpr int R = decltype(taps)::value, kStep = decltype(step)::value;
      constexpr bool kPatches = !kCodes && kStep == (Rule::kSelects ? 2 : 1);
      if (s.channels > 1) {
        if constexpr (kPatches)
          launch_pool_patches<Rule, R, kStep, false>(s, images, x, y, queue);
        else
          launch_pool_bands<Rule, R, R, kStep, false, kCodes>(s, images, x, y, selected, queue);
      } else {
        if constexpr (kPatches && Rule::kSelects)  // averages of planes have rows in common
          launch_pool_patches<Rule, R, kStep, true>(s, images, x, y, queue);
        else
          launch_pool_bands<Rule, R, R, kStep, true, kCodes>(s, images, x, y, selected, queue);
      }
    };
    constexpr std::integral_constant<int, 1> one{};
    constexpr std::integral_constant<int, 2> two{};
    constexpr std::integral_constant<int, 3> three{};
    switch (band_window<T>(s, aligned<T>(x, n) && aligned<T>(y, n) &&
                                  aligned_codes(selected.kind, selected.data, n))) {
      case BandWindow::k2x2Stride2:
        run(two, two);
        return true;
      case BandWindow::k3x3Stride2:
        run(three, two);
        return true;
      case BandWindow::k3x3Stride1:
        run(three, one);
        return true;
      case BandWindow::kNone:
        break;
    }
  }
  return false;
}

}  // namespace torchconv::cuda
