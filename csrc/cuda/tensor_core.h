// The instructions of a tensor-core kernel for compute capability 8.0 and later: cp.async with zero
// fill, ldmatrix, and mma.sync on float16, bfloat16 and TF32 with float32 sums. Fragments are laid
// out as the PTX manual says of mma.m16n8k16 and mma.m16n8k8. With g = lane / 4 and t = lane % 4,
// in words of 32 bits:
//   A, 16 rows of 32 bytes    words 0..3 at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   B, 8 columns of 32 bytes  words 0..1 at (t, g), (t + 4, g)
//   sums, 16 x 8              0, 1 at (g, 2t), (g, 2t + 1); 2, 3 at (g + 8, 2t), (g + 8, 2t + 1)
// The two instructions look alike: 32 bytes are 16 half elements or 8 floats. The hardware
// truncates where it adds to a sum, so a chain of n instructions errs by about n * 2^-24.
//
// On older devices they trap; tests/emulator has them in plain C++.
#pragma once

#include "cuda/element.h"

#ifdef TORCHCONV_EMULATE_CUDA
#include "emulated_tensor_core.h"
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define TORCHCONV_FROM_SM80(statement) __trap()
#else
#define TORCHCONV_FROM_SM80(statement) statement
#endif

namespace torchconv::cuda {

// An address in shared memory, for arithmetic in bytes.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// Starts a copy of 4, 8 or 16 bytes from global memory, both addresses aligned to as many; zeros,
// without a look at `from`, where it is not valid.
template <int Bytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  [[maybe_unused]] const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    TORCHCONV_FROM_SM80(
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to),
                     "l"(from), "r"(read)));
  else
    TORCHCONV_FROM_SM80(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to),
                                     "l"(from), "n"(Bytes), "r"(read)));
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
  TORCHCONV_FROM_SM80(asm volatile("cp.async.commit_group;\n" ::));
}

// Waits for all groups of this thread but the newest `Pending`.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  TORCHCONV_FROM_SM80(asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory"));
}

__device__ __forceinline__ uint32_t load_shared(SharedAddress from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(from));
  return word;
}

__device__ __forceinline__ void store_shared(SharedAddress to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(word) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane 8 * i + j gives the address of row j of matrix i, and
// receives word t of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], SharedAddress row) {
  TORCHCONV_FROM_SM80(asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n" : "=r"(word[0]),
      "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(row)));
}

// As load_matrices, each matrix of 16-bit elements transposed: a lane receives elements (2t, g) and
// (2t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&word)[4], SharedAddress row) {
  TORCHCONV_FROM_SM80(asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n" : "=r"(word[0]),
      "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(row)));
}

// Either of the two; the same for all lanes.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], SharedAddress row,
                                              bool transposed) {
  TORCHCONV_FROM_SM80(asm volatile(
      "{\n.reg .pred transposed;\nsetp.ne.s32 transposed, %5, 0;\n"
      "@!transposed ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      "@transposed ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, "
      "[%4];\n}\n" : "=r"(word[0]),
      "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(row), "r"(static_cast<int>(transposed))));
}

// float32 to TF32, to nearest with ties away from zero, up to bits that the hardware ignores: half
// a unit in TF32's last place is added to a normal number, 2^-11 of what its exponent alone stands
// for. cvt.rna.tf32 does as much by a comparison and a predicate, of which there are too few for
// many roundings at a time. Infinity and NaN stay.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t word) {
  const float power = __uint_as_float(word & 0xFF800000u);
  return __float_as_uint(fmaf(power, 0x1p-11f, __uint_as_float(word)));
}

// sums += A * B, of Half, BFloat16, or float that has been rounded to TF32.
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#define TORCHCONV_MMA(shape_and_types)                                                          \
  TORCHCONV_FROM_SM80(                                                                          \
      asm("mma.sync.aligned." shape_and_types                                                   \
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" : "+f"(sums[0]), \
          "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]),        \
          "r"(a[3]), "r"(b0), "r"(b1)))
  if constexpr (std::is_same_v<T, Half>)
    TORCHCONV_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else if constexpr (std::is_same_v<T, BFloat16>)
    TORCHCONV_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    TORCHCONV_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef TORCHCONV_MMA
}

}  // namespace torchconv::cuda

#undef TORCHCONV_FROM_SM80
#endif
