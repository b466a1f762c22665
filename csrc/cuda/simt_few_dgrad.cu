// Exact float32 dgrad by few channels (an image's three), of stride 1 or 2, over NCHW.
//
// A position stands for one pixel of dx, or of stride 2 for 2 x 2, its phases: all of these read
// the same window of dz, one or the other by each tap. A thread owns four neighbouring positions of
// a row, all phases and channels, so that an element of dz serves several sums, and a quad of
// weights, which is one phase's channels, four. The weights of some filters at a time are in shared
// memory, as windows. Bound by the FMA units.
//
// A sum is taken in chunks of so many filters, whose sums are added, as in simt_tile.h.
#include <algorithm>

#include "core/range.h"
#include "cuda/divmod.h"
#include "cuda/element.h"
#include "cuda/simt_few_dgrad.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 128, kPositions = 4, kMostChannels = 4, kMostMasks = 16;
constexpr int kWeightBytes = 16 * 1024, kChunkTerms = 256;

using Quad = Vector<float, 4>;

struct FewDgrad {
  int C, H, W, K, P, Q, R, S, pad_top, pad_left;
  int64_t w_k, w_c, w_r, w_s;
  bool flip;
  int first_h, first_w;    // of the window of position (0, 0) in dz
  int window_h, window_w;  // taps of a window; columns in whole fours
  int filters;             // of a chunk
  bool quads;              // dx has rows of whole quads, aligned
  Divisor across, down;    // threads of a row, rows of positions
  int64_t threads;
  // Bit a of row u: whether phase a has a tap there.
  unsigned char row_phases[kMostMasks], column_phases[kMostMasks];
};

// The weights of filters first, first + 1, ...: [filter of the chunk][row][column][phase], channels
// of each.
template <int kStride, int kC>
__device__ __forceinline__ void stage_weights(const FewDgrad& p, const float* w, int first,
                                              int filters, Quad* weights) {
  constexpr int kPhases = kStride * kStride;
  const int window = p.window_h * p.window_w;
  for (int at = static_cast<int>(threadIdx.x); at < filters * window * kPhases; at += kThreads) {
    const int phase = at % kPhases, tap = at / kPhases % window, k = at / kPhases / window;
    const int u = tap / p.window_w, v = tap % p.window_w;
    // Pixel h is row i of dz through tap r where h + pad = i*stride + r.
    int r = phase / kStride + p.pad_top - kStride * (p.first_h + u);
    int s = phase % kStride + p.pad_left - kStride * (p.first_w + v);
    Quad quad{};
    if (r >= 0 && r < p.R && s >= 0 && s < p.S) {
      if (p.flip) r = p.R - 1 - r, s = p.S - 1 - s;
      const float* from = w + (first + k) * p.w_k + r * p.w_r + s * p.w_s;
#pragma unroll
      for (int c = 0; c < kC; ++c)
        if (c < p.C) quad.element[c] = from[c * p.w_c];
    }
    weights[at] = quad;
  }
}

template <int kStride, int kC>
using FewSums = float[kStride * kStride][kC][kPositions];

template <int kPhases, int kC>
__device__ __forceinline__ void clear(float (&sums)[kPhases][kC][kPositions]) {
#pragma unroll
  for (int a = 0; a < kPhases; ++a)
#pragma unroll
    for (int c = 0; c < kC; ++c)
#pragma unroll
      for (int q = 0; q < kPositions; ++q) sums[a][c][q] = 0;
}

template <int kPhases, int kC>
__device__ __forceinline__ void add(const float (&sums)[kPhases][kC][kPositions],
                                    float (&total)[kPhases][kC][kPositions]) {
#pragma unroll
  for (int a = 0; a < kPhases; ++a)
#pragma unroll
    for (int c = 0; c < kC; ++c)
#pragma unroll
      for (int q = 0; q < kPositions; ++q) total[a][c][q] += sums[a][c][q];
}

