// Pooling's backward for any window, ordinary and adaptive, in both layouts: one thread for each
// element of dx, or in NHWC for 16 bytes of the channels of one, asks the windows that hold the
// element, in ascending order. Nothing is scattered, so no atomics, and every element is written.
// Bound: the loads of dy and of what was selected, which neighbouring elements share in the caches.
//
// A rule says what a window adds: dy where it selected the element, or dy over the divisor.
#pragma once

#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

// Whether each of n neighbouring selections is the wanted one. Bytes are compared four at a time:
// one instruction takes the difference and asks whether a byte of it is zero.
template <typename O, int n>
struct Matches {
  static constexpr bool kWords = sizeof(O) == 1 && n % 4 == 0;
  using Item = std::conditional_t<kWords, uint32_t, O>;
  static constexpr int kItems = kWords ? n / 4 : n;
  static constexpr int kPiece = kItems < kLanes<Item> ? kItems : kLanes<Item>;
  Vector<Item, kPiece> piece[kItems / kPiece];
  Item wanted;

  // None is.
  __device__ __forceinline__ Matches() {
#pragma unroll
    for (int i = 0; i < kItems; i++) piece[i / kPiece].element[i % kPiece] = static_cast<Item>(-1);
  }
  __device__ __forceinline__ explicit Matches(const O* p) {
#pragma unroll
    for (int i = 0; i < kItems / kPiece; i++)
      piece[i] = reinterpret_cast<const Vector<Item, kPiece>*>(p)[i];
  }
  __device__ __forceinline__ void want(O value) {
    if constexpr (kWords)
      wanted = value * uint32_t{0x01010101};
    else
      wanted = value;
  }
  __device__ __forceinline__ bool at(int i) const {
    if constexpr (kWords) {
      const uint32_t difference = piece[i / 4 / kPiece].element[i / 4 % kPiece] ^ wanted;
      return (difference & (uint32_t{0xff} << (i % 4 * 8))) == 0;
    } else {
      return piece[i / kPiece].element[i % kPiece] == wanted;
    }
  }
};

// Where a window's output stands, and which of its taps the element is.
template <typename I>
struct Asked {
  I position;  // in dy
  I p, q, r, s;
  int64_t index;  // of the element, h * W + w
};

template <typename T, typename O>
struct AddSelected {
  using Element = T;
  static constexpr bool kTwoLevels = false;
  const T* dy;
  const O* selected;

  template <int n, typename I>
  __device__ __forceinline__ void add(const PoolView<I>& v, const Asked<I>& a,
                                      Wide<T> (&sum)[n]) const {
    Matches<O, n> matches(selected + a.position);
    if constexpr (sizeof(O) == 8)
      matches.want(a.index);
    else
      matches.want(static_cast<O>(a.r * v.row_codes + a.s));
    // Of the many windows that a large one overlaps, few selected the element.
    bool any = v.h.taps < 4 && v.row_codes < 4;
#pragma unroll
    for (int i = 0; i < n; i++) any = any || matches.at(i);
    if (!any) return;
    const auto vector = *reinterpret_cast<const Vector<T, n>*>(dy + a.position);
#pragma unroll
    for (int i = 0; i < n; i++)
      if (matches.at(i)) sum[i] += to_wide(vector.element[i]);
  }
};

// Selections of any kind, for one element.
template <typename T>
struct AddSelectedAny {
  using Element = T;
  static constexpr bool kTwoLevels = false;
  const T* dy;
  Selected kind;
  const void* selected;

  template <int n, typename I>
  __device__ __forceinline__ void add(const PoolView<I>& v, const Asked<I>& a,
                                      Wide<T> (&sum)[n]) const {
    static_assert(n == 1);
    const bool match = kind == Selected::kIndex64
                           ? static_cast<const int64_t*>(selected)[a.position] == a.index
                           : load_code({kind, selected}, a.position) ==
                                 static_cast<uint32_t>(a.r) * static_cast<uint32_t>(v.row_codes) +
                                     static_cast<uint32_t>(a.s);
    if (match) sum[0] += to_wide(dy[a.position]);
  }
};

template <typename T>
struct AddAverage {
  using Element = T;
  static constexpr bool kTwoLevels = true;
  const T* dy;

  template <int n, typename I>
  __device__ __forceinline__ void add(const PoolView<I>& v, const Asked<I>& a,
                                      Wide<T> (&sum)[n]) const {
    const auto vector = *reinterpret_cast<const Vector<T, n>*>(dy + a.position);
    const Division<Wide<T>> over(v.template divisor_of<Wide<T>>(a.p, a.q));
#pragma unroll
    for (int i = 0; i < n; i++) sum[i] += over(to_wide(vector.element[i]));
  }
};

template <typename Rule, int n, typename I>
__global__ void __launch_bounds__(kPoolThreads)
    pool_backward(PoolView<I> v, Rule rule, typename Rule::Element* __restrict__ dx) {
  using T = typename Rule::Element;
  const I thread = pool_thread<I>();
  if (thread >= v.threads) return;
  const PoolPlace<I> at(v, thread, n);
  const auto rows = v.h.visits(at.row), columns = v.w.visits(at.column);
  Wide<T> total[n] = {};
  Asked<I> asked;
  asked.index = static_cast<int64_t>(at.row) * v.w.size + at.column;
  for (I i = 0; i < rows.count; i++) {
    if (!v.h.visit(at.row, rows.begin + i, &asked.p, &asked.r)) continue;
    const I row = (at.image * v.h.out + asked.p) * v.w.out;
    Wide<T> sum[n];
#pragma unroll
    for (int k = 0; k < n; k++) sum[k] = Rule::kTwoLevels ? Wide<T>{0} : total[k];
#pragma unroll 4
    for (I j = 0; j < columns.count; j++) {
      if (!v.w.visit(at.column, columns.begin + j, &asked.q, &asked.s)) continue;
      asked.position = (row + asked.q) * v.channels + at.c;
      rule.add(v, asked, sum);
    }
#pragma unroll
    for (int k = 0; k < n; k++) total[k] = Rule::kTwoLevels ? total[k] + sum[k] : sum[k];
  }
  store_all<T, n>(dx + static_cast<int64_t>(thread) * n,
                  [&](int k) { return from_wide<T>(total[k]); });
}

template <int n, typename I, typename Rule>
void launch_pool_backward(const PoolShape& s, int64_t images, const Rule& rule,
                          typename Rule::Element* dx, const Queue& queue) {
  const PoolView<I> view(s, images, n, false);
  launch(pool_backward<Rule, n, I>, pool_grid(view.threads), dim3(kPoolThreads), 0, queue, view,
         rule, dx);
}

}  // namespace torchconv::cuda
