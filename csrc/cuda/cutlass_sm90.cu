// Convolutions through CUTLASS on Hopper: what surrounds the kernels of cutlass_sm90_*.cu.
//
// fprop is one gather, and so are both of wide groups (cutlass_sm90_groups.h). dgrad is a gather
// over dz with the filters turned and transposed, one for each phase of the stride, whose positions
// of x share their taps. wgrad adds the parts of its sums. These helpers are memory-bound, and
// small beside the convolution.
#include "cuda/conv_passes.h"

#ifdef TORCHCONV_CUTLASS

#include <limits>

#include "cuda/block_sums.cuh"
#include "cuda/conv_layout.h"
#include "cuda/cutlass_sm90_groups.h"
#include "cuda/cutlass_sm90_groups_wgrad.h"
#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"
#include "cuda/early_launch.h"
#include "cuda/transpose_kernel.h"

namespace torchconv::cuda {
namespace {

using sm90::Phase;
using sm90::WgradShares;

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

// Of the filters w as a matrix of K rows, R x S x C or C x R x S, where each column goes: C x R' x
// S' x K for each phase of the stride, one after the other.
struct TurnedRows {
  sm90::TurnedFilters filters;
  int64_t C, K;
  int S, taps;
  bool channels_last;
  __device__ __forceinline__ int64_t operator()(int64_t, int64_t column) const {
    const int64_t row = column / (channels_last ? C : taps);
    const int64_t rest = column - row * (channels_last ? C : taps);
    const int64_t c = channels_last ? rest : row;
    const int at = static_cast<int>(channels_last ? row : rest), r = at / S;
    const sm90::TurnedTap t = filters.tap(r, at - r * S);
    return (t.before * C + c * t.taps + t.tap) * K;
  }
};

__global__ void fill_with_zeros(uint4* target, int64_t count) {
  begin_early();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride)
    target[i] = uint4{0, 0, 0, 0};
}

struct PartSums {
  WgradShares shares;
  uint32_t K, taps, columns;  // columns of four channels
  uint32_t tiles;             // of columns, in a result
};
constexpr int kLanesOfSum = 32, kRowsOfSum = 8;

// dw = the sums of the parts, four channels a thread, of which 32 have neighbours; a block's are
// all of one result and one tap. Of few parts a thread adds those of kVectors filters; of many, a
// row of threads adds every kRowsOfSum-th, and the first row adds the rows.
template <typename T, bool kMany, int kVectors>
__global__ void __launch_bounds__(kLanesOfSum* kRowsOfSum, 4)
    add_parts(const __grid_constant__ PartSums p, const float4* sums, Vector<T, 4>* dw) {
  using Sum = std::conditional_t<kMany, double, float>;
  constexpr int kShares = kMany ? kRowsOfSum : 1;
  __shared__ int parts;
  begin_early();
  const uint32_t lanes = static_cast<uint32_t>(p.shares.tile_c / 4);  // of a filter
  const uint32_t of_lanes = kLanesOfSum / lanes;                      // filters
  const uint32_t of_rows = of_lanes * (kMany ? 1 : kRowsOfSum);
  const uint32_t tile = blockIdx.x % p.tiles, rest = blockIdx.x / p.tiles;
  const uint32_t tap = rest % p.taps, k0 = rest / p.taps * (of_rows * kVectors);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    const int64_t m = k0 / static_cast<uint32_t>(p.shares.tile_k * p.shares.cluster);
    parts = static_cast<int>(p.shares.parts((m * p.taps + tap) * p.tiles + tile));
  }
  __syncthreads();
  const uint32_t column = tile * lanes + threadIdx.x % lanes;
  const uint32_t k = k0 + threadIdx.x / lanes + (kMany ? 0 : threadIdx.y * of_lanes);
  const int64_t filter = int64_t{p.taps} * p.columns, slot = p.K * filter;
  const int64_t first = k * filter + tap * p.columns + column;
  const bool inside = column < p.columns;
  Sum total[kVectors][4] = {};
#pragma unroll(kVectors == 1 ? 8 : 2)
  for (int part = kMany ? threadIdx.y : 0; part < parts; part += kShares)
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (inside && k + i * of_rows < p.K) {
        const float4 sum = sums[part * slot + first + i * of_rows * filter];
        total[i][0] += sum.x, total[i][1] += sum.y, total[i][2] += sum.z, total[i][3] += sum.w;
      }
  if constexpr (kMany) {
    __shared__ double rows[kRowsOfSum][4][kLanesOfSum];
    for (int e = 0; e < 4; ++e) rows[threadIdx.y][e][threadIdx.x] = total[0][e];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int row = 1; row < kRowsOfSum; ++row)
      for (int e = 0; e < 4; ++e) total[0][e] += rows[row][e][threadIdx.x];
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (inside && k + i * of_rows < p.K) {
      Vector<T, 4> rounded;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        rounded.element[e] = from_wide<T>(static_cast<float>(total[i][e]));
      dw[first + i * of_rows * filter] = rounded;
    }
}

