// Winograd's transforms of images and weights to the operands of its products. Bound by memory.
//
// A thread transforms one channel of one tile. The lanes of a warp run along what is innermost in
// the image, tiles or channels, and its eight warps along the other; where the operand's rows run
// along that one, the block's results change places in shared memory, and are written in pieces of
// 32 bytes.
#include "core/range.h"
#include "cuda/winograd_tiles.h"

namespace torchconv::cuda::winograd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Source {
  static constexpr int kSize = kPoints;
  static __device__ __forceinline__ void transform(const float (&d)[kSize], float (&v)[kPoints]) {
    transform_source(d, v);
  }
};
struct Gradient {
  static constexpr int kSize = kOutputs;
  static __device__ __forceinline__ void transform(const float (&d)[kSize], float (&v)[kPoints]) {
    transform_gradient(d, v);
  }
};

// kChannelsLast: of the image. kAlongTiles: V's rows run along tiles.
template <typename Transform, bool kChannelsLast, bool kAlongTiles>
__global__ void __launch_bounds__(kThreads, 3)
    winograd_image(const __grid_constant__ Image image, const __grid_constant__ Tiles tiles,
                   const __grid_constant__ Panels v, unsigned tile_blocks, int* flag) {
  constexpr int kSize = Transform::kSize;
  // Rows of lanes, of a length that eight rows' first four meet all banks.
  __shared__ float exchange[kChannelsLast == kAlongTiles ? kProducts * kWarps * 36 : 1];
  if (flag != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *flag = 0;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int tile0 = static_cast<int>(blockIdx.x % tile_blocks) * (kChannelsLast ? kWarps : 32);
  const int channel0 = static_cast<int>(blockIdx.x / tile_blocks) * (kChannelsLast ? 32 : kWarps);
  int tile = tile0 + (kChannelsLast ? warp : lane);
  int channel = channel0 + (kChannelsLast ? lane : warp);

  float columns[kPoints][kSize];  // of the tile, transformed
  const bool active = tile < tiles.ranges.count && channel < image.channels;
  bool tall = false, wide = false;
  if (active) {
    const Place place = tiles.place(tile);
    tall = place.rows == kOutputs, wide = place.columns == kOutputs;
    const int i = place.i + image.first_row, j = place.j + image.first_column;
    const float* from = image.data + place.n * image.strides.n + channel * image.strides.c +
                        i * image.strides.row + j * image.strides.column;
    float d[kSize][kSize];
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
      const float* row = from + r * image.strides.row;
      // A gradient belongs to one tile, an input to several.
      const bool own_row = kSize == kPoints || r < place.rows;
      const bool inside =
          own_row && static_cast<unsigned>(i + r) < static_cast<unsigned>(image.rows);
#pragma unroll
      for (int s = 0; s < kSize; ++s) {
        const bool own = kSize == kPoints || s < place.columns;
        d[r][s] = 0;
        if (inside && own && static_cast<unsigned>(j + s) < static_cast<unsigned>(image.columns))
          d[r][s] = row[s * image.strides.column];
      }
    }
#pragma unroll
    for (int s = 0; s < kSize; ++s) {
      float column[kSize], points[kPoints];
#pragma unroll
      for (int r = 0; r < kSize; ++r) column[r] = d[r][s];
      Transform::transform(column, points);
#pragma unroll
      for (int r = 0; r < kPoints; ++r) columns[r][s] = points[r];
    }
  }
  if constexpr (kChannelsLast != kAlongTiles) {
    if (!active) return;
    float* to = v.data + channel * v.channel + tile * v.tile;
#pragma unroll
    for (int r = 0; r < kPoints; ++r) {
      float points[kPoints];
      Transform::transform(columns[r], points);
#pragma unroll
      for (int s = 0; s < kPoints; ++s)
        if ((r < kPoints - 1 || tall) && (s < kPoints - 1 || wide))
          to[(r * kPoints + s) * v.point] = points[s];
    }
  } else {
    if (active) {
#pragma unroll
      for (int r = 0; r < kPoints; ++r) {
        float points[kPoints];
        Transform::transform(columns[r], points);
#pragma unroll
        for (int s = 0; s < kPoints; ++s)
          exchange[((r * kPoints + s) * kWarps + warp) * 36 + lane] = points[s];
      }
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) / kWarps,
              at = static_cast<int>(threadIdx.x) % kWarps;
    tile = tile0 + (kChannelsLast ? at : row);
    channel = channel0 + (kChannelsLast ? row : at);
    if (tile >= tiles.ranges.count || channel >= image.channels) return;
    const Place place = tiles.place(tile);
    tall = place.rows == kOutputs, wide = place.columns == kOutputs;
    float* to = v.data + channel * v.channel + tile * v.tile;
#pragma unroll
    for (int point = 0; point < kProducts; ++point)
      if ((point / kPoints < kPoints - 1 || tall) && (point % kPoints < kPoints - 1 || wide))
        to[point * v.point] = exchange[(point * kWarps + at) * 36 + row];
  }
}