// The pixels of sample n that belong to positions j0, j0 + 1, ... of row i.
template <int kStride, int kC>
__device__ __forceinline__ void store(const FewDgrad& p, uint32_t n, int i, int j0,
                                      const FewSums<kStride, kC>& total, float* dx) {
#pragma unroll
  for (int c = 0; c < kC; ++c) {
    if (c >= p.C) break;
    float* plane = dx + (int64_t{n} * p.C + c) * p.H * p.W;
#pragma unroll
    for (int a = 0; a < kStride; ++a) {
      const int h = i * kStride + a;
      if (h >= p.H) break;
      float* row = plane + int64_t{h} * p.W;
#pragma unroll
      for (int part = 0; part < kStride; ++part) {
        const int w0 = j0 * kStride + part * kPositions;
        Quad quad;
#pragma unroll
        for (int q = 0; q < kPositions; ++q) {
          const int at = part * kPositions + q;
          quad.element[q] = total[a * kStride + at % kStride][c][at / kStride];
        }
        if (p.quads) {
          if (w0 < p.W) *reinterpret_cast<Quad*>(row + w0) = quad;
          continue;
        }
#pragma unroll
        for (int q = 0; q < kPositions; ++q)
          if (w0 + q < p.W) row[w0 + q] = quad.element[q];
      }
    }
  }
}

template <int kStride, int kC>
__global__ void __launch_bounds__(kThreads, 3)
    simt_few_dgrad_kernel(const __grid_constant__ FewDgrad p, const float* dz, const float* w,
                          float* dx) {
  constexpr int kPhases = kStride * kStride;
  Quad* weights = dynamic_shared<Quad>();
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool active = thread < p.threads;
  uint32_t n = active ? static_cast<uint32_t>(thread) : 0;
  const int j0 = static_cast<int>(p.across.split(n)) * kPositions;
  const int i = static_cast<int>(p.down.split(n));
  const float* image = dz + int64_t{n} * p.K * p.P * p.Q;
  const int q0 = j0 + p.first_w;

  FewSums<kStride, kC> total;
  clear(total);

#pragma unroll 1
  for (int first = 0; first < p.K; first += p.filters) {
    const int filters = min(p.filters, p.K - first);
    __syncthreads();
    stage_weights<kStride, kC>(p, w, first, filters, weights);
    __syncthreads();
    FewSums<kStride, kC> sums;
    clear(sums);
    const Quad* quads = weights;
#pragma unroll 1
    for (int k = 0; k < filters; ++k) {
      const float* plane = image + int64_t{first + k} * p.P * p.Q;
#pragma unroll 1
      for (int u = 0; u < p.window_h; ++u) {
        const int row = i + p.first_h + u;
        const bool inside = active && static_cast<unsigned>(row) < static_cast<unsigned>(p.P);
        const float* from = plane + int64_t{row} * p.Q;
        const auto load = [&](int q) {
          return inside && static_cast<unsigned>(q) < static_cast<unsigned>(p.Q) ? from[q] : 0.0f;
        };
        const int rows = p.row_phases[u];
        float d[2 * kPositions];
#pragma unroll
        for (int q = 0; q < kPositions; ++q) d[q] = load(q0 + q);
#pragma unroll 1
        for (int v0 = 0; v0 < p.window_w; v0 += kPositions) {
#pragma unroll
          for (int q = 0; q < kPositions; ++q) d[kPositions + q] = load(q0 + v0 + kPositions + q);
#pragma unroll
          for (int v = 0; v < kPositions; ++v) {
            const int columns = p.column_phases[v0 + v];
#pragma unroll
            for (int a = 0; a < kStride; ++a) {
#pragma unroll
              for (int b = 0; b < kStride; ++b) {
                // Where a phase has no tap, nothing is multiplied: dz may be infinite.
                if ((rows >> a & 1) == 0 || (columns >> b & 1) == 0) continue;
                const Quad quad = quads[v * kPhases + a * kStride + b];
#pragma unroll
                for (int c = 0; c < kC; ++c)
#pragma unroll
                  for (int q = 0; q < kPositions; ++q) {
                    float& sum = sums[a * kStride + b][c][q];
                    sum = fmaf(quad.element[c], d[v + q], sum);
                  }
              }
            }
          }
          quads += kPositions * kPhases;
#pragma unroll
          for (int q = 0; q < kPositions; ++q) d[q] = d[kPositions + q];
        }
      }
    }
    add(sums, total);
  }
  if (active) store<kStride, kC>(p, n, i, j0, total, dx);
}