template <typename T>
void wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue) {
  const WgradShares s = sm90::wgrad_shares(p);
  float* sums = queue.scratch<float>(s.splits * p.K * p.R * p.S * p.C);
  sm90::wgrad_parts(p, s, dz, x, sums, queue);
  const int64_t tiles = ceil_div(p.C, s.tile_c), taps = p.R * p.S;
  const PartSums sizes{s, static_cast<uint32_t>(p.K), static_cast<uint32_t>(taps),
                       static_cast<uint32_t>(p.C / 4), static_cast<uint32_t>(tiles)};
  const int64_t of_lanes = 4 * kLanesOfSum / s.tile_c;
  const auto blocks = [&](int64_t filters) { return ceil_div(p.K, filters) * taps * tiles; };
  const auto add = [&](auto kernel, int64_t count) {
    launch_early(kernel, dim3(static_cast<unsigned>(count)), dim3(kLanesOfSum, kRowsOfSum), 0,
                 queue, sizes, reinterpret_cast<const float4*>(sums),
                 static_cast<Vector<T, 4>*>(dw));
  };
  const int64_t of_block = kRowsOfSum * of_lanes;
  if (s.splits <= 16 && blocks(4 * of_block) < 264)
    add(add_parts<T, false, 1>, blocks(of_block));
  else if (s.splits > 66 || (s.splits > 4 && blocks(4 * of_block) < 132))
    add(add_parts<T, true, 1>, blocks(of_lanes));
  else
    add(add_parts<T, false, 4>, blocks(4 * of_block));
}

// dz transposed, K rows of a pitch.
struct PitchedRows {
  int64_t pitch;
  __device__ __forceinline__ int64_t operator()(int64_t, int64_t k) const { return k * pitch; }
};

void wgrad_tf32(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue) {
  const sm90::WgradTf32Shares s = sm90::wgrad_tf32_shares(p);
  const int64_t weights = p.R * p.S * p.C;
  const void* gradient = dz;
  if (!s.turns) {
    uint32_t* turned = queue.scratch<uint32_t>(p.K * s.pitch);
    // K and the pitch are whole vectors.
    launch_transpose<uint32_t, true, true>(static_cast<const uint32_t*>(dz), turned, 1,
                                           p.N * p.P * p.Q, p.K, PitchedRows{s.pitch}, queue);
    gradient = turned;
  }
  const SliceSums<float> sums = slice_sums(static_cast<float*>(dw), s.parts, p.K * weights, queue);
  sm90::wgrad_tf32_parts(p, s, gradient, x, sums.partial == nullptr ? sums.result : sums.partial,
                         queue);
  add_slices(sums, s.parts, queue);
}

// The library may have been built for other GPUs alone.
constexpr bool built_for_hopper() {
  for (const int architecture : {__CUDA_ARCH_LIST__})
    if (architecture == 900) return true;
  return false;
}

