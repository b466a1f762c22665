// Depthwise wgrad of stride 1 in NHWC, half types, 5x5 and 7x7: strips of channel_strips.cuh. That
// of 3x3 comes with dx (depthwise_channel_gradients.cu).
//
// A thread rolls the R rows of x that a row of dz meets down its set of rows, and adds to all R x R
// sums of its channels. The subs of a block go through a slice of all strips, cut by the shape
// alone; their sums meet in shared memory, those of slices in block_sums.cu.
// A product with padding is not formed, for dz need not be finite.
// Bound: the bytes of x and dz; multiplications where R is 5 or 7.
#include "cuda/channel_strips.cuh"
#include "cuda/early_launch.h"

namespace torchconv::cuda {
namespace {

template <typename S>
constexpr int kResident = S::R == 7 || S::kColumns == 4 ? 2 : 3;

template <typename S>
__global__ void __launch_bounds__(S::kThreads, kResident<S>)
    channel_strips_wgrad_kernel(const __grid_constant__ ChannelStrips p, uint32_t slice_positions,
                                const typename S::T* dz, const typename S::T* x,
                                const SliceSums<typename S::T> sums) {
  using T = typename S::T;
  using A = typename S::A;
  constexpr int R = S::R, kTaps = S::kTaps, kVector = S::kVector, kUnroll = S::kUnroll;
  constexpr int kColumns = S::kColumns, kWindow = S::kWindow, kDepth = S::kDepth;
  // Paddings are at most so large, so that no more columns lie beside the image.
  constexpr int kBeside = R / 2;
  begin_early();
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t slice = blockIdx.x, sub = threadIdx.x;
  const int vector0 = static_cast<int>(p.lane_tiles.split(slice)) * lanes;
  const int lane = static_cast<int>(p.lanes.split(sub));
  // The last images first: dgrad, which came before, has left their dz in the cache.
  slice = gridDim.x / p.lane_tiles.value() - 1 - slice;
  const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector;
  const int64_t in_row = static_cast<int64_t>(g.w.in) * p.channels;
  const int64_t out_row = static_cast<int64_t>(g.w.out) * p.channels;

  A z[kTaps][kVector] = {};
  const uint32_t end = min((slice + 1) * slice_positions, p.positions);
  uint32_t position = slice * slice_positions + sub;
  if (sub >= static_cast<uint32_t>(p.subs) || vector0 + lane >= p.vectors) position = end;
#pragma unroll 1
  for (; position < end; position += static_cast<uint32_t>(p.subs)) {
    const StripPlace at(p, position, kColumns);
    const int rows = min(p.set_rows, g.h.out - at.row), w0 = at.column + g.w.origin;
    int h = at.row + g.h.origin;
    const T* line = x + (static_cast<int64_t>(at.n) * g.h.in + h) * in_row +
                    static_cast<int64_t>(w0) * p.channels + c;
    const T* gradient = dz + (static_cast<int64_t>(at.n) * g.h.out + at.row) * out_row +
                        static_cast<int64_t>(at.column) * p.channels + c;
    const uint32_t inside = inside_bits<kWindow, false>(w0, 1, g.w.in);
    typename S::Loaded x_next[kDepth][kWindow], d_next[kDepth][kColumns];
    const auto load_x = [&](int step, typename S::Loaded(&row)[kWindow]) {
      const bool row_inside =
          step < rows + R - 1 && static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in);
      S::load(line, p.channels, row_inside ? inside : 0, row);
      ++h, line += in_row;
    };
    const auto load_dz = [&](bool exists, typename S::Loaded(&row)[kColumns]) {
      S::load(gradient, p.channels, exists ? ~0u : 0, row);
      gradient += out_row;
    };
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      load_x(j, x_next[j]);
      load_dz(j < rows, d_next[(j + R - 1) % kDepth]);
    }

