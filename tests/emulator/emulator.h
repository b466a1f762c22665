// What csrc/cuda/launch.h includes in the place of CUDA's headers under TORCHCONV_EMULATE_CUDA: as
// much of CUDA C++ as the kernels use, so that a C++ compiler takes the .cu files as they are and
// their blocks run on the CPU, one after another.
//
// Every thread of a block is a coroutine (emulator.cpp), which runs until it meets a barrier or an
// exchange of its warp. A block's shared memory holds NaN before each block. What CUDA
// leaves undefined ends the launch with a std::runtime_error where it can be seen: a barrier that
// not all threads reach, lanes that meet in different exchanges, a launch beyond the device's
// limits. A missing barrier shows as a result that depends on the order of threads.
//
// Environment, read at every launch:
//   TORCHCONV_EMULATED_ORDER            forward (default), reverse or shuffle: threads and blocks
//   TORCHCONV_EMULATED_CAPABILITY       10 * major + minor of the device, 90 by default
//   TORCHCONV_EMULATED_MULTIPROCESSORS  4 by default
#pragma once

#include <math.h>  // unlike cmath it declares the overloads for float in the global namespace

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda/queue.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static thread_local  // so that emulator.cpp finds them all in one place
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vectors -------------------------------------------------------------------------------------

#define TORCHCONV_EMULATED_VECTORS(name, type, align2, align4)                \
  struct name##1 { type x; };                                                 \
  struct alignas(align2) name##2 { type x, y; };                              \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(align4) name##4 { type x, y, z, w; };                        \
  inline name##1 make_##name##1(type x) { return {x}; }                       \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

TORCHCONV_EMULATED_VECTORS(char, signed char, 2, 4)
TORCHCONV_EMULATED_VECTORS(uchar, unsigned char, 2, 4)
TORCHCONV_EMULATED_VECTORS(short, short, 4, 8)
TORCHCONV_EMULATED_VECTORS(ushort, unsigned short, 4, 8)
TORCHCONV_EMULATED_VECTORS(int, int, 8, 16)
TORCHCONV_EMULATED_VECTORS(uint, unsigned, 8, 16)
TORCHCONV_EMULATED_VECTORS(longlong, long long, 16, 16)
TORCHCONV_EMULATED_VECTORS(ulonglong, unsigned long long, 16, 16)
TORCHCONV_EMULATED_VECTORS(float, float, 8, 16)
TORCHCONV_EMULATED_VECTORS(double, double, 16, 16)
#undef TORCHCONV_EMULATED_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Those of the coroutine that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- bits and arithmetic -------------------------------------------------------------------------

namespace torchconv::cuda::emulator {
template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace torchconv::cuda::emulator

inline unsigned __float_as_uint(float v) { return torchconv::cuda::emulator::bits<unsigned>(v); }
inline int __float_as_int(float v) { return torchconv::cuda::emulator::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return torchconv::cuda::emulator::bits<float>(v); }
inline float __int_as_float(int v) { return torchconv::cuda::emulator::bits<float>(v); }
inline long long __double_as_longlong(double v) {
  return torchconv::cuda::emulator::bits<long long>(v);
}
inline double __longlong_as_double(long long v) {
  return torchconv::cuda::emulator::bits<double>(v);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Product;
  return static_cast<unsigned long long>((static_cast<Product>(a) * b) >> 64);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= ((v >> i) & 1u) << (31 - i);
  return reversed;
}
// Four of the eight bytes of (b, a), as the four low nibbles of selector say.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t{b} << 32) | a;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = (selector >> (4 * i)) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7u))) & 255u;
    if (nibble & 8u) byte = (byte & 128u) ? 255u : 0u;
    chosen |= byte << (8 * i);
  }
  return chosen;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }

#define TORCHCONV_EMULATED_MINMAX(result, a_type, b_type)                            \
  constexpr result min(a_type a, b_type b) {                                         \
    return static_cast<result>(b) < static_cast<result>(a) ? static_cast<result>(b)  \
                                                           : static_cast<result>(a); \
  }                                                                                  \
  constexpr result max(a_type a, b_type b) {                                         \
    return static_cast<result>(a) < static_cast<result>(b) ? static_cast<result>(b)  \
                                                           : static_cast<result>(a); \
  }
#define TORCHCONV_EMULATED_MINMAX_OF(type)                               \
  TORCHCONV_EMULATED_MINMAX(type, type, type)                            \
  TORCHCONV_EMULATED_MINMAX(unsigned type, unsigned type, unsigned type) \
  TORCHCONV_EMULATED_MINMAX(unsigned type, type, unsigned type)          \
  TORCHCONV_EMULATED_MINMAX(unsigned type, unsigned type, type)
TORCHCONV_EMULATED_MINMAX_OF(int)
TORCHCONV_EMULATED_MINMAX_OF(long)
TORCHCONV_EMULATED_MINMAX_OF(long long)
#undef TORCHCONV_EMULATED_MINMAX_OF
#undef TORCHCONV_EMULATED_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// --- loads and stores with a hint ----------------------------------------------------------------

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}

