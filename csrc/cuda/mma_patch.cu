// The kernel of mma_patch.h.
#include <algorithm>

#include "core/range.h"
#include "cuda/divmod.h"
#include "cuda/mma_gather_kernel.h"
#include "cuda/mma_patch.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 128, kRows = 8, kColumns = 16, kFilters = 64;
constexpr int kChannels = 4;  // at most
constexpr int kBlocks = 3;    // on a multiprocessor

// Sums of a row of outputs.
using Row = Tile<kColumns, kFilters, 1, 1, kBlocks>;

struct PatchProblem {
  int H, W, C, K, P, Q, R, S;
  int stride_h, pad_top, dilation_h;
  int first_column;  // of the patch of output column 0, in pixels
  int column_step;   // pixels from one output column's to the next one's
  int tap_chunks;    // of a row of taps
  int tap_step;      // chunks from one to the next
  int apart;         // chunks from one output column's to the next one's
  int run;           // chunks of one residue in a row of the patch
  int rows;          // of the patch
  int copy;          // bytes to the copy whose chunks have one pixel, 0 where there is none
  int tiles_p, tiles_q;
  int64_t tiles;
  bool vector_outputs;

  __host__ __device__ int line() const { return apart * run; }      // chunks of a row of the patch
  __host__ __device__ int chunks() const { return rows * line(); }  // of the patch
  __host__ __device__ int terms() const { return R * tap_chunks; }  // chunks of an output's sum
  // Chunks of a filter in shared memory: an odd number, so that eight rows meet all banks.
  __host__ __device__ int filter_chunks() const { return (terms() + 1) / 2 * 2 + 1; }
};

// What a thread loads of a patch at most, in chunks.
template <int kPixels>
constexpr int kUnits = kPixels == 2 ? 4 : 8;

// Bytes of shared memory: filters, places of the terms' chunks, patch and its copy, sums.
__host__ __device__ constexpr int sums_bytes() {
  return kThreads / 32 * kColumns * (kSumsPitch<Row> * 4 + 8);
}
int shared_bytes(const PatchProblem& p) {
  return kFilters * p.filter_chunks() * 16 + round_up(p.terms() + 1, 4) * 4 +
         p.chunks() * 16 * (p.copy != 0 ? 2 : 1) + sums_bytes();
}

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T v) {
  if constexpr (sizeof(T) == 2)
    return *reinterpret_cast<const uint16_t*>(&v);
  else
    return round_to_tf32(__float_as_uint(v));
}

struct alignas(16) Chunk {
  uint32_t word[4];
};

// A chunk of kPixels pixels.
template <typename T, int kPixels>
__device__ __forceinline__ Chunk chunk_of(const T (&pixel)[kPixels][kChannels]) {
  Chunk chunk{};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) chunk.word[c] = bits_of(pixel[0][c]);
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < kChannels; c += 2)
        chunk.word[2 * i + c / 2] = bits_of(pixel[i][c]) | bits_of(pixel[i][c + 1]) << 16;
  }
  return chunk;
}

