// Depthwise wgrad of strides 1 and 2 in NHWC on tensor cores, half types.
//
// One product of matrices has all taps of a channel: its rows are pairs (i, s) of a row of x and a
// tap's column, its columns n rows of dz, and it sums over 16 pixels q of a row,
//   D[(i, s)][n] += x[h + i][stride q + s] dz[p + n][q]
// of which D[(i, s)][n] belongs to the tap of row r = i + R - 1 - stride n. D is the same for all
// places of an image, so a warp rolls down the rows of a strip of 16 columns and keeps the D of its
// 16 channels in registers; what lies outside the kernel's rows is thrown away in the end.
//
// A warp works alone: it copies the rows of its strip to its own part of shared memory as they lie
// in memory, one step ahead, those of dz to a ring that keeps the rows which the next step meets
// again. A lane loads eight channels of a pixel at once, and a byte permutation makes of two pixels
// the words of a fragment. Warps' sums meet in shared memory, those of slices, which the shape
// and the kind of device cut, in block_sums.cu.
//
// Padding is zeros in shared memory. A product with it is not to be formed, for dz need not be
// finite; it can only make a sum NaN, so sums that are NaN are computed once more, term by term.
// Bound: the bytes of x and dz.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"
#include "cuda/early_launch.h"
#include "cuda/shared_memory.h"
#include "cuda/tensor_core_of_8.h"

namespace torchconv::cuda {
namespace {

constexpr int kStripWidth = 16, kChannels = 16;  // of a warp
constexpr int kMostWarps = 12;                   // of a block, one on an SM

struct MmaStrips {
  Gather g;                     // fprop's
  int channels, width, pixels;  // of all; outputs of a strip's row, and inputs they meet
  int set_rows;                 // of x
  int set_steps;
  Divisor channel_tiles, parts, sets;   // parts of a row, sets of rows of an image
  uint32_t positions, slice_positions;  // strips of all images; of a slice
};

template <typename T_, int R_, int kStride_>
struct MmaStrip {
  using T = T_;
  static constexpr int R = R_, kStride = kStride_;
  static constexpr int kRows = 16 / R / kStride * kStride;  // of x in a product
  static constexpr int kUsed = kRows * R;                   // rows of the product
  static constexpr int kAdvance = kRows / kStride;  // rows of dz from one product to the next
  static constexpr int kWindowRows = (kRows + R - 2) / kStride + 1;  // that a product meets
  // Products of a step: two where one has few rows, so that enough bytes are under way.
  static constexpr int kProducts = R == 7 || (R == 5 && kStride == 2) ? 2 : 1;
  static constexpr int kStepRows = kProducts * kRows, kStepAdvance = kProducts * kAdvance;
  static constexpr int kAgain = kWindowRows - kAdvance;  // rows of dz that two steps meet
  // Shared memory, in pixels of two vectors. Rows are multiples of four pixels apart, after which
  // the vectors of a pixel change places: few of eight lanes that load at once meet in a bank.
  static constexpr int kPitch = kStride == 2 ? 36 : 24, kRingPitch = 20;
  static constexpr int kProductPixels = (kRows * kPitch + 7) / 8 * 8;
  static constexpr int kStage = kProducts * kProductPixels;
  static constexpr int kRing = 2 * (kAgain + kStepAdvance);
  static constexpr int kPixelBytes = kChannels * static_cast<int>(sizeof(T));
  static constexpr int kRingAt = 2 * kStage * kPixelBytes;
  static constexpr int kWarpBytes = kRingAt + kRing * kRingPitch * kPixelBytes;
  static constexpr int kSumBytes = kChannels * 16 * 8 * static_cast<int>(sizeof(float));
  static_assert(kWindowRows <= 8 && kSumBytes <= kWarpBytes &&
                (kStripWidth - 1) * kStride + R <= kPitch);