template <typename Transform, bool kAlongTiles>
void run(const Image& image, const Tiles& tiles, const Panels& v, int* flag, const Queue& queue) {
  const bool channels_last = image.strides.c == 1;
  const int64_t tile_blocks = ceil_div(tiles.ranges.count, channels_last ? kWarps : 32);
  const int64_t channel_blocks = ceil_div(image.channels, channels_last ? 32 : kWarps);
  launch(channels_last ? winograd_image<Transform, true, kAlongTiles>
                       : winograd_image<Transform, false, kAlongTiles>,
         dim3(static_cast<unsigned>(tile_blocks * channel_blocks)), kThreads, 0, queue, image,
         tiles, v, static_cast<unsigned>(tile_blocks), flag);
}

// A block of 32 target channels by eight source channels. kTapsFirst: the taps are neighbours in
// memory.
template <bool kTapsFirst>
__global__ void __launch_bounds__(kThreads)
    winograd_weights(const __grid_constant__ Weights w, float* u, int64_t width, unsigned m_blocks,
                     int* flags, int64_t count) {
  constexpr int kNine = kTaps * kTaps, kPitch = kWarps * kNine + 1;
  __shared__ float taps[32 * kPitch];  // [target channel][source channel][tap]
  if (blockIdx.x == 0)
    for (int64_t n = threadIdx.x; n < count; n += kThreads) flags[n] = 0;
  const int m0 = static_cast<int>(blockIdx.x % m_blocks) * 32;
  const int c0 = static_cast<int>(blockIdx.x / m_blocks) * kWarps;
  const bool m_first = w.m < w.c;  // nearer together
  for (int at = static_cast<int>(threadIdx.x); at < 32 * kWarps * kNine; at += kThreads) {
    int rest = at, tap = 0;
    if (kTapsFirst) tap = rest % kNine, rest /= kNine;
    int m = m_first ? rest % 32 : 0, c = m_first ? 0 : rest % kWarps;
    rest /= m_first ? 32 : kWarps;
    if (!kTapsFirst) tap = rest % kNine, rest /= kNine;
    if (m_first)
      c = rest;
    else
      m = rest;
    float value = 0;
    if (m0 + m < w.M && c0 + c < w.C)
      value = w.data[w.from + (m0 + m) * w.m + (c0 + c) * w.c + tap / kTaps * w.row +
                     tap % kTaps * w.column];
    taps[m * kPitch + c * kNine + tap] = value;
  }
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x) % 32, c = static_cast<int>(threadIdx.x) / 32;
  if (m0 + m >= w.M || c0 + c >= w.C) return;
  const float* g = taps + m * kPitch + c * kNine;
  float columns[kPoints][kTaps];
#pragma unroll
  for (int s = 0; s < kTaps; ++s) {
    const float column[kTaps] = {g[s], g[kTaps + s], g[2 * kTaps + s]};
    float points[kPoints];
    transform_weight(column, points);
#pragma unroll
    for (int r = 0; r < kPoints; ++r) columns[r][s] = points[r];
  }
  float* to = u + (c0 + c) * width + m0 + m;
  const int64_t point = w.C * width;
#pragma unroll
  for (int r = 0; r < kPoints; ++r) {
    float points[kPoints];
    transform_weight(columns[r], points);
#pragma unroll
    for (int s = 0; s < kPoints; ++s) to[(r * kPoints + s) * point] = points[s];
  }
}

}  // namespace

void transform_sources(const Image& image, const Tiles& tiles, bool terms, const Panels& v,
                       const Queue& queue) {
  if (terms)
    run<Source, false>(image, tiles, v, nullptr, queue);
  else
    run<Source, true>(image, tiles, v, nullptr, queue);
}

void transform_gradients(const Image& image, const Tiles& tiles, const Panels& v, int* flag,
                         const Queue& queue) {
  run<Gradient, false>(image, tiles, v, flag, queue);
}

void transform_weights(const Weights& w, float* u, int64_t width, int* flags, int64_t count,
                       const Queue& queue) {
  const int64_t m_blocks = ceil_div(w.M, 32), c_blocks = ceil_div(w.C, kWarps);
  const bool taps_first = w.column == 1 || w.column == -1;
  launch(taps_first ? winograd_weights<true> : winograd_weights<false>,
         dim3(static_cast<unsigned>(m_blocks * c_blocks)), kThreads, 0, queue, w, u, width,
         static_cast<unsigned>(m_blocks), flags, count);
}

}  // namespace torchconv::cuda::winograd
