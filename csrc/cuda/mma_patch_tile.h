// The patch of an image under a tile of outputs, as mma_patch.h describes it: its sizes, and how a
// block of four warps brings it to shared memory.
#pragma once

#include "core/range.h"
#include "cuda/divmod.h"
#include "cuda/mma_patch.h"
#include "cuda/mma_tile.h"

namespace torchconv::cuda {

inline constexpr int kPatchThreads = 128, kPatchRows = 8, kPatchColumns = 16;  // of outputs
inline constexpr int kPatchChannels = 4;                                       // at most

inline constexpr int64_t kMostPatches = int64_t{1} << 31;  // that a Divisor takes

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
  int copy;          // chunks to the copy whose chunks have one pixel, 0 where there is none
  Divisor tiles_p, tiles_q;
  int64_t tiles;
  int64_t filter_tap, filter_channel;  // steps of the filters in memory, fprop's
  bool vector_outputs;

  __host__ __device__ int line() const { return apart * run; }      // chunks of a row of the patch
  __host__ __device__ int chunks() const { return rows * line(); }  // of the patch
  __host__ __device__ int terms() const { return R * tap_chunks; }  // chunks of an output's sum
  // Chunks of a filter in shared memory: an odd number, so that eight rows meet all banks.
  __host__ __device__ int filter_chunks() const { return (terms() + 1) / 2 * 2 + 1; }
};

// What a thread loads of a patch at most, in chunks.
template <int kPixels>
inline constexpr int kPatchUnits = kPixels == 2 ? 4 : 8;

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
__device__ __forceinline__ Chunk chunk_of(const T (&pixel)[kPixels][kPatchChannels]) {
  Chunk chunk{};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) chunk.word[c] = bits_of(pixel[0][c]);
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int c = 0; c < kPatchChannels; c += 2)
        chunk.word[2 * i + c / 2] = bits_of(pixel[i][c]) | bits_of(pixel[i][c + 1]) << 16;
  }
  return chunk;
}

// A tile's sample, and its first row and column in tiles.
struct PatchCorner {
  int64_t n;
  int row, column;
};
__device__ __forceinline__ PatchCorner corner_of(int64_t tile, const Divisor& rows,
                                                 const Divisor& columns) {
  uint32_t rest = static_cast<uint32_t>(tile);
  const int column = static_cast<int>(columns.split(rest));
  const int row = static_cast<int>(rows.split(rest));
  return {rest, row, column};
}

// Where the chunks of an output's terms are, from that of its first term in its first row.
__device__ __forceinline__ int place_of_term(const PatchProblem& p, int term) {
  const int r = term / p.tap_chunks, u = (term - r * p.tap_chunks) * p.tap_step;
  const int place = r * p.dilation_h * p.line() + u % p.apart * p.run + u / p.apart;
  return u == (p.tap_chunks - 1) * p.tap_step ? place + p.copy : place;
}

// What one thread loads of each patch, and holds until the patch before it is done with: from NHWC,
// or from planes.
template <typename T, int kPixels, bool kPlanes = false>
class PatchLoader {
 public:
  __device__ __forceinline__ PatchLoader(const PatchProblem& p, int thread) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int chunk = thread + i * kPatchThreads, row = chunk / p.line();
      const int at = chunk - row * p.line(), residue = at / p.run;
      places_[i] = row << 16 | ((at - residue * p.run) * p.apart + residue) * kPixels;
    }
  }

  __device__ __forceinline__ void load(const PatchProblem& p, const T* x, int thread,
                                       int64_t tile) {
    const PatchCorner corner = corner_of(tile, p.tiles_p, p.tiles_q);
    const int h0 = corner.row * kPatchRows * p.stride_h - p.pad_top;
    const int w0 = corner.column * kPatchColumns * p.column_step + p.first_column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int h = h0 + (places_[i] >> 16), w = w0 + (places_[i] & 0xFFFF);
      const bool row = all_of(thread + i * kPatchThreads < p.chunks(), within(h, p.H));
      const int64_t plane = int64_t{p.H} * p.W;
      const T* from = x + (kPlanes ? corner.n * p.C * plane + int64_t{h} * p.W + w
                                   : ((corner.n * p.H + h) * p.W + w) * p.C);
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        const bool inside = all_of(row, within(w + j, p.W));
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c)
          loaded_[i][j][c] =
              inside && c < p.C ? from[kPlanes ? c * plane + j : j * p.C + c] : from_wide<T>(0.0f);
      }
    }
  }

  __device__ __forceinline__ void leave(const PatchProblem& p, Chunk* patch, int thread) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int chunk = thread + i * kPatchThreads;
      if (chunk >= p.chunks()) break;
      Chunk both = chunk_of(loaded_[i]);
      patch[chunk] = both;
      if constexpr (kPixels == 2)
        if (p.copy != 0) {
          both.word[2] = both.word[3] = 0;
          patch[chunk + p.copy] = both;
        }
    }
  }

 private:
  static constexpr int kCount = kPatchUnits<kPixels>;
  int places_[kCount];  // of its chunks: row, and column of the first pixel in the lower half
  T loaded_[kCount][kPixels][kPatchChannels];
};

// Two pixels in a chunk: half types, where all outputs' first chunks begin with an even pixel.
inline bool in_pairs(const ConvProblem& p) {
  return p.dtype != DType::kFloat32 && p.stride_w % 2 == 0 && p.dilation_w == 1;
}

inline PatchProblem patch_problem(const ConvProblem& p) {
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
  g.run = kPatchColumns + (g.tap_chunks - 1) * g.tap_step / g.apart;
  g.rows = (kPatchRows - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1;
  g.copy = pixels == 2 && p.S % 2 != 0 ? g.chunks() : 0;
  g.tiles_p = Divisor(ceil_div(p.P, kPatchRows));
  g.tiles_q = Divisor(ceil_div(p.Q, kPatchColumns));
  g.tiles = p.N * g.tiles_p.value() * g.tiles_q.value();
  const bool channels_last = p.weight_layout == Layout::kNHWC;
  g.filter_tap = channels_last ? p.C : 1;
  g.filter_channel = channels_last ? 1 : p.R * p.S;
  return g;
}

// Whether patches of a pass are right for the kernels, in any layout: half types' and floats'
// alike.
inline bool patch_fits(const ConvProblem& p) {
  // Of fewer channels most of a chunk would be zeros.
  if (p.C < 3 || p.C > kPatchChannels || p.groups != 1 || p.flip) return false;
  constexpr int64_t kMost = 64;  // a patch of more does not fit
  for (const int64_t size : {p.R, p.S, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w})
    if (size > kMost) return false;
  const PatchProblem g = patch_problem(p);
  return g.tiles < kMostPatches &&
         g.chunks() <= kPatchThreads * (in_pairs(p) ? kPatchUnits<2> : kPatchUnits<1>);
}

}  // namespace torchconv::cuda
