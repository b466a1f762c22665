// Exact wgrad on CUDA cores: filters of a group by (channel, tap), over pixels of z, in the tiles
// of simt_tile.h. Of the image's panel a column is a channel and a tap, a term is a pixel: both
// have an address and a place, whose sums name an element of x, or the padding. A block owns a tile
// and a slice of the pixels; slices are fixed by the shape, their sums go to memory, and a second
// kernel adds them up in double. Bound by the FMA units.
#include <algorithm>

#include "core/range.h"
#include "cuda/conv_passes.h"
#include "cuda/simt_direct.h"
#include "cuda/simt_masked.h"
#include "cuda/simt_tile.h"
#include "cuda/simt_view.h"

namespace torchconv::cuda {
namespace {

template <typename T>
struct Wgrad {
  SimtStrides x, z;
  const T *image, *gradient;
  int64_t pixels;
  int64_t chunks_a_slice;
  int P, Q, H, W;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int M, C, columns, width;  // of a group: filters, channels, C*R*S, that in whole quads
  TermOrder order;           // of the columns
  unsigned m_tiles, n_tiles, groups;
  Wide<T>* slices;    // [slice][group][filter][width]
  const int* wanted;  // where not null, whether anything is
};

// The n, i, j of a pixel.
template <typename T>
__device__ __forceinline__ void split_pixel(const Wgrad<T>& p, int64_t pixel, int64_t& n, int& i,
                                            int& j) {
  int64_t line;
  if (p.pixels <= 0x7fffffff) {
    line = static_cast<uint32_t>(pixel) / static_cast<uint32_t>(p.Q);
    n = static_cast<uint32_t>(line) / static_cast<uint32_t>(p.P);
  } else {
    line = pixel / p.Q;
    n = line / p.P;
  }
  j = static_cast<int>(pixel - line * p.Q);
  i = static_cast<int>(line - n * p.P);
}

// kQuads: channels are neighbours in memory and are fetched by four. Else a thread keeps to one
// pixel of the eight, its neighbours to the next ones.
template <typename T, typename Tile, bool kQuads>
class WgradLoader {
  using Quad = typename Tile::Quad;
  using Loaded = Vector<T, kQuads ? 4 : 1>;
  static constexpr int kThreads = Tile::kThreads, kTerms = Tile::kTerms;
  static constexpr int kEach = kQuads ? 4 : 1;
  static constexpr int kLoadsM = Tile::kM * kTerms / kThreads / kEach;
  static constexpr int kLoadsN = Tile::kN * kTerms / kThreads / kEach;
  static_assert(kLoadsM > 0 && kLoadsN > 0);

 public:
  // Where the pixels of a chunk are in z, in bytes.
  using Offsets = int64_t[Tile::kChunk];

  __device__ __forceinline__ WgradLoader(const Wgrad<T>& p, Offsets& offsets,
                                         Reach (&columns)[Tile::kN], int group, int first_m,
                                         int first_n)
      : p_(p), offsets_(offsets), columns_(columns) {
    gradient_ =
        reinterpret_cast<const char*>(p.gradient + (int64_t{group} * p.M + first_m) * p.z.c);
    image_ = reinterpret_cast<const char*>(p.image + int64_t{group} * p.C * p.x.c);
    rows_ = p.M - first_m;
    for (int i = threadIdx.x; i < Tile::kN; i += kThreads) {
      Reach reach{0, {kNowhere, kNowhere}};
      if (first_n + i < p.columns) {
        int c, r, s;
        p.order.split(static_cast<uint32_t>(first_n + i), c, r, s);
        reach.at = {r * p.dilation_h, s * p.dilation_w};
        reach.bytes = (c * p.x.c + reach.at.h * p.x.row + reach.at.w * p.x.column) *
                      static_cast<int64_t>(sizeof(T));
      }
      columns[i] = reach;
    }
  }

  __device__ __forceinline__ int begin(typename Tile::Shared& shared, int chunk) {
    const int64_t first = (blockIdx.y * p_.chunks_a_slice + chunk) * Tile::kChunk;
    const int count = static_cast<int>(min(int64_t{Tile::kChunk}, p_.pixels - first));
    for (int k = threadIdx.x; k < Tile::kChunk; k += kThreads) {
      Reach reach{0, {kNowhere, kNowhere}};
      int64_t offset = -1;
      if (k < count) {
        int64_t n;
        int i, j;
        split_pixel(p_, first + k, n, i, j);
        reach.at = {i * p_.stride_h - p_.pad_top, j * p_.stride_w - p_.pad_left};
        reach.bytes = (n * p_.x.n + reach.at.h * p_.x.row + reach.at.w * p_.x.column) *
                      static_cast<int64_t>(sizeof(T));
        offset = (n * p_.z.n + i * p_.z.row + j * p_.z.column) * static_cast<int64_t>(sizeof(T));
      }
      shared.reach[k] = reach;
      offsets_[k] = offset;
    }
    return count;
  }

