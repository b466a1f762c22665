// wgrad by few channels on tensor cores: mma_patch.h's patch of the image against the tile of dz
// that it brings about, both in shared memory, where ldmatrix turns them.
//
//   dw[k, term] = sum over outputs of dz[output, k] * patch[place of the output + place of the
//   term]
//
// A block of four warps takes 64 filters and all terms, 7 columns of 8 terms a warp, over a run of
// tiles of 8 x 16 outputs, and leaves one slice of sums, which add_slices adds. Every kChain tiles
// it adds what the tensor cores have summed up to its totals in shared memory, because the hardware
// truncates where it adds. Outputs that are none have dz = 0 and read a chunk of zeros, so that no
// NaN beside the image's windows comes in. Runs are as many as fill a large device, by the shape
// alone. Bound: reading image and dz once.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/mma_patch_tile.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = kPatchThreads, kWarps = kThreads / 32, kFilters = 64;
constexpr int kOutputs = kPatchRows * kPatchColumns;
constexpr int kColumns = 7;  // of eight terms, a warp
constexpr int kGroups = kFilters / 16;
constexpr int kValues = kGroups * kColumns * 4;
constexpr int kChain = 2048 / kOutputs;  // tiles
constexpr int kBlocks = 2;               // on a multiprocessor
// Tiles of dz in shared memory, and bytes from one pixel's 64 filters to the next one's, so that
// what a fragment reads meets all banks.
template <typename T>
constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kPitch = kFilters * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 ? 16 : 32);
template <typename T>
constexpr int kDzBytes = kOutputs * kPitch<T>;

template <typename T>
int shared_bytes(const PatchProblem& p) {
  return (p.chunks() * (p.copy != 0 ? 2 : 1) + 1) * 16 + kStages<T> * kDzBytes<T> +
         kValues * kThreads * 4;
}

template <typename T, int kPixels>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mma_patch_wgrad_kernel(const __grid_constant__ PatchProblem p, int64_t tiles_of_run,
                           const T* dz, const T* x, const SliceSums<T> sums_of_runs) {
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr int kChunksOfColumn = kHalf ? 1 : 2;
  const int all_chunks = p.chunks() * (p.copy != 0 ? 2 : 1);
  unsigned char* shared = dynamic_shared<unsigned char>();
  float* totals = reinterpret_cast<float*>(shared) + threadIdx.x;
  unsigned char* tiles = shared + kValues * kThreads * 4;
  Chunk* patch = reinterpret_cast<Chunk*>(tiles + kStages<T> * kDzBytes<T>);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int tiles_k = (p.K + kFilters - 1) / kFilters;
  const int first_filter = static_cast<int>(blockIdx.x) % tiles_k * kFilters;
  const int64_t run = blockIdx.x / static_cast<unsigned>(tiles_k);
  const int64_t begin = run * tiles_of_run, end = min(begin + tiles_of_run, p.tiles);
  const int terms = p.terms();

  if (thread == 0) patch[all_chunks] = Chunk{};
#pragma unroll
  for (int i = 0; i < kValues; ++i) totals[i * kThreads] = 0.0f;

  PatchLoader<T, kPixels> loader(p, thread);
  const auto load_dz = [&](int64_t tile) {
    constexpr int kUnits = kFilters / kLanes<T>;
    const PatchCorner corner = corner_of(tile, p.tiles_p, p.tiles_q);
    const int p0 = corner.row * kPatchRows, q0 = corner.column * kPatchColumns;
    const SharedAddress to = shared_address(tiles) +
                             static_cast<SharedAddress>((tile - begin) % kStages<T> * kDzBytes<T>);
#pragma unroll 4
    for (int unit = thread; unit < kOutputs * kUnits; unit += kThreads) {
      const int output = unit / kUnits, k = first_filter + unit % kUnits * kLanes<T>;
      const int h = p0 + output / kPatchColumns, w = q0 + output % kPatchColumns;
      const bool inside = all_of(h < p.P, w < p.Q, k < p.K);
      copy_async<16>(to + static_cast<SharedAddress>(output * kPitch<T> + unit % kUnits * 16),
                     inside ? dz + (((corner.n * p.P + h) * p.Q + w) * p.K + k) : dz, inside);
    }
  };

  // Where this lane's rows of a fragment begin: of the first 16 bytes, or words, of dz, and of
  // terms.
  const int g = lane >> 2, t = lane & 3, matrix = lane >> 3;
  const int pixel_a = kHalf ? (lane & 7) + 8 * (matrix >> 1) : t;
  const int pixel_b = kHalf ? (lane & 7) + 8 * (matrix & 1) : t;
  const SharedAddress a_of_lane =
      shared_address(tiles) +
      static_cast<SharedAddress>(pixel_a * kPitch<T> + (kHalf ? 16 * (matrix & 1) : 4 * g));
  const SharedAddress patches = shared_address(patch);
  const SharedAddress zeros = patches + static_cast<SharedAddress>(16 * all_chunks);
  constexpr int kPlaces = kHalf ? (kColumns + 1) / 2 : kColumns;
  SharedAddress places[kPlaces];
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    const int term =
        kHalf ? warp * kColumns + 2 * i + (matrix >> 1) : (warp * kColumns + i) * 2 + (g >> 2);
    places[i] = static_cast<SharedAddress>(16 * (term < terms ? place_of_term(p, term) : 0) +
                                           (kHalf ? 0 : 4 * (g & 3)));
  }

  float sums[kGroups][kColumns][4];
  const auto add_to_totals = [&] {
#pragma unroll
    for (int m = 0; m < kGroups; ++m)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          totals[((m * kColumns + j) * 4 + e) * kThreads] += sums[m][j][e];
          sums[m][j][e] = 0.0f;
        }
  };
