// Depthwise fprop of stride 1 and 2 and dgrad of stride 1 in NHWC: strips of channel_strips.cuh.
//
// A thread keeps the weights of its channels and the sums of the R rows of outputs that the current
// row of its window meets. Epilogues of no more than a comparison alone, for their code stands once
// for each of those rows.
// Bound: the bytes of x and y; multiplications where R is 5 or 7.
#include "cuda/activation.h"
#include "cuda/channel_strips.cuh"
#include "cuda/early_launch.h"

namespace torchconv::cuda {
namespace {

// Blocks that a multiprocessor's registers hold.
template <typename S>
constexpr int kResident = !S::kNarrow || (S::R == 3 && S::kColumns == 4) ? 4 : 3;

template <typename S>
__global__ void __launch_bounds__(S::kThreads, kResident<S>)
    channel_strips_kernel(const __grid_constant__ ChannelStrips p, const typename S::T* in,
                          const typename S::T* w, const typename S::T* bias, typename S::T* out,
                          Activation activation) {
  using T = typename S::T;
  using A = typename S::A;
  constexpr int R = S::R, kTaps = S::kTaps, kVector = S::kVector, kUnroll = S::kUnroll;
  constexpr int kColumns = S::kColumns, kWindow = S::kWindow, kStride = S::kStride;
  constexpr int kSlots = S::kSlots, kDepth = S::kDepth, kLast = R - 1;
  // Products that belong to another thread's outputs are many where R is large.
  constexpr bool kExact = R > 3;
  begin_early();
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t run = blockIdx.x, sub = threadIdx.x;
  const int vector0 = static_cast<int>(p.lane_tiles.split(run)) * lanes;
  const int lane = static_cast<int>(p.lanes.split(sub));
  const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector;

  A* weights = dynamic_shared<A>();
  stage_weights<S>(p, vector0, w, weights);

  const uint32_t position = run * static_cast<uint32_t>(p.subs) + sub;
  const bool active =
      sub < static_cast<uint32_t>(p.subs) && vector0 + lane < p.vectors && position < p.positions;
  const StripPlace at(p, active ? position : 0, kColumns);
  const int rows = active ? min(p.set_rows, g.h.out - at.row) : 0;
  const int steps = (rows - 1) * kStride + R;
  const int w0 = at.column * kStride + g.w.origin;
  int h = at.row * kStride + g.h.origin;
  const int64_t in_row = static_cast<int64_t>(g.w.in) * p.channels;
  const T* line = in + (static_cast<int64_t>(at.n) * g.h.in + h) * in_row +
                  static_cast<int64_t>(w0) * p.channels + c;
  T* target = out +
              ((static_cast<int64_t>(at.n) * g.h.out + at.row) * g.w.out + at.column) * p.channels +
              c;
  const uint32_t inside = inside_bits<kWindow, false>(w0, 1, g.w.in);
  const int columns = min(kColumns, g.w.out - at.column);
  typename S::Loaded loaded[kDepth][kWindow];
  const auto load = [&](int step, typename S::Loaded(&row)[kWindow]) {
    const bool row_inside =
        step < steps && static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in);
    S::load(line, p.channels, row_inside ? inside : 0, row);
    ++h, line += in_row;
  };
  if (active) {
#pragma unroll
    for (int j = 0; j < kDepth; ++j) load(j, loaded[j]);
  }
  A first[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v)
    first[v] = active && bias != nullptr ? to_wide(bias[c + v]) : A{0};
  __syncthreads();
  if (!active) return;
  A weight[kTaps][kVector];
#pragma unroll
  for (int i = 0; i < kTaps; ++i)
#pragma unroll
    for (int v = 0; v < kVector; ++v) weight[i][v] = weights[i * S::kPitch + lane * kVector + v];

  const bool relu = activation != Activation::kNone, cut = activation == Activation::kReLU6;
  A z[kSlots][kColumns][kVector] = {};
#pragma unroll 1
  for (int base = 0; base < steps; base += kUnroll) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int step = base + u;
      if (kUnroll > 1 && step >= steps) break;
      A value[kWindow][kVector];
      S::widen(loaded[u % kDepth], value);
      load(step + kDepth, loaded[u % kDepth]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        // kUnroll is at least R, or 1 where rows are one apart.
        if ((u - r + kUnroll * R) % kStride != 0) continue;
        if (kExact && (step < r || step - r >= rows * kStride)) continue;
        A(&row)
        [kColumns][kVector] = z[kUnroll == 1 ? kLast - r : (u - r + kUnroll) / kStride % kSlots];
#pragma unroll
        for (int s = 0; s < R; ++s)
#pragma unroll
          for (int b = 0; b < kColumns; ++b)
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              row[b][v] = weight[r * R + s][v] * value[b * kStride + s][v] +
                          (r == 0 && s == 0 ? first[v] : row[b][v]);
      }

