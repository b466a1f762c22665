// Convolutions through CUTLASS on Hopper: what surrounds the kernels of cutlass_sm90_*.cu.
//
// fprop is one gather. dgrad is a gather over dz with the filters turned and transposed, one for
// each phase of the stride, whose positions of x share their taps. wgrad sums the splits of its
// products, in blocks of kColumns columns of four elements by kRows rows of splits. These helpers
// are memory-bound, and small beside the convolution.
#include "cuda/conv_passes.h"

#ifdef TORCHCONV_CUTLASS

#include <limits>

#include "cuda/conv_layout.h"
#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace torchconv::cuda {
namespace {

using sm90::Phase;
using sm90::WgradSplits;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The tensor memory accelerator works from 16-byte boundaries, but a tensor may begin at any
// element. This is the tensor, or a copy of it in scratch.
const void* aligned_input(DType dtype, const void* source, int64_t count, const Queue& queue) {
  if (reinterpret_cast<uintptr_t>(source) % 16 == 0) return source;
  void* copy = queue.scratch<char>(count * sm90::bytes_of(dtype));
  transpose(dtype, source, copy, 1, 1, count, queue);
  return copy;
}

// work(target), by way of scratch where target is not on a 16-byte boundary.
template <class Work>
void with_aligned_output(DType dtype, void* target, int64_t count, const Queue& queue,
                         const Work& work) {
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0) return work(target);
  void* scratch = queue.scratch<char>(count * sm90::bytes_of(dtype));
  work(scratch);
  transpose(dtype, scratch, target, 1, 1, count, queue);
}

struct TurnParams {
  sm90::TurnedFilters filters;
  int64_t C, K;
  int tiles_c;
};

// A block turns 32 filters of 32 channels at one tap, 32 by 8 threads.
template <typename T>
__global__ void turn_filters(const T* w, T* turned, const __grid_constant__ TurnParams p) {
  __shared__ T tile[32][33];
  const int r = static_cast<int>(blockIdx.y), s = static_cast<int>(blockIdx.z);
  const int taps = static_cast<int>(gridDim.y * gridDim.z),
            tap = r * static_cast<int>(gridDim.z) + s;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x / p.tiles_c) * 32;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x % p.tiles_c) * 32;
  for (int row = threadIdx.y; row < 32; row += 8) {
    const int64_t k = k0 + row, c = c0 + threadIdx.x;
    if (k < p.K && c < p.C) tile[row][threadIdx.x] = w[(k * taps + tap) * p.C + c];
  }
  __syncthreads();
  const sm90::TurnedTap t = p.filters.tap(r, s);
  for (int row = threadIdx.y; row < 32; row += 8) {
    const int64_t c = c0 + row, k = k0 + threadIdx.x;
    if (k < p.K && c < p.C)
      turned[(t.before * p.C + c * t.taps + t.tap) * p.K + k] = tile[threadIdx.x][row];
  }
}

__global__ void fill_with_zeros(uint4* target, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride)
    target[i] = uint4{0, 0, 0, 0};
}

constexpr int kRows = 8, kColumns = 32;

// One round of splits: before + the sum of sums[i][e], from which dw or what the next round begins
// with. A row of threads adds every kRows-th split, and the first row adds the rows; few splits are
// added by one long row.
template <typename T>
__global__ void add_splits(const float4* sums, int splits, int64_t vectors, const float4* before,
                           float4* after, Vector<T, 4>* dw) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  double total[4] = {};
  if (v < vectors) {
#pragma unroll 4
    for (int i = threadIdx.y; i < splits; i += blockDim.y) {
      const float4 sum = sums[i * vectors + v];
      total[0] += sum.x, total[1] += sum.y, total[2] += sum.z, total[3] += sum.w;
    }
  }
  if (blockDim.y > 1) {
    __shared__ double partial[kRows][4][kColumns];
    for (int e = 0; e < 4; ++e) partial[threadIdx.y][e][threadIdx.x] = total[e];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int row = 1; row < kRows; ++row)
      for (int e = 0; e < 4; ++e) total[e] += partial[row][e][threadIdx.x];
  }
  if (v >= vectors) return;
  if (before != nullptr) {
    const float4 b = before[v];
    total[0] += b.x, total[1] += b.y, total[2] += b.z, total[3] += b.w;
  }
  const float4 sum{static_cast<float>(total[0]), static_cast<float>(total[1]),
                   static_cast<float>(total[2]), static_cast<float>(total[3])};
  if (after != nullptr) after[v] = sum;
  if (dw != nullptr)
    dw[v] = {{from_wide<T>(sum.x), from_wide<T>(sum.y), from_wide<T>(sum.z), from_wide<T>(sum.w)}};
}

