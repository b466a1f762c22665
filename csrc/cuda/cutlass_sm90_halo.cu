// The gather of few channels, 64 of 16 bits, for windows of several taps at stride 1. There each
// tap of a tile reads nearly what the tap before it read, and few filters make little of it: the
// cache's bandwidth would be the bound. Here a block loads the pixels that its rows of outputs need
// once, a halo around them, and keeps all filters in shared memory. Bound: the tensor cores.
//
// Pixels lie in shared memory row after row, Q + S - 1 of them a row, with zeros outside the image:
// the operand of a tap is the same memory from a later pixel on. Sums at the last S - 1 positions
// of a row are of no output, and what stores a tile leaves them out.
//
// Two warpgroups compute a tile each, in turn with each other, so that one multiplies while the
// other stores; a thread of a third, which gives them its registers, loads.
#ifdef TORCHCONV_CUTLASS
#include "cuda/cutlass_sm90_limits.h"
#include "cuda/cutlass_sm90_passes.h"
#include "cuda/cutlass_sm90_wgmma.h"
#include "cuda/divmod.h"
#include "cutlass/arch/reg_reconfig.h"

namespace torchconv::cuda::sm90 {
namespace {

constexpr int kFilters = 64, kRowBytes = 128;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);
constexpr int kFilterBytes = kFilters * kRowBytes;  // of a tap
constexpr int kPatchBytes = kHaloPixels * kRowBytes;
constexpr int kOutputBytes = kHaloOutputs * kRowBytes;
constexpr int kFragments = kHaloOutputs / 64;
constexpr int kShared =
    1024 + kHaloTaps * kFilterBytes + kWarpgroups * (kPatchBytes + kOutputBytes);
static_assert(kShared + 1024 <= 227 * 1024);

struct Params {
  CUtensorMap image;    // (c, w, h, n)
  CUtensorMap filters;  // (c, tap, k)
  CUtensorMap output;   // (k, q, p, n)
  const void* bias;
  float low, high;
  int tiles, taps, taps_w, K;
  int columns, rows;  // of a tile in shared memory, and of its outputs
  int patch_bytes;
  int pad_top, pad_left;
  Divisor tiles_of_image;
};

template <class Element>
__global__ void __launch_bounds__(kThreads, 1) halo_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // cutlass_takes refuses every device that runs this
#else
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;
  extern __shared__ __align__(1024) unsigned char halo_memory[];
  __shared__ alignas(8) uint64_t filters_there, full[kWarpgroups], empty[kWarpgroups];
  const uint32_t from = cute::cast_smem_ptr_to_uint(halo_memory);
  unsigned char* filters = halo_memory + (-from & 1023u);
  unsigned char* patches = filters + kHaloTaps * kFilterBytes;
  unsigned char* outputs = patches + kWarpgroups * kPatchBytes;

  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    Full::init(&filters_there, 1);
    for (int i = 0; i < kWarpgroups; ++i) Full::init(&full[i], 1), Empty::init(&empty[i], 128);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int group = thread / 128;
  const auto image_of = [&](int tile, int& row) {
    uint32_t n = static_cast<uint32_t>(tile);
    row = static_cast<int>(p.tiles_of_image.split(n)) * p.rows;
    return static_cast<int>(n);
  };
  if (group == kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread != 128 * kWarpgroups) return;
    const uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    Full::arrive_and_expect_tx(&filters_there, static_cast<uint32_t>(p.taps * kFilterBytes));
    for (int tap = 0; tap < p.taps; ++tap)
      cute::SM90_TMA_LOAD_3D::copy(&p.filters, &filters_there, hint, filters + tap * kFilterBytes,
                                   0, tap, 0);
    int count = 0;
    for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles;
         tile += static_cast<int>(gridDim.x), ++count) {
      const int to = count % kWarpgroups;
      Empty::wait(&empty[to], static_cast<uint32_t>(count / kWarpgroups % 2 ^ 1));
      Full::arrive_and_expect_tx(&full[to], static_cast<uint32_t>(p.patch_bytes));
      int row;
      const int n = image_of(tile, row);
      cute::SM90_TMA_LOAD_4D::copy(&p.image, &full[to], hint, patches + to * kPatchBytes, 0,
                                   -p.pad_left, row - p.pad_top, n);
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<232>();

  const int lane = thread % 32, warp = thread / 32 % 4, g = lane / 4, t = lane % 4;
  float bias[16];
  load_bias<Element>(p.bias, 2 * t, p.K, bias);
  const uint32_t patch = cute::cast_smem_ptr_to_uint(patches + group * kPatchBytes);
  const uint32_t filters_at = cute::cast_smem_ptr_to_uint(filters);
  unsigned char* output = outputs + group * kOutputBytes;
  const auto meet = [&] { asm volatile("bar.sync %0, 128;\n" ::"r"(1 + group) : "memory"); };
  Full::wait(&filters_there, 0);
  int phase = 0;
  for (int tile = static_cast<int>(blockIdx.x) + group * static_cast<int>(gridDim.x);
       tile < p.tiles; tile += kWarpgroups * static_cast<int>(gridDim.x), phase ^= 1) {
    float sums[kFragments][32] = {};
    Full::wait(&full[group], static_cast<uint32_t>(phase));
    int r = 0, s = 0;
    for (int tap = 0; tap < p.taps; ++tap) {
      const uint64_t a =
          operand<kRowBytes>(patch + static_cast<uint32_t>((r * p.columns + s) * kRowBytes));
      const uint64_t b = operand<kRowBytes>(filters_at + static_cast<uint32_t>(tap * kFilterBytes));
      if (++s == p.taps_w) s = 0, ++r;
      for (auto& fragment : sums)
        for (auto& sum : fragment) cute::warpgroup_fence_operand(sum);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < kFragments; ++i)
          multiply<Element, kFilters, false, false>(
              a + static_cast<uint64_t>(i * (64 * kRowBytes / 16) + 2 * step),
              b + static_cast<uint64_t>(2 * step), sums[i]);
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    for (auto& fragment : sums)
      for (auto& sum : fragment) cute::warpgroup_fence_operand(sum);
    Empty::arrive(&empty[group]);

    // What was stored before has been read.
    if (thread % 128 == 0) cute::tma_store_wait<0>();
    meet();
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_row<Element>(output, 64 * i + 16 * warp + g + 8 * half, t, bias, p.low, p.high,
                           [&](int j, int e) { return sums[i][4 * j + 2 * half + e]; });
    cute::tma_store_fence();
    meet();
    if (thread % 128 == 0) {
      int row;
      const int n = image_of(tile, row);
      cute::SM90_TMA_STORE_4D::copy(&p.output, output, 0, 0, row, n);
      cute::tma_store_arrive();
    }
  }
  if (thread % 128 == 0) cute::tma_store_wait<0>();
#endif
}

}  // namespace