template <typename T>
const char* turned_filters(const ConvProblem& p, const void* w, const Queue& queue) {
  const int64_t columns = p.R * p.S * p.C;
  T* turned = queue.scratch<T>(p.K * columns);
  const TurnedRows rows{
      sm90::turned_filters(p),         p.C, p.K, static_cast<int>(p.S), static_cast<int>(p.R * p.S),
      p.weight_layout == Layout::kNHWC};
  const T* filters = static_cast<const T*>(w);
  // K and C are whole vectors.
  if (aligned<T>(w, kLanes<T>))
    launch_transpose<T, true, true>(filters, turned, 1, p.K, columns, rows, queue);
  else
    launch_transpose<T, false, true>(filters, turned, 1, p.K, columns, rows, queue);
  return reinterpret_cast<const char*>(turned);
}

}  // namespace

bool cutlass_takes(const ConvProblem& p, Pass pass, bool preactivation, bool residual,
                   const Queue& queue) {
  if (!built_for_hopper()) return false;
  if (p.groups > 1)
    return pass == Pass::kWgrad
               ? sm90::takes_groups_wgrad(p, queue.capability)
               : sm90::takes_groups(p, pass, preactivation, residual, queue.capability);
  ConvProblem q = p;
  if (pass == Pass::kDgrad) q.weight_layout = Layout::kNHWC;  // they are turned from either
  return sm90::takes(q, pass, preactivation, residual, queue.capability);
}

void cutlass_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                   const void* residual, void* y, const Queue& queue) {
  const float low = p.activation == Activation::kNone ? -kInfinity : 0.f;
  const float high = p.activation == Activation::kReLU6 ? 6.f : kInfinity;
  const void* image = aligned_input(p.dtype, x, p.N * p.H * p.W * p.C, queue);
  const void* filters = aligned_input(p.dtype, w, p.K * p.R * p.S * (p.C / p.groups), queue);
  const int64_t size = p.N * p.P * p.Q * p.K;
  const void* added = residual == nullptr ? nullptr : aligned_input(p.dtype, residual, size, queue);
  with_aligned_output(p.dtype, y, size, queue, [&](void* output) {
    const sm90::GatherTensors tensors{image, filters, bias, added, output, low, high};
    if (p.groups > 1) return sm90::gather_groups(p, Pass::kFprop, tensors, queue);
    const sm90::Gather g = sm90::fprop_gather(p);
    if (added == nullptr && sm90::takes_halo(g, sm90::bytes_of(p.dtype)))
      sm90::gather_with_halo(p.dtype, g, tensors, queue);
    else
      sm90::gather(p.dtype, g, tensors, queue);
  });
}

void cutlass_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                   const Queue& queue) {
  const int64_t bytes = sm90::bytes_of(p.dtype), size = p.N * p.H * p.W * p.C;
  const void* image = aligned_input(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  if (p.groups > 1) {
    const void* straight = aligned_input(p.dtype, w, p.K * p.R * p.S * (p.C / p.groups), queue);
    return with_aligned_output(p.dtype, dx, size, queue, [&](void* output) {
      sm90::gather_groups(p, Pass::kDgrad,
                          {image, straight, nullptr, nullptr, output, -kInfinity, kInfinity},
                          queue);
    });
  }
  const char* filters =
      bytes == 2 ? turned_filters<uint16_t>(p, w, queue) : turned_filters<uint32_t>(p, w, queue);
  const sm90::TurnedFilters turned = sm90::turned_filters(p);
  with_aligned_output(p.dtype, dx, size, queue, [&](void* output) {
    // Phases that no tap reaches leave zeros.
    if (sm90::has_zero_phase(p)) {
      const int64_t vectors = size * bytes / 16;
      launch_early(fill_with_zeros,
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
                     {image, phase_filters, nullptr, nullptr,
                      static_cast<char*>(output) + phase.offset * bytes, -kInfinity, kInfinity},
                     queue);
      }
  });
}

void cutlass_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue) {
  const void* a = aligned_input(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  const void* b = aligned_input(p.dtype, x, p.N * p.H * p.W * p.C, queue);
  if (p.groups > 1) return sm90::wgrad_groups(p, a, b, dw, queue);
  if (p.dtype == DType::kFloat32) return wgrad_tf32(p, a, b, dw, queue);
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

bool cutlass_takes(const ConvProblem&, Pass, bool, bool, const Queue&) { return false; }

void cutlass_fprop(const ConvProblem&, const void*, const void*, const void*, const void*, void*,
                   const Queue&) {
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