  __device__ __forceinline__ void load(const typename Tile::Shared& shared, int step) {
#pragma unroll
    for (int l = 0; l < kLoadsM; ++l) {
      const int64_t offset = offsets_[step * kTerms + term_of<Tile::kM>(l)];
      const int m = place_of<Tile::kM>(l);
      gradients_[l] = {};
      if (offset >= 0 && m < rows_)
        gradients_[l] = *reinterpret_cast<const Loaded*>(
            gradient_ + (offset + m * p_.z.c * static_cast<int64_t>(sizeof(T))));
    }
#pragma unroll
    for (int l = 0; l < kLoadsN; ++l) {
      const Reach pixel = shared.reach[step * kTerms + term_of<Tile::kN>(l)];
      const Reach column = columns_[place_of<Tile::kN>(l)];
      Loaded value = {};
      if (static_cast<unsigned>(pixel.at.h + column.at.h) < static_cast<unsigned>(p_.H) &&
          static_cast<unsigned>(pixel.at.w + column.at.w) < static_cast<unsigned>(p_.W))
        value = *reinterpret_cast<const Loaded*>(image_ + (pixel.bytes + column.bytes));
      pixels_[l] = value;
    }
  }

  __device__ __forceinline__ void store(typename Tile::Shared& shared, int buffer) {
#pragma unroll
    for (int l = 0; l < kLoadsM; ++l)
      put(&shared.a[buffer][term_of<Tile::kM>(l)][place_of<Tile::kM>(l)], gradients_[l]);
#pragma unroll
    for (int l = 0; l < kLoadsN; ++l)
      put(&shared.b[buffer][term_of<Tile::kN>(l)][place_of<Tile::kN>(l)], pixels_[l]);
  }

 private:
  template <int kSize>
  static __device__ __forceinline__ int term_of(int l) {
    return kQuads ? (threadIdx.x + l * kThreads) / (kSize / 4) : threadIdx.x % kTerms;
  }
  template <int kSize>
  static __device__ __forceinline__ int place_of(int l) {
    return kQuads ? (threadIdx.x + l * kThreads) % (kSize / 4) * 4
                  : threadIdx.x / kTerms + l * (kThreads / kTerms);
  }
  static __device__ __forceinline__ void put(Wide<T>* target, const Loaded& v) {
    if constexpr (kQuads) {
      *reinterpret_cast<Quad*>(target) = {{to_wide(v.element[0]), to_wide(v.element[1]),
                                           to_wide(v.element[2]), to_wide(v.element[3])}};
    } else {
      *target = to_wide(v.element[0]);
    }
  }

