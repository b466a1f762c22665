// dgrad by few channels on tensor cores, of stride 1 or 2: mma_patch.h's image is dz here, and an
// output is the gradient of one pixel's channels, of which eight fill the narrowest product.
//
// A block of four warps computes tile after tile of 16 columns of positions, which stand for one
// pixel of dx each, or, of stride 2, for 2 x 2: those read the same window of dz, one or the other
// by each tap, so that a fragment of dz is loaded once for all of them. The window of the tile's
// positions and all filters are in shared memory; a filter's row of K elements has 16 bytes more,
// and a pixel's too, so that the rows that one ldmatrix reads meet all banks. Sums go through
// shared memory to whole rows of dx.
//
// Bound: reading dz and writing dx once, or 2 * pixels of dz * taps * K * 8 operations. The order
// of a sum is that of the window, whatever the tile.
#include <algorithm>

#include "cuda/mma_patch_tile.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kColumns = 16, kBlocks = 2;
constexpr int kChannels = 8;    // at most
constexpr int kStepBytes = 64;  // of a filter's row, in two products
template <typename T>
constexpr int kWarpRows = sizeof(T) == 2 ? 4 : 2;  // rows of positions of a warp

struct PatchDgrad {
  int H, W, C, K, P, Q, R, S, pad_top, pad_left;
  int first_h, first_w;    // of the window of position (0, 0)
  int window_h, window_w;  // taps of a window
  int rows, columns;       // of the patch
  int chunks;              // of a pixel of dz, 16 bytes each
  Divisor chunk, column;
  Divisor tiles_h, tiles_w;
  int64_t tiles;

  __host__ __device__ int pitch() const { return 16 * chunks + 16; }     // of pixels and filters
  __host__ __device__ int filter_rows() const { return R * S * C + 1; }  // the last is zeros
};

template <typename T>
__host__ __device__ int sums_of_warp(int stride, int C) {  // elements
  return kWarpRows<T> * kColumns * stride * stride * C;
}
template <typename T>
int shared_bytes(const PatchDgrad& p, int stride) {
  return (p.filter_rows() + p.rows * p.columns) * p.pitch() +
         kWarps * sums_of_warp<T>(stride, p.C) * static_cast<int>(sizeof(T));
}

