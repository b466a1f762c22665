// The kernel of mma_patch.h.
#include <algorithm>

#include "cuda/mma_gather_kernel.h"
#include "cuda/mma_patch_tile.h"
#include "cuda/mma_planes_epilogue.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = kPatchThreads, kColumns = kPatchColumns, kFilters = 64;
constexpr int kBlocks = 3;  // on a multiprocessor

// Sums of a row of outputs: pixels by filters for NHWC, filters by pixels for planes.
using Row = Tile<kColumns, kFilters, 1, 1, kBlocks>;
using PlaneRow = Tile<kFilters, kColumns, 1, 1, kBlocks>;

// Bytes of shared memory: filters, places of the terms' chunks, patch and its copy, sums.
__host__ __device__ constexpr int sums_bytes() {
  return kThreads / 32 * kColumns * (kSumsPitch<Row> * 4 + 8);
}
int shared_bytes(const PatchProblem& p) {
  return kFilters * p.filter_chunks() * 16 + round_up(p.terms() + 3, 4) * 4 +
         p.chunks() * 16 * (p.copy != 0 ? 2 : 1) + sums_bytes();
}

// Stores the sums of a row of outputs to planes, from the row's first element of filter 0 on.
template <typename T>
__device__ __forceinline__ void store_row(const Sums<PlaneRow>& sums, const Epilogue<T>& epilogue,
                                          const PatchProblem& p, int lane, int first_filter,
                                          int64_t first, int columns) {
  const int g = lane >> 2, t = lane & 3;
  const int64_t plane = int64_t{p.P} * p.Q;
#pragma unroll
  for (int i = 0; i < PlaneRow::kGroupsM; ++i) {
    const int filter = first_filter + 16 * i + g;
    float bias[2];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper)
      bias[upper] = filter + 8 * upper < p.K ? epilogue.bias_of(filter + 8 * upper) : 0.0f;
    if constexpr (sizeof(T) == 2) {
      // The pairs of a quad: eight pixels twice of one filter, then of the eighth after it.
      float z[8];
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            z[4 * upper + 2 * j + e] = sums.value[i][j][2 * upper + e] + bias[upper];
      const int k = filter + 8 * (t >> 1), q = 8 * (t & 1);
      store_pixels(z, epilogue, lane, first + k * plane + q, k < p.K ? columns - q : 0,
                   p.vector_outputs);
    } else {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int k = filter + 8 * upper, q = 8 * j + 2 * t;
          float z[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) z[e] = sums.value[i][j][2 * upper + e] + bias[upper];
          if (k >= p.K || q >= columns) continue;
          const int64_t at = first + k * plane + q;
          const auto load = [&](const T* from) {
            return Vector<T, 2>{{from[at], q + 1 < columns ? from[at + 1] : T{0}}};
          };
          finish(z, epilogue, load, [&](T* to, const Vector<T, 2>& rounded) {
            to[at] = rounded.element[0];
            if (q + 1 < columns) to[at + 1] = rounded.element[1];
          });
        }
    }
  }
}

