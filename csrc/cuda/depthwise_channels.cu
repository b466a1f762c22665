// Depthwise fprop and dgrad by small square kernels (gather.h) with channels contiguous (NHWC).
//
// A lane has as many channels as 16 bytes hold (8, for the many sums of large kernels in two-byte
// types) and computes kRows x kColumns pixels of them, so that every loaded vector serves several
// taps from registers; weights lie in shared memory, which a warp's lanes read side by side. Blocks
// tile channels, columns, rows and images; neighbouring windows overlap in L1. Multiples of 16
// bytes of channels alone, and one filter a channel.
// Bound: the bytes of x and y.
#include "cuda/activate_tile.h"
#include "cuda/depthwise.h"

namespace torchconv::cuda {
namespace {

struct ChannelGather {
  Gather g;
  int channels, vectors;          // of a pixel
  Divisor lanes, lane_tiles;      // vectors of a block; blocks along a pixel's channels
  Divisor columns, rows, images;  // tiles of a block
  Divisor column_blocks, row_blocks;
};

template <typename T, typename Tap, int kVector, int kRows, int kColumns>
__global__ void __launch_bounds__(128, 3)
    depthwise_channels_kernel(const __grid_constant__ ChannelGather p, const T* in, const T* w,
                              const Epilogue<T> epilogue) {
  using A = Wide<T>;
  constexpr int R = Tap::R, kTaps = R * R;
  constexpr int kPart = kLanes<A>, kParts = kVector / kPart;
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t block = blockIdx.x;
  const int vector0 = static_cast<int>(p.lane_tiles.split(block)) * lanes;

  // [R][R][kParts][lanes] of vectors: neighbouring lanes read neighbouring 16 bytes.
  A* weights = dynamic_shared<A>();
  for (int i = static_cast<int>(threadIdx.x); i < kTaps * lanes * kVector;
       i += static_cast<int>(blockDim.x)) {
    const int part = i % kPart;
    uint32_t rest = static_cast<uint32_t>(i / kPart);
    const int lane = static_cast<int>(p.lanes.split(rest));
    const int tap = static_cast<int>(rest) / kParts;
    const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector +
                      static_cast<int>(rest) % kParts * kPart + part;
    weights[i] = c < p.channels ? to_wide(w[c * kTaps + (g.turned ? kTaps - 1 - tap : tap)]) : A{0};
  }
  __syncthreads();

  uint32_t rest = threadIdx.x;
  const int lane = static_cast<int>(p.lanes.split(rest));
  uint32_t column_tile = p.columns.split(rest), row_tile = p.rows.split(rest);
  column_tile += p.column_blocks.split(block) * p.columns.value();
  row_tile += p.row_blocks.split(block) * p.rows.value();
  const int64_t n = static_cast<int64_t>(block) * p.images.value() + rest;
  const int column = g.w.first_output<Tap, kColumns>(column_tile);
  const int row = g.h.first_output<Tap, kRows>(row_tile);
  if (rest >= p.images.value() || n >= g.N || vector0 + lane >= p.vectors || row >= g.h.out ||
      column >= g.w.out)
    return;
  const int h0 = g.h.first_input<Tap>(row), w0 = g.w.first_input<Tap>(column);
  const int unit_h = g.h.distance<Tap>(), unit_w = g.w.distance<Tap>();
  const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector;

  A z[kRows * kColumns * kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const A bias = epilogue.bias_of(c + v);
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) z[i * kVector + v] = bias;
  }