// --- the half types ------------------------------------------------------------------------------

// Constructed from numbers and read as float, as CUDA's are, by the conversions below.
struct __half {
  unsigned short __x;
  __half() = default;
  template <typename N, typename = std::enable_if_t<std::is_arithmetic_v<N>>>
  __half(N number);
  operator float() const;
};
struct __nv_bfloat16 {
  unsigned short __x;
  __nv_bfloat16() = default;
  template <typename N, typename = std::enable_if_t<std::is_arithmetic_v<N>>>
  __nv_bfloat16(N number);
  operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned short __half_as_ushort(__half v) { return v.__x; }
inline __half __ushort_as_half(unsigned short v) {
  return torchconv::cuda::emulator::bits<__half>(v);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) {
  return torchconv::cuda::emulator::bits<__nv_bfloat16>(v);
}

inline float __half2float(__half v) {
  const unsigned sign = (v.__x & 0x8000u) << 16, rest = v.__x & 0x7FFFu;
  if (rest >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | (rest << 13));
  if (rest >= 0x0400u) return __uint_as_float(sign | ((rest + 0x1C000u) << 13));
  return __uint_as_float(sign | __float_as_uint(static_cast<float>(rest) * 0x1p-24f));
}

// To nearest, ties to even; NaN becomes CUDA's one NaN.
inline __half __float2half_rn(float v) {
  const unsigned all = __float_as_uint(v), rest = all & 0x7FFFFFFFu;
  const unsigned sign = (all >> 16) & 0x8000u;
  const auto half = [](unsigned bits) {
    return __ushort_as_half(static_cast<unsigned short>(bits));
  };
  if (rest > 0x7F800000u) return half(0x7FFFu);
  if (rest >= 0x47800000u) return half(sign | 0x7C00u);  // 65536 and more
  // The 24 bits of the significand, shifted so that the half's last bit is the lowest.
  const bool normal = rest >= 0x38800000u;  // 2^-14 and more
  const int exponent = static_cast<int>(rest >> 23);
  const int shift = normal ? 13 : 126 - exponent;
  if (shift > 24) return half(sign);
  const unsigned significand = normal ? rest - 0x38000000u : (rest & 0x7FFFFFu) | 0x800000u;
  const unsigned low = significand & ((1u << shift) - 1u), middle = 1u << (shift - 1);
  unsigned result = significand >> shift;
  result += low > middle || (low == middle && (result & 1u) != 0u);
  return half(sign | result);  // a carry into the exponent is the next number, or infinity
}
inline __half __float2half(float v) { return __float2half_rn(v); }

inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.__x) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const unsigned all = __float_as_uint(v);
  if ((all & 0x7FFFFFFFu) > 0x7F800000u) return __ushort_as_bfloat16(0x7FFFu);
  return __ushort_as_bfloat16(
      static_cast<unsigned short>((all + 0x7FFFu + ((all >> 16) & 1u)) >> 16));
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }

template <typename N, typename>
__half::__half(N number) : __x(__float2half_rn(static_cast<float>(number)).__x) {}
inline __half::operator float() const { return __half2float(*this); }
template <typename N, typename>
__nv_bfloat16::__nv_bfloat16(N number) : __x(__float2bfloat16_rn(static_cast<float>(number)).__x) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }

// --- barriers and exchanges ----------------------------------------------------------------------

namespace torchconv::cuda::emulator {

// Where a thread waits. Threads meet only at the same place.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// How many of the block's threads came with true, once all have come.
int block_barrier(const Site& site, bool predicate);

using AnyFunction = void (*)();
// Once all live lanes of mask are here, the last to come calls meet(lanes, function), with what
// every lane brought, or null for a lane that takes no part; then all go on.
using Meet = void (*)(void* const* lanes, AnyFunction function);
void warp_meeting(const Site& site, unsigned mask, void* mine, Meet meet, AnyFunction function);

int lane();
unsigned live_lanes();

// Ends the launch with an error, from a kernel.
[[noreturn]] void fail(const std::string& message);

// An exchange of registers by the lanes of a warp, as the tensor core's instructions are: each lane
// comes with its registers in `mine`, one calls `together` for all 32 (a null pointer for each lane
// that takes no part), and every lane goes on with what `together` has put into its own.
template <typename T>
void warp_exchange(unsigned mask, T& mine, void (*together)(T* const* lanes),
                   const char* what = "warp_exchange", const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const Meet meet = [](void* const* untyped, AnyFunction function) {
    T* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<T*>(untyped[i]);
    reinterpret_cast<void (*)(T* const*)>(function)(lanes);
  };
  warp_meeting({what, file, line}, mask, &mine, meet, reinterpret_cast<AnyFunction>(together));
}

template <typename T>
struct Shuffled {
  T value;
  int source;
};

// The value of lane `source`; what a lane that takes no part has is undefined, here NaN.
template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, const char* file, int line) {
  Shuffled<T> mine{value, source};
  void (*const together)(Shuffled<T>* const*) = [](Shuffled<T>* const* lanes) {
    T values[32];
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) continue;
      const Shuffled<T>* from = lanes[lanes[i]->source];
      if (from == nullptr)
        std::memset(&values[i], 0xFF, sizeof(T));
      else
        values[i] = from->value;
    }
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr) lanes[i]->value = values[i];
  };
  warp_exchange(mask, mine, together, what, file, line);
  return mine.value;
}

