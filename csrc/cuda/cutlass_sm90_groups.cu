// Convolutions of groups of 32 or 64 channels and as many filters on Hopper, in units and slabs as
// cutlass_sm90_groups.h has them. Bound: the image's bytes; of groups of 32, what the tensor cores
// load of shared memory.
//
// A block keeps the filters of its slab in shared memory. A thread loads the pixels of units to
// come; two warpgroups compute a unit each, in turn with each other, so that one multiplies while
// the other stores. A tap's operand is the memory of its patch from product_at on, in rows of 64
// channels: a group of 32 multiplies half of each row. Sums at the ends of rows are of no output,
// and what stores a unit leaves them out. dgrad reads the same filters turned by wgmma; of
// stride 2 a unit's outputs are stored phase by phase.
#ifdef TORCHCONV_CUTLASS
#include "cuda/cutlass_sm90_groups.h"
#include "cuda/cutlass_sm90_wgmma.h"
#include "cuda/divmod.h"
#include "cuda/early_launch.h"

namespace torchconv::cuda::sm90 {
namespace {

constexpr int kThreads = 128 * (kGroupMultipliers + 1);

struct Params {
  CUtensorMap image[kGroupResidues];   // (c, w, h, n) of each residue
  CUtensorMap filters;                 // (c of a group, tap, k)
  CUtensorMap output[kGroupResidues];  // (k, q, p, n) of each phase
  const void* bias;
  float low, high;
  int slabs, parts, units;  // blocks are slabs x parts; units of a slab
  int K;
  int rows, patches;
  int loaded, stage_bytes, stages;
  int first_h[kGroupResidues], first_w[kGroupResidues], patch_at[kGroupResidues];
  int product_at[kGroupTaps];
  Divisor units_of_image;
};

template <class Element, int kGroup, GroupWalk kWalk>
__global__ void __launch_bounds__(kThreads, 1) groups_kernel(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // cutlass_takes refuses every device that runs this
#else
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;
  constexpr bool kBackward = kWalk != GroupWalk::kForward;
  constexpr int kPhases = phases_of(kWalk), kStored = stored_units(kWalk);
  constexpr int kGroups = kSlabChannels / kGroup, kSteps = kGroup / 16;         // of 16 terms
  constexpr int kRowBytes = 2 * kGroup, kTapBytes = kSlabChannels * kRowBytes;  // of the filters
  // From one step's filters to the next.
  constexpr int kStepBytes = kBackward ? 16 * kRowBytes : 32;
  extern __shared__ __align__(1024) unsigned char groups_memory[];
  __shared__ alignas(8) uint64_t filters_there, full[kGroupStages], empty[kGroupStages];
  const uint32_t from = cute::cast_smem_ptr_to_uint(groups_memory);
  unsigned char* filters = groups_memory + (-from & 1023u);
  unsigned char* stages = filters + kGroupTaps * kTapBytes;
  unsigned char* outputs = stages + p.stages * p.stage_bytes;

  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    Full::init(&filters_there, 1);
    for (int i = 0; i < p.stages; ++i) Full::init(&full[i], 1), Empty::init(&empty[i], 128);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  begin_early();

  const int warpgroup = cutlass::canonical_warp_group_idx();  // uniform to the compiler
  const int part = static_cast<int>(blockIdx.x) / p.slabs;
  const int first_channel = (static_cast<int>(blockIdx.x) - part * p.slabs) * kSlabChannels;
  const auto image_of = [&](int unit, int& row) {
    uint32_t n = static_cast<uint32_t>(unit);
    row = static_cast<int>(p.units_of_image.split(n)) * p.rows;
    return static_cast<int>(n);
  };
  if (warpgroup == kGroupMultipliers) {
    if (thread != 128 * kGroupMultipliers) return;
    const uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    Full::arrive_and_expect_tx(&filters_there, static_cast<uint32_t>(kGroupTaps * kTapBytes));
    for (int tap = 0; tap < kGroupTaps; ++tap)
      cute::SM90_TMA_LOAD_3D::copy(&p.filters, &filters_there, hint, filters + tap * kTapBytes, 0,
                                   tap, first_channel);
    int stage = 0;
    uint32_t phase = 1;
    for (int unit = part; unit < p.units; unit += p.parts) {
      Empty::wait(&empty[stage], phase);
      Full::arrive_and_expect_tx(&full[stage], static_cast<uint32_t>(p.loaded));
      int row;
      const int n = image_of(unit, row);
      for (int i = 0; i < p.patches; ++i)
        cute::SM90_TMA_LOAD_4D::copy(&p.image[i], &full[stage], hint,
                                     stages + stage * p.stage_bytes + p.patch_at[i], first_channel,
                                     p.first_w[i], row + p.first_h[i], n);
      if (++stage == p.stages) stage = 0, phase ^= 1;
    }
    return;
  }

  const int lane = thread % 32, warp = thread / 32 % 4, g = lane / 4, t = lane % 4;
  float bias[16];
  load_bias<Element>(p.bias, first_channel + 2 * t, p.K, bias);
  const uint32_t filters_at = cute::cast_smem_ptr_to_uint(filters);
  const uint32_t stages_at = cute::cast_smem_ptr_to_uint(stages);
  unsigned char* stored = outputs + warpgroup * (kStored * kUnitBytes);
  const auto meet = [&] { asm volatile("bar.sync %0, 128;\n" ::"r"(1 + warpgroup) : "memory"); };
  Full::wait(&filters_there, 0);
  int stage = warpgroup;
  uint32_t phase = 0;
  for (int unit = part + warpgroup * p.parts; unit < p.units; unit += kGroupMultipliers * p.parts) {
    Full::wait(&full[stage], phase);
    const uint32_t pixels = stages_at + static_cast<uint32_t>(stage * p.stage_bytes);
    int row;
    const int n = image_of(unit, row);
#pragma unroll
    for (int residue = 0; residue < kPhases; ++residue) {
      float sums[kGroups][kGroup / 2] = {};
#pragma unroll
      for (int i = products_before(kWalk, residue); i < products_before(kWalk, residue + 1); ++i) {
        const uint64_t a = operand<kPixelBytes>(pixels + static_cast<uint32_t>(p.product_at[i]));
        const uint64_t b = operand<kRowBytes>(
            filters_at + static_cast<uint32_t>(tap_of_product(kWalk, i) * kTapBytes));
        for (auto& group : sums)
          for (auto& sum : group) cute::warpgroup_fence_operand(sum);
        cute::warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int j = 0; j < kGroups; ++j)
            multiply<Element, kGroup, false, kBackward>(
                a + static_cast<uint64_t>((j * kRowBytes + 32 * step) / 16),
                b + static_cast<uint64_t>((j * kGroup * kRowBytes + step * kStepBytes) / 16),
                sums[j]);
        cute::warpgroup_commit_batch();
      }
      cute::warpgroup_wait<0>();
      for (auto& group : sums)
        for (auto& sum : group) cute::warpgroup_fence_operand(sum);
      if (residue + 1 == kPhases) Empty::arrive(&empty[stage]);

      // What was stored from here before has been read.
      unsigned char* output = stored + residue % kStored * kUnitBytes;
      if (thread % 128 == 0) cute::tma_store_wait<kStored - 1>();
      meet();
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_row<Element>(output, 16 * warp + g + 8 * half, t, bias, p.low, p.high,
                           [&](int j, int e) {
                             return sums[8 * j / kGroup][4 * j % (kGroup / 2) + 2 * half + e];
                           });
      cute::tma_store_fence();
      meet();
      if (thread % 128 == 0) {
        cute::SM90_TMA_STORE_4D::copy(&p.output[residue], output, first_channel, 0, row, n);
        cute::tma_store_arrive();
      }
    }
    stage += kGroupMultipliers;
    if (stage >= p.stages) stage -= p.stages, phase ^= 1;
  }
  if (thread % 128 == 0) cute::tma_store_wait<0>();
#endif
}

template <class Element, int kGroup, GroupWalk kWalk>
void run(const Params& p, const Queue& queue) {
  const int filters = kGroupTaps * kSlabChannels * kGroup * 2;
  const int stored = kGroupMultipliers * stored_units(kWalk) * kUnitBytes;
  launch_early(groups_kernel<Element, kGroup, kWalk>,
               dim3(static_cast<unsigned>(p.slabs * p.parts)), dim3(kThreads),
               1024 + filters + p.stages * p.stage_bytes + stored, queue, p);
}

template <class Element, int kGroup>
void run(const Params& p, GroupWalk walk, const Queue& queue) {
  switch (walk) {
    case GroupWalk::kForward:
      return run<Element, kGroup, GroupWalk::kForward>(p, queue);
    case GroupWalk::kBackward:
      return run<Element, kGroup, GroupWalk::kBackward>(p, queue);
    default:
      return run<Element, kGroup, GroupWalk::kDoubled>(p, queue);
  }
}

template <class Element>
void run_of(const Params& p, int64_t group, GroupWalk walk, const Queue& queue) {
  if (group == 64)
    run<Element, 64>(p, walk, queue);
  else
    run<Element, 32>(p, walk, queue);
}

}  // namespace

