// Depthwise fprop and dgrad by small square kernels (gather.h) with channels contiguous (NHWC).
//
// A lane has four channels (two of float64) and computes tiles of kRows x kColumns pixels of them,
// so that every loaded vector serves several taps from registers. It goes from tile to tile, every
// block through a run of neighbouring ones, whose windows overlap in L1. kDepth rows of a window
// are under way while the sums of others are formed and while the tile before is stored. Weights
// lie in shared memory, which a warp's lanes read side by side. Multiples of 16 bytes of channels
// alone, and one filter a channel.
// Bound: the bytes of x and y.
#include "cuda/activate_tile.h"
#include "cuda/depthwise.h"
#include "cuda/packed.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 128;

struct ChannelGather {
  Gather g;
  int channels, vectors;      // of a pixel
  Divisor lanes, lane_tiles;  // vectors of a block; blocks along a pixel's channels
  Divisor column_tiles, row_tiles;
  uint32_t positions, run;  // tiles of all images; of a block
  int subs;                 // threads that share a run
};

// How a lane's channels and its tile are cut, and how many blocks a multiprocessor holds.
template <typename T, typename Tap>
struct ChannelTile {
  static constexpr bool kNarrow = sizeof(T) == 2, kLarge = Tap::R > 3;
  static constexpr int kVector = sizeof(T) == 8 ? 2 : 4;
  static constexpr bool kThin = Tap::kStride == 2 || (sizeof(T) == 8 && Tap::kDilated);
  static constexpr int kRows = 2, kColumns = kThin ? 2 : 4;
  static constexpr int kWindowRows = Tap::window(kRows), kWindow = Tap::window(kColumns);
  // Window rows rolled: the many weights of all rows would not fit in registers.
  static constexpr bool kRolled =
      Tap::R == 7 || (Tap::R == 5 && !Tap::kSpread && (!kNarrow || Tap::kStride == 2));
  static constexpr int kUnroll = kRolled ? 1 : kWindowRows;
  static constexpr int kDepth = kRolled || (!kNarrow && (kLarge || Tap::kDilated)) ? 1 : 2;
  static constexpr int kBlocks = kNarrow && !kLarge ? 4 : 3;
};

