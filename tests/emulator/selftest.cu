// Kernels that test_emulator.py runs on the emulated device, right ones and wrong ones.
#include "cuda/divmod.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace torchconv::cuda {
namespace {

// y[b] = the sum of the block's part of x, as a tree in shared memory.
__global__ void __launch_bounds__(256) block_sums(const float* __restrict__ x, float* y, int n) {
  __shared__ float partial[256];
  const int t = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + t;
  partial[t] = i < n ? x[i] : 0.0f;
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) partial[t] += partial[t + half];
  }
  if (t == 0) y[blockIdx.x] = partial[0];
}

// y = x with each block reversed; without the barrier a thread reads what is not written yet.
template <bool Barrier>
__global__ void reverse_block(const float* x, float* y) {
  float* held = dynamic_shared<float>();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  held[threadIdx.x] = x[i];
  if constexpr (Barrier) __syncthreads();
  y[i] = held[blockDim.x - 1 - threadIdx.x];
}

// y = x of the block's first thread, which writes it only where `written` says so.
__global__ void first_of_block(const float* x, float* y, unsigned written) {
  __shared__ float first;
  if (threadIdx.x == 0 && (written >> blockIdx.x) % 2 == 1) first = x[blockIdx.x * blockDim.x];
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = first;
}

// Seven shuffles of the thread's number, a row of the output each.
__global__ void shuffles(int* y) {
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const unsigned all = 0xFFFFFFFFu;
  int* out = y + t;
  out[0 * n] = __shfl_sync(all, t, 5);
  out[1 * n] = __shfl_sync(all, t, t + 1, 8);
  out[2 * n] = __shfl_xor_sync(all, t, 16);
  out[3 * n] = __shfl_down_sync(all, t, 3, 16);
  out[4 * n] = __shfl_up_sync(all, t, 3, 16);
  out[5 * n] = static_cast<int>(__ballot_sync(all, t % 3 == 0));
  out[6 * n] = __any_sync(all, t == 40) + 2 * __all_sync(all, t < 48) +
               4 * __syncthreads_count(t < 7) + 256 * __syncthreads_or(t == 9) +
               512 * __syncthreads_and(t != 9);
}

// Half of the lanes leave; those that stay exchange without them, then meet at a barrier.
__global__ void early_exit(int* y) {
  const int t = static_cast<int>(threadIdx.x);
  y[t] = -1;
  if (t % 2 == 1) return;
  __syncthreads();
  y[t] = __shfl_xor_sync(0x55555555u, t, 2);
}

__global__ void split_warp(float* y) {
  const float v = y[threadIdx.x];
  if (threadIdx.x % 2 == 0)
    y[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  else
    __syncthreads();
}

__global__ void outside_mask(int* y) { y[threadIdx.x] = __shfl_sync(1u, 0, 0); }

__global__ void overrun() {
  unsigned char* memory = dynamic_shared<unsigned char>();
  memory[100] = 0;
}

__global__ void trap() {
  if (threadIdx.x == 3 && blockIdx.y == 2) __trap();
}

// c = a b^T for 32 x 32 matrices, a warp's exchange of rows: lane i has row i of a, b and c.
struct Rows {
  float a[32], b[32], c[32];
};
__global__ void warp_product(const float* a, const float* b, float* c) {
  const unsigned lane = threadIdx.x;
  Rows rows;
  for (int i = 0; i < 32; ++i) rows.a[i] = a[lane * 32 + i], rows.b[i] = b[lane * 32 + i];
  emulator::warp_exchange<Rows>(0xFFFFFFFFu, rows, [](Rows* const* lanes) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j) {
        lanes[i]->c[j] = 0;
        for (int k = 0; k < 32; ++k) lanes[i]->c[j] += lanes[i]->a[k] * lanes[j]->b[k];
      }
  });
  for (int i = 0; i < 32; ++i) c[lane * 32 + i] = rows.c[i];
}

__global__ void coordinates(int* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * blockDim.x * blockDim.y * blockDim.z + thread]++;
}

template <typename F>
const char* caught(F&& f) {
  static std::string message;
  try {
    Queue queue{};
    queue.capability = emulator::capability();
    queue.multiprocessors = emulator::multiprocessors();
    f(queue);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace torchconv::cuda

// What ctypes calls: null, or the error's message.
#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace torchconv::cuda;

EXPORT const char* run_block_sums(const float* x, float* y, int n) {
  return caught([&](const Queue& q) {
    launch(block_sums, dim3(static_cast<unsigned>(n + 255) / 256), 256, 0, q, x, y, n);
  });
}
EXPORT const char* run_reverse_block(const float* x, float* y, int blocks, int threads,
                                     int barrier) {
  return caught([&](const Queue& q) {
    launch(barrier ? reverse_block<true> : reverse_block<false>, blocks, threads, threads * 4, q, x,
           y);
  });
}
EXPORT const char* run_first_of_block(const float* x, float* y, unsigned written) {
  return caught([&](const Queue& q) { launch(first_of_block, 3, 8, 0, q, x, y, written); });
}
EXPORT const char* run_shuffles(int* y, int threads) {
  return caught([&](const Queue& q) { launch(shuffles, 1, threads, 0, q, y); });
}
EXPORT const char* run_early_exit(int* y, int threads) {
  return caught([&](const Queue& q) { launch(early_exit, 1, threads, 0, q, y); });
}
EXPORT const char* run_split_warp(float* y) {
  return caught([&](const Queue& q) { launch(split_warp, 1, 32, 0, q, y); });
}
EXPORT const char* run_outside_mask(int* y) {
  return caught([&](const Queue& q) { launch(outside_mask, 1, 2, 0, q, y); });
}
EXPORT const char* run_overrun(int shared_bytes) {
  return caught([&](const Queue& q) { launch(overrun, 1, 1, shared_bytes, q); });
}
EXPORT const char* run_trap() {
  return caught([&](const Queue& q) { launch(trap, dim3(1, 4), 8, 0, q); });
}
EXPORT const char* run_warp_product(const float* a, const float* b, float* c) {
  return caught([&](const Queue& q) { launch(warp_product, 1, 32, 0, q, a, b, c); });
}
EXPORT const char* run_coordinates(int* y, const unsigned* grid, const unsigned* block) {
  return caught([&](const Queue& q) {
    launch(coordinates, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, q,
           y);
  });
}
EXPORT void to_half(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = __half_as_ushort(from_wide<Half>(x[i]));
}
EXPORT void from_half(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_wide(__ushort_as_half(x[i]));
}
EXPORT void to_bfloat16(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = __bfloat16_as_ushort(from_wide<BFloat16>(x[i]));
}
EXPORT void from_bfloat16(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_wide(__ushort_as_bfloat16(x[i]));
}

// How many of the dividends are not divided right.
EXPORT int64_t divisor_errors(int64_t divisor, const int64_t* dividends, int64_t n) {
  const Divisor by(divisor);
  int64_t errors = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t quotient = static_cast<uint32_t>(dividends[i]);
    const uint32_t rest = by.split(quotient);
    errors += quotient != dividends[i] / divisor || rest != dividends[i] % divisor;
  }
  return errors;
}