#pragma unroll
  for (int m = 0; m < kGroups; ++m)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][j][e] = 0.0f;

  // Half types load the next tile meanwhile; floats have no registers and memory left for it.
  if constexpr (kHalf) {
    loader.load(p, x, thread, begin);
    load_dz(begin);
    copy_async_commit();
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    __syncthreads();
    if constexpr (kHalf) {
      loader.leave(p, patch, thread);
      if (tile + 1 < end) load_dz(tile + 1);
      copy_async_commit();
      if (tile + 1 < end) loader.load(p, x, thread, tile + 1);
      copy_async_wait<1>();
    } else {
      load_dz(tile);
      copy_async_commit();
      loader.load(p, x, thread, tile);
      loader.leave(p, patch, thread);
      copy_async_wait<0>();
    }
    __syncthreads();

    const PatchCorner corner = corner_of(tile, p.tiles_p, p.tiles_q);
    const int p0 = corner.row * kPatchRows, q0 = corner.column * kPatchColumns;
    const SharedAddress a_of_tile =
        a_of_lane + static_cast<SharedAddress>((tile - begin) % kStages<T> * kDzBytes<T>);
    for (int row = 0; row < kPatchRows; ++row) {
      const SharedAddress a_of_row =
          a_of_tile + static_cast<SharedAddress>(row * kPatchColumns * kPitch<T>);
      const SharedAddress b_of_row =
          patches + static_cast<SharedAddress>(16 * (row * p.stride_h * p.line() + pixel_b));
      const bool is_row = p0 + row < p.P;
      if constexpr (kHalf) {
        const bool inside = all_of(is_row, q0 + pixel_b < p.Q);
        uint32_t a[kGroups][4];
#pragma unroll
        for (int m = 0; m < kGroups; ++m) load_matrices_transposed(a[m], a_of_row + 32 * m);
#pragma unroll
        for (int i = 0; i < kPlaces; ++i) {
          uint32_t b[4];
          load_matrices_transposed(b, inside ? b_of_row + places[i] : zeros);
#pragma unroll
          for (int m = 0; m < kGroups; ++m) {
            mma<T>(sums[m][2 * i], a[m], b[0], b[1]);
            if (2 * i + 1 < kColumns) mma<T>(sums[m][(2 * i + 1) % kColumns], a[m], b[2], b[3]);
          }
        }
      } else {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          uint32_t a[kGroups][4];
#pragma unroll
          for (int m = 0; m < kGroups; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[m][i] = round_to_tf32(load_shared(
                  a_of_row + static_cast<SharedAddress>((8 * eight + 4 * (i >> 1)) * kPitch<T> +
                                                        64 * m + 32 * (i & 1))));
          const bool first = all_of(is_row, q0 + 8 * eight + t < p.Q);
          const bool second = all_of(is_row, q0 + 8 * eight + 4 + t < p.Q);
          const SharedAddress b_of_eight = b_of_row + 128 * eight;
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) {
            const uint32_t b0 = load_shared(first ? b_of_eight + places[i] : zeros);
            const uint32_t b1 = load_shared(second ? b_of_eight + 64 + places[i] : zeros);
#pragma unroll
            for (int m = 0; m < kGroups; ++m) mma<T>(sums[m][i], a[m], b0, b1);
          }
        }
      }
    }
    if ((tile - begin) % kChain == kChain - 1) add_to_totals();
  }
  add_to_totals();

  for (int m = 0; m < kGroups; ++m)
    for (int j = 0; j < kColumns; ++j)
      for (int e = 0; e < 4; ++e) {
        const int k = first_filter + 16 * m + g + 8 * (e >> 1), column = 2 * t + (e & 1);
        const int term = (warp * kColumns + j) * kChunksOfColumn + (kHalf ? 0 : column / 4);
        const int r = term / p.tap_chunks, c = kHalf && kPixels == 1 ? column : column % 4;
        const int s = (term - r * p.tap_chunks) * kPixels + (kPixels == 2 ? column / 4 : 0);
        if (k < p.K && r < p.R && s < p.S && c < p.C)
          sums_of_runs.store(run, ((int64_t{k} * p.R + r) * p.S + s) * p.C + c,
                             totals[((m * kColumns + j) * 4 + e) * kThreads]);
      }
}