void gather_groups(const ConvProblem& problem, Pass pass, const GatherTensors& tensors,
                   const Queue& queue) {
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  const DType dtype = problem.dtype;
  const Gather g = groups_gather(problem, pass);
  const int64_t group = problem.C / problem.groups;
  const int64_t H = g.h.image, W = g.w.image;
  const int64_t stride = g.h.stride, slabs = ceil_div(g.C, kSlabChannels);
  const GroupTile tile = group_tile(problem, pass);
  const GroupWalk walk = group_walk(problem, pass);
  Params p{};
  for (int i = 0; i < tile.patches; ++i) {
    const GroupPatch& patch = tile.patch[i];
    const char* first =
        static_cast<const char*>(tensors.image) + 2 * (patch.residue_h * W + patch.residue_w) * g.C;
    p.image[i] = tensor_map<4>(
        dtype, first,
        {g.C, ceil_div(W - patch.residue_w, stride), ceil_div(H - patch.residue_h, stride), g.N},
        {stride * g.C, stride * W * g.C, H * W * g.C},
        {kSlabChannels, tile.columns, patch.rows, 1});
    p.first_h[i] = narrow(patch.first_h), p.first_w[i] = narrow(patch.first_w);
    p.patch_at[i] = narrow(patch.at);
  }
  p.filters =
      tensor_map<3>(dtype, tensors.filters, {group, kGroupTaps, g.K}, {group, 1, kSlabChannels});
  const bool forward = walk == GroupWalk::kForward;
  const int64_t height = forward ? problem.P : problem.H, width = forward ? problem.Q : problem.W;
  const int64_t apart = walk == GroupWalk::kDoubled ? 2 : 1;  // outputs of a phase
  for (int phase = 0; phase < phases_of(walk); ++phase) {
    const int64_t h = phase / apart, w = phase % apart;
    char* first = static_cast<char*>(tensors.output) + 2 * (h * width + w) * g.K;
    p.output[phase] = tensor_map<4>(
        dtype, first, {g.K, ceil_div(width - w, apart), ceil_div(height - h, apart), g.N},
        {apart * g.K, apart * width * g.K, height * width * g.K},
        {kSlabChannels, tile.columns, tile.rows, 1});
  }
  p.bias = tensors.bias;
  p.low = tensors.low;
  p.high = tensors.high;
  p.units = narrow(g.N * tile.units_of_image);
  p.slabs = narrow(slabs);
  p.parts = narrow(group_parts(slabs, p.units, queue.multiprocessors));
  p.K = narrow(g.K);
  p.rows = narrow(tile.rows);
  p.patches = tile.patches;
  p.loaded = narrow(tile.loaded);
  p.stage_bytes = narrow(tile.stage_bytes);
  p.stages = narrow(tile.stages);
  for (int tap = 0; tap < kGroupTaps; ++tap) p.product_at[tap] = narrow(tile.product_at[tap]);
  p.units_of_image = Divisor(tile.units_of_image);
  if (dtype == DType::kFloat16)
    run_of<__half>(p, group, walk, queue);
  else
    run_of<__nv_bfloat16>(p, group, walk, queue);
}

}  // namespace torchconv::cuda::sm90
#endif