template <typename T, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mma_patch_dgrad_kernel(const __grid_constant__ PatchDgrad p, const T* dz, const T* w, T* dx) {
  constexpr int kM = kWarpRows<T>;
  unsigned char* filters = dynamic_shared<unsigned char>();
  unsigned char* patch = filters + p.filter_rows() * p.pitch();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  T* staged = reinterpret_cast<T*>(patch + p.rows * p.columns * p.pitch()) +
              warp * sums_of_warp<T>(kStride, p.C);

  // Filters as rows (r, s, c) of K.
  const int weights = p.R * p.S * p.C;
#pragma unroll 8
  for (int i = thread; i < (weights + 1) * p.K; i += kThreads) {
    const int k = i / (weights + 1), row = i - k * (weights + 1);
    T value = from_wide<T>(0.0f);
    if (row < weights) value = w[int64_t{k} * weights + row];
    if constexpr (sizeof(T) == 4) value = __uint_as_float(round_to_tf32(__float_as_uint(value)));
    *reinterpret_cast<T*>(filters + row * p.pitch() + k * static_cast<int>(sizeof(T))) = value;
  }

  const int matrix = lane >> 3;
  const int c = lane & 7;
  const SharedAddress filter = shared_address(filters) + static_cast<SharedAddress>(16 * matrix);
  const SharedAddress no_filter = filter + static_cast<SharedAddress>(weights * p.pitch());
  const SharedAddress patches = shared_address(patch);
  const SharedAddress positions =
      patches +
      static_cast<SharedAddress>(
          (warp * kM * p.columns + (lane & 7) + 8 * (matrix & 1)) * p.pitch() + 16 * (matrix >> 1));
  const int steps = 16 * p.chunks / kStepBytes;

  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const PatchCorner corner = corner_of(tile, p.tiles_h, p.tiles_w);
    const int64_t n = corner.n;
    const int i0 = corner.row * (kWarps * kM), j0 = corner.column * kColumns;
    const int p0 = i0 + p.first_h, q0 = j0 + p.first_w;
    __syncthreads();
#pragma unroll 4
    for (int i = thread; i < p.rows * p.columns * p.chunks; i += kThreads) {
      uint32_t pixel = static_cast<uint32_t>(i);
      const uint32_t chunk = p.chunk.split(pixel);
      uint32_t row = pixel;
      const int q = q0 + static_cast<int>(p.column.split(row)), p_ = p0 + static_cast<int>(row);
      const bool inside = all_of(within(p_, p.P), within(q, p.Q));
      const int64_t from = ((n * p.P + p_) * p.Q + q) * p.K;
      copy_async<16>(patches + static_cast<SharedAddress>(static_cast<int>(pixel) * p.pitch() +
                                                          16 * static_cast<int>(chunk)),
                     dz + (inside ? from + chunk * kLanes<T> : 0), inside);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    float sums[kStride][kStride][kM][4];
#pragma unroll
    for (int u = 0; u < kStride; ++u)
#pragma unroll
      for (int v = 0; v < kStride; ++v)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[u][v][m][e] = 0.0f;
    for (int d_h = 0; d_h < p.window_h; ++d_h)
      for (int d_w = 0; d_w < p.window_w; ++d_w) {
        const int r0 = p.pad_top - kStride * (d_h + p.first_h);
        const int s0 = p.pad_left - kStride * (d_w + p.first_w);
        const SharedAddress at =
            positions + static_cast<SharedAddress>((d_h * p.columns + d_w) * p.pitch());
        for (int step = 0; step < steps; ++step) {
          uint32_t a[kM][2][4];
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              load_matrices(a[m][half],
                            at + static_cast<SharedAddress>(m * p.columns * p.pitch() +
                                                            kStepBytes * step + 32 * half));
              if constexpr (sizeof(T) == 4)
#pragma unroll
                for (int e = 0; e < 4; ++e) a[m][half][e] = round_to_tf32(a[m][half][e]);
            }
#pragma unroll
          for (int u = 0; u < kStride; ++u)
#pragma unroll
            for (int v = 0; v < kStride; ++v) {
              const int r = r0 + u, s = s0 + v;
              if (!within(r, p.R) || !within(s, p.S)) continue;
              const SharedAddress row =
                  c < p.C
                      ? filter + static_cast<SharedAddress>(((r * p.S + s) * p.C + c) * p.pitch())
                      : no_filter;
              uint32_t b[4];
              load_matrices(b, row + static_cast<SharedAddress>(kStepBytes * step));
#pragma unroll
              for (int m = 0; m < kM; ++m) {
                mma<T>(sums[u][v][m], a[m][0], b[0], b[1]);
                mma<T>(sums[u][v][m], a[m][1], b[2], b[3]);
              }
            }
        }
      }

    const int line_of_sums = kColumns * kStride * p.C;
#pragma unroll
    for (int u = 0; u < kStride; ++u)
#pragma unroll
      for (int v = 0; v < kStride; ++v)
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = (lane >> 2) + 8 * (e >> 1), channel = 2 * (lane & 3) + (e & 1);
            if (channel < p.C)
              staged[(m * kStride + u) * line_of_sums + (column * kStride + v) * p.C + channel] =
                  from_wide<T>(sums[u][v][m][e]);
          }
    __syncwarp();
    const int first_w = j0 * kStride;
    const int elements = min(line_of_sums, (p.W - first_w) * p.C);
    for (int row = 0; row < kM * kStride; ++row) {
      const int h = (i0 + warp * kM) * kStride + row;
      if (h >= p.H) break;
      T* to = dx + ((n * p.H + h) * p.W + first_w) * p.C;
      for (int i = lane; i < elements; i += 32) to[i] = staged[row * line_of_sums + i];
    }
    __syncwarp();
  }
}