  const Wgrad<T>& p_;
  Offsets& offsets_;
  Reach (&columns_)[Tile::kN];
  const char *gradient_, *image_;
  int rows_;
  Loaded gradients_[kLoadsM], pixels_[kLoadsN];
};

// Whether quads are shared evenly by the threads that fetch them.
template <typename Tile>
inline constexpr bool kFetchesQuads = Tile::kN * Tile::kTerms / 4 % Tile::kThreads == 0;

template <typename T, typename Tile, bool kQuads>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    simt_wgrad_slices(const __grid_constant__ Wgrad<T> p) {
  if (p.wanted != nullptr && *p.wanted == 0) return;
  __shared__ int64_t offsets[Tile::kChunk];
  __shared__ Reach columns[Tile::kN];
  __shared__ SimtChunks chunks;
  auto& shared = *dynamic_shared<typename Tile::Shared>();
  const int first_m = static_cast<int>(blockIdx.x % p.m_tiles) * Tile::kM;
  const unsigned rest = blockIdx.x / p.m_tiles;
  const int first_n = static_cast<int>(rest % p.n_tiles) * Tile::kN;
  const int group = static_cast<int>(rest / p.n_tiles);
  if (threadIdx.x == 0) {
    const int64_t all = (p.pixels + Tile::kChunk - 1) / Tile::kChunk;
    chunks = {0, static_cast<int>(min(p.chunks_a_slice, all - blockIdx.y * p.chunks_a_slice)), -1};
  }
  WgradLoader<T, Tile, kQuads> loader(p, offsets, columns, group, first_m, first_n);
  __syncthreads();
  typename Tile::Sums sums;
  Tile::template run<false>(shared, loader, chunks, sums, [](int) {});
  Wide<T>* target = p.slices + (int64_t{blockIdx.y} * p.groups + group) * p.M * p.width + first_n;
  typename Tile::Quad* own = &shared.sums[0][threadIdx.x];
  sums.save(own);
#pragma unroll 1
  for (int slot = 0; slot < Tile::kSlots; ++slot) {
    const int m = first_m + Tile::slot_m(slot, false), n = Tile::slot_n(slot, false);
    if (m < p.M && first_n + n < p.width)
      *reinterpret_cast<typename Tile::Quad*>(target + int64_t{m} * p.width + n) =
          Tile::saved(own, slot, false);
  }
}

struct WgradSum {
  int64_t slice_size, outputs;  // of all groups, without and with M * width in place of M * columns
  int64_t k, c, r, s;           // strides of dw
  int slices, R, S, columns, width;
  bool flip;
  TermOrder order;
  const int* wanted;
};

// 32 weights a block, and eight threads for each, which take every eighth slice.
template <typename T>
__global__ void __launch_bounds__(256)
    simt_wgrad_sum(const __grid_constant__ WgradSum p, const Wide<T>* slices, T* dw) {
  __shared__ double sums[8][32];
  if (p.wanted != nullptr && *p.wanted == 0) return;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t at = int64_t{blockIdx.x} * 32 + lane;
  double sum = 0;
  if (at < p.outputs) {
    const int64_t filter = at / p.columns;
    const int64_t source = filter * p.width + (at - filter * p.columns);
#pragma unroll 4
    for (int slice = part; slice < p.slices; slice += 8)
      sum += static_cast<double>(slices[slice * p.slice_size + source]);
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || at >= p.outputs) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  const int64_t filter = at / p.columns;
  int c, r, s;
  p.order.split(static_cast<uint32_t>(at - filter * p.columns), c, r, s);
  if (p.flip) r = p.R - 1 - r, s = p.S - 1 - s;
  dw[filter * p.k + c * p.c + r * p.r + s * p.s] = from_wide<T>(static_cast<Wide<T>>(sum));
}

// The chunks of a slice with which a large device, whichever this one is, ends soonest: its
// multiprocessor with the most blocks, which needs eight warps to hide latencies, and the slices'
// sums that are written and read. No slice is so long that its chunks' sums lose accuracy. In units
// of a tile's chunk on a multiprocessor, which takes so long as the device moves kBytes.
template <typename Tile>
int64_t chunks_a_slice(int64_t tiles, int64_t chunks, int64_t slice_bytes) {
  constexpr int64_t kMultiprocessors = 132, kMostChunks = 256, kMostSlices = 65535;
  constexpr double kBytes = 4000.0 * Tile::kM * Tile::kN;
  // More chunks than kMostChunks only where slices of those would be more than a grid has.
  const int64_t fewest = std::max<int64_t>(ceil_div(chunks, kMostSlices), 1);
  const int64_t most = std::max(std::min(chunks, kMostChunks), fewest);
  int64_t best = 0;
  double least = 0;
  for (int64_t each = fewest; each <= most; ++each) {
    const int64_t slices = ceil_div(chunks, each);
    const int64_t blocks = ceil_div(tiles * slices, kMultiprocessors);
    const int64_t warps = std::min<int64_t>(blocks, Tile::kBlocks) * Tile::kThreads / 32;
    const double cost = static_cast<double>(blocks) * (static_cast<double>(each) + 0.2) /
                            std::min(1.0, 0.5 + static_cast<double>(warps) / 16) +
                        2.0 * static_cast<double>(slices * slice_bytes) / kBytes;
    if (best == 0 || cost < least) best = each, least = cost;
  }
  return best;
}

template <typename T, typename Tile>
void run(const ConvProblem& p, Wgrad<T>& q, bool quads, T* dw, const Queue& queue) {
  q.m_tiles = static_cast<unsigned>(ceil_div(q.M, Tile::kM));
  q.n_tiles = static_cast<unsigned>(ceil_div(q.columns, Tile::kN));
  const int64_t tiles = int64_t{q.m_tiles} * q.n_tiles * q.groups;
  const int64_t chunks = ceil_div(q.pixels, Tile::kChunk);
  WgradSum sum{};
  sum.slice_size = p.K * q.width;
  sum.outputs = p.K * q.columns;
  q.chunks_a_slice =
      chunks_a_slice<Tile>(tiles, chunks, sum.slice_size * static_cast<int64_t>(sizeof(Wide<T>)));
  const int64_t slices = std::max<int64_t>(ceil_div(chunks, q.chunks_a_slice), 1);
  q.slices = queue.scratch<Wide<T>>(slices * sum.slice_size);
  auto kernel = simt_wgrad_slices<T, Tile, false>;
  if constexpr (kFetchesQuads<Tile>)
    if (quads) kernel = simt_wgrad_slices<T, Tile, true>;
  launch(kernel, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(slices)), Tile::kThreads,
         static_cast<int>(sizeof(typename Tile::Shared)), queue, q);
  const SimtWeightStrides w = weight_strides(p);
  sum.k = w.k, sum.c = w.c, sum.r = w.r, sum.s = w.s;
  sum.slices = static_cast<int>(slices);
  sum.R = static_cast<int>(p.R), sum.S = static_cast<int>(p.S);
  sum.columns = q.columns, sum.width = q.width;
  sum.flip = p.flip;
  sum.order = q.order;
  sum.wanted = q.wanted;
  launch(simt_wgrad_sum<T>, dim3(static_cast<unsigned>(ceil_div(sum.outputs, 32))), 256, 0, queue,
         sum, q.slices, dw);
}

template <typename T>
void wgrad(const ConvProblem& p, const T* dz, const T* x, T* dw, const Queue& queue,
           const int* wanted = nullptr) {
  Wgrad<T> q{};
  q.wanted = wanted;
  q.x = image_strides(p.layout, p.C, p.H, p.W);
  q.z = image_strides(p.layout, p.K, p.P, p.Q);
  q.image = x, q.gradient = dz;
  q.pixels = p.N * p.P * p.Q;
  q.P = static_cast<int>(p.P), q.Q = static_cast<int>(p.Q);
  q.H = static_cast<int>(p.H), q.W = static_cast<int>(p.W);
  q.stride_h = p.P > 1 ? static_cast<int>(p.stride_h) : 0;
  q.stride_w = p.Q > 1 ? static_cast<int>(p.stride_w) : 0;
  q.pad_top = static_cast<int>(p.pad_top), q.pad_left = static_cast<int>(p.pad_left);
  q.dilation_h = p.R > 1 ? static_cast<int>(p.dilation_h) : 0;
  q.dilation_w = p.S > 1 ? static_cast<int>(p.dilation_w) : 0;
  q.groups = static_cast<unsigned>(p.groups);
  q.M = static_cast<int>(p.K / p.groups), q.C = static_cast<int>(p.C / p.groups);
  q.columns = static_cast<int>(q.C * p.R * p.S);
  q.width = (q.columns + 3) / 4 * 4;
  const bool channels_last = p.layout == Layout::kNHWC;
  q.order = {channels_last ? static_cast<uint32_t>(q.C) : 1, static_cast<uint32_t>(p.R * p.S),
             static_cast<uint32_t>(p.S)};
  const bool quads =
      channels_last && q.C % 4 == 0 && q.M % 4 == 0 && aligned<T>(x, 4) && aligned<T>(dz, 4);
  if constexpr (std::is_same_v<T, float>) {
    // By the weights that a tile has and the problem has not, and the share of FMAs in its threads.
    // The wide tile is for the 147 of a stem of 7x7 taps.
    const auto cost = [&](int64_t m, int64_t n, double share) {
      return static_cast<double>(ceil_div(q.M, m) * m * ceil_div(q.columns, n) * n) / share;
    };
    const double large = cost(128, 128, 0.75), medium = cost(64, 128, 0.7);
    const double small = cost(64, 64, 0.6), wide = quads ? large : cost(64, 160, 0.7);
    if (large <= std::min(medium, small) && large_tiles_fit(queue))
      return run<T, SimtTile<float, 128, 128, 8, 8, 2>>(p, q, quads, dw, queue);
    if (wide < std::min(medium, small) && large_tiles_fit(queue))
      return run<T, SimtTile<float, 64, 160, 4, 20, 3>>(p, q, quads, dw, queue);
    if (medium <= small) return run<T, SimtTile<float, 64, 128, 8, 8, 3>>(p, q, quads, dw, queue);
  }
  run<T, SimtTile<Wide<T>, 64, 64, 8, 4, std::is_same_v<T, double> ? 2 : 4>>(p, q, quads, dw,
                                                                             queue);
}

}  // namespace

void simt_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue) {
  const int64_t M = p.K / p.groups, C = p.C / p.groups;
  if (p.K * C == 0) return;
  // A tile has 4096 weights.
  if (!simt_fits(p) || M * C * p.R * p.S <= 64) return simt_direct_wgrad(p, dz, x, dw, queue);
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    wgrad<T>(p, static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dw), queue);
  });
}

void simt_wgrad_if(const int* wanted, const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue) {
  wgrad<float>(p, static_cast<const float*>(dz), static_cast<const float*>(x),
               static_cast<float*>(dw), queue, wanted);
}

}  // namespace torchconv::cuda