      if ((u - kLast + kUnroll * R) % kStride != 0) continue;
      A(&done)[kColumns][kVector] = z[kUnroll == 1 ? 0 : (u - kLast + kUnroll) / kStride % kSlots];
      if (step >= kLast) {
        if (relu)
#pragma unroll
          for (int i = 0; i < kColumns * kVector; ++i) {
            A& y = done[i / kVector][i % kVector];
            y = y < A{0} ? A{0} : y;
            y = cut && y > A{6} ? A{6} : y;
          }
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          Vector<T, kVector> rounded;
#pragma unroll
          for (int v = 0; v < kVector; ++v) rounded.element[v] = from_wide<T>(done[b][v]);
          if (b < columns)
            *reinterpret_cast<Vector<T, kVector>*>(target + static_cast<int64_t>(b) * p.channels) =
                rounded;
        }
        target += static_cast<int64_t>(g.w.out) * p.channels;
      }
      if constexpr (kUnroll == 1)
#pragma unroll
        for (int i = 0; i < (R - 1) * kColumns * kVector; ++i)
          z[i / kVector / kColumns][i / kVector % kColumns][i % kVector] =
              z[i / kVector / kColumns + 1][i / kVector % kColumns][i % kVector];
    }
  }
}

// Rows of a set: few are worked on twice, but there are enough sets for a large device. Where
// little is computed for each, more sets than that are faster: their blocks share rows in the
// caches.
template <typename S>
int64_t rows_of_set(const Gather& g) {
  constexpr int64_t kMost = S::R == 7 ? 32 : 8, kFew = 3, kOverhead = 2;
  const ChannelStrips p = channel_strips<S>(g, g.h.out);
  int64_t best = g.h.out, least = 0;
  for (int64_t sets = ceil_div(g.h.out, kMost), most = sets + 16; sets <= most; ++sets) {
    const int64_t rows = ceil_div(g.h.out, sets);
    if (least > 0 && rows < kFew) break;
    const int64_t blocks = ceil_div(p.positions * ceil_div(g.h.out, rows), p.subs);
    const int64_t cost = duration<S>(blocks * p.lane_tiles.value(),
                                     (rows - 1) * S::kStride + S::R + kOverhead, kResident<S>);
    if (least == 0 || cost < least) best = rows, least = cost;
  }
  return best;
}

template <typename S>
bool launch_channel_strips(const Gather& g, const void* in, const void* w, const void* bias,
                           void* out, Activation activation, const Queue& queue) {
  using T = typename S::T;
  if (!channel_strips_take<S>(g, in, out)) return false;
  const ChannelStrips p = channel_strips<S>(g, rows_of_set<S>(g));
  const int64_t blocks = ceil_div(p.positions, p.subs) * p.lane_tiles.value();
  launch_early(channel_strips_kernel<S>, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreads),
               S::kTaps * S::kPitch * static_cast<int>(sizeof(Wide<T>)), queue, p,
               static_cast<const T*>(in), static_cast<const T*>(w), static_cast<const T*>(bias),
               static_cast<T*>(out), activation);
  return true;
}

}  // namespace

bool depthwise_channel_strips(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* in, const void* w, const void* bias, void* out,
                              Activation activation, const Queue& queue) {
  const bool unit = sampling == Sampling::kUnit;
  if ((!unit && sampling != Sampling::kStride2) ||
      (activation != Activation::kNone && activation != Activation::kReLU &&
       activation != Activation::kReLU6))
    return false;
  const auto run = [&](auto strip) {
    return launch_channel_strips<decltype(strip)>(g, in, w, bias, out, activation, queue);
  };
  const auto compute = [&](auto element) {
    using T = decltype(element);
    if (!unit)
      return R == 5 ? run(ChannelStrip<T, 5, 4, 2, 2>{}) : run(ChannelStrip<T, 3, 4, 2, 2>{});
    return R == 7   ? run(ChannelStrip<T, 7, 7, 1>{})
           : R == 5 ? run(ChannelStrip<T, 5, 4, 2>{})
                    : run(ChannelStrip<T, 3, 7, 2>{});
  };
  if (dtype == DType::kFloat32) {
    if (R == 3)
      return unit ? run(ChannelStrip<float, 3, 4, 2>{}) : run(ChannelStrip<float, 3, 4, 2, 2>{});
    if (R == 5)
      return unit ? run(ChannelStrip<float, 5, 4, 1>{}) : run(ChannelStrip<float, 5, 4, 1, 2>{});
    return false;
  }
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
