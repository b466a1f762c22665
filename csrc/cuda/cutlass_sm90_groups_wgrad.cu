// The weights' gradient of groups of 32 or 64 channels on Hopper, in items, parts and lines as
// cutlass_sm90_groups_wgrad.h has them. Bound: the bytes of x and dz.
//
// Of a slab of 64 channels and as many filters a block has all 9 x 64 x 64 sums: three warpgroups
// have those of a row of taps each. They take the lines of x one after the other, and multiply each
// with the row of dz that it meets at their taps. A pixel of 16 images is an operand by itself, in
// rows of 64 channels, images after each other. Groups of 32 make half of a product's sums, and
// leave out the others.
#ifdef TORCHCONV_CUTLASS
#include "cuda/block_sums.cuh"
#include "cuda/cutlass_sm90_groups_wgrad.h"
#include "cuda/cutlass_sm90_wgmma.h"
#include "cuda/divmod.h"
#include "cuda/early_launch.h"

namespace torchconv::cuda::sm90 {
namespace {

constexpr int kTapRows = 3, kMultipliers = 128 * kTapRows, kThreads = kMultipliers + 32;
constexpr int kOperandBytes = kWgradImages * kPixelBytes;

struct Params {
  CUtensorMap x, dz;  // (c, n, w, h)
  int slabs, K;
  int stride, pad_top, pad_left;
  int H, P;
  int rows, items, of_part, chain;
  int x_slots, dz_slots, x_bytes, dz_bytes;
  int from[kTapRows], to[kTapRows];  // outputs of a row whose pixel for a column of taps there is
  Divisor segments;
};

// A place in a ring of shared memory.
struct Place {
  int slot = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

template <class Element, int kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    groups_wgrad_kernel(const __grid_constant__ Params p, const SliceSums<Element> results) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // cutlass_takes refuses every device that runs this
#else
  using Full = cutlass::arch::ClusterTransactionBarrier;
  using Empty = cutlass::arch::ClusterBarrier;
  extern __shared__ __align__(1024) unsigned char groups_wgrad_memory[];
  __shared__ alignas(8) uint64_t x_full[kWgradSlots], x_empty[kWgradSlots];
  __shared__ alignas(8) uint64_t dz_full[kWgradSlots], dz_empty[kWgradSlots];
  const uint32_t from = cute::cast_smem_ptr_to_uint(groups_wgrad_memory);
  unsigned char* x = groups_wgrad_memory + (-from & 1023u);
  unsigned char* dz = x + p.x_slots * p.x_bytes;

  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < p.x_slots; ++i)
      Full::init(&x_full[i], 1), Empty::init(&x_empty[i], kMultipliers);
    for (int i = 0; i < p.dz_slots; ++i)
      Full::init(&dz_full[i], 1), Empty::init(&dz_empty[i], kMultipliers);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  begin_early();

  const int warpgroup = cutlass::canonical_warp_group_idx();  // uniform to the compiler
  const int part = static_cast<int>(blockIdx.x) / p.slabs;
  const int first_channel = (static_cast<int>(blockIdx.x) - part * p.slabs) * kSlabChannels;
  const int first_item = part * p.of_part, end = min(first_item + p.of_part, p.items);
  struct Item {
    int image, row, rows;   // the first image, and the outputs'
    int first_line, lines;  // of x
  };
  const auto item_at = [&](int item) {
    uint32_t chunk = static_cast<uint32_t>(item);
    const int row = static_cast<int>(p.segments.split(chunk)) * p.rows;
    const int rows = min(p.rows, p.P - row);
    return Item{static_cast<int>(chunk) * kWgradImages, row, rows, row * p.stride - p.pad_top,
                (rows - 1) * p.stride + kTapRows};
  };
  const int log_stride = p.stride - 1;

  if (warpgroup == kTapRows) {
    if (thread != kMultipliers) return;
    const uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    Place to_x, to_dz;
    for (int i = first_item; i < end; ++i) {
      const Item item = item_at(i);
      for (int line = 0; line < item.lines; ++line) {
        if ((line & log_stride) == 0 && line >> log_stride < item.rows) {
          Empty::wait(&dz_empty[to_dz.slot], to_dz.phase ^ 1);
          Full::arrive_and_expect_tx(&dz_full[to_dz.slot], static_cast<uint32_t>(p.dz_bytes));
          cute::SM90_TMA_LOAD_4D::copy(&p.dz, &dz_full[to_dz.slot], hint,
                                       dz + to_dz.slot * p.dz_bytes, first_channel, item.image, 0,
                                       item.row + (line >> log_stride));
          to_dz.advance(p.dz_slots);
        }
        Empty::wait(&x_empty[to_x.slot], to_x.phase ^ 1);
        Full::arrive_and_expect_tx(&x_full[to_x.slot], static_cast<uint32_t>(p.x_bytes));
        cute::SM90_TMA_LOAD_4D::copy(&p.x, &x_full[to_x.slot], hint, x + to_x.slot * p.x_bytes,
                                     first_channel, item.image, 0, item.first_line + line);
        to_x.advance(p.x_slots);
      }
    }
    return;
  }

