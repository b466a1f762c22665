// The parts of wgrad in TF32. Tensor cores take TF32 operands from shared memory only where the sum
// lies inside, and NHWC memory has the channels there:
//
//   sums[k, (r, s, c)] = sum over pixels (n, p, q) of dz[k, pixel] * x[place of the pixel + tap, c]
//
// x is the operand in registers, read from shared memory in whichever order; dz has been transposed
// beforehand. M is (r, s, c) in slabs of 32 channels of one tap, N the filters, and the sum goes
// over pixels, 32 at a time, which the tensor memory accelerator gathers for each slab (im2col).
// Both operands are rounded to TF32 as they are loaded. Bound: the tensor cores.
//
// Of 1x1 windows with few channels or filters the bound is memory. Then the smaller of the two is
// N, and is turned in shared memory, as it was loaded, by those who multiply.
//
// Two warpgroups multiply, two slabs each; one more thread loads. The two blocks of a
// cluster have neighbouring tiles of M and share what they load of N.
#ifdef TORCHCONV_CUTLASS
#include <utility>

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"
#include "cuda/divmod.h"
#include "cuda/early_launch.h"

// clang-format off
#include "cutlass/cutlass.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cuda/cutlass_sm90_tensor_map.h"  // before what makes tensor maps
#include "cute/tensor.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/pipeline/sm90_pipeline.hpp"
// clang-format on