void gather_with_halo(DType dtype, const Gather& g, const GatherTensors& tensors,
                      const Queue& queue) {
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  const HaloTile tile = halo_tile(g);
  const int64_t taps = g.h.taps * g.w.taps, P = g.h.outputs, Q = g.w.outputs;
  const int64_t tiles_of_image = ceil_div(P, tile.rows);
  Params p{};
  p.image = tensor_map<4>(dtype, tensors.image, {g.C, g.w.image, g.h.image, g.N},
                          {64, tile.columns, tile.rows + g.h.taps - 1, 1});
  p.filters = tensor_map<3>(dtype, tensors.filters, {g.C, taps, g.K}, {64, 1, kFilters});
  p.output = tensor_map<4>(dtype, tensors.output, {g.K, Q, P, g.N},
                           {kFilters, tile.columns, tile.rows, 1});
  p.bias = tensors.bias;
  p.low = tensors.low;
  p.high = tensors.high;
  p.tiles = narrow(g.N * tiles_of_image);
  p.taps = narrow(taps);
  p.taps_w = narrow(g.w.taps);
  p.K = narrow(g.K);
  p.columns = narrow(tile.columns);
  p.rows = narrow(tile.rows);
  p.patch_bytes = narrow((tile.rows + g.h.taps - 1) * tile.columns * kRowBytes);
  p.pad_top = narrow(g.h.pad);
  p.pad_left = narrow(g.w.pad);
  p.tiles_of_image = Divisor(tiles_of_image);
  launch(dtype == DType::kFloat16 ? halo_kernel<__half> : halo_kernel<__nv_bfloat16>,
         dim3(static_cast<unsigned>(std::min(p.tiles, queue.multiprocessors))), dim3(kThreads),
         kShared, queue, p);
}

}  // namespace torchconv::cuda::sm90
#endif
