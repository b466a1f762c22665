// The backward pass of maxima over 2x2 or 3x3 windows that are 2 apart, by byte offsets.
//
// A thread writes 2 x 2 elements of dx for 16 bytes of channels (NHWC), or 2 rows of 16 bytes of a
// plane (NCHW): it loads the windows that hold them, at most four for each element, before it adds
// anything. Terms are added in ascending order of the windows. Elements of the half types are
// chosen for two at once, by masks; where there are more than two terms, floats add them. Bound:
// bytes moved.
#pragma once

#include "cuda/element_pairs.h"
#include "cuda/pool_backward_bands.h"

namespace torchconv::cuda {

inline constexpr int kQuadThreads = 128;

// Of four pairs, whose sums are rounded once.
template <typename T>
__device__ __forceinline__ uint32_t add_pairs(const uint32_t (&term)[4]) {
  const auto sum = [&](auto part) {
    return from_wide<T>(
        ((to_wide(part(term[0])) + to_wide(part(term[1]))) + to_wide(part(term[2]))) +
        to_wide(part(term[3])));
  };
  return pair_of(sum([](uint32_t pair) { return low_of<T>(pair); }),
                 sum([](uint32_t pair) { return high_of<T>(pair); }));
}

// One window's dy and offsets, of 16 bytes of channels.
template <typename T>
struct QuadSource {
  static constexpr int n = kLanes<T>, kWords = n / 4;
  Pack<T> dy;
  uint32_t code[kWords];

  __device__ __forceinline__ void clear() {
    dy = Pack<T>::filled(from_wide<T>(0.0f));
#pragma unroll
    for (int i = 0; i < kWords; i++) code[i] = ~0u;
  }
  __device__ __forceinline__ void load(const T* gradients, const uint8_t* codes) {
    dy = Pack<T>::load(gradients);
    const auto words = *reinterpret_cast<const Vector<uint32_t, kWords>*>(codes);
#pragma unroll
    for (int i = 0; i < kWords; i++) code[i] = words.element[i];
  }
  // Word k of dy, zero where another tap was selected.
  __device__ __forceinline__ uint32_t term(int k, uint32_t tap) const {
    if constexpr (sizeof(T) == 2) {
      // Small numbers, which are denormal halves.
      const uint32_t codes = __byte_perm(code[k / 2], 0, k % 2 == 0 ? 0x4140u : 0x4342u);
      return dy.word[k] & ~differ<Half>(codes, tap * 0x00010001u);
    } else {
      return (code[0] >> (8 * k) & 0xffu) == tap ? dy.word[k] : 0u;
    }
  }
};

template <typename T>
__device__ __forceinline__ uint32_t add_words(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 2)
    return add<T>(a, b);
  else
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
}
template <typename T>
__device__ __forceinline__ uint32_t add_words(const uint32_t (&term)[4]) {
  if constexpr (sizeof(T) == 2)
    return add_pairs<T>(term);
  else
    return __float_as_uint(
        ((__uint_as_float(term[0]) + __uint_as_float(term[1])) + __uint_as_float(term[2])) +
        __uint_as_float(term[3]));
}

struct PoolQuads {
  PoolView<int32_t> v;
  int32_t threads;
  int32_t first_p, first_q;  // windows whose first two rows and columns are written
  Quotient<int32_t> by_groups, by_columns, by_bands;
};

