// What the kernels share that issue wgmma themselves: operands in shared memory, in rows with the
// swizzle that the tensor memory accelerator writes, and the maps of tensors that it reads.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/launch.h"

// clang-format off
#include "cutlass/cutlass.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cuda/cutlass_sm90_tensor_map.h"  // before what makes tensor maps
#include "cute/tensor.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/barrier.h"
// clang-format on

namespace torchconv::cuda::sm90 {

// 64 rows by kColumns, 64 or 32, of sums of 16 terms. Turned operands have terms in rows of memory.
template <class Element, int kColumns, bool kTurnedA, bool kTurnedB>
struct Product {
  static constexpr auto kA = kTurnedA ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K;
  static constexpr auto kB = kTurnedB ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K;
  using Wide = std::conditional_t<std::is_same_v<Element, __half>,
                                  cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<kA, kB>,
                                  cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<kA, kB>>;
  using Narrow = std::conditional_t<std::is_same_v<Element, __half>,
                                    cute::SM90::GMMA::MMA_64x32x16_F32F16F16_SS<kA, kB>,
                                    cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<kA, kB>>;
  static_assert(kColumns == 64 || kColumns == 32);
  using Type = std::conditional_t<kColumns == 64, Wide, Narrow>;
};

// A thread's sums are half as many as there are columns.
template <class Product, size_t... i>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float* sums,
                                         std::index_sequence<i...>) {
  Product::fma(a, b, sums[i]...);
}
template <class Element, int kColumns, bool kTurnedA, bool kTurnedB>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float (&sums)[kColumns / 2]) {
  multiply<typename Product<Element, kColumns, kTurnedA, kTurnedB>::Type>(
      a, b, sums, std::make_index_sequence<kColumns / 2>{});
}

// Rows of kBytes, 128 or 64, with the swizzle of as many, eight rows after eight.
template <int kBytes>
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  static_assert(kBytes == 128 || kBytes == 64);
  constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : 2;
  return (kSwizzle << 62) | (uint64_t{8 * kBytes >> 4} << 32) | (uint64_t{1} << 16) |
         (address >> 4);
}

__device__ __forceinline__ uint32_t rounded(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t rounded(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

// What a thread adds to its columns of 64: bias[i] to column i / 2 * 8 + i % 2 of its pairs, which
// begin at `first`; zero from channel K on.
template <class Element>
__device__ __forceinline__ void load_bias(const void* bias, int first, int K, float (&values)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int k = first + i / 2 * 8 + i % 2;
    values[i] =
        bias == nullptr || k >= K ? 0.f : static_cast<float>(static_cast<const Element*>(bias)[k]);
  }
}

// Row `row` of the thread's pairs t of 64 columns, sum_at(column pair, element), with the bias and
// within [low, high], to rows of 128 bytes in shared memory with their swizzle.
template <class Element, typename Sum>
__device__ __forceinline__ void store_row(unsigned char* rows, int row, int t,
                                          const float (&bias)[16], float low, float high,
                                          const Sum& sum_at) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float z[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float sum = sum_at(j, e) + bias[2 * j + e];
      const float raised = sum < low ? low : sum;
      z[e] = raised > high ? high : raised;
    }
    *reinterpret_cast<uint32_t*>(rows + row * 128 + ((j ^ (row & 7)) << 4) + 4 * t) =
        rounded(z[0], z[1], Element{});
  }
}

// A tensor, innermost size first and contiguous, the strides of the others in elements, in boxes
// with a swizzle as long as their rows.
template <int kRank>
CUtensorMap tensor_map(DType dtype, const void* data, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int64_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint64_t extents[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i + 1 < kRank) bytes[i] = 2 * static_cast<cuuint64_t>(strides[i]);
  }
  CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)
  (&map,
   dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
   static_cast<cuuint32_t>(kRank), const_cast<void*>(data), &extents[0], &bytes[0], &boxes[0],
   &steps[0], CU_TENSOR_MAP_INTERLEAVE_NONE,
   box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

// Of a dense tensor.
template <int kRank>
CUtensorMap tensor_map(DType dtype, const void* data, const int64_t (&sizes)[kRank],
                       const int64_t (&box)[kRank]) {
  int64_t strides[kRank - 1], stride = 1;
  for (int i = 0; i + 1 < kRank; ++i) strides[i] = stride *= sizes[i];
  return tensor_map<kRank>(dtype, data, sizes, strides, box);
}

}  // namespace torchconv::cuda::sm90