namespace torchconv::cuda::sm90 {
namespace {

constexpr int kSlab = 32;        // channels
constexpr int kStepPixels = 32;  // rows of 128 bytes, of x and of dz
constexpr int kTileSlabs = 4;
constexpr int kMultipliers = 256;
constexpr int kClusterSize = 2;
constexpr int kSlabBytes = kStepPixels * kSlab * 4;

template <int kFilters_, bool kTurns_>
struct Tile {
  static constexpr int kFilters = kFilters_;
  static constexpr bool kTurns = kTurns_;
  static constexpr int kStages = kTurns ? 3 : kFilters == 128 ? 6 : 4;
  static constexpr int kBlocks = kFilters == 64 ? 2 : 1;  // on a multiprocessor
  // The sums of a wide tile need registers that a whole warpgroup has to give.
  static constexpr bool kGives = kFilters == 256;
  static constexpr int kThreads = kMultipliers + (kGives ? 128 : 32);
  static constexpr int kImageBytes = kTileSlabs * kSlabBytes;
  static constexpr int kColumnBytes = kFilters * kStepPixels * 4;
  static constexpr int kStageBytes = kImageBytes + kColumnBytes;
  // Turned columns: the products with those of a step may run until the third step after it.
  static constexpr int kTurnedBytes = kTurns ? 3 * kColumnBytes : 0;
  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  // A swizzle's pattern repeats every 1024 bytes.
  static constexpr int kShared = 1024 + kStages * kStageBytes + kTurnedBytes +
                                 static_cast<int>(sizeof(typename Pipeline::SharedStorage));
};

template <int kFilters>
using Product = std::conditional_t<
    kFilters == 256, cute::SM90::GMMA::MMA_64x256x8_F32TF32TF32_RS_TN<>,
    std::conditional_t<kFilters == 128, cute::SM90::GMMA::MMA_64x128x8_F32TF32TF32_RS_TN<>,
                       cute::SM90::GMMA::MMA_64x64x8_F32TF32TF32_RS_TN<>>>;

// The pixel of a tensor that belongs to an output's.
struct Sampling {
  int stride_h, stride_w, pad_top, pad_left;
};

struct Params {
  CUtensorMap rows;     // of M: (c, w, h, n)
  CUtensorMap columns;  // of N: the same, or transposed (pixel, k)
  Sampling rows_at, columns_at;
  float* sums;                 // of the parts
  int64_t slot;                // elements of a part
  int64_t stride_m, stride_n;  // in a part
  int channels, filters;       // of a tap in M, and in N
  int slabs, slabs_of_tap;
  int steps, steps_of_part;
  int clusters_m, tiles_n;
  int dilation_h, dilation_w, taps_w;
  Divisor plane, line;  // by P and Q
};

// Four products of a step with 8 pixels each: a is of this thread, b the staged dz.
template <int kFilters, size_t... i>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4][4], uint64_t b,
                                         float (&sums)[kFilters / 2], std::index_sequence<i...>) {
  for (auto& sum : sums) cute::warpgroup_fence_operand(sum);
  cute::warpgroup_arrive();
#pragma unroll
  for (int eight = 0; eight < 4; ++eight)
    Product<kFilters>::fma(a[eight][0], a[eight][1], a[eight][2], a[eight][3],
                           b + static_cast<uint64_t>(2 * eight), sums[i]...);
  cute::warpgroup_commit_batch();
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    wgrad_tf32_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // cutlass_takes refuses every device that runs this
#else
  constexpr int kFilters = T::kFilters;
  using Pipeline = typename T::Pipeline;
  extern __shared__ __align__(1024) unsigned char memory[];
  unsigned char* staged = memory + (-cute::cast_smem_ptr_to_uint(memory) & 1023u);
  unsigned char* turned = staged + T::kStages * T::kStageBytes;
  auto& barriers = *reinterpret_cast<typename Pipeline::SharedStorage*>(turned + T::kTurnedBytes);

  const int thread = static_cast<int>(threadIdx.x), warp = cutlass::canonical_warp_idx_sync();
  const bool loads = warp >= kMultipliers / 32;
  typename Pipeline::Params pipeline_params;
  pipeline_params.role =
      loads ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = thread == kMultipliers;
  pipeline_params.num_consumers = kMultipliers;
  pipeline_params.transaction_bytes = T::kStageBytes;
  Pipeline pipeline(barriers, pipeline_params, cute::Shape<cute::_2, cute::_1, cute::_1>{});
  // The barriers must be there before a block of the cluster signals on them.
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
  begin_early();

  const int rank = static_cast<int>(blockIdx.x) % kClusterSize;
  int unit = static_cast<int>(blockIdx.x) / kClusterSize;
  const int tile_m = unit % p.clusters_m * kClusterSize + rank;
  unit /= p.clusters_m;
  const int first_filter = unit % p.tiles_n * kFilters, part = unit / p.tiles_n;
  const int first_step = part * p.steps_of_part;
  const int count = min(p.steps_of_part, p.steps - first_step);

  if (loads) {
    if constexpr (T::kGives) cutlass::arch::warpgroup_reg_dealloc<56>();
    if (thread != kMultipliers) return;
    int channel[kTileSlabs];
    uint16_t move_h[kTileSlabs], move_w[kTileSlabs];
    for (int i = 0; i < kTileSlabs; ++i) {
      // Beyond the last slab there is nothing to multiply: the last one again, which none stores.
      const int slab = min(tile_m * kTileSlabs + i, p.slabs - 1), tap = slab / p.slabs_of_tap;
      channel[i] = (slab - tap * p.slabs_of_tap) * kSlab;
      move_h[i] = static_cast<uint16_t>(tap / p.taps_w * p.dilation_h);
      move_w[i] = static_cast<uint16_t>(tap % p.taps_w * p.dilation_w);
    }
    constexpr int kShare = kFilters / kClusterSize;  // of the filters' rows
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (int step = first_step; step < first_step + count; ++step, ++state) {
      pipeline.producer_acquire(state);
      auto* barrier = pipeline.producer_get_barrier(state);
      unsigned char* stage = staged + static_cast<int>(state.index()) * T::kStageBytes;
      uint32_t sample = static_cast<uint32_t>(step) * kStepPixels;
      const int column = static_cast<int>(p.line.split(sample));
      const int row = static_cast<int>(p.plane.split(sample));
      const int n = static_cast<int>(sample);
      const auto line = [&](const Sampling& at) { return row * at.stride_h - at.pad_top; };
      const auto pixel = [&](const Sampling& at) { return column * at.stride_w - at.pad_left; };
      constexpr uint16_t kAll = (1 << kClusterSize) - 1;
      unsigned char* share = stage + T::kImageBytes + rank * kShare * kStepPixels * 4;
      if constexpr (T::kTurns)
        cute::SM90_TMA_LOAD_IM2COL_MULTICAST_4D::copy(
            &p.columns, barrier, kAll, share, first_filter + rank * kShare, pixel(p.columns_at),
            line(p.columns_at), n, 0, 0);
      else
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(
            &p.columns, barrier, kAll,
            static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), share,
            step * kStepPixels, first_filter + rank * kShare);
      for (int i = 0; i < kTileSlabs; ++i)
        cute::SM90_TMA_LOAD_IM2COL_4D::copy(&p.rows, barrier, stage + i * kSlabBytes, channel[i],
                                            pixel(p.rows_at), line(p.rows_at), n, move_w[i],
                                            move_h[i]);
    }
    pipeline.producer_tail(state);
    return;
  }

  if constexpr (T::kGives) cutlass::arch::warpgroup_reg_alloc<224>();

  // A thread's rows of the product, g and g + 8 of its warp's 16, are channels 4 apart of a slab,
  // 16 * (g / 4) + g % 4 and so on, so that a warp's reads of four pixels meet all banks.
  const int lane = thread % 32, g = lane / 4, t = lane % 4;
  const int first_channel = 16 * (g / 4) + 8 * (warp % 2) + g % 4;
  int place[4];  // of words 0 and 1, four pixels on words 2 and 3
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pixel = t + i / 2 * 4, chunk = first_channel / 4 + i % 2;
    place[i] = warp / 2 * kSlabBytes + pixel * 128 + (chunk ^ pixel) * 16 + g % 4 * 4;
  }
  // Rows of 128 bytes, the swizzle of 128 bytes, eight rows after eight.
  const uint64_t columns =
      (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) |
      (cute::cast_smem_ptr_to_uint(T::kTurns ? turned : staged + T::kImageBytes) >> 4);
  // columns[n][pixel] from what was loaded, a row of 32 channels for each pixel: a warp has all
  // channels of a slab, and so all banks, and a quarter of its pixels.
  [[maybe_unused]] const auto turn = [&](const unsigned char* loaded, unsigned char* to) {
    static_assert(!T::kTurns || kFilters == 2 * kSlab);
    const int slab = warp % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = warp / 2 * 2 + i;
      uint4 four;
      uint32_t* const word = &four.x;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pixel = 4 * chunk + e;
        word[e] =
            *reinterpret_cast<const uint32_t*>(loaded + slab * kSlabBytes + pixel * 128 +
                                               (((lane / 4) ^ (pixel & 7)) << 4) + lane % 4 * 4);
      }
      *reinterpret_cast<uint4*>(to + (slab * kSlab + lane) * 128 + ((chunk ^ (lane & 7)) << 4)) =
          four;
    }
    cute::tma_store_fence();
    asm volatile("bar.sync 1, 256;\n" ::: "memory");
  };

  float sums[kFilters / 2] = {};
  uint32_t words[2][4][4];
  typename Pipeline::PipelineState state, previous;
  const auto step = [&](int i, uint32_t (&a)[4][4]) {
    pipeline.consumer_wait(state);
    const int stage = static_cast<int>(state.index()) * T::kStageBytes;
    int operand = stage;
    if constexpr (T::kTurns) {
      operand = i % 3 * T::kColumnBytes;
      turn(staged + stage + T::kImageBytes, turned + operand);
    }
#pragma unroll
    for (int eight = 0; eight < 4; ++eight)
#pragma unroll
      for (int word = 0; word < 4; ++word)
        a[eight][word] =
            *reinterpret_cast<const uint32_t*>(staged + stage + eight * 1024 + place[word]);
    multiply<kFilters>(a, columns + static_cast<uint64_t>(operand >> 4), sums,
                       std::make_index_sequence<kFilters / 2>{});
    // The products of the step before have been made: its stage can be filled again.
    cute::warpgroup_wait<1>();
    if (i > 0) pipeline.consumer_release(previous);
    previous = state;
    ++state;
  };
  int i = 0;
  for (; i + 1 < count; i += 2) {
    step(i, words[0]);
    step(i + 1, words[1]);
  }
  if (i < count) step(i, words[0]);
  cute::warpgroup_wait<0>();
  for (auto& sum : sums) cute::warpgroup_fence_operand(sum);
  pipeline.consumer_release(previous);

  const int slab = tile_m * kTileSlabs + warp / 2, tap = slab / p.slabs_of_tap;
  float* to = p.sums + part * p.slot;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = (slab - tap * p.slabs_of_tap) * kSlab + first_channel + 4 * half;
    if (slab >= p.slabs || channel >= p.channels) continue;
    float* column = to + (tap * p.channels + channel) * p.stride_m;