    A value[R][kWindow][kVector];
#pragma unroll 1
    for (int base = 0; base < rows + R - 1; base += kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int step = base + u;
        if (kUnroll > 1 && step >= rows + R - 1) break;
        S::widen(x_next[u % kDepth], value[kUnroll == 1 ? R - 1 : u]);
        load_x(step + kDepth, x_next[u % kDepth]);
        if (step >= R - 1) {
          A d[kColumns][kVector];
          S::widen(d_next[u % kDepth], d);
          load_dz(step + kDepth < rows + R - 1, d_next[u % kDepth]);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            // h is already that of the next row to load.
            if (static_cast<unsigned>(h - kDepth - R + r) >= static_cast<unsigned>(g.h.in))
              continue;
            const A(&row)[kWindow][kVector] = value[kUnroll == 1 ? r : (u + 1 + r) % R];
#pragma unroll
            for (int s = 0; s < R; ++s)
#pragma unroll
              for (int b = 0; b < kColumns; ++b) {
                const int i = b + s;
                const bool beside = i < kBeside || i >= kWindow - kBeside;
                if (beside && (inside >> i & 1) == 0) continue;
#pragma unroll
                for (int v = 0; v < kVector; ++v) z[r * R + s][v] += d[b][v] * row[i][v];
              }
          }
        }
        if constexpr (kUnroll == 1)
#pragma unroll
          for (int r = 0; r + 1 < R; ++r)
#pragma unroll
            for (int i = 0; i < kWindow * kVector; ++i)
              value[r][i / kVector][i % kVector] = value[r + 1][i / kVector][i % kVector];
      }
    }
  }

  store_block_sums<S>(p, vector0, slice, z, dynamic_shared<A>(), sums);
}

template <typename S>
bool launch_channel_strips_wgrad(const Gather& g, const void* dz, const void* x, void* dw,
                                 const Queue& queue) {
  using T = typename S::T;
  const auto narrow = [](const GatherAxis& axis) {
    const int before = -axis.origin, after = axis.out - axis.in - before + S::R - 1;
    return before <= S::R / 2 && after <= S::R / 2;
  };
  if (!channel_strips_take<S>(g, x, dz) || !narrow(g.w) || g.w.out % S::kColumns != 0) return false;
  constexpr int64_t kRows = 7, kMostTerms = 512;
  const int64_t rows = ceil_div(g.h.out, ceil_div(g.h.out, kRows));
  const ChannelStrips p = channel_strips<S>(g, rows);
  // So many terms keep a thread's sums short enough for float32. The sums of a block cost about as
  // much as six rows.
  const int64_t most = std::max<int64_t>(kMostTerms / (rows * S::kColumns), 1);
  int64_t each = 1, least = 0;
  for (int64_t strips = 1; strips <= most; ++strips) {
    const int64_t blocks = p.lane_tiles.value() * ceil_div(p.positions, p.subs * strips);
    const int64_t cost = duration<S>(blocks, strips * (rows + S::R - 1) + 6, kResident<S>);
    if (least == 0 || cost <= least) each = strips, least = cost;
  }
  const int64_t slices = ceil_div(p.positions, p.subs * each);
  const SliceSums<T> sums =
      slice_sums(static_cast<T*>(dw), slices, static_cast<int64_t>(g.groups) * g.w_group, queue);
  const int64_t shared = S::kTaps * S::kThreads * S::kVector;
  launch_early(channel_strips_wgrad_kernel<S>,
               dim3(static_cast<unsigned>(p.lane_tiles.value() * slices)), dim3(S::kThreads),
               static_cast<int>(shared * static_cast<int64_t>(sizeof(Wide<T>))), queue, p,
               static_cast<uint32_t>(p.subs * each), static_cast<const T*>(dz),
               static_cast<const T*>(x), sums);
  add_slices(sums, slices, queue);
  return true;
}

}  // namespace

bool depthwise_channel_strips_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                                    const void* dz, const void* x, void* dw, const Queue& queue) {
  if (sampling != Sampling::kUnit || R == 3) return false;
  const auto compute = [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto strip) {
      return launch_channel_strips_wgrad<decltype(strip)>(g, dz, x, dw, queue);
    };
    return R == 7 ? run(ChannelStrip<T, 7, 7, 1>{})
                  : run(ChannelStrip<T, 5, 7, 1>{}) || run(ChannelStrip<T, 5, 4, 2>{});
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
