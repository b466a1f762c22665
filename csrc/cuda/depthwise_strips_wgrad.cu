// Depthwise wgrad of stride 1 in NCHW, half types: strips of plane_runs.cuh.
//
// A block has some neighbouring channels and goes through a slice of the bands of all images, whose
// runs of x and dz it stages together. A thread rolls the R rows of x that a row of dz meets down
// its set of rows, and adds to all R x R sums in registers; those of a block's threads meet in
// shared memory, those of slices, which the shape alone cuts, in block_sums.cu.
// A product with padding is not formed, for dz need not be finite.
// Bound: the bytes of x and dz.
#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"
#include "cuda/plane_runs.cuh"

namespace torchconv::cuda {
namespace {

struct StripWgrad {
  Gather g;  // fprop's
  PlaneRuns t;
  Divisor channel_sets;
  int64_t batches, slice_batches;  // bands of all images; of a slice
  int x_elements;                  // of shared memory for the run of x
  int shares;                      // threads that add a block's sums of one channel and tap: 1 to 8
};

template <typename S>
__global__ void __launch_bounds__(kStripThreads, S::R == 7                ? 2
                                                 : S::R == 5 && S::kPairs ? 3
                                                                          : 4)
    depthwise_strips_wgrad_kernel(const __grid_constant__ StripWgrad p, const typename S::T* dz,
                                  const typename S::T* x, const SliceSums<typename S::T> sums) {
  using T = typename S::T;
  using A = Wide<T>;
  constexpr int R = S::R, kTaps = R * R, kColumns = S::kColumns, kWindow = S::kWindow;
  constexpr int kUnroll = R == 7 ? 1 : R, kLast = R - 1;
  // Paddings are at most so large, so that no more columns lie beside the image.
  constexpr int kBeside = R / 2;
  const Gather& g = p.g;
  const PlaneRuns& t = p.t;
  T* inputs = dynamic_shared<T>();
  T* gradients = inputs + p.x_elements;

  uint32_t rest = blockIdx.x;
  const int c0 = static_cast<int>(p.channel_sets.split(rest)) * t.slots;
  // The last images first: dgrad, which came before, has left their dz in the cache.
  const int64_t slice = gridDim.x / p.channel_sets.value() - 1 - rest;
  const int planes = min(t.slots, g.groups - c0);
  const int in_plane = g.h.in * g.w.in, out_plane = g.h.out * g.w.out;

  uint32_t slot = threadIdx.x;
  const int column = static_cast<int>(t.strips.split(slot)) * kColumns;
  const int first_row = static_cast<int>(t.sets.split(slot)) * t.set_rows;
  const int w0 = column + g.w.origin;
  const uint32_t inside = S::inside(w0, g.w.in);
  bool left[kBeside], right[kBeside];  // whether these columns of the window are in the image
#pragma unroll
  for (int i = 0; i < kBeside; ++i) {
    left[i] = w0 + i >= 0;
    right[i] = w0 + kWindow - kBeside + i < g.w.in;
  }

  A z[kTaps] = {};
  const int64_t end = min((slice + 1) * p.slice_batches, p.batches);
  for (int64_t batch = slice * p.slice_batches; batch < end; ++batch) {
    uint32_t image = static_cast<uint32_t>(batch);
    const PlaneRun run = run_of<S>(g, t, static_cast<int>(t.bands.split(image)));
    const int64_t plane0 = static_cast<int64_t>(image) * g.groups + c0;
    const T* x_run = x + plane0 * in_plane + static_cast<int64_t>(run.h_first) * g.w.in;
    const T* dz_run = dz + plane0 * out_plane + static_cast<int64_t>(run.row0) * g.w.out;
    __syncthreads();
    load_run(inputs, x_run, (planes - 1) * in_plane + run.in_rows * g.w.in);
    load_run(gradients, dz_run, (planes - 1) * out_plane + run.rows * g.w.out);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    const int rows = min(t.set_rows, run.rows - first_row);
    if (slot >= static_cast<uint32_t>(planes) || rows <= 0) continue;
    int h = run.row0 + first_row + g.h.origin;
    const T* window = inputs + lead_of(x_run) + static_cast<int>(slot) * in_plane +
                      (h - run.h_first) * g.w.in + w0;
    const T* gradient = gradients + lead_of(dz_run) + static_cast<int>(slot) * out_plane +
                        first_row * g.w.out + column;
    A value[R][kWindow];
#pragma unroll 1
    for (int base = 0; base < rows + R - 1; base += kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int step = base + u;
        if (kUnroll > 1 && step >= rows + R - 1) break;
        S::load(window, static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in), inside,
                value[kUnroll == 1 ? kLast : u]);
        window += g.w.in, ++h;
        if (step >= R - 1) {
          A d[kColumns];
#pragma unroll
          for (int b = 0; b < kColumns; b += S::kStep) {
            const auto loaded = *reinterpret_cast<const Packed<T, S::kStep>*>(gradient + b);
#pragma unroll
            for (int v = 0; v < S::kStep; ++v) d[b + v] = loaded.wide(v);
          }
          gradient += g.w.out;
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (static_cast<unsigned>(h - R + r) >= static_cast<unsigned>(g.h.in)) continue;
            const A(&row)[kWindow] = value[kUnroll == 1 ? r : (u + 1 + r) % R];
#pragma unroll
            for (int s = 0; s < R; ++s)
#pragma unroll
              for (int b = 0; b < kColumns; ++b) {
                const int i = b + s, last = i - (kWindow - kBeside);
                if (i < kBeside && !left[i < kBeside ? i : 0]) continue;
                if (last >= 0 && !right[last >= 0 ? last : 0]) continue;
                z[r * R + s] += d[b] * row[i];
              }
          }
        }
        if constexpr (kUnroll == 1)
#pragma unroll
          for (int r = 0; r + 1 < R; ++r)
#pragma unroll
            for (int i = 0; i < kWindow; ++i) value[r][i] = value[r + 1][i];
      }
    }
  }

  A* shared = dynamic_shared<A>();  // [kTaps][threads]
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int each = static_cast<int>(t.sets.value() * t.strips.value());  // threads of a channel
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTaps; ++i) shared[i * threads + thread] = z[i];
  __syncthreads();
  const int share0 = thread & (p.shares - 1);
  for (int first = 0; first < planes * kTaps * p.shares; first += threads) {
    const int i = (first + thread) / p.shares, of = i / kTaps, tap = i % kTaps;
    A total{0};
    if (of < planes)
      for (int share = share0; share < each; share += p.shares)
        total += shared[tap * threads + of * each + share];
    for (int offset = p.shares / 2; offset > 0; offset /= 2)
      total += __shfl_xor_sync(~0u, total, offset);
    if (of < planes && share0 == 0)
      sums.store(slice, (c0 + of) * g.w_group + (g.turned ? kTaps - 1 - tap : tap) * g.w_tap,
                 total);
  }
}