#pragma unroll
    for (int j = 0; j < kFilters / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int filter = first_filter + 8 * j + 2 * t + e;
        if (filter < p.filters) column[filter * p.stride_n] = sums[4 * j + 2 * half + e];
      }
  }
#endif
}

CUtensorMap pixel_map(const Gather& g, const void* x) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(g.C), static_cast<cuuint64_t>(g.w.image),
                              static_cast<cuuint64_t>(g.h.image), static_cast<cuuint64_t>(g.N)};
  const cuuint64_t pixel = sizes[0] * 4, line = pixel * sizes[1];
  const cuuint64_t strides[] = {pixel, line, line * sizes[2]};
  const auto after = [](const GatherAxis& a) {
    return static_cast<int>(pad_after(a) - (a.taps - 1) * a.dilation);
  };
  const int lower[] = {static_cast<int>(-g.w.pad), static_cast<int>(-g.h.pad)};
  const int upper[] = {after(g.w), after(g.h)};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(g.w.stride),
                              static_cast<cuuint32_t>(g.h.stride), 1};
  CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeIm2col)
  (&map, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4u, const_cast<void*>(x), &sizes[0], &strides[0],
   &lower[0], &upper[0], static_cast<cuuint32_t>(kSlab), static_cast<cuuint32_t>(kStepPixels),
   &steps[0], CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

CUtensorMap turned_map(const void* dz, int64_t pixels, int64_t pitch, int64_t filters, int rows) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(pixels), static_cast<cuuint64_t>(filters)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch) * 4};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kStepPixels), static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[] = {1, 1};
  CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)
  (&map, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 2u, const_cast<void*>(dz), &sizes[0], &strides[0],
   &box[0], &steps[0], CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

template <class T>
void launch_tiles(const Params& p, int64_t parts, bool early, const Queue& queue) {
  const auto kernel = wgrad_tf32_kernel<T>;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), T::kShared);
  cudaLaunchAttribute attributes[2] = {{}, starts_early()};
  cudaLaunchAttribute& cluster = attributes[0];
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kClusterSize;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(int64_t{kClusterSize} * p.clusters_m * p.tiles_n * parts));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kShared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = attributes;
  config.numAttrs = early && may_start_early(queue) ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
}