// The window of one axis: dx at stride * i + u gets dz at i + d by tap u + pad - stride * d.
struct Window {
  int first, taps;
};
Window window_of(int64_t taps, int64_t stride, int64_t pad) {
  const auto floor_of = [&](int64_t v) { return v >= 0 ? v / stride : -ceil_div(-v, stride); };
  const int64_t first = -floor_of(taps - 1 - pad), last = floor_of(stride - 1 + pad);
  return {static_cast<int>(first), static_cast<int>(std::max<int64_t>(last - first + 1, 0))};
}

PatchDgrad patch_dgrad(const ConvProblem& p, int rows_of_tile) {
  const Window h = window_of(p.R, p.stride_h, p.pad_top),
               w = window_of(p.S, p.stride_w, p.pad_left);
  PatchDgrad g{};
  g.H = static_cast<int>(p.H), g.W = static_cast<int>(p.W), g.C = static_cast<int>(p.C);
  g.K = static_cast<int>(p.K), g.P = static_cast<int>(p.P), g.Q = static_cast<int>(p.Q);
  g.R = static_cast<int>(p.R), g.S = static_cast<int>(p.S);
  g.pad_top = static_cast<int>(p.pad_top), g.pad_left = static_cast<int>(p.pad_left);
  g.first_h = h.first, g.first_w = w.first;
  g.window_h = h.taps, g.window_w = w.taps;
  g.rows = rows_of_tile + h.taps - 1, g.columns = kColumns + w.taps - 1;
  g.chunks = static_cast<int>(p.K * (p.dtype == DType::kFloat32 ? 4 : 2) / 16);
  g.chunk = Divisor(g.chunks);
  g.column = Divisor(g.columns);
  g.tiles_h = Divisor(ceil_div(ceil_div(p.H, p.stride_h), rows_of_tile));
  g.tiles_w = Divisor(ceil_div(ceil_div(p.W, p.stride_w), kColumns));
  g.tiles = p.N * g.tiles_h.value() * g.tiles_w.value();
  return g;
}

template <typename T>
bool fits(const ConvProblem& p, const Queue& queue) {
  const PatchDgrad g = patch_dgrad(p, kWarps * kWarpRows<T>);
  return g.window_h > 0 && g.window_w > 0 && g.tiles < kMostPatches &&
         shared_bytes<T>(g, static_cast<int>(p.stride_h)) <= shared_of_patch(queue);
}

}  // namespace

bool patch_dgrad_takes(const ConvProblem& p, const Queue& queue) {
  constexpr int64_t kMost = 64;  // a patch of more does not fit
  const int64_t size = p.dtype == DType::kFloat32 ? 4 : 2;
  if (p.C > kChannels || p.groups != 1 || p.flip || p.layout != Layout::kNHWC ||
      p.weight_layout != Layout::kNHWC || p.stride_h != p.stride_w || p.stride_h > 2 ||
      p.dilation_h != 1 || p.dilation_w != 1 || p.R > kMost || p.S > kMost ||
      p.K * size % kStepBytes != 0 || p.K > 4096)
    return false;
  return size == 2 ? fits<Half>(p, queue) : fits<float>(p, queue);
}

template <typename T>
void run_patch_dgrad(const ConvProblem& p, const T* dz, const T* w, T* dx, const Queue& queue) {
  const PatchDgrad g = patch_dgrad(p, kWarps * kWarpRows<T>);
  dz = on_16_bytes(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  const int64_t resident = int64_t{std::max(queue.multiprocessors, 1)} * kBlocks;
  launch(p.stride_h == 1 ? mma_patch_dgrad_kernel<T, 1> : mma_patch_dgrad_kernel<T, 2>,
         dim3(static_cast<unsigned>(std::min(g.tiles, resident))), dim3(kThreads),
         shared_bytes<T>(g, static_cast<int>(p.stride_h)), queue, g, dz, w, dx);
}

template void run_patch_dgrad(const ConvProblem&, const Half*, const Half*, Half*, const Queue&);
template void run_patch_dgrad(const ConvProblem&, const BFloat16*, const BFloat16*, BFloat16*,
                              const Queue&);
template void run_patch_dgrad(const ConvProblem&, const float*, const float*, float*, const Queue&);

}  // namespace torchconv::cuda
