// Depthwise fprop of stride 1 and 2 and dgrad of stride 1 in NCHW, types of at most four bytes:
// strips of plane_runs.cuh.
//
// A thread keeps the sums of the R rows of outputs that the current row of its window meets; the
// row that is finished goes to shared memory, from where the block stores its run of outputs: as
// rounded numbers, or, where an epilogue has more to do than a comparison, as float ones that each
// pass through it on their way out. Weights lie in registers.
// Bound: the bytes of x and y; multiplications where R is 5 or 7.
#include "cuda/activation.h"
#include "cuda/depthwise.h"
#include "cuda/plane_runs.cuh"

namespace torchconv::cuda {
namespace {

struct StripGather {
  Gather g;
  PlaneRuns t;
  Divisor channels;
  int64_t planes;
  int in_elements;  // of shared memory for the input's run
  bool wide;        // whether results are staged as float
};

template <typename S>
__global__ void __launch_bounds__(kStripThreads,
                                  S::R == 7 || (S::R == 5 && S::kColumns == 14) ? 3 : 4)
    depthwise_strips_kernel(const __grid_constant__ StripGather p, const typename S::T* in,
                            const typename S::T* w, const Epilogue<typename S::T> epilogue) {
  using T = typename S::T;
  using A = Wide<T>;
  constexpr int R = S::R, kTaps = R * R, kStride = S::kStride;
  constexpr int kColumns = S::kColumns, kWindow = S::kWindow;
  constexpr int kSlots = (R + kStride - 1) / kStride;  // outputs that a row of the window meets
  // Rows of the window whose code stands side by side, so that no sum moves to another register.
  constexpr int kUnroll = R == 7 ? 1 : kStride * kSlots;
  // Products that belong to another thread's outputs are many where R is large.
  constexpr bool kExact = R > 3;
  const Gather& g = p.g;
  const PlaneRuns& t = p.t;
  T* inputs = dynamic_shared<T>();                            // as PlaneRun lies in memory
  A* weights = reinterpret_cast<A*>(inputs + p.in_elements);  // [slots][R][R], padded to 16 bytes
  A* wide = weights + (t.slots * kTaps + 3) / 4 * 4;          // the outputs' run, or
  T* narrow = reinterpret_cast<T*>(wide);                     // the same, rounded

  uint32_t block = blockIdx.x;
  const PlaneRun run = run_of<S>(g, t, static_cast<int>(t.bands.split(block)));
  const int64_t plane0 = static_cast<int64_t>(block) * t.slots;
  const int planes = static_cast<int>(min(static_cast<int64_t>(t.slots), p.planes - plane0));
  const int in_plane = g.h.in * g.w.in, out_plane = g.h.out * g.w.out;
  const T* from = in + plane0 * in_plane + static_cast<int64_t>(run.h_first) * g.w.in;
  load_run(inputs, from, (planes - 1) * in_plane + run.in_rows * g.w.in);
  copy_async_commit();
  for (int i = static_cast<int>(threadIdx.x); i < planes * kTaps;
       i += static_cast<int>(blockDim.x)) {
    uint32_t channel = static_cast<uint32_t>(plane0) + static_cast<uint32_t>(i / kTaps);
    channel = p.channels.split(channel);
    const int tap = g.turned ? kTaps - 1 - i % kTaps : i % kTaps;
    weights[i] = to_wide(w[channel * g.w_group + tap * g.w_tap]);
  }
  copy_async_wait<0>();
  __syncthreads();

  T* const target = epilogue.y + plane0 * out_plane + static_cast<int64_t>(run.row0) * g.w.out;
  const int out_lead = p.wide ? 0 : lead_of(target);
  uint32_t slot = threadIdx.x;
  const int strip = static_cast<int>(t.strips.split(slot));
  const int first_row = static_cast<int>(t.sets.split(slot)) * t.set_rows;
  // The last strip of a row may share columns with the one before, and write the same there.
  const int column = min(strip * kColumns, g.w.out - kColumns);
  const int w0 = column * kStride + g.w.origin;
  const int rows = min(t.set_rows, run.rows - first_row);
  if (slot < static_cast<uint32_t>(planes) && rows > 0) {
    A weight[kTaps];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) weight[i] = weights[static_cast<int>(slot) * kTaps + i];
    uint32_t channel = static_cast<uint32_t>(plane0) + slot;
    const A bias = epilogue.bias_of(p.channels.split(channel));
    const uint32_t inside = S::inside(w0, g.w.in);
    int h = (run.row0 + first_row) * kStride + g.h.origin;
    const T* window = inputs + lead_of(from) + static_cast<int>(slot) * in_plane +
                      (h - run.h_first) * g.w.in + w0;
    int out = out_lead + static_cast<int>(slot) * out_plane + first_row * g.w.out + column;
    const bool relu = epilogue.activation != Activation::kNone;
    const bool cut = epilogue.activation == Activation::kReLU6;

    const int steps = (rows - 1) * kStride + R;
    A z[kSlots][kColumns] = {};
#pragma unroll 1
    for (int base = 0; base < steps; base += kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int step = base + u;
        if (kUnroll > 1 && step >= steps) break;
        A value[kWindow];
        S::load(window, static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in), inside, value);
        window += g.w.in, ++h;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          // kUnroll is at least R, or 1 where rows are one apart.
          if ((u - r + kUnroll * R) % kStride != 0) continue;
          if (kExact && (step < r || step - r >= rows * kStride)) continue;
          const int a = kUnroll == 1 ? R - 1 - r : (u - r + kUnroll) / kStride % kSlots;
#pragma unroll
          for (int s = 0; s < R; ++s)
#pragma unroll
            for (int b = 0; b < kColumns; ++b)
              z[a][b] =
                  weight[r * R + s] * value[b * kStride + s] + (r == 0 && s == 0 ? bias : z[a][b]);
        }