template <typename T, int kPixels>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mma_patch_kernel(const __grid_constant__ PatchProblem p, const T* x, const T* w,
                     const Epilogue<T> epilogue) {
  Chunk* filters = dynamic_shared<Chunk>();
  int* places = reinterpret_cast<int*>(filters + kFilters * p.filter_chunks());
  const int terms = p.terms(), pairs = (terms + 1) / 2;
  Chunk* patch = reinterpret_cast<Chunk*>(places + (terms + 4) / 4 * 4);
  const int copy = p.copy / 16;
  float* sums_of_warps = reinterpret_cast<float*>(patch + p.chunks() * (copy != 0 ? 2 : 1));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float* staged = sums_of_warps + warp * (kColumns * (kSumsPitch<Row> + 2));
  int64_t* offsets = reinterpret_cast<int64_t*>(staged + kColumns * kSumsPitch<Row>);
  const int tiles_n = (p.K + kFilters - 1) / kFilters;
  const int first_filter = static_cast<int>(blockIdx.x) % tiles_n * kFilters;
  const T zero = from_wide<T>(0.0f);

  for (int unit = thread; unit < kFilters * p.filter_chunks(); unit += kThreads) {
    const int n = unit / p.filter_chunks(), term = unit - n * p.filter_chunks();
    const int r = term / p.tap_chunks, s = (term - r * p.tap_chunks) * kPixels;
    const int64_t tap = (int64_t{first_filter + n} * p.R + r) * p.S + s;
    T pixel[kPixels][kChannels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        pixel[i][c] = first_filter + n < p.K && r < p.R && s + i < p.S && c < p.C
                          ? w[(tap + i) * p.C + c]
                          : zero;
    filters[unit] = chunk_of(pixel);
  }
  for (int term = thread; term <= terms; term += kThreads) {
    const int r = term / p.tap_chunks, u = (term - r * p.tap_chunks) * p.tap_step;
    int place = r * p.dilation_h * p.line() + u % p.apart * p.run + u / p.apart;
    if (copy != 0 && u == (p.tap_chunks - 1) * p.tap_step) place += copy;
    places[term] = term < terms ? place : 0;
  }

  // The chunks of a patch that this thread loads: row, and the first pixel's column.
  constexpr int kCount = kUnits<kPixels>;
  int rows[kCount], columns[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chunk = thread + i * kThreads, row = chunk / p.line(), at = chunk - row * p.line();
    const int residue = at / p.run;
    rows[i] = chunk < p.chunks() ? row : kNowhere;
    columns[i] = ((at - residue * p.run) * p.apart + residue) * kPixels;
  }
  T loaded[kCount][kPixels][kChannels];
  const auto load = [&](int64_t tile) {
    const int64_t line = tile / p.tiles_q, n = line / p.tiles_p;
    const int h0 = static_cast<int>(line - n * p.tiles_p) * kRows * p.stride_h - p.pad_top;
    const int w0 =
        static_cast<int>(tile - line * p.tiles_q) * kColumns * p.column_step + p.first_column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int h = h0 + rows[i];
      const T* from = x + ((n * p.H + h) * p.W + w0 + columns[i]) * p.C;
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        const bool inside = all_of(within(h, p.H), within(w0 + columns[i] + j, p.W));
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          loaded[i][j][c] = inside && c < p.C ? from[j * p.C + c] : zero;
      }
    }
  };
  const auto leave = [&] {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int chunk = thread + i * kThreads;
      if (chunk >= p.chunks()) break;
      Chunk both = chunk_of(loaded[i]);
      patch[chunk] = both;
      if constexpr (kPixels == 2)
        if (copy != 0) {
          both.word[2] = both.word[3] = 0;
          patch[chunk + copy] = both;
        }
    }
  };

  const int matrix = lane >> 3;
  const int column = (lane & 7) + 8 * (matrix & 1), odd_a = matrix >> 1;
  const SharedAddress patches = shared_address(patch);
  const SharedAddress filter =
      shared_address(filters) +
      static_cast<SharedAddress>(
          16 * (((lane & 7) + 8 * (matrix >> 1)) * p.filter_chunks() + (matrix & 1)));
  const SharedAddress outputs =
      patches + static_cast<SharedAddress>(16 * (2 * warp * p.stride_h * p.line() + column));
  const SharedAddress next_row = static_cast<SharedAddress>(16 * p.stride_h * p.line());

  const int64_t step = gridDim.x / static_cast<unsigned>(tiles_n);
  int64_t tile = blockIdx.x / static_cast<unsigned>(tiles_n);
  if (tile < p.tiles) load(tile);
  for (; tile < p.tiles; tile += step) {
    __syncthreads();
    leave();
    __syncthreads();
    if (tile + step < p.tiles) load(tile + step);
    Sums<Row> sums[2];
    sums[0].clear(), sums[1].clear();
#pragma unroll 2
    for (int pair = 0; pair < pairs; ++pair) {
      const SharedAddress at = outputs + static_cast<SharedAddress>(16 * places[2 * pair + odd_a]);
      uint32_t a[2][4], b[Row::kGroupsN][4];
      load_matrices(a[0], at);
      load_matrices(a[1], at + next_row);
      if (2 * pair + 1 == terms) a[0][2] = a[0][3] = a[1][2] = a[1][3] = 0;
#pragma unroll
      for (int j = 0; j < Row::kGroupsN; ++j)
        load_matrices(b[j], filter + static_cast<SharedAddress>(
                                         16 * (16 * j * p.filter_chunks() + 2 * pair)));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < Row::kGroupsN; ++j) {
          mma<T>(sums[i].value[0][2 * j], a[i], b[j][0], b[j][1]);
          mma<T>(sums[i].value[0][2 * j + 1], a[i], b[j][2], b[j][3]);
        }
    }
    const int64_t line = tile / p.tiles_q, n = line / p.tiles_p;
    const int p0 = static_cast<int>(line - n * p.tiles_p) * kRows + 2 * warp;
    const int q0 = static_cast<int>(tile - line * p.tiles_q) * kColumns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      leave_sums(sums[i], staged, lane, 0, 0);
      if (lane < kColumns)
        offsets[lane] =
            p0 + i < p.P && q0 + lane < p.Q ? ((n * p.P + p0 + i) * p.Q + q0 + lane) * p.K : -1;
      __syncwarp();
      store_tile<T, Row>(lane, staged, offsets, first_filter, p.K, p.vector_outputs, epilogue);
      __syncwarp();
    }
  }
}

