// Sums of many values at once over the threads of a block, and over slices of a reduction: always
// in the same order.
#pragma once

#include "cuda/element.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

constexpr int power_of_two(int count) { return count <= 1 ? 1 : 2 * power_of_two((count + 1) / 2); }

// Adds kCount values (a power of two) over a warp. Half of the values goes to the other half of the
// lanes in every step, so that 31 exchanges serve 32 values. Lane l then holds the totals of
// values [first_value(l), first_value(l) + max(kCount / 32, 1)) in v[0], v[1], ...
template <int kCount, int kOffset = 16, typename A, int kSize>
__device__ __forceinline__ void warp_sums(A (&v)[kSize]) {
  if constexpr (kOffset > 0) {
    if constexpr (kCount > 1) {
      const bool upper = (threadIdx.x & kOffset) != 0;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const A kept = upper ? v[i + kCount / 2] : v[i];
        v[i] = kept + __shfl_xor_sync(~0u, upper ? v[i] : v[i + kCount / 2], kOffset);
      }
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], kOffset);
    }
    warp_sums<(kCount + 1) / 2, kOffset / 2>(v);
  }
}

template <int kCount>
__device__ __forceinline__ int first_value(int lane) {
  int first = 0;
  for (int count = kCount, offset = 16; offset > 0 && count > 1; count /= 2, offset /= 2)
    first += (lane & offset) != 0 ? count / 2 : 0;
  return first;
}

// f(i, total) for each of kCount sums over all threads of the block, called by thread i % blockDim.
// shared: [warps][power_of_two(kCount)], which nobody uses any more. All threads call it.
template <int kCount, typename A, typename F>
__device__ __forceinline__ void block_sums(const A* sums, A* shared, F&& f) {
  constexpr int kPadded = power_of_two(kCount), kHeld = kPadded > 32 ? kPadded / 32 : 1;
  A v[kPadded];
#pragma unroll
  for (int i = 0; i < kPadded; ++i) v[i] = i < kCount ? sums[i] : A{0};
  warp_sums<kPadded>(v);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  __syncthreads();
  const int first = first_value<kPadded>(lane);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) shared[warp * kPadded + first + i] = v[i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += static_cast<int>(blockDim.x)) {
    A total{0};
    for (int each = 0; each < static_cast<int>(blockDim.x / 32); ++each)
      total += shared[each * kPadded + i];
    f(i, total);
  }
}

// Where a slice's sum goes: to its partial sums, or, of a single slice, to the result.
template <typename T>
struct SliceSums {
  T* result;
  Wide<T>* partial;  // [slices][elements]; null where there is one slice
  int64_t elements;

  __device__ __forceinline__ void store(int64_t slice, int64_t element, Wide<T> sum) const {
    if (partial == nullptr)
      result[element] = from_wide<T>(sum);
    else
      partial[slice * elements + element] = sum;
  }
};

template <typename T>
SliceSums<T> slice_sums(T* result, int64_t slices, int64_t elements, const Queue& queue) {
  return {result, slices > 1 ? queue.scratch<Wide<T>>(slices * elements) : nullptr, elements};
}

// result = partial sums added over slices, in double; it may be one of the slices. Nothing where
// there is one slice.
template <typename T>
void add_slices(const SliceSums<T>& sums, int64_t slices, const Queue& queue);

}  // namespace torchconv::cuda