        constexpr int kLast = R - 1;
        if ((u - kLast + kUnroll * R) % kStride != 0) continue;
        A(&done)[kColumns] = z[kUnroll == 1 ? 0 : (u - kLast + kUnroll) / kStride % kSlots];
        if (step >= kLast) {
          if (p.wide) {
#pragma unroll
            for (int b = 0; b < kColumns; ++b) wide[out + b] = done[b];
          } else {
            if (relu)
#pragma unroll
              for (int b = 0; b < kColumns; ++b) {
                done[b] = done[b] < A{0} ? A{0} : done[b];
                done[b] = cut && done[b] > A{6} ? A{6} : done[b];
              }
#pragma unroll
            for (int b = 0; b < kColumns; b += S::kStore) {
              Vector<T, S::kStore> rounded;
#pragma unroll
              for (int v = 0; v < S::kStore; ++v) rounded.element[v] = from_wide<T>(done[b + v]);
              *reinterpret_cast<Vector<T, S::kStore>*>(narrow + out + b) = rounded;
            }
          }
          out += g.w.out;
        }
        if constexpr (kUnroll == 1)
#pragma unroll
          for (int a = 0; a + 1 < R; ++a)
#pragma unroll
            for (int b = 0; b < kColumns; ++b) z[a][b] = z[a + 1][b];
      }
    }
  }
  __syncthreads();

  const int count = (planes - 1) * out_plane + run.rows * g.w.out;
  if (!p.wide) return store_run(narrow, target, count);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    epilogue.store(wide[i], target - epilogue.y + i);
}

template <typename S>
bool launch_strips(const Gather& g, const void* in, const void* w,
                   const Epilogue<typename S::T>& epilogue, const Queue& queue) {
  using T = typename S::T;
  constexpr int64_t kSize = sizeof(T);
  if (!strips_take<S>(g)) return false;
  if (S::kPairs && (!aligned<T>(in, 2) || !aligned<T>(epilogue.y, 2))) return false;
  StripGather p{};
  p.g = g;
  const Activation activation = epilogue.activation;
  p.wide = epilogue.preactivation != nullptr ||
           (activation != Activation::kNone && activation != Activation::kReLU &&
            activation != Activation::kReLU6);
  const int64_t out_size = p.wide ? static_cast<int64_t>(sizeof(Wide<T>)) : kSize;
  if (!plane_runs<S>(g, kSize, out_size, p.t)) return false;
  p.planes = g.N * g.groups;
  p.channels = Divisor(g.groups);
  const int64_t slots = p.t.slots;
  const int64_t in_rows = std::min<int64_t>((p.t.band_rows - 1) * S::kStride + S::R, g.h.in);
  p.in_elements = static_cast<int>(run_elements<T>(slots, g.h.in, in_rows, g.w.in));
  const int64_t outputs = run_elements<T>(slots, g.h.out, p.t.band_rows, g.w.out);
  const int64_t weights = round_up(slots * S::R * S::R, 4);
  const int64_t blocks = ceil_div(p.planes, slots) * p.t.bands.value();
  launch(depthwise_strips_kernel<S>, dim3(static_cast<unsigned>(blocks)),
         dim3(static_cast<unsigned>(p.t.threads)),
         static_cast<int>(p.in_elements * kSize + weights * static_cast<int64_t>(sizeof(Wide<T>)) +
                          outputs * out_size),
         queue, p, static_cast<const T*>(in), static_cast<const T*>(w), epilogue);
  return true;
}

}  // namespace

bool depthwise_strips(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue) {
  const bool unit = sampling == Sampling::kUnit;
  if ((!unit && sampling != Sampling::kStride2) || queue.capability < 80) return false;
  const auto compute = [&](auto element) {
    using T = decltype(element);
    constexpr bool kHalf = sizeof(T) == 2;
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    const auto run = [&](auto strip) {
      return launch_strips<decltype(strip)>(g, in, w, epilogue, queue);
    };
    if (!unit)
      return R == 5 ? run(Strip<T, 5, 7, kHalf, 2>{})
                    : run(Strip<T, 3, kHalf ? 14 : 7, kHalf, 2>{});
    if (R == 7) return run(Strip<T, 7, 7, false>{});
    // Pairs take fewer instructions, but a row may fill strips of 14 badly.
    if constexpr (kHalf)
      if (ceil_div(g.w.out, 14) * 14 * 5 <= ceil_div(g.w.out, 7) * 7 * 6 &&
          (R == 5 ? run(Strip<T, 5, 14, true>{}) : run(Strip<T, 3, 14, true>{})))
        return true;
    if (R == 5) return run(Strip<T, 5, 7, false>{});
    return run(Strip<T, 3, 7, false>{});
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
         : dtype == DType::kFloat32  ? compute(float{})
                                     : false;
}

}  // namespace torchconv::cuda