template <typename T, int R>
__global__ void __launch_bounds__(kQuadThreads)
    select_channel_quads(PoolQuads b, const T* __restrict__ dy,
                         const uint8_t* __restrict__ selected, T* __restrict__ dx) {
  constexpr int n = kLanes<T>, kBefore = R > 2 ? 1 : 0;
  int32_t rest =
      static_cast<int32_t>(blockIdx.x) * kQuadThreads + static_cast<int32_t>(threadIdx.x);
  if (rest >= b.threads) return;
  const int32_t c = b.by_groups.split(rest) * n;
  const int32_t q = b.first_q + b.by_columns.split(rest);
  const int32_t first_p = b.first_p + b.by_bands.split(rest), image = rest;
  const int32_t channels = b.v.channels;

  QuadSource<T> source[1 + kBefore][1 + kBefore];
#pragma unroll
  for (int i = 0; i <= kBefore; i++) {
    const int32_t p = first_p - kBefore + i;
    const bool inside = static_cast<uint32_t>(p) < static_cast<uint32_t>(b.v.h.out);
#pragma unroll
    for (int j = 0; j <= kBefore; j++) {
      const int32_t column = q - kBefore + j;
      source[i][j].clear();
      if (inside && static_cast<uint32_t>(column) < static_cast<uint32_t>(b.v.w.out)) {
        const int32_t at = ((image * b.v.h.out + p) * b.v.w.out + column) * channels + c;
        source[i][j].load(dy + at, selected + at);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int32_t h = first_p * 2 - b.v.h.pad + r;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(b.v.h.size)) continue;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      const int32_t w = q * 2 - b.v.w.pad + s;
      if (static_cast<uint32_t>(w) >= static_cast<uint32_t>(b.v.w.size)) continue;
      const bool above = kBefore == 1 && r == 0, before = kBefore == 1 && s == 0;
      Vector<uint32_t, 4> sums;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const auto term = [&](int up, int left) {
          return source[kBefore - up][kBefore - left].term(
              k, static_cast<uint32_t>((r + 2 * up) * R + s + 2 * left));
        };
        if (above && before)
          sums.element[k] = add_words<T>({term(1, 1), term(1, 0), term(0, 1), term(0, 0)});
        else if (above)
          sums.element[k] = add_words<T>(term(1, 0), term(0, 0));
        else if (before)
          sums.element[k] = add_words<T>(term(0, 1), term(0, 0));
        else
          sums.element[k] = add_words<T>(term(0, 0), 0u);  // never minus zero
      }
      const int32_t at = ((image * b.v.h.size + h) * b.v.w.size + w) * channels + c;
      *reinterpret_cast<Vector<uint32_t, 4>*>(dx + at) = sums;
    }
  }
}

// Windows that hold n neighbouring columns: those that begin in the middle, and for 3x3 windows,
// padded by a column, one after them.
template <typename T, int R>
struct PlaneQuadSource {
  static constexpr int n = kLanes<T>, kMiddle = n / 2, kAfter = R > 2 ? 1 : 0;
  Vector<T, kMiddle> dy;
  Vector<uint8_t, kMiddle> code;
  T dy_after;
  uint8_t code_after;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMiddle; i++) dy.element[i] = from_wide<T>(0.0f), code.element[i] = 0xff;
    dy_after = from_wide<T>(0.0f), code_after = 0xff;
  }
  __device__ __forceinline__ void load(const T* gradients, const uint8_t* codes, bool after) {
    dy = *reinterpret_cast<const Vector<T, kMiddle>*>(gradients);
    code = *reinterpret_cast<const Vector<uint8_t, kMiddle>*>(codes);
    if (kAfter == 1 && after) dy_after = gradients[kMiddle], code_after = codes[kMiddle];
  }
  __device__ __forceinline__ T dy_of(int j) const { return j < kMiddle ? dy.element[j] : dy_after; }
  __device__ __forceinline__ uint32_t code_of(int j) const {
    return j < kMiddle ? code.element[j] : code_after;
  }
};

