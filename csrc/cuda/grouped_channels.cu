// Grouped 3x3 fprop and dgrad with channels contiguous (NHWC).
//
// A thread computes kRows x kColumns pixels of four output channels and goes through its group's
// input channels by fours: a window row of them is loaded once and multiplied by the three taps of
// each row of the kernel. Lanes have neighbouring sets of four output channels, whose weights the
// block keeps in shared memory, padded by zeros to fours; then come image rows, whose windows
// overlap in L1. A block serves several tiles, so that filling its weights costs little.
// Bound: multiplications, for more than about four channels a group.
#include <algorithm>

#include "cuda/activate_tile.h"
#include "cuda/channel_quads.cuh"
#include "cuda/grouped.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 128;

struct QuadGather {
  Gather g;
  Divisor lanes, lane_tiles, group_chunks;  // chunks: fours of output channels
  Divisor row_tiles, column_tiles;
  int chunks, in_padded;              // all chunks; a group's input channels, a multiple of four
  int subs, rounds;                   // tiles that a block works on at once, and how often
  int64_t in_channels, out_channels;  // of a pixel
  uint32_t positions;                 // tiles of all images
};

template <typename T, typename Tap, int kRows, int kColumns, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    grouped_channels_kernel(const __grid_constant__ QuadGather p, const T* in, const T* w,
                            const Epilogue<T> epilogue) {
  using A = Wide<T>;
  using Quad = Vector<T, kQuad>;
  using Weights = Vector<A, kQuad>;
  constexpr int R = Tap::R, kTaps = R * R, kWindow = Tap::window(kColumns);
  // Window rows that are under way at once, as far as registers go.
  constexpr int kUnroll = sizeof(T) == 4 && kColumns == 8 ? 1 : Tap::window(kRows);
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t block = blockIdx.x;
  const int chunk0 = static_cast<int>(p.lane_tiles.split(block)) * lanes;

  A* weights = dynamic_shared<A>();  // [in_padded][R][R][lanes][kQuad]
  for (int i = static_cast<int>(threadIdx.x); i < p.in_padded * kTaps * lanes * kQuad;
       i += kThreads) {
    uint32_t rest = static_cast<uint32_t>(i / kQuad);
    uint32_t group = static_cast<uint32_t>(chunk0) + p.lanes.split(rest);
    const bool present = static_cast<int>(group) < p.chunks;
    const int o = static_cast<int>(p.group_chunks.split(group)) * kQuad + i % kQuad;
    const int tap = static_cast<int>(rest) % kTaps, c = static_cast<int>(rest) / kTaps;
    const int64_t offset =
        group * g.w_group + o * g.w_out + c * g.w_in + (g.turned ? kTaps - 1 - tap : tap) * g.w_tap;
    weights[i] = present && o < g.out_channels && c < g.in_channels ? to_wide(w[offset]) : A{0};
  }
  __syncthreads();

  uint32_t sub = threadIdx.x;
  const int lane = static_cast<int>(p.lanes.split(sub));
  uint32_t group = static_cast<uint32_t>(chunk0 + lane);
  if (static_cast<int>(group) >= p.chunks || static_cast<int>(sub) >= p.subs) return;
  const int o0 = static_cast<int>(p.group_chunks.split(group)) * kQuad;
  const int present = min(kQuad, g.out_channels - o0);
  const int64_t k0 = static_cast<int64_t>(group) * g.out_channels + o0;
  const int unit_h = g.h.distance<Tap>(), unit_w = g.w.distance<Tap>();

#pragma unroll 1
  for (int round = 0; round < p.rounds; ++round) {
    uint32_t position = (block * p.rounds + round) * p.subs + sub;
    if (position >= p.positions) return;
    const int row = g.h.first_output<Tap, kRows>(p.row_tiles.split(position));
    const int column = g.w.first_output<Tap, kColumns>(p.column_tiles.split(position));
    const int64_t n = position;
    const int h0 = g.h.first_input<Tap>(row), w0 = g.w.first_input<Tap>(column);

    A z[kRows * kColumns * kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const A bias = k < present ? epilogue.bias_of(k0 + k) : A{0};
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) z[i * kQuad + k] = bias;
    }

    const T* source = in + ((n * g.h.in + h0) * g.w.in + w0) * p.in_channels +
                      static_cast<int64_t>(group) * g.in_channels;
#pragma unroll 1
    for (int c = 0; c < p.in_padded; c += kQuad) {
      const A* filters = weights + (c * kTaps * lanes + lane) * kQuad;
#pragma unroll kUnroll
      for (int j = 0; j < Tap::window(kRows); ++j) {
        const bool row_inside =
            static_cast<unsigned>(h0 + j * unit_h) < static_cast<unsigned>(g.h.in);
        const T* line = source + static_cast<int64_t>(j) * unit_h * g.w.in * p.in_channels + c;
        Quad x[kWindow];
#pragma unroll
        for (int i = 0; i < kWindow; ++i)
          x[i] = load_quad<kAligned>(
              line + i * unit_w * p.in_channels, g.in_channels - c,
              row_inside && static_cast<unsigned>(w0 + i * unit_w) < static_cast<unsigned>(g.w.in));
#pragma unroll
        for (int a = 0; a < kRows; ++a) {
          if (!Tap::meet(a, j)) continue;
#pragma unroll
          for (int s = 0; s < R; ++s)
#pragma unroll
            for (int each = 0; each < kQuad; ++each) {
              const Weights filter = *reinterpret_cast<const Weights*>(
                  filters + (each * kTaps + Tap::tap(a, j) * R + s) * lanes * kQuad);
#pragma unroll
              for (int i = 0; i < kWindow; ++i)
#pragma unroll
                for (int b = 0; b < kColumns; ++b) {
                  if (Tap::tap(b, i) != s) continue;
#pragma unroll
                  for (int k = 0; k < kQuad; ++k)
                    z[(a * kColumns + b) * kQuad + k] +=
                        filter.element[k] * to_wide(x[i].element[each]);
                }
            }
        }
      }
    }

    const auto store = [&](T* out) {
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (row + a * unit_h >= g.h.out) break;
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          if (column + b * unit_w >= g.w.out) break;
          const int64_t pixel = (n * g.h.out + row + a * unit_h) * g.w.out + column + b * unit_w;
          store_quad<kAligned>(out + pixel * p.out_channels + k0, z + (a * kColumns + b) * kQuad,
                               present);
        }
      }
    };
    if (epilogue.preactivation != nullptr) store(epilogue.preactivation);
    activate_tile<kQuad>(epilogue.activation, z);
    store(epilogue.y);
  }
}