template <typename T, typename Tap>
__global__ void __launch_bounds__(kThreads, ChannelTile<T, Tap>::kBlocks)
    depthwise_channels_kernel(const __grid_constant__ ChannelGather p, const T* in, const T* w,
                              const Epilogue<T> epilogue) {
  using A = Wide<T>;
  using Tile = ChannelTile<T, Tap>;
  constexpr int R = Tap::R, kTaps = R * R, kVector = Tile::kVector, kDepth = Tile::kDepth;
  constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns, kWindow = Tile::kWindow;
  using Loaded = Packed<T, kVector>;
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t run = blockIdx.x, sub = threadIdx.x;
  const int vector0 = static_cast<int>(p.lane_tiles.split(run)) * lanes;
  const int lane = static_cast<int>(p.lanes.split(sub));
  const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector, pixel = p.channels;
  const int unit_h = g.h.distance<Tap>(), unit_w = g.w.distance<Tap>();
  const int column_step = unit_w * p.channels;
  const int64_t row_step = static_cast<int64_t>(unit_h) * g.w.in * pixel;

  struct Spot {
    const T* source;         // of a window that may begin outside
    int64_t target;          // the first output
    uint32_t rows, columns;  // bits: what of the window is inside, then what of the tile
  };
  constexpr int kWindowRows = Tile::kWindowRows;
  const auto spot_of = [&](uint32_t position) {
    uint32_t n = position;
    const int column = g.w.first_output<Tap, kColumns>(p.column_tiles.split(n));
    const int row = g.h.first_output<Tap, kRows>(p.row_tiles.split(n));
    const int h0 = g.h.first_input<Tap>(row), w0 = g.w.first_input<Tap>(column);
    Spot at;
    at.source = in + ((static_cast<int64_t>(n) * g.h.in + h0) * g.w.in + w0) * pixel + c;
    at.target = ((static_cast<int64_t>(n) * g.h.out + row) * g.w.out + column) * pixel + c;
    at.rows = inside_bits<kWindowRows, Tap::kDilated>(h0, unit_h, g.h.in) |
              inside_bits<kRows, Tap::kDilated>(row, unit_h, g.h.out) << kWindowRows;
    at.columns = inside_bits<kWindow, Tap::kDilated>(w0, unit_w, g.w.in) |
                 inside_bits<kColumns, Tap::kDilated>(column, unit_w, g.w.out) << kWindow;
    return at;
  };
  Loaded x[kDepth][kWindow];
  const auto load = [&](const Spot& at, int j, Loaded(&row)[kWindow]) {
    const uint32_t columns = (at.rows >> j & 1) != 0 ? at.columns : 0;
    const T* line = at.source + j * row_step;
#pragma unroll
    for (int i = 0; i < kWindow; ++i)
      row[i] = (columns >> i & 1) != 0 ? *reinterpret_cast<const Loaded*>(line + i * column_step)
                                       : Loaded{};
  };

  const uint32_t end = min((run + 1) * p.run, p.positions);
  uint32_t position = run * p.run + sub;
  if (sub >= static_cast<uint32_t>(p.subs) || vector0 + lane >= p.vectors) position = end;
  Spot at{};
  if (position < end) {
    at = spot_of(position);
#pragma unroll
    for (int j = 0; j < kDepth; ++j) load(at, j, x[j]);
  }

  // [R][R][lanes] of vectors; the pitch spreads the taps of a channel over banks.
  A* weights = dynamic_shared<A>();
  const int pitch = (lanes + 1) * kVector;
  const int count = min(lanes, p.vectors - vector0) * kVector * kTaps;
  const T* block_weights = w + static_cast<int64_t>(vector0) * kVector * kTaps;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int tap = i % kTaps;
    weights[(g.turned ? kTaps - 1 - tap : tap) * pitch + i / kTaps] = to_wide(block_weights[i]);
  }
  A bias[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) bias[v] = position < end ? epilogue.bias_of(c + v) : A{0};
  __syncthreads();
  const A* lane_weights = weights + lane * kVector;

  while (position < end) {
    // Weights are read anew for every tile: those of large kernels would not fit in registers.
    asm volatile("" ::: "memory");
    A z[kRows * kColumns * kVector];
#pragma unroll
    for (int i = 0; i < kRows * kColumns * kVector; ++i) z[i] = bias[i % kVector];
#pragma unroll Tile::kUnroll
    for (int j = 0; j < kWindowRows; ++j) {
      A value[kWindow][kVector];
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
#pragma unroll
        for (int v = 0; v < kVector; ++v) value[i][v] = x[j % kDepth][i].wide(v);
      if (j + kDepth < kWindowRows) load(at, j + kDepth, x[j % kDepth]);
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (!Tap::meet(a, j)) continue;
#pragma unroll
        for (int s = 0; s < R; ++s) {
          const Vector<A, kVector> weight = *reinterpret_cast<const Vector<A, kVector>*>(
              lane_weights + (Tap::tap(a, j) * R + s) * pitch);
#pragma unroll
          for (int i = 0; i < kWindow; ++i)
#pragma unroll
            for (int b = 0; b < kColumns; ++b) {
              if (Tap::tap(b, i) != s) continue;
#pragma unroll
              for (int v = 0; v < kVector; ++v)
                z[(a * kColumns + b) * kVector + v] += weight.element[v] * value[i][v];
            }
        }
      }
    }

    const int64_t target = at.target;
    const uint32_t rows = at.rows >> kWindowRows, columns = at.columns >> kWindow;
    position += static_cast<uint32_t>(p.subs);
    if (position < end) {
      at = spot_of(position);
#pragma unroll
      for (int j = 0; j < kDepth; ++j) load(at, j, x[j]);
    }
    const auto store = [&](T* out) {
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if ((rows >> a & 1) == 0) break;
        T* line = out + target + static_cast<int64_t>(a * unit_h) * g.w.out * pixel;
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          if ((columns >> b & 1) == 0) break;
          Vector<T, kVector> result;
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            result.element[v] = from_wide<T>(z[(a * kColumns + b) * kVector + v]);
          *reinterpret_cast<Vector<T, kVector>*>(line + b * column_step) = result;
        }
      }
    };
    if (epilogue.preactivation != nullptr) store(epilogue.preactivation);
    activate_tile<kVector>(epilogue.activation, z);
    store(epilogue.y);
  }
}

template <typename T, typename Tap>
void launch_channels(const Gather& g, const T* in, const T* w, const Epilogue<T>& epilogue,
                     const Queue& queue) {
  using Tile = ChannelTile<T, Tap>;
  ChannelGather p{};
  p.g = g;
  p.channels = g.groups;
  p.vectors = g.groups / Tile::kVector;
  const int64_t lanes = lanes_of_block(p.vectors, kThreads);
  const int64_t lane_tiles = ceil_div(p.vectors, lanes), subs = kThreads / lanes;
  const int64_t column_tiles = g.w.tiles_of(Tile::kColumns), row_tiles = g.h.tiles_of(Tile::kRows);
  const int64_t positions = g.N * column_tiles * row_tiles;
  const int64_t rounds = rounds_of_block(lane_tiles, positions, subs, 16, 132 * Tile::kBlocks, 1);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.column_tiles = Divisor(column_tiles), p.row_tiles = Divisor(row_tiles);
  p.subs = static_cast<int>(subs);
  p.positions = static_cast<uint32_t>(positions), p.run = static_cast<uint32_t>(subs * rounds);
  const int64_t shared = Tap::R * Tap::R * (lanes + 1) * Tile::kVector;
  launch(depthwise_channels_kernel<T, Tap>,
         dim3(static_cast<unsigned>(lane_tiles * ceil_div(positions, subs * rounds))),
         dim3(kThreads), static_cast<int>(shared * static_cast<int64_t>(sizeof(Wide<T>))), queue, p,
         in, w, epilogue);
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
        !aligned<T>(preactivation, kVector) || !window_fits(g))
      return;
    done = true;
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    with_taps<T, true>(R, sampling, [&](auto taps) {
      launch_channels<T, decltype(taps)>(g, static_cast<const T*>(in), static_cast<const T*>(w),
                                         epilogue, queue);
    });
  });
  return done;
}

}  // namespace torchconv::cuda