struct Ballot {
  bool predicate;
  unsigned ballot;
  unsigned lanes;
};
inline Ballot ballot(unsigned mask, bool predicate, const char* what, const char* file, int line) {
  Ballot mine{predicate, 0, 0};
  void (*const together)(Ballot* const*) = [](Ballot* const* lanes) {
    unsigned ballot = 0, present = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr) {
        present |= 1u << i;
        ballot |= unsigned{lanes[i]->predicate} << i;
      }
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr) lanes[i]->ballot = ballot, lanes[i]->lanes = present;
  };
  warp_exchange(mask, mine, together, what, file, line);
  return mine;
}

}  // namespace torchconv::cuda::emulator

#define TORCHCONV_EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(TORCHCONV_EMULATED_SITE) {
  torchconv::cuda::emulator::block_barrier({"__syncthreads", file, line}, false);
}
inline int __syncthreads_count(int predicate, TORCHCONV_EMULATED_SITE) {
  return torchconv::cuda::emulator::block_barrier({"__syncthreads_count", file, line},
                                                  predicate != 0);
}
inline int __syncthreads_or(int predicate, TORCHCONV_EMULATED_SITE) {
  return torchconv::cuda::emulator::block_barrier({"__syncthreads_or", file, line},
                                                  predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, TORCHCONV_EMULATED_SITE) {
  return torchconv::cuda::emulator::block_barrier({"__syncthreads_and", file, line},
                                                  predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, TORCHCONV_EMULATED_SITE) {
  torchconv::cuda::emulator::warp_meeting(
      {"__syncwarp", file, line}, mask, nullptr,
      [](void* const*, torchconv::cuda::emulator::AnyFunction) {}, nullptr);
}

// A segment is `width` lanes, a power of two; what would leave it keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, TORCHCONV_EMULATED_SITE) {
  const int segment = torchconv::cuda::emulator::lane() & ~(width - 1);
  return torchconv::cuda::emulator::shuffle(mask, value, segment + (source & (width - 1)),
                                            "__shfl_sync", file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, TORCHCONV_EMULATED_SITE) {
  const int lane = torchconv::cuda::emulator::lane(), source = (lane ^ lane_mask) & 31;
  const int last = lane | (width - 1);
  return torchconv::cuda::emulator::shuffle(mask, value, source > last ? lane : source,
                                            "__shfl_xor_sync", file, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   TORCHCONV_EMULATED_SITE) {
  const int lane = torchconv::cuda::emulator::lane(), source = lane + static_cast<int>(delta);
  const int last = lane | (width - 1);
  return torchconv::cuda::emulator::shuffle(mask, value, source > last ? lane : source,
                                            "__shfl_down_sync", file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, TORCHCONV_EMULATED_SITE) {
  const int lane = torchconv::cuda::emulator::lane(), source = lane - static_cast<int>(delta);
  const int first = lane & ~(width - 1);
  return torchconv::cuda::emulator::shuffle(mask, value, source < first ? lane : source,
                                            "__shfl_up_sync", file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, TORCHCONV_EMULATED_SITE) {
  return torchconv::cuda::emulator::ballot(mask, predicate != 0, "__ballot_sync", file, line)
      .ballot;
}
inline int __any_sync(unsigned mask, int predicate, TORCHCONV_EMULATED_SITE) {
  return torchconv::cuda::emulator::ballot(mask, predicate != 0, "__any_sync", file, line).ballot !=
         0;
}
inline int __all_sync(unsigned mask, int predicate, TORCHCONV_EMULATED_SITE) {
  const auto b = torchconv::cuda::emulator::ballot(mask, predicate != 0, "__all_sync", file, line);
  return b.ballot == b.lanes;
}
#undef TORCHCONV_EMULATED_SITE

inline unsigned __activemask() { return torchconv::cuda::emulator::live_lanes(); }
[[noreturn]] inline void __trap() { torchconv::cuda::emulator::fail("a thread called __trap"); }

// Every write of the coroutines is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- launches ------------------------------------------------------------------------------------

namespace torchconv::cuda {

namespace emulator {

// What the emulated device says of itself.
int capability();
int multiprocessors();

void run(dim3 grid, dim3 block, int shared_bytes, int capability, void (*body)(const void* call),
         const void* call);
void* shared_memory();

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            const Queue& queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  emulator::run(
      grid, block, shared_bytes, queue.capability,
      [](const void* untyped) {
        const Call& one = *static_cast<const Call*>(untyped);
        std::apply(one.kernel, one.arguments);
      },
      &call);
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory());
}

}  // namespace torchconv::cuda