// Of stems: 7x7 taps, stride 2, padding 3, and rows of dz that are whole quads, aligned. As above,
// but it is known at compile time which phases have a tap where, and a window row is three loads.
// The next row is on its way while one is multiplied.
template <int kC>
__global__ void __launch_bounds__(kThreads, 3)
    simt_stem_dgrad_kernel(const __grid_constant__ FewDgrad p, const float* dz, const float* w,
                           float* dx) {
  using Pair = Vector<float, 2>;
  constexpr int kWindow = 4, kPhases = 4;
  const auto has_tap = [](int phase, int at) { return phase == 1 || at + 1 < kWindow; };
  Quad* weights = dynamic_shared<Quad>();
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool active = thread < p.threads;
  uint32_t n = active ? static_cast<uint32_t>(thread) : 0;
  const int j0 = static_cast<int>(p.across.split(n)) * kPositions;
  const int i = static_cast<int>(p.down.split(n));
  const int64_t plane = int64_t{p.P} * p.Q;
  // Position j0 in the first row of the window.
  const float* from = dz + n * (p.K * plane) + int64_t{i - 1} * p.Q + j0;
  const bool left = j0 > 0, right = j0 + kPositions < p.Q;

  struct Row {
    float d[2 * kPositions - 1];
  };
  const auto load = [&](const float* corner, int u, bool wanted) {
    const bool inside =
        wanted && active && static_cast<unsigned>(i - 1 + u) < static_cast<unsigned>(p.P);
    const float* at = corner + int64_t{u} * p.Q;
    Quad middle{};
    Pair end{};
    Row row;
    row.d[0] = inside && left ? at[-1] : 0.0f;
    if (inside) middle = *reinterpret_cast<const Quad*>(at);
    if (inside && right) end = *reinterpret_cast<const Pair*>(at + kPositions);
#pragma unroll
    for (int q = 0; q < kPositions; ++q) row.d[1 + q] = middle.element[q];
    row.d[1 + kPositions] = end.element[0];
    row.d[2 + kPositions] = end.element[1];
    return row;
  };

  FewSums<2, kC> total;
  clear(total);
  Row rows[2];
  rows[0] = load(from, 0, true);
#pragma unroll 1
  for (int first = 0; first < p.K; first += p.filters) {
    const int filters = min(p.filters, p.K - first);
    __syncthreads();
    stage_weights<2, kC>(p, w, first, filters, weights);
    __syncthreads();
    FewSums<2, kC> sums;
    clear(sums);
    const Quad* quads = weights;
#pragma unroll 1
    for (int k = first; k < first + filters; ++k) {
#pragma unroll
      for (int u = 0; u < kWindow; ++u) {
        const bool last = u + 1 == kWindow;
        rows[(u + 1) % 2] =
            load(last ? from + plane : from, last ? 0 : u + 1, !last || k + 1 < p.K);
#pragma unroll
        for (int v = 0; v < kWindow; ++v)
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) {
            if (!has_tap(phase / 2, u) || !has_tap(phase % 2, v)) continue;
            const Quad quad = quads[(u * kWindow + v) * kPhases + phase];
#pragma unroll
            for (int c = 0; c < kC; ++c)
#pragma unroll
              for (int q = 0; q < kPositions; ++q) {
                float& sum = sums[phase][c][q];
                sum = fmaf(quad.element[c], rows[u % 2].d[v + q], sum);
              }
          }
      }
      from += plane;
      quads += kWindow * kWindow * kPhases;
    }
    add(sums, total);
  }
  if (active) store<2, kC>(p, n, i, j0, total, dx);
}

// The window along one axis: its first element, from that of the position, and its length.
struct Window {
  int64_t first, length;
  Window(int64_t taps, int64_t stride, int64_t pad)
      : first(-floor_div(taps - 1 - pad, stride)),
        length(floor_div(stride - 1 + pad, stride) - first + 1) {}
};