  // Where the vector of a pixel's half `chunk` of the channels lies.
  static __device__ __forceinline__ int place(int pixel, int chunk) {
    return pixel * kPixelBytes + ((chunk ^ (pixel >> 2)) & 1) * 16;
  }
  // Of row i of a step's rows of x, its first pixel.
  static constexpr int row_at(int i) { return i / kRows * kProductPixels + i % kRows * kPitch; }
  static __device__ __forceinline__ int wrap(int slot) {
    return slot < kRing ? slot : slot - kRing;
  }
  // A place four pixels further, or rows, which are multiples of four pixels apart.
  static __device__ __forceinline__ int further(int place, int pixels) {
    return (place ^ (pixels / 4 % 2 * 16)) + pixels * kPixelBytes;
  }
  // Row of x at which set number `set` begins; with stride 2 one that the first tap meets.
  static __device__ __forceinline__ int first_row(const MmaStrips& p, int set) {
    return set * p.set_rows - (kStride == 2 ? p.g.h.origin & 1 : 0);
  }
};

struct alignas(16) Words {
  uint32_t word[4];
};

// Sums that are NaN: one tap of a channel over the slice's pixels of dz that have one of x, as far
// as the sum is a number.
template <typename S>
__device__ float sum_of_pixels(const MmaStrips& p, const typename S::T* dz, const typename S::T* x,
                               int64_t c, int r, int s, uint32_t first, uint32_t end) {
  const Gather& g = p.g;
  float total = 0;
  for (uint32_t position = first; position < end; ++position) {
    uint32_t n = position;
    const int q0 = static_cast<int>(p.parts.split(n)) * p.width;
    const int h0 = S::first_row(p, static_cast<int>(p.sets.split(n)));
    for (int h = max(h0, 0); h < min(h0 + p.set_rows, g.h.in); ++h) {
      const int row = h - g.h.origin - r, pr = row / S::kStride;
      if (row < 0 || row % S::kStride != 0 || pr >= g.h.out) continue;
      if (total != total) return total;
      for (int q = q0; q < min(q0 + p.width, g.w.out); ++q) {
        const int w = q * S::kStride + g.w.origin + s;
        if (static_cast<unsigned>(w) >= static_cast<unsigned>(g.w.in)) continue;
        const int64_t image = n;
        total += to_wide(dz[((image * g.h.out + pr) * g.w.out + q) * p.channels + c]) *
                 to_wide(x[((image * g.h.in + h) * g.w.in + w) * p.channels + c]);
      }
    }
  }
  return total;
}

template <typename S>
__global__ void __launch_bounds__(kMostWarps * 32, 1)
    depthwise_mma_wgrad_kernel(const __grid_constant__ MmaStrips p, const typename S::T* dz,
                               const typename S::T* x, const SliceSums<typename S::T> sums) {
  using T = typename S::T;
  constexpr int R = S::R, kStride = S::kStride;
  constexpr int kLoads = (S::kPitch + 15) / 16;  // of a row of x, 16 pixels each
  const Gather& g = p.g;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t warps = blockDim.x / 32;
  unsigned char* const all = dynamic_shared<unsigned char>();
  unsigned char* const mine = all + warp * S::kWarpBytes;

  uint32_t slice = blockIdx.x;
  const int64_t c0 = static_cast<int64_t>(p.channel_tiles.split(slice)) * kChannels;
  // The last images first: dgrad, which came before, has left their dz in the cache.
  slice = gridDim.x / p.channel_tiles.value() - 1 - slice;
  const uint32_t first = slice * p.slice_positions;
  const uint32_t end = min(first + p.slice_positions, p.positions);

  // Columns that no strip loads stay zero.
  for (int i = lane * 16; i < S::kWarpBytes; i += 32 * 16)
    *reinterpret_cast<Words*>(mine + i) = Words{};
  __syncwarp();

  // What the next step loads. A lane has one vector of a pixel in 16.
  const int chunk = lane & 1, pixel = lane >> 1;
  const int64_t c = c0 + chunk * 8;
  const int x_row = g.w.in * p.channels, dz_row = g.w.out * p.channels;
  const SharedAddress memory = shared_address(mine);
  const int place = S::place(pixel, chunk);
  uint32_t position = first + static_cast<uint32_t>(warp);
  int step = 0, stage = 0, slot = 0;  // of its set; of x's two; of the ring
  int h = 0, h_end = 0, row = 0;
  uint32_t columns =
      0;  // bits: which of the lane's pixels of x lie inside, then whether that of dz
  const T *x_from = nullptr, *dz_from = nullptr;
  const auto load_dz = [&] {
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(g.h.out);
    const int to =
        S::kRingAt + slot * (S::kRingPitch * S::kPixelBytes) + (place ^ (slot * 16 & 16));
    if (pixel < p.width)
      copy_async<16>(memory + static_cast<SharedAddress>(to), dz_from,
                     inside && (columns >> kLoads & 1) != 0);
    ++row, dz_from += dz_row, slot = S::wrap(slot + 1);
  };
  // Loads the next step, if there is one, and tells where in the ring its window begins.
  const auto load_step = [&] {
    int window = S::wrap(slot + S::kRing - S::kAgain);
    if (position < end) {
      if (step == 0) {
        uint32_t n = position;
        const int q0 = static_cast<int>(p.parts.split(n)) * p.width;
        h = S::first_row(p, static_cast<int>(p.sets.split(n)));
        h_end = min(h + p.set_rows, g.h.in);
        row = (h - g.h.origin - (R - 1)) / kStride;
        const int w0 = q0 * kStride + g.w.origin + pixel;
        const int64_t image = n;
        x_from = x + ((image * g.h.in + h) * g.w.in + w0) * p.channels + c;
        dz_from = dz + ((image * g.h.out + row) * g.w.out + q0 + pixel) * p.channels + c;
        columns = q0 + pixel < g.w.out ? 1u << kLoads : 0;
#pragma unroll
        for (int b = 0; b < kLoads; ++b)
          if (static_cast<unsigned>(w0 + 16 * b) < static_cast<unsigned>(g.w.in))
            columns |= 1u << b;
        if (c >= p.channels) columns = 0;
        window = slot;
#pragma unroll
        for (int i = 0; i < S::kAgain; ++i) load_dz();
      }
#pragma unroll
      for (int i = 0; i < S::kStepRows; ++i) {
        const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(h_end);
        const SharedAddress to =
            memory + static_cast<SharedAddress>(stage * (S::kStage * S::kPixelBytes) +
                                                S::further(place, S::row_at(i)));
#pragma unroll
        for (int b = 0; b < kLoads; ++b)
          if (pixel + 16 * b < p.pixels)
            copy_async<16>(to + static_cast<SharedAddress>(16 * b * S::kPixelBytes),
                           x_from + 16 * b * p.channels, inside && (columns >> b & 1) != 0);
        ++h, x_from += x_row;
      }
#pragma unroll
      for (int i = 0; i < S::kStepAdvance; ++i) load_dz();
      stage ^= 1;
      if (++step == p.set_steps) step = 0, position += warps;
    }
    copy_async_commit();
    return window;
  };

  // Where the lane's words of the fragments come from: rows g and g + 8 of x's, row g of dz's, and
  // output columns t and t + 4, 8 and 12 for the second half of the sum.
  // Rows beyond the last repeat it.
  const int row_of = lane >> 2, t = lane & 3;
  int a_from[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int of = min(row_of + 8 * m, S::kUsed - 1);
    a_from[m] = S::place(of / R * S::kPitch + of % R + kStride * t, 0);
  }
  float sum[2][8][4] = {};
  const auto multiply = [&](int staged, int window) {
#pragma unroll
    for (int product = 0; product < S::kProducts; ++product) {
      const unsigned char* const inputs =
          mine + (staged * S::kStage + product * S::kProductPixels) * S::kPixelBytes;
      const int of = S::wrap(window + product * S::kAdvance + min(row_of, S::kWindowRows - 1));
      const int b_from = S::kRingAt + S::place(of * S::kRingPitch + t, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          Words a[2][2], b[2];  // of rows, elements
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            b[e] = *reinterpret_cast<const Words*>(mine +
                                                   S::further(b_from ^ 16 * half, 4 * e + 8 * k));
#pragma unroll
            for (int m = 0; m < 2; ++m)
              a[m][e] = *reinterpret_cast<const Words*>(
                  inputs + S::further(a_from[m] ^ 16 * half, kStride * (4 * e + 8 * k)));
          }
#pragma unroll
          for (int v = 0; v < 8; ++v) {
            const auto both = [&](const Words(&pair)[2]) {
              return __byte_perm(pair[0].word[v / 2], pair[1].word[v / 2],
                                 v % 2 == 0 ? 0x5410 : 0x7632);
            };
            mma_of_8<T>(sum[half][v], both(a[0]), both(a[1]), both(b));
          }
        }
    }
    __syncwarp();
  };