template <typename T, int kPixels, bool kPlanes>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mma_patch_kernel(const __grid_constant__ PatchProblem p, const T* x, const T* w,
                     const Epilogue<T> epilogue) {
  Chunk* filters = dynamic_shared<Chunk>();
  int* places = reinterpret_cast<int*>(filters + kFilters * p.filter_chunks());
  const int terms = p.terms(), pairs = (terms + 1) / 2;
  Chunk* patch = reinterpret_cast<Chunk*>(places + (terms + 6) / 4 * 4);
  float* sums_of_warps = reinterpret_cast<float*>(patch + p.chunks() * (p.copy != 0 ? 2 : 1));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float* staged = sums_of_warps + warp * (kColumns * (kSumsPitch<Row> + 2));
  int64_t* offsets = reinterpret_cast<int64_t*>(staged + kColumns * kSumsPitch<Row>);
  const int tiles_n = (p.K + kFilters - 1) / kFilters;
  const int first_filter = static_cast<int>(blockIdx.x) % tiles_n * kFilters;
  const T zero = from_wide<T>(0.0f);

#pragma unroll 4
  for (int unit = thread; unit < kFilters * p.filter_chunks(); unit += kThreads) {
    const int n = unit / p.filter_chunks(), term = unit - n * p.filter_chunks();
    const int r = term / p.tap_chunks, s = (term - r * p.tap_chunks) * kPixels;
    const int64_t filter = int64_t{first_filter + n} * p.R * p.S * p.C;
    const int64_t tap = filter + (r * p.S + s) * p.filter_tap;
    T pixel[kPixels][kPatchChannels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c)
        pixel[i][c] = first_filter + n < p.K && r < p.R && s + i < p.S && c < p.C
                          ? w[tap + i * p.filter_tap + c * p.filter_channel]
                          : zero;
    filters[unit] = chunk_of(pixel);
  }
  for (int term = thread; term < terms + 3; term += kThreads)
    places[term] = term < terms ? place_of_term(p, term) : 0;

  PatchLoader<T, kPixels, kPlanes> loader(p, thread);
  // Pixels are the lines of A, filters those of B, or the other way round.
  const int matrix = lane >> 3, odd = matrix & 1, high = matrix >> 1;
  const int odd_chunk = kPlanes ? odd : high, filter_chunk = kPlanes ? high : odd;
  const int column = (lane & 7) + 8 * (kPlanes ? high : odd);
  const SharedAddress patches = shared_address(patch);
  const SharedAddress filter =
      shared_address(filters) +
      static_cast<SharedAddress>(
          16 * (((lane & 7) + 8 * (kPlanes ? odd : high)) * p.filter_chunks() + filter_chunk));
  const SharedAddress outputs =
      patches + static_cast<SharedAddress>(16 * (2 * warp * p.stride_h * p.line() + column));
  const SharedAddress next_row = static_cast<SharedAddress>(16 * p.stride_h * p.line());

  const int64_t step = gridDim.x / static_cast<unsigned>(tiles_n);
  int64_t tile = blockIdx.x / static_cast<unsigned>(tiles_n);
  if (tile < p.tiles) loader.load(p, x, thread, tile);
  for (; tile < p.tiles; tile += step) {
    __syncthreads();
    loader.leave(p, patch, thread);
    __syncthreads();
    if (tile + step < p.tiles) loader.load(p, x, thread, tile + step);
    Sums<std::conditional_t<kPlanes, PlaneRow, Row>> sums[2];
    sums[0].clear(), sums[1].clear();
    int place = places[odd_chunk];
#pragma unroll 2
    for (int pair = 0; pair < pairs; ++pair) {
      const SharedAddress at = outputs + static_cast<SharedAddress>(16 * place);
      place = places[2 * pair + 2 + odd_chunk];  // the next one's
      uint32_t pixels[2][4], of_filters[kFilters / 16][4];
      load_matrices(pixels[0], at);
      load_matrices(pixels[1], at + next_row);
      if (2 * pair + 1 == terms)
#pragma unroll
        for (int i = 0; i < 2; ++i) pixels[i][kPlanes ? 1 : 2] = pixels[i][3] = 0;
#pragma unroll
      for (int j = 0; j < kFilters / 16; ++j)
        load_matrices(of_filters[j], filter + static_cast<SharedAddress>(
                                                  16 * (16 * j * p.filter_chunks() + 2 * pair)));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < kFilters / 16; ++j)
          if constexpr (kPlanes) {
            mma<T>(sums[i].value[j][0], of_filters[j], pixels[i][0], pixels[i][1]);
            mma<T>(sums[i].value[j][1], of_filters[j], pixels[i][2], pixels[i][3]);
          } else {
            mma<T>(sums[i].value[0][2 * j], pixels[i], of_filters[j][0], of_filters[j][1]);
            mma<T>(sums[i].value[0][2 * j + 1], pixels[i], of_filters[j][2], of_filters[j][3]);
          }
    }
    const PatchCorner corner = corner_of(tile, p.tiles_p, p.tiles_q);
    const int p0 = corner.row * kPatchRows + 2 * warp, q0 = corner.column * kColumns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kPlanes) {
        store_row(sums[i], epilogue, p, lane, first_filter,
                  (corner.n * p.K * p.P + p0 + i) * p.Q + q0, p0 + i < p.P ? p.Q - q0 : 0);
      } else {
        leave_sums(sums[i], staged, lane, 0, 0);
        if (lane < kColumns)
          offsets[lane] = p0 + i < p.P && q0 + lane < p.Q
                              ? ((corner.n * p.P + p0 + i) * p.Q + q0 + lane) * p.K
                              : -1;
        __syncwarp();
        store_tile<T, Row>(lane, staged, offsets, first_filter, p.K, p.vector_outputs, epilogue);
        __syncwarp();
      }
    }
  }
}

}  // namespace

bool patch_takes(const ConvProblem& p, const Queue& queue) {
  return patch_fits(p) && shared_bytes(patch_problem(p)) <= shared_of_patch(queue);
}

template <typename T>
void run_patch(const ConvProblem& p, const T* x, const T* w, const Epilogue<T>& epilogue,
               const Queue& queue) {
  PatchProblem g = patch_problem(p);
  const bool planes = p.layout == Layout::kNCHW;
  const auto vectors = [&](const T* to) {
    const int64_t line = planes ? p.Q : p.K;
    return to == nullptr || (aligned<T>(to, kLanes<T>) && line % kLanes<T> == 0);
  };
  g.vector_outputs = vectors(epilogue.y) && vectors(epilogue.preactivation);
  const int64_t tiles_n = ceil_div(p.K, kFilters);
  const int64_t resident = ceil_div(int64_t{queue.multiprocessors} * kBlocks, tiles_n);
  const dim3 grid(static_cast<unsigned>(std::min(g.tiles, resident) * tiles_n));
  const auto run = [&](auto kernel) {
    launch(kernel, grid, dim3(kThreads), shared_bytes(g), queue, g, x, w, epilogue);
  };
  if constexpr (sizeof(T) == 2)
    if (in_pairs(p))
      return planes ? run(mma_patch_kernel<T, 2, true>) : run(mma_patch_kernel<T, 2, false>);
  planes ? run(mma_patch_kernel<T, 1, true>) : run(mma_patch_kernel<T, 1, false>);
}

template void run_patch(const ConvProblem&, const Half*, const Half*, const Epilogue<Half>&,
                        const Queue&);
template void run_patch(const ConvProblem&, const BFloat16*, const BFloat16*,
                        const Epilogue<BFloat16>&, const Queue&);
template void run_patch(const ConvProblem&, const float*, const float*, const Epilogue<float>&,
                        const Queue&);

}  // namespace torchconv::cuda