template <typename S>
bool launch_strips_wgrad(const Gather& g, const void* dz, const void* x, void* dw,
                         const Queue& queue) {
  using T = typename S::T;
  // So many terms keep a thread's sums short enough for float32.
  constexpr int64_t kSize = sizeof(T), kMostTerms = 512, kBlocks = 1024;
  const auto narrow = [](const GatherAxis& axis) {
    const int before = -axis.origin, after = axis.out - axis.in - before + S::R - 1;
    return before <= S::R / 2 && after <= S::R / 2;
  };
  if (!strips_take<S>(g) || !narrow(g.w) || g.w.out % S::kColumns != 0) return false;
  if (S::kPairs && (!aligned<T>(dz, 2) || !aligned<T>(x, 2))) return false;
  StripWgrad p{};
  p.g = g;
  if (!plane_runs<S>(g, kSize, kSize, p.t)) return false;
  p.t.slots = std::min(p.t.slots, g.groups);
  const int64_t slots = p.t.slots, columns = ceil_div(g.groups, slots);
  p.channel_sets = Divisor(columns);
  p.batches = g.N * p.t.bands.value();
  const int64_t each = p.t.sets.value() * p.t.strips.value();
  p.shares = each >= 32 ? 8 : each >= 12 ? 4 : each >= 4 ? 2 : 1;
  const int64_t most = std::max<int64_t>(kMostTerms / (p.t.set_rows * S::kColumns), 1);
  p.slice_batches = std::min(std::max<int64_t>(columns * p.batches / kBlocks, 1), most);
  const int64_t slices = ceil_div(p.batches, p.slice_batches);
  const SliceSums<T> sums =
      slice_sums(static_cast<T*>(dw), slices, static_cast<int64_t>(g.groups) * g.w_group, queue);
  p.x_elements = static_cast<int>(
      run_elements<T>(slots, g.h.in, std::min<int64_t>(p.t.band_rows + S::R - 1, g.h.in), g.w.in));
  const int64_t elements = p.x_elements + run_elements<T>(slots, g.h.out, p.t.band_rows, g.w.out);
  const int64_t shared =
      std::max(elements * kSize, p.t.threads * S::R * S::R * static_cast<int64_t>(sizeof(Wide<T>)));
  launch(depthwise_strips_wgrad_kernel<S>, dim3(static_cast<unsigned>(columns * slices)),
         dim3(static_cast<unsigned>(p.t.threads)), static_cast<int>(shared), queue, p,
         static_cast<const T*>(dz), static_cast<const T*>(x), sums);
  add_slices(sums, slices, queue);
  return true;
}

}  // namespace

bool depthwise_strips_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                            const void* dz, const void* x, void* dw, const Queue& queue) {
  if (sampling != Sampling::kUnit || queue.capability < 80) return false;
  const auto compute = [&](auto element) {
    using T = decltype(element);
    if (R == 7) return launch_strips_wgrad<Strip<T, 7, 7, false>>(g, dz, x, dw, queue);
    if (R == 5)
      return launch_strips_wgrad<Strip<T, 5, 14, true>>(g, dz, x, dw, queue) ||
             launch_strips_wgrad<Strip<T, 5, 7, false>>(g, dz, x, dw, queue);
    return launch_strips_wgrad<Strip<T, 3, 14, true>>(g, dz, x, dw, queue) ||
           launch_strips_wgrad<Strip<T, 3, 7, false>>(g, dz, x, dw, queue);
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