  using Loaded = Vector<T, kVector>;
  const int64_t pixel = p.channels;
  const T* source =
      in + ((n * g.h.in + h0) * g.w.in + w0) * pixel + c;  // of a window that may begin outside
  // Small windows are under way as a whole before the first product; large ones would not fit.
  constexpr int kUnroll = R == 3 && Tap::kStride == 1 ? Tap::window(kRows) : 1;
#pragma unroll kUnroll
  for (int j = 0; j < Tap::window(kRows); ++j) {
    const bool row_inside = static_cast<unsigned>(h0 + j * unit_h) < static_cast<unsigned>(g.h.in);
    const T* line = source + static_cast<int64_t>(j) * unit_h * g.w.in * pixel;
    Loaded x[Tap::window(kColumns)];
#pragma unroll
    for (int i = 0; i < Tap::window(kColumns); ++i) {
      const bool inside =
          row_inside && static_cast<unsigned>(w0 + i * unit_w) < static_cast<unsigned>(g.w.in);
      x[i] = inside ? *reinterpret_cast<const Loaded*>(line + i * unit_w * pixel) : Loaded{};
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      if (!Tap::meet(a, j)) continue;
#pragma unroll
      for (int s = 0; s < R; ++s) {
        const int tap = Tap::tap(a, j) * R + s;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Vector<A, kPart> weight = *reinterpret_cast<const Vector<A, kPart>*>(
              weights + ((tap * kParts + part) * lanes + lane) * kPart);
#pragma unroll
          for (int i = 0; i < Tap::window(kColumns); ++i)
#pragma unroll
            for (int b = 0; b < kColumns; ++b) {
              if (Tap::tap(b, i) != s) continue;
#pragma unroll
              for (int v = 0; v < kPart; ++v)
                z[(a * kColumns + b) * kVector + part * kPart + v] +=
                    weight.element[v] * to_wide(x[i].element[part * kPart + v]);
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
        Loaded result;
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          result.element[v] = from_wide<T>(z[(a * kColumns + b) * kVector + v]);
        const int64_t position = (n * g.h.out + row + a * unit_h) * g.w.out + column + b * unit_w;
        *reinterpret_cast<Loaded*>(out + position * pixel + c) = result;
      }
    }
  };
  if (epilogue.preactivation != nullptr) store(epilogue.preactivation);
  activate_tile<kVector>(epilogue.activation, z);
  store(epilogue.y);
}

template <typename T, typename Tap, int kVector, int kRows, int kColumns>
void run(const Gather& g, const T* in, const T* w, const Epilogue<T>& epilogue,
         const Queue& queue) {
  ChannelGather p{};
  p.g = g;
  p.channels = g.groups;
  p.vectors = g.groups / kVector;
  // Even shares of at most 16 vectors, and the rest of 128 threads as a square of tiles.
  const int64_t lanes = ceil_div(p.vectors, ceil_div(p.vectors, 16));
  const int64_t lane_tiles = ceil_div(p.vectors, lanes);
  const int64_t column_tiles = g.w.tiles_of(kColumns), row_tiles = g.h.tiles_of(kRows);
  const int64_t spots = 128 / lanes, wanted = spots >= 16 ? spots / 4 : spots / 2;
  const int64_t columns = ceil_div(column_tiles, ceil_div(column_tiles, wanted));
  const int64_t most_rows = std::max<int64_t>(spots / columns, 1);
  const int64_t rows = ceil_div(row_tiles, ceil_div(row_tiles, most_rows));
  const int64_t images = std::max<int64_t>(std::min(spots / (columns * rows), g.N), 1);
  const int64_t column_blocks = ceil_div(column_tiles, columns);
  const int64_t row_blocks = ceil_div(row_tiles, rows);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.columns = Divisor(columns), p.rows = Divisor(rows), p.images = Divisor(images);
  p.column_blocks = Divisor(column_blocks), p.row_blocks = Divisor(row_blocks);
  launch(
      depthwise_channels_kernel<T, Tap, kVector, kRows, kColumns>,
      dim3(static_cast<unsigned>(lane_tiles * column_blocks * row_blocks * ceil_div(g.N, images))),
      dim3(static_cast<unsigned>(round_up(lanes * columns * rows * images, 32))),
      static_cast<int>(Tap::R * Tap::R * lanes * kVector * sizeof(Wide<T>)), queue, p, in, w,
      epilogue);
}

}  // namespace

bool depthwise_channels(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                        const void* w, const void* bias, void* out, void* preactivation,
                        Activation activation, const Queue& queue) {
  bool done = false;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kLanes<T>;
    if (g.in_channels != 1 || g.out_channels != 1 || g.groups % kVector != 0 ||
        !aligned<T>(in, kVector) || !aligned<T>(out, kVector) ||
        !aligned<T>(preactivation, kVector))
      return;
    done = true;
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    with_taps<T, true>(R, sampling, [&](auto taps) {
      using Tap = decltype(taps);
      constexpr bool kNarrow = sizeof(T) == 2, kLarge = Tap::R > 3;
      constexpr bool kSmall = Tap::kStride == 2 || (Tap::kSpread && kNarrow && !kLarge);
      constexpr int kRows = kNarrow && !kLarge && !kSmall ? 1 : 2, kColumns = kSmall ? 2 : 4;
      run<T, Tap, kNarrow && kLarge ? 4 : kVector, kRows, kColumns>(
          g, static_cast<const T*>(in), static_cast<const T*>(w), epilogue, queue);
    });
  });
  return done;
}

}  // namespace torchconv::cuda