  if (position < end) {
    const int of_warp = static_cast<int>((end - 1 - position) / warps + 1) * p.set_steps;
    int window = load_step(), staged = 0;
#pragma unroll 1
    for (int i = 0; i < of_warp; ++i) {
      const int next = load_step();
      copy_async_wait<1>();
      __syncwarp();
      multiply(staged, window);
      window = next, staged ^= 1;
    }
  }
  copy_async_wait<0>();
  __syncwarp();

  let_next_start();
  // [kChannels][16][8] of each warp
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
#pragma unroll
    for (int m = 0; m < 2; ++m)
      *reinterpret_cast<float2*>(mine + ((i * 16 + row_of + 8 * m) * 8 + 2 * t) * 4) =
          make_float2(sum[i / 8][i % 8][2 * m], sum[i / 8][i % 8][2 * m + 1]);
  __syncthreads();
  constexpr int kTaps = R * R;
  const int channels = static_cast<int>(min(static_cast<int64_t>(kChannels), p.channels - c0));
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < channels * kTaps;
       i += static_cast<int>(blockDim.x)) {
    const int of = i / kTaps, tap = i % kTaps, r = tap / R, s = tap % R;
    float total = 0;
    for (uint32_t each = 0; each < warps; ++each) {
      const float* const products =
          reinterpret_cast<const float*>(all + each * S::kWarpBytes) + (of * 16 + s) * 8;
#pragma unroll
      for (int j = 0; j < S::kRows; ++j) {
        const int below = j + R - 1 - r;
        if (below >= 0 && below % kStride == 0 && below / kStride < S::kWindowRows)
          total += products[j * R * 8 + below / kStride];
      }
    }
    if (total != total) total = sum_of_pixels<S>(p, dz, x, c0 + of, r, s, first, end);
    sums.store(slice, (c0 + of) * kTaps + (g.turned ? kTaps - 1 - tap : tap), total);
  }
}