  const uint32_t x_at = cute::cast_smem_ptr_to_uint(x), dz_at = cute::cast_smem_ptr_to_uint(dz);
  const int lane = thread % 32, warp = thread / 32 % 4, g = lane / 4, t = lane % 4;
  // Filters from 32 on are those of the second group of 32, whose channels are the last columns.
  const bool second = kGroup == 32 && warp >= 2;
  Place at_x, at_dz;
  for (int first_of_chain = first_item; first_of_chain < end; first_of_chain += p.chain) {
    float sums[kTapRows][32] = {};
    const int end_of_chain = min(first_of_chain + p.chain, end);
    for (int i = first_of_chain; i < end_of_chain; ++i) {
      const Item item = item_at(i);
      for (int line = 0; line < item.lines; ++line) {
        // Every line is waited for, so that no warpgroup is a turn of the ring ahead of another.
        Full::wait(&x_full[at_x.slot], at_x.phase);
        const int ahead = line - warpgroup;
        if (ahead >= 0 && (ahead & log_stride) == 0 && ahead >> log_stride < item.rows) {
          Full::wait(&dz_full[at_dz.slot], at_dz.phase);
          const int h = item.first_line + line;
          if (h >= 0 && h < p.H) {
            const uint64_t a =
                operand<kPixelBytes>(dz_at + static_cast<uint32_t>(at_dz.slot * p.dz_bytes));
            const uint64_t b =
                operand<kPixelBytes>(x_at + static_cast<uint32_t>(at_x.slot * p.x_bytes));
            for (auto& column : sums)
              for (auto& sum : column) cute::warpgroup_fence_operand(sum);
            cute::warpgroup_arrive();
#pragma unroll
            for (int s = 0; s < kTapRows; ++s)
              for (int q = p.from[s]; q < p.to[s]; ++q)
                multiply<Element, kSlabChannels, true, true>(
                    a + static_cast<uint64_t>(q * (kOperandBytes / 16)),
                    b + static_cast<uint64_t>((q * p.stride - p.pad_left + s) *
                                              (kOperandBytes / 16)),
                    sums[s]);
            cute::warpgroup_commit_batch();
            cute::warpgroup_wait<0>();
            for (auto& column : sums)
              for (auto& sum : column) cute::warpgroup_fence_operand(sum);
          }
          Empty::arrive(&dz_empty[at_dz.slot]);
          at_dz.advance(p.dz_slots);
        }
        Empty::arrive(&x_empty[at_x.slot]);
        at_x.advance(p.x_slots);
      }
    }
    // The sums are the part's, or, of a single part, the result.
    const bool adds = first_of_chain > first_item;
#pragma unroll
    for (int s = 0; s < kTapRows; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = first_channel + 16 * warp + g + 8 * half;
        if (k >= p.K) continue;
        const int64_t first = (int64_t{k} * 9 + kTapRows * warpgroup + s) * kGroup + 2 * t;
#pragma unroll
        for (int j = 0; j < kGroup / 8; ++j) {
          const int i = 4 * j + 2 * half;
          float2 pair{second ? sums[s][(i + 16) % 32] : sums[s][i],
                      second ? sums[s][(i + 17) % 32] : sums[s][i + 1]};
          if (results.partial != nullptr) {
            float2& to = *reinterpret_cast<float2*>(results.partial + part * results.elements +
                                                    first + 8 * j);
            if (adds) pair.x += to.x, pair.y += to.y;
            to = pair;
          } else {
            results.result[first + 8 * j] = from_wide<Element>(pair.x);
            results.result[first + 8 * j + 1] = from_wide<Element>(pair.y);
          }
        }
      }
  }
#endif
}

template <class Element>
void wgrad_of(const ConvProblem& problem, const Params& p, const GroupsWgrad& g, Element* dw,
              const Queue& queue) {
  const int64_t group = problem.C / problem.groups;
  const SliceSums<Element> sums = slice_sums(dw, g.parts, problem.K * 9 * group, queue);
  launch_early(group == 64 ? groups_wgrad_kernel<Element, 64> : groups_wgrad_kernel<Element, 32>,
               dim3(static_cast<unsigned>(p.slabs * g.parts)), dim3(kThreads),
               1024 + p.x_slots * p.x_bytes + p.dz_slots * p.dz_bytes, queue, p, sums);
  add_slices(sums, g.parts, queue);
}

}  // namespace

void wgrad_groups(const ConvProblem& problem, const void* dz, const void* x, void* dw,
                  const Queue& queue) {
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  const DType dtype = problem.dtype;
  const int64_t C = problem.C, N = problem.N;
  const GroupsWgrad g = groups_wgrad(problem);
  // Images after each other, in rows of channels.
  const auto map_of = [&](const void* data, int64_t height, int64_t width) {
    return tensor_map<4>(dtype, data, {C, N, width, height}, {height * width * C, C, width * C},
                         {kSlabChannels, kWgradImages, width, 1});
  };
  Params p{};
  p.x = map_of(x, problem.H, problem.W);
  p.dz = map_of(dz, problem.P, problem.Q);
  p.slabs = narrow(ceil_div(C, kSlabChannels));
  p.K = narrow(problem.K);
  p.stride = narrow(problem.stride_h);
  p.pad_top = narrow(problem.pad_top);
  p.pad_left = narrow(problem.pad_left);
  p.H = narrow(problem.H);
  p.P = narrow(problem.P);
  p.rows = narrow(g.rows);
  p.items = narrow(g.items);
  p.of_part = narrow(g.of_part);
  p.chain = narrow(g.chain);
  p.x_slots = narrow(g.x_slots), p.dz_slots = narrow(g.dz_slots);
  p.x_bytes = narrow(g.x_bytes), p.dz_bytes = narrow(g.dz_bytes);
  for (int s = 0; s < kTapRows; ++s) {
    const Range outputs = outputs_inside(problem, s);
    p.from[s] = narrow(outputs.begin), p.to[s] = narrow(outputs.end);
  }
  p.segments = Divisor(g.segments);
  if (dtype == DType::kFloat16)
    wgrad_of(problem, p, g, static_cast<Half*>(dw), queue);
  else
    wgrad_of(problem, p, g, static_cast<BFloat16*>(dw), queue);
}

}  // namespace torchconv::cuda::sm90
#endif