template <typename T>
bool fits(const ConvProblem& p, const Queue& queue) {
  const PatchProblem g = patch_problem(p);
  return g.terms() <= kWarps * kColumns * (sizeof(T) == 2 ? 1 : 2) && p.K % kLanes<T> == 0 &&
         shared_bytes<T>(g) <= shared_of_patch(queue);
}

}  // namespace

bool patch_wgrad_takes(const ConvProblem& p, const Queue& queue) {
  return p.layout == Layout::kNHWC && p.weight_layout == Layout::kNHWC && patch_fits(p) &&
         (p.dtype == DType::kFloat32 ? fits<float>(p, queue) : fits<Half>(p, queue));
}

template <typename T>
void run_patch_wgrad(const ConvProblem& p, const T* dz, const T* x, T* dw, const Queue& queue) {
  const PatchProblem g = patch_problem(p);
  dz = on_16_bytes(p.dtype, dz, p.N * p.P * p.Q * p.K, queue);
  constexpr int64_t kMultiprocessors = 132, kFewestTiles = 4, kMostTiles = 1 << 16;
  const int64_t tiles_k = ceil_div(p.K, kFilters);
  const int64_t resident = ceil_div(kMultiprocessors * kBlocks, tiles_k);
  const int64_t of_run = std::min(std::max(ceil_div(g.tiles, resident), kFewestTiles), kMostTiles);
  const int64_t runs = ceil_div(g.tiles, of_run);
  const SliceSums<T> sums = slice_sums(dw, runs, p.K * p.R * p.S * p.C, queue);
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(static_cast<unsigned>(runs * tiles_k)), dim3(kThreads), shared_bytes<T>(g),
           queue, g, of_run, dz, x, sums);
  };
  if constexpr (sizeof(T) == 2) {
    if (in_pairs(p))
      run(mma_patch_wgrad_kernel<T, 2>);
    else
      run(mma_patch_wgrad_kernel<T, 1>);
  } else {
    run(mma_patch_wgrad_kernel<T, 1>);
  }
  add_slices(sums, runs, queue);
}

template void run_patch_wgrad(const ConvProblem&, const Half*, const Half*, Half*, const Queue&);
template void run_patch_wgrad(const ConvProblem&, const BFloat16*, const BFloat16*, BFloat16*,
                              const Queue&);
template void run_patch_wgrad(const ConvProblem&, const float*, const float*, float*, const Queue&);

}  // namespace torchconv::cuda
