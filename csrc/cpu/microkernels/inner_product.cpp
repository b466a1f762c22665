// The tiles of inner_product.h, one for each size.
#include "cpu/microkernels/inner_product.h"

#include <type_traits>
#include <utility>

namespace torchconv::cpu {
namespace {

// Of two vectors of blocks of kBlock lanes, the lower or upper (kFirst) half of each block.
template <int kBlock, int kFirst, typename Type, int... I>
TORCHCONV_INLINE Type half_blocks(Type a, Type b, std::integer_sequence<int, I...>) {
  constexpr int kHalf = kBlock / 2;
  return shuffle<(I / kHalf * kBlock + I % kHalf + kFirst * kHalf)...>(a, b);
}

// The blocks of a, then of b, each folded to half its lanes.
template <int kBlock, typename Type, int kLanes>
TORCHCONV_INLINE Type fold_blocks(Type a, Type b) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  return half_blocks<kBlock, 0>(a, b, kAll) + half_blocks<kBlock, 1>(a, b, kAll);
}

// Lane i of the result is the sum of rows[i], i < kRows: a power of two, at most the lanes.
template <int kBlock, int kRows, typename V>
TORCHCONV_INLINE typename V::Type sum_lanes(const typename V::Type* rows) {
  using Type = typename V::Type;
  if constexpr (kBlock == 1) {
    return rows[0];
  } else if constexpr (kRows == 1) {
    const Type folded = fold_blocks<kBlock, Type, V::kLanes>(rows[0], rows[0]);
    return sum_lanes<kBlock / 2, 1, V>(&folded);
  } else {
    Type folded[kRows / 2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows / 2; ++i)
      folded[i] = fold_blocks<kBlock, Type, V::kLanes>(rows[2 * i], rows[2 * i + 1]);
    return sum_lanes<kBlock / 2, kRows / 2, V>(folded);
  }
}

constexpr int power_of_two_within(int n) {
  int power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

// sums[i] = the sum of rows[i], i < kRows; whole vectors are written.
template <int kRows, typename V, typename T>
TORCHCONV_INLINE void sum_all_lanes(const typename V::Type* rows, T* sums) {
  constexpr int kNow = power_of_two_within(kRows < V::kLanes ? kRows : V::kLanes);
  V::store(sums, sum_lanes<V::kLanes, kNow, V>(rows));
  if constexpr (kRows > kNow) sum_all_lanes<kRows - kNow, V>(rows + kNow, sums + kNow);
}

template <typename T, int kPixels, int kFilters>
void inner_tile(const InnerTile<T>& tile) {
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int kL = V::kLanes;
  Register sum[kPixels * kFilters];
#pragma GCC unroll 32
  for (int i = 0; i < kPixels * kFilters; ++i) sum[i] = Register{};

  const int64_t step = tile.step, step3 = 3 * step, filter_step = tile.filter_step;
  // Weights take longer to come than the products with so few pixels.
  constexpr int kFewPixels = 2;
  for (const TermRun *run = tile.runs, *end = run + tile.run_count; run != end; ++run) {
    const T* src = tile.src + run->src;
    const T* w = tile.w + run->w;
    const auto multiply = [&](auto asks, const auto& load) {
      Register filters[kFilters];
#pragma GCC unroll 4
      for (int f = 0; f < kFilters; ++f) {
        filters[f] = load(w + f * filter_step);
        if constexpr (asks) __builtin_prefetch(w + f * filter_step + tile.ahead);
      }
      const T* pixel = src;
#pragma GCC unroll 16
      for (int m = 0; m < kPixels; m += 3, pixel += step3) {
#pragma GCC unroll 4
        for (int i = 0; i < 3; ++i)
          if (m + i < kPixels) {
            Register x = load(pixel + i * step);
            if constexpr (kFilters > 1) keep_in_register(x);
#pragma GCC unroll 4
            for (int f = 0; f < kFilters; ++f) sum[(m + i) * kFilters + f] += x * filters[f];
          }
      }
    };
    int64_t left = run->length;
    const auto whole = [](const T* p) { return V::load(p); };
    if constexpr (kPixels <= kFewPixels)
      if (tile.ahead != 0)
        for (; left >= kL; left -= kL, src += kL, w += kL) multiply(std::true_type(), whole);
    for (; left >= kL; left -= kL, src += kL, w += kL) multiply(std::false_type(), whole);
    if (left > 0)
      multiply(std::false_type(), [left](const T* p) { return V::load_partial(p, left); });
  }

  alignas(64) T sums[kPixels * kFilters + kL];
  sum_all_lanes<kPixels * kFilters, V>(sum, sums);
  T* out = tile.out;
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m, out += tile.out_pixel)
#pragma GCC unroll 4
    for (int f = 0; f < kFilters; ++f) out[f] += sums[m * kFilters + f];
}

// [size], of 1 << size pixels.
template <typename T, int kFilters, int... kSize>
InnerMicrokernel<T> find(int64_t pixels, std::integer_sequence<int, kSize...>) {
  static constexpr InnerMicrokernel<T> kTable[] = {inner_tile<T, 1 << kSize, kFilters>...};
  int64_t size = 0;
  while (int64_t{1} << size < pixels) ++size;
  return kTable[size];
}

template <typename T, int kFilters>
InnerMicrokernel<T> find(int64_t pixels) {
  constexpr int64_t kMost = inner_tile_pixels(kInnerPixels, kFilters);
  constexpr int kSizes = kMost == 8 ? 4 : kMost == 4 ? 3 : 2;
  return find<T, kFilters>(pixels, std::make_integer_sequence<int, kSizes>());
}

}  // namespace

template <typename T>
InnerMicrokernel<T> inner_microkernel(int64_t pixels, int64_t filters) {
  switch (filters) {
    case 1:
      return find<T, 1>(pixels);
    case 2:
      return find<T, 2>(pixels);
    case 3:
      return find<T, 3>(pixels);
    default:
      return find<T, 4>(pixels);
  }
}

template InnerMicrokernel<float> inner_microkernel(int64_t, int64_t);
template InnerMicrokernel<double> inner_microkernel(int64_t, int64_t);

}  // namespace torchconv::cpu