void mark_phases(const Window& window, int64_t taps, int64_t stride, int64_t pad,
                 unsigned char (&phases)[kMostMasks]) {
  for (int64_t u = 0; u < window.length; ++u)
    for (int64_t a = 0; a < stride; ++a) {
      const int64_t tap = a + pad - stride * (window.first + u);
      if (tap >= 0 && tap < taps) phases[u] |= static_cast<unsigned char>(1 << a);
    }
}

}  // namespace

bool simt_few_dgrad_takes(const ConvProblem& p) {
  if (p.dtype != DType::kFloat32 || p.layout != Layout::kNCHW || p.groups != 1 ||
      p.C > kMostChannels || p.stride_h != p.stride_w || p.stride_h > 2 || p.dilation_h != 1 ||
      p.dilation_w != 1 || p.R > kMostMasks || p.S > kMostMasks || !simt_fits(p))
    return false;
  const Window rows(p.R, p.stride_h, p.pad_top), columns(p.S, p.stride_w, p.pad_left);
  const int64_t width = ceil_div(columns.length, kPositions) * kPositions;
  const int64_t bytes = rows.length * width * p.stride_h * p.stride_w * int64_t{sizeof(Quad)};
  return width <= kMostMasks && bytes <= kWeightBytes && p.N * p.H * p.W < kSimtLimit * 4;
}

void simt_few_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                    const Queue& queue) {
  FewDgrad q{};
  q.C = static_cast<int>(p.C), q.K = static_cast<int>(p.K);
  q.H = static_cast<int>(p.H), q.W = static_cast<int>(p.W);
  q.P = static_cast<int>(p.P), q.Q = static_cast<int>(p.Q);
  q.R = static_cast<int>(p.R), q.S = static_cast<int>(p.S);
  q.pad_top = static_cast<int>(p.pad_top), q.pad_left = static_cast<int>(p.pad_left);
  const SimtWeightStrides strides = weight_strides(p);
  q.w_k = strides.k, q.w_c = strides.c, q.w_r = strides.r, q.w_s = strides.s;
  q.flip = p.flip;
  const Window rows(p.R, p.stride_h, p.pad_top), columns(p.S, p.stride_w, p.pad_left);
  mark_phases(rows, p.R, p.stride_h, p.pad_top, q.row_phases);
  mark_phases(columns, p.S, p.stride_w, p.pad_left, q.column_phases);
  q.first_h = static_cast<int>(rows.first), q.first_w = static_cast<int>(columns.first);
  q.window_h = static_cast<int>(rows.length);
  q.window_w = static_cast<int>(ceil_div(columns.length, kPositions)) * kPositions;
  const int phases = static_cast<int>(p.stride_h * p.stride_w);
  const int window = q.window_h * q.window_w;
  const int filter_bytes = window * phases * static_cast<int>(sizeof(Quad));
  q.filters = std::clamp(std::min(kWeightBytes / filter_bytes, kChunkTerms / window), 1, q.K);
  q.quads = p.W % kPositions == 0 && aligned<float>(dx, kPositions);
  const int64_t across = ceil_div(ceil_div(p.W, p.stride_w), kPositions);
  const int64_t down = ceil_div(p.H, p.stride_h);
  q.across = Divisor(across), q.down = Divisor(down);
  q.threads = p.N * across * down;
  const bool stem = p.R == 7 && p.S == 7 && p.stride_h == 2 && p.pad_top == 3 && p.pad_left == 3 &&
                    p.C <= 3 && p.P == ceil_div(p.H, 2) && p.Q == ceil_div(p.W, 2) &&
                    p.Q % kPositions == 0 && aligned<float>(dz, kPositions);
  const auto kernel = stem              ? simt_stem_dgrad_kernel<3>
                      : p.stride_h == 1 ? simt_few_dgrad_kernel<1, 4>
                      : p.C <= 3        ? simt_few_dgrad_kernel<2, 3>
                                        : simt_few_dgrad_kernel<2, 4>;
  launch(kernel, dim3(static_cast<unsigned>(ceil_div(q.threads, kThreads))), kThreads,
         q.filters * filter_bytes, queue, q, static_cast<const float*>(dz),
         static_cast<const float*>(w), static_cast<float*>(dx));
}

}  // namespace torchconv::cuda