template <typename T>
void wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue) {
  const WgradSplits s = sm90::wgrad_splits(p);
  const int64_t size = p.K * p.R * p.S * p.C, vectors = size / 4;
  const int64_t most = sm90::splits_of_round(p);
  const int64_t round = std::min(most, s.splits);
  float* sums = queue.scratch<float>(round * size);
  float* carried = s.splits > round ? queue.scratch<float>(size) : nullptr;
  for (int64_t first = 0; first < s.splits; first += round) {
    const int64_t count = std::min(round, s.splits - first);
    const bool last = first + count == s.splits;
    sm90::wgrad_sums(p, s, first, count, dz, x, sums, queue);
    const dim3 block = count < 2 * kRows ? dim3(kColumns * kRows, 1) : dim3(kColumns, kRows);
    launch(add_splits<T>, dim3(static_cast<unsigned>(ceil_div(vectors, block.x))), block, 0, queue,
           reinterpret_cast<const float4*>(sums), static_cast<int>(count), vectors,
           reinterpret_cast<const float4*>(first > 0 ? carried : nullptr),
           reinterpret_cast<float4*>(last ? nullptr : carried),
           static_cast<Vector<T, 4>*>(last ? dw : nullptr));
  }
}

// The library may have been built for other GPUs alone.
constexpr bool built_for_hopper() {
  for (const int architecture : {__CUDA_ARCH_LIST__})
    if (architecture == 900) return true;
  return false;
}

// C x R' x S' x K for each phase of the stride, one after the other.
const char* turned_filters(const ConvProblem& p, const void* w, const Queue& queue) {
  char* turned = queue.scratch<char>(p.K * p.R * p.S * p.C * sm90::bytes_of(p.dtype));
  const int64_t tiles_c = ceil_div(p.C, 32);
  const TurnParams params{sm90::turned_filters(p), p.C, p.K, static_cast<int>(tiles_c)};
  const dim3 grid(static_cast<unsigned>(tiles_c * ceil_div(p.K, 32)), static_cast<unsigned>(p.R),
                  static_cast<unsigned>(p.S));
  if (sm90::bytes_of(p.dtype) == 2)
    launch(turn_filters<uint16_t>, grid, dim3(32, 8), 0, queue, static_cast<const uint16_t*>(w),
           reinterpret_cast<uint16_t*>(turned), params);
  else
    launch(turn_filters<uint32_t>, grid, dim3(32, 8), 0, queue, static_cast<const uint32_t*>(w),
           reinterpret_cast<uint32_t*>(turned), params);
  return turned;
}

}  // namespace

bool cutlass_takes(const ConvProblem& p, Pass pass, bool preactivation, const Queue& queue) {
  return built_for_hopper() && sm90::takes(p, pass, preactivation, queue.capability);
}

void cutlass_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                   const Queue& queue) {
  const float low = p.activation == Activation::kNone ? -kInfinity : 0.f;
  const float high = p.activation == Activation::kReLU6 ? 6.f : kInfinity;
  const void* image = aligned_input(p.dtype, x, p.N * p.H * p.W * p.C, queue);
  const void* filters = aligned_input(p.dtype, w, p.K * p.R * p.S * p.C, queue);
  with_aligned_output(p.dtype, y, p.N * p.P * p.Q * p.K, queue, [&](void* output) {
    sm90::gather(p.dtype, sm90::fprop_gather(p), {image, filters, bias, output, low, high}, queue);
  });
}

void cutlass_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                   const Queue& queue) {
  const int64_t bytes = sm90::bytes_of(p.dtype), size = p.N * p.H * p.W * p.C;
  const void* image = aligned_input(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  const char* filters = turned_filters(p, w, queue);
  const sm90::TurnedFilters turned = sm90::turned_filters(p);
  with_aligned_output(p.dtype, dx, size, queue, [&](void* output) {
    // Phases that no tap reaches leave zeros.
    if (sm90::has_zero_phase(p)) {
      const int64_t vectors = size * bytes / 16;
      launch(fill_with_zeros,
             dim3(static_cast<unsigned>(
                 std::min<int64_t>(ceil_div(vectors, 256), queue.multiprocessors * 8))),
             dim3(256), 0, queue, static_cast<uint4*>(output), vectors);
    }
    for (int64_t h = 0; h < p.stride_h; ++h)
      for (int64_t w_ = 0; w_ < p.stride_w; ++w_) {
        const Phase phase = sm90::dgrad_phase(p, h, w_);
        if (phase.empty() || phase.zero()) continue;
        const char* phase_filters = filters + turned.before(h, w_) * p.C * p.K * bytes;
        sm90::gather(p.dtype, phase.gather,
                     {image, phase_filters, nullptr,
                      static_cast<char*>(output) + phase.offset * bytes, -kInfinity, kInfinity},
                     queue);
      }
  });
}

void cutlass_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue) {
  const void* a = aligned_input(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  const void* b = aligned_input(p.dtype, x, p.N * p.H * p.W * p.C, queue);
  with_aligned_output(p.dtype, dw, p.K * p.R * p.S * p.C, queue, [&](void* output) {
    if (p.dtype == DType::kFloat16)
      wgrad<Half>(p, a, b, output, queue);
    else
      wgrad<BFloat16>(p, a, b, output, queue);
  });
}

}  // namespace torchconv::cuda

#else

#include <stdexcept>

namespace torchconv::cuda {

bool cutlass_takes(const ConvProblem&, Pass, bool, const Queue&) { return false; }

void cutlass_fprop(const ConvProblem&, const void*, const void*, const void*, void*, const Queue&) {
  throw std::logic_error("torchconv was built without CUTLASS");
}

void cutlass_dgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {
  throw std::logic_error("torchconv was built without CUTLASS");
}

void cutlass_wgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {
  throw std::logic_error("torchconv was built without CUTLASS");
}

}  // namespace torchconv::cuda

#endif