template <typename T, int R>
__global__ void __launch_bounds__(kQuadThreads)
    select_plane_quads(PoolQuads b, const T* __restrict__ dy, const uint8_t* __restrict__ selected,
                       T* __restrict__ dx) {
  constexpr int n = kLanes<T>, kBefore = R > 2 ? 1 : 0;
  using Source = PlaneQuadSource<T, R>;
  int32_t rest =
      static_cast<int32_t>(blockIdx.x) * kQuadThreads + static_cast<int32_t>(threadIdx.x);
  if (rest >= b.threads) return;
  const int32_t first = b.by_groups.split(rest) * Source::kMiddle;  // window in the middle
  const int32_t first_p = b.first_p + b.by_bands.split(rest), image = rest;
  const bool after = first + Source::kMiddle < b.v.w.out;

  Source source[1 + kBefore];
#pragma unroll
  for (int i = 0; i <= kBefore; i++) {
    const int32_t p = first_p - kBefore + i;
    source[i].clear();
    if (static_cast<uint32_t>(p) < static_cast<uint32_t>(b.v.h.out)) {
      const int32_t at = (image * b.v.h.out + p) * b.v.w.out + first;
      source[i].load(dy + at, selected + at, after);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int32_t h = first_p * 2 - b.v.h.pad + r;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(b.v.h.size)) continue;
    const bool above = kBefore == 1 && r == 0;
    const int32_t at = (image * b.v.h.size + h) * b.v.w.size + 2 * first;
    // Columns 2 * j, of window j alone, and 2 * j + 1, which for 3x3 is in window j + 1 too.
    constexpr int kFirst = kBefore;  // tap of the even column
    if constexpr (sizeof(T) == 4) {
      store_all<T, n>(dx + at, [&](int k) {
        const int j = k / 2;
        const bool odd = k % 2 != 0;
        float sum = 0;
#pragma unroll
        for (int up = above ? 1 : 0; up >= 0; up--) {
          const Source& from = source[kBefore - up];
          const auto row = static_cast<uint32_t>((r + 2 * up) * R);
          if (from.code_of(j) == row + kFirst + (odd ? 1 : 0)) sum += from.dy_of(j);
          if (odd && kBefore == 1 && from.code_of(j + 1) == row) sum += from.dy_of(j + 1);
        }
        return sum;
      });
    } else {
      Vector<uint32_t, n / 2> sums;
#pragma unroll
      for (int j = 0; j < n / 2; j++) {
        const auto twice = [&](const Source& from, uint32_t row) {
          const uint32_t codes = from.code_of(j) * 0x00010001u;
          const uint32_t wanted = (row + kFirst) | (row + kFirst + 1) << 16;
          return pair_of(from.dy_of(j), from.dy_of(j)) & ~differ<Half>(codes, wanted);
        };
        const auto next = [&](const Source& from, uint32_t row) {
          const T none = from_wide<T>(0.0f);
          return from.code_of(j + 1) == row ? pair_of(none, from.dy_of(j + 1)) : 0u;
        };
        const Source& own = source[kBefore];
        const auto row = static_cast<uint32_t>(r * R);
        if constexpr (kBefore == 0) {
          sums.element[j] = add<T>(twice(own, row), 0u);
        } else if (above) {
          const Source& up = source[0];
          sums.element[j] = add_pairs<T>(
              {twice(up, row + 2 * R), next(up, row + 2 * R), twice(own, row), next(own, row)});
        } else {
          sums.element[j] = add<T>(twice(own, row), next(own, row));
        }
      }
      *reinterpret_cast<Vector<uint32_t, n / 2>*>(dx + at) = sums;
    }
  }
}

// Of R x R windows. In planes whose rows are not twice as long as those of dy, or not whole
// vectors, it is pool_backward_bands.
template <typename T, int R>
void run_select_quads(const PoolShape& s, int64_t images, const T* dy, const uint8_t* selected,
                      T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const bool planes = s.channels == 1;
  if (planes && !(s.w.size % n == 0 && s.w.size == 2 * s.w.out && aligned<T>(dx, n) &&
                  aligned<T>(dy, n / 2) && reinterpret_cast<uintptr_t>(selected) % (n / 2) == 0))
    return launch_backward_bands<T, true, R, R, 2, true>(s, images, dy, selected, dx, queue);
  const int64_t first_p = s.h.pad / 2, end_p = (s.h.size - 1 + s.h.pad) / 2 + 1;
  const int64_t first_q = s.w.pad / 2, end_q = (s.w.size - 1 + s.w.pad) / 2 + 1;
  const int64_t groups = planes ? s.w.size / n : s.channels / n;
  const int64_t columns = planes ? 1 : end_q - first_q, bands = end_p - first_p;
  const PoolQuads b{PoolView<int32_t>(s, images, n, false),
                    static_cast<int32_t>(groups * columns * bands * images),
                    static_cast<int32_t>(first_p),
                    static_cast<int32_t>(first_q),
                    Quotient<int32_t>(groups),
                    Quotient<int32_t>(columns),
                    Quotient<int32_t>(bands)};
  const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{b.threads}, int64_t{kQuadThreads})));
  launch(planes ? select_plane_quads<T, R> : select_channel_quads<T, R>, grid, dim3(kQuadThreads),
         0, queue, b, dy, selected, dx);
}

}  // namespace torchconv::cuda