// A strip, one of `strips` of the batch for each tile of channels, is cut into sets of set_steps
// steps. A warp takes `each` sets, a block `warps` times as many, which is a slice.
struct StripsPlan {
  int64_t sets, set_steps, each, warps, slices;
};

// The slices of all tiles are at most as many blocks as fill a large device, but a warp takes at
// most so many steps that truncation of its sums does not show.
template <typename S>
StripsPlan plan_strips(int64_t strips, int64_t steps, int64_t tiles, int64_t most_warps) {
  constexpr int64_t kMostSteps = 128, kBlocks = 132;
  const int64_t most_slices = std::max<int64_t>(kBlocks / tiles, 1);
  StripsPlan best{};
  int64_t least = 0;
  for (int64_t sets = ceil_div(steps, kMostSteps); sets <= steps; ++sets) {
    const int64_t set_steps = ceil_div(steps, sets);
    if (ceil_div(steps, set_steps) != sets) continue;
    const int64_t share = ceil_div(strips * sets, most_slices);
    const int64_t rounds = ceil_div(share, most_warps);
    // In rows that a warp loads, of both images.
    const int64_t cost = rounds * (set_steps * (S::kStepRows + S::kStepAdvance) + S::kAgain);
    if (least != 0 && cost >= least) continue;
    least = cost;
    const int64_t each = std::min(rounds, std::max<int64_t>(kMostSteps / set_steps, 1));
    const int64_t warps = std::min(ceil_div(share, each), most_warps);
    best = {sets, set_steps, each, warps, ceil_div(strips * sets, warps * each)};
  }
  return best;
}