// Two pixels in a chunk: half types, where all outputs' first chunks begin with an even pixel.
bool in_pairs(const ConvProblem& p) {
  return p.dtype != DType::kFloat32 && p.stride_w % 2 == 0 && p.dilation_w == 1;
}

PatchProblem patch_problem(const ConvProblem& p) {
  const int64_t pixels = in_pairs(p) ? 2 : 1;
  PatchProblem g{};
  g.H = static_cast<int>(p.H), g.W = static_cast<int>(p.W), g.C = static_cast<int>(p.C);
  g.K = static_cast<int>(p.K), g.P = static_cast<int>(p.P), g.Q = static_cast<int>(p.Q);
  g.R = static_cast<int>(p.R), g.S = static_cast<int>(p.S);
  g.stride_h = static_cast<int>(p.stride_h);
  g.pad_top = static_cast<int>(p.pad_top);
  g.dilation_h = static_cast<int>(p.dilation_h);
  g.first_column = static_cast<int>(-p.pad_left);
  g.column_step = static_cast<int>(p.stride_w);
  g.tap_chunks = static_cast<int>(ceil_div(p.S, pixels));
  g.tap_step = pixels == 2 ? 1 : static_cast<int>(p.dilation_w);
  g.apart = static_cast<int>(p.stride_w / pixels);
  g.run = kColumns + (g.tap_chunks - 1) * g.tap_step / g.apart;
  g.rows = (kRows - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1;
  g.copy = pixels == 2 && p.S % 2 != 0 ? g.chunks() * 16 : 0;
  g.tiles_p = static_cast<int>(ceil_div(p.P, kRows));
  g.tiles_q = static_cast<int>(ceil_div(p.Q, kColumns));
  g.tiles = p.N * g.tiles_p * g.tiles_q;
  return g;
}

}  // namespace

bool patch_takes(const ConvProblem& p) {
  // Of fewer channels most of a chunk would be zeros.
  if (p.C < 3 || p.C > kChannels || p.groups != 1 || p.flip || p.layout != Layout::kNHWC ||
      p.weight_layout != Layout::kNHWC)
    return false;
  constexpr int64_t kMost = 64;  // a patch of more does not fit
  for (const int64_t size : {p.R, p.S, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w})
    if (size > kMost) return false;
  const PatchProblem g = patch_problem(p);
  return g.chunks() <= kThreads * (in_pairs(p) ? kUnits<2> : kUnits<1>) &&
         shared_bytes(g) <= 112 * 1024;
}

template <typename T>
void run_patch(const ConvProblem& p, const T* x, const T* w, const Epilogue<T>& epilogue,
               const Queue& queue) {
  PatchProblem g = patch_problem(p);
  const auto vectors = [&](const T* to) {
    return to == nullptr || (aligned<T>(to, kLanes<T>) && p.K % kLanes<T> == 0);
  };
  g.vector_outputs = vectors(epilogue.y) && vectors(epilogue.preactivation);
  const int64_t tiles_n = ceil_div(p.K, kFilters);
  const int64_t resident = ceil_div(int64_t{queue.multiprocessors} * kBlocks, tiles_n);
  const dim3 grid(static_cast<unsigned>(std::min(g.tiles, resident) * tiles_n));
  const auto run = [&](auto kernel) {
    launch(kernel, grid, dim3(kThreads), shared_bytes(g), queue, g, x, w, epilogue);
  };
  if constexpr (sizeof(T) == 2)
    if (in_pairs(p)) return run(mma_patch_kernel<T, 2>);
  run(mma_patch_kernel<T, 1>);
}

template void run_patch(const ConvProblem&, const Half*, const Half*, const Epilogue<Half>&,
                        const Queue&);
template void run_patch(const ConvProblem&, const BFloat16*, const BFloat16*,
                        const Epilogue<BFloat16>&, const Queue&);
template void run_patch(const ConvProblem&, const float*, const float*, const Epilogue<float>&,
                        const Queue&);

}  // namespace torchconv::cuda