int narrow(int64_t v) { return static_cast<int>(v); }

Sampling sampling(const Gather& g) {
  return {narrow(g.h.stride), narrow(g.w.stride), narrow(g.h.pad), narrow(g.w.pad)};
}

}  // namespace

void wgrad_tf32_parts(const ConvProblem& p, const WgradTf32Shares& s, const void* dz, const void* x,
                      float* sums, const Queue& queue) {
  const Gather image = fprop_gather(p);
  // dz, each pixel by itself.
  const Gather gradient{
      p.N, p.K, p.C, gather_axis(p.P, 1, p.P, 1, 0, 1), gather_axis(p.Q, 1, p.Q, 1, 0, 1), 0, 0, 0};
  const Gather &rows = s.swaps ? gradient : image, &columns = s.swaps ? image : gradient;
  const int64_t pixels = p.N * p.P * p.Q, weights = p.R * p.S * p.C;
  Params params{};
  params.rows = pixel_map(rows, s.swaps ? dz : x);
  params.columns = s.turns ? pixel_map(columns, s.swaps ? x : dz)
                           : turned_map(dz, pixels, s.pitch, p.K, narrow(s.filters / kClusterSize));
  params.rows_at = sampling(rows);
  params.columns_at = sampling(columns);
  params.sums = sums;
  params.slot = p.K * weights;
  params.stride_m = s.swaps ? p.C : 1;
  params.stride_n = s.swaps ? 1 : weights;
  params.channels = narrow(rows.C);
  params.filters = narrow(columns.C);
  params.slabs_of_tap = narrow(ceil_div(rows.C, kSlab));
  params.slabs = narrow(p.R * p.S) * params.slabs_of_tap;
  params.steps = narrow(ceil_div(pixels, kStepPixels));
  params.steps_of_part = narrow(s.steps);
  params.clusters_m = narrow(s.clusters_m);
  params.tiles_n = narrow(ceil_div(columns.C, s.filters));
  params.dilation_h = narrow(image.h.dilation);
  params.dilation_w = narrow(image.w.dilation);
  params.taps_w = narrow(p.S);
  params.plane = Divisor(p.P);
  params.line = Divisor(p.Q);
  const bool early = gains_by_early_start(p.C, p.K, p.R * p.S);
  if (s.turns)
    launch_tiles<Tile<64, true>>(params, s.parts, early, queue);
  else if (s.filters == 256)
    launch_tiles<Tile<256, false>>(params, s.parts, early, queue);
  else if (s.filters == 128)
    launch_tiles<Tile<128, false>>(params, s.parts, early, queue);
  else
    launch_tiles<Tile<64, false>>(params, s.parts, early, queue);
}

}  // namespace torchconv::cuda::sm90
#endif