template <typename T, typename Tap, int kRows, int kColumns, bool kAligned>
void run(const Gather& g, const T* in, const T* w, const Epilogue<T>& epilogue,
         const Queue& queue) {
  constexpr int64_t kMostBytes = 40 * 1024;
  QuadGather p{};
  p.g = g;
  const int64_t group_chunks = ceil_div(g.out_channels, kQuad), chunks = group_chunks * g.groups;
  p.chunks = static_cast<int>(chunks), p.group_chunks = Divisor(group_chunks);
  p.in_padded = static_cast<int>(round_up(g.in_channels, kQuad));
  p.in_channels = static_cast<int64_t>(g.groups) * g.in_channels;
  p.out_channels = static_cast<int64_t>(g.groups) * g.out_channels;
  const int64_t lane_bytes =
      p.in_padded * Tap::R * Tap::R * kQuad * static_cast<int64_t>(sizeof(Wide<T>));
  const int64_t most = std::max<int64_t>(std::min<int64_t>(kMostBytes / lane_bytes, 32), 1);
  const int64_t lanes = ceil_div(chunks, ceil_div(chunks, most));
  const int64_t lane_tiles = ceil_div(chunks, lanes);
  const int64_t row_tiles = g.h.tiles_of(kRows), column_tiles = g.w.tiles_of(kColumns);
  const int64_t positions = g.N * row_tiles * column_tiles;
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.row_tiles = Divisor(row_tiles), p.column_tiles = Divisor(column_tiles);
  p.positions = static_cast<uint32_t>(positions);
  p.subs = static_cast<int>(kThreads / lanes);
  // As many tiles a block as leave every multiprocessor several blocks.
  const int64_t single = ceil_div(positions, p.subs);
  p.rounds =
      static_cast<int>(std::min<int64_t>(std::max<int64_t>(single * lane_tiles / 1024, 1), 8));
  launch(grouped_channels_kernel<T, Tap, kRows, kColumns, kAligned>,
         dim3(static_cast<unsigned>(lane_tiles * ceil_div(single, p.rounds))), dim3(kThreads),
         static_cast<int>(lanes * lane_bytes), queue, p, in, w, epilogue);
}

}  // namespace

void grouped_channels(DType dtype, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    // Of float64 there is the general form alone.
    constexpr bool kVectors = sizeof(T) < 8;
    const bool quads = kVectors && g.in_channels % kQuad == 0 && g.out_channels % kQuad == 0 &&
                       aligned<T>(in, kQuad) && aligned<T>(out, kQuad) &&
                       aligned<T>(preactivation, kQuad);
    with_group_taps<true>(sampling, [&](auto taps) {
      using Tap = decltype(taps);
      const T* source = static_cast<const T*>(in);
      const T* weights = static_cast<const T*>(w);
      constexpr int kRows = Tap::kSpread ? 2 : 1;  // the spread's come in pairs
      if constexpr (kVectors) {
        // A weight from shared memory ought to serve eight pixels, unless that leaves
        // multiprocessors idle.
        constexpr int kWide = Tap::kStride == 1 ? 8 : 4;
        const int64_t tiles = g.N * g.h.tiles_of(kRows) * g.w.tiles_of(kWide);
        const bool many = tiles * g.groups * ceil_div(g.out_channels, kQuad) >= 256 * kThreads;
        if (quads && many)
          return run<T, Tap, kRows, kWide, true>(g, source, weights, epilogue, queue);
        if (quads) return run<T, Tap, kRows, 4, true>(g, source, weights, epilogue, queue);
      }
      run<T, Tap, kRows, 2, false>(g, source, weights, epilogue, queue);
    });
  });
}

}  // namespace torchconv::cuda