template <typename S>
void launch_mma_wgrad(const Gather& g, const void* dz, const void* x, void* dw,
                      const Queue& queue) {
  using T = typename S::T;
  MmaStrips p{};
  p.g = g;
  p.channels = g.groups;
  const int64_t tiles = ceil_div(p.channels, kChannels), parts = ceil_div(g.w.out, kStripWidth);
  p.width = static_cast<int>(ceil_div(g.w.out, parts));
  p.pixels = (p.width - 1) * S::kStride + S::R;
  const int64_t steps =
      ceil_div(g.h.in + (S::kStride == 2 ? g.h.origin & 1 : 0), static_cast<int64_t>(S::kStepRows));
  const int64_t most_warps =
      queue.capability < 90
          ? 4
          : std::min<int64_t>(kMostWarps, shared_of_block(queue.capability) / S::kWarpBytes);
  const StripsPlan plan = plan_strips<S>(g.N * parts, steps, tiles, most_warps);
  const int64_t slices = plan.slices, warps = plan.warps;
  p.set_steps = static_cast<int>(plan.set_steps);
  p.set_rows = static_cast<int>(plan.set_steps * S::kStepRows);
  p.sets = Divisor(plan.sets);
  p.positions = static_cast<uint32_t>(g.N * parts * plan.sets);
  p.slice_positions = static_cast<uint32_t>(warps * plan.each);
  p.channel_tiles = Divisor(tiles), p.parts = Divisor(parts);
  const SliceSums<T> sums =
      slice_sums(static_cast<T*>(dw), slices, static_cast<int64_t>(g.groups) * g.w_group, queue);
  launch(depthwise_mma_wgrad_kernel<S>, dim3(static_cast<unsigned>(tiles * slices)),
         dim3(static_cast<unsigned>(warps * 32)), static_cast<int>(warps * S::kWarpBytes), queue, p,
         static_cast<const T*>(dz), static_cast<const T*>(x), sums);
  add_slices(sums, slices, queue);
}

}  // namespace

bool depthwise_mma_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* dz,
                         const void* x, void* dw, const Queue& queue) {
  // Small planes of 3x3 fill too little of a strip: kernels without tensor cores are faster there.
  if (R == 3 && static_cast<int64_t>(g.h.out) * g.w.out < 100) return false;
  if (queue.capability < 80 || g.out_channels != 1 || g.groups % 8 != 0 || g.N == 0 ||
      static_cast<int64_t>(std::max({g.w.in, g.w.out, 48})) * g.groups >= int64_t{1} << 30 ||
      g.h.out == 0 || g.w.out == 0 ||
      (sampling != Sampling::kUnit && sampling != Sampling::kStride2))
    return false;
  const auto compute = [&](auto element) {
    using T = decltype(element);
    if (!aligned<T>(dz, 8) || !aligned<T>(x, 8)) return false;
    const auto run = [&](auto strip) {
      launch_mma_wgrad<decltype(strip)>(g, dz, x, dw, queue);
      return true;
    };
    if (sampling == Sampling::kStride2)
      return R == 5 ? run(MmaStrip<T, 5, 2>{}) : run(MmaStrip<T, 3, 2>{});
    return R == 7 ? run(MmaStrip<T, 7, 1>{}) : R == 5 && run(MmaStrip<T, 5, 1>{});
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
