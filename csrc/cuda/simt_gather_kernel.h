// The gather of simt_view.h as an implicit matrix product on CUDA cores: M target channels of a
// group by pixels of the target (all samples in a row), over terms (channel, tap). A block owns a
// tile of both; the panel of pixels is gathered from the image term by term, and what a term adds
// to a pixel's address and place comes from a table in shared memory, filled once a chunk: any
// stride, dilation, padding and layout costs the same. Bound by the FMA units.
//
// Few tiles are split along the terms: then every chunk's sums go to memory, and simt_gather_finish
// adds them in the order in which one block would have, so that no split changes a bit.
#pragma once

#include "cuda/activation.h"
#include "cuda/divmod.h"
#include "cuda/simt_tile.h"
#include "cuda/simt_view.h"
#include "cuda/simt_weights.h"

namespace torchconv::cuda {

// Whether `samples` may be given.
template <typename T>
inline constexpr bool kMaskable = std::is_same_v<T, float>;

template <typename T>
struct SimtGather {
  SimtView view;
  const T* source;
  SimtPacked<Wide<T>> weights;
  uint32_t channels;  // of a block of terms
  unsigned m_tiles, n_tiles;
  Epilogue<T> epilogue;
  Divisor plane;        // pixels of a plane, where the target is dense and has less than 2^31
  bool dense;           // pixels
  bool along_m;         // channels of the target are neighbours in memory
  bool store_quads;     // so are four pixels, or channels, and aligned
  int chunks_a_slice;   // of what a block adds up; all where the tiles are not split
  int most_chunks;      // of a phase
  Wide<T>* chunk_sums;  // of split tiles, else null
  const int* samples;   // where not null, those to compute are not zero: of a dense target alone

  __device__ __forceinline__ bool leaves(int64_t pixel) const {
    if (samples == nullptr) return false;
    uint32_t sample = static_cast<uint32_t>(pixel);
    plane.split(sample);
    return samples[sample] == 0;
  }
};

// What a block computes.
struct SimtPlace {
  int64_t first_pixel, pixels;
  int row_phase, column_phase, group, first_m;
  SimtChunks chunks;
};

// The place stands in shared memory, as a thread of the large tile has no register for it.
template <typename T, typename Tile>
struct SimtGatherBlock {
  const SimtGather<T>& p;
  const SimtPlace& at;

  // All threads come here. False for a block that the largest phase has and this one has not, and
  // with kMasked for one of samples to leave out.
  template <bool kMasked>
  static __device__ __forceinline__ bool find(const SimtGather<T>& p, SimtPlace& at) {
    if (threadIdx.x == 0) {
      unsigned rest = blockIdx.x;
      at.first_m = static_cast<int>(rest % p.m_tiles) * Tile::kM;
      rest /= p.m_tiles;
      at.first_pixel = int64_t{rest % p.n_tiles} * Tile::kN;
      rest /= p.n_tiles;
      at.group = static_cast<int>(rest % static_cast<unsigned>(p.view.groups));
      rest /= static_cast<unsigned>(p.view.groups);
      at.column_phase = static_cast<int>(rest % p.view.columns.phases);
      at.row_phase = static_cast<int>(rest / p.view.columns.phases);
      at.pixels = p.view.N * p.view.rows.phase[at.row_phase].grid *
                  p.view.columns.phase[at.column_phase].grid;
      at.chunks.first = static_cast<int>(blockIdx.y) * p.chunks_a_slice;
      at.chunks.current = at.chunks.first - 1;
      at.chunks.last = min(at.chunks.first + p.chunks_a_slice, SimtGatherBlock{p, at}.all_chunks());
      if (kMasked && p.samples != nullptr && none_wanted(p, at)) at.pixels = 0;
    }
    __syncthreads();
    return at.first_pixel < at.pixels;
  }

  static __device__ __forceinline__ bool none_wanted(const SimtGather<T>& p, const SimtPlace& at) {
    uint32_t sample = static_cast<uint32_t>(at.first_pixel);
    uint32_t last = static_cast<uint32_t>(min(at.first_pixel + Tile::kN, at.pixels) - 1);
    p.plane.split(sample), p.plane.split(last);
    for (; sample <= last; ++sample)
      if (p.samples[sample] != 0) return false;
    return true;
  }

  __device__ __forceinline__ const SimtPhase& row() const {
    return p.view.rows.phase[at.row_phase];
  }
  __device__ __forceinline__ const SimtPhase& column() const {
    return p.view.columns.phase[at.column_phase];
  }
  __device__ __forceinline__ int taps() const { return row().taps * column().taps; }
  __device__ __forceinline__ int terms() const { return taps() * static_cast<int>(p.view.C); }
  __device__ __forceinline__ int all_chunks() const {
    return (terms() + Tile::kChunk - 1) / Tile::kChunk;
  }

  // The sample, row and column of the grid of a pixel.
  __device__ __forceinline__ void split(int64_t pixel, int64_t& n, int& i, int& j) const {
    const int64_t plane = int64_t{row().grid} * column().grid;
    int64_t line;
    if (at.pixels <= 0x7fffffff) {
      n = static_cast<uint32_t>(pixel) / static_cast<uint32_t>(plane);
    } else {
      n = pixel / plane;
    }
    line = pixel - n * plane;
    if (plane <= 0x7fffffff) {
      i = static_cast<int>(static_cast<uint32_t>(line) / static_cast<uint32_t>(column().grid));
    } else {
      i = static_cast<int>(line / column().grid);
    }
    j = static_cast<int>(line - int64_t{i} * column().grid);
  }

  // In elements; of channel 0.
  __device__ __forceinline__ int64_t target_offset(int64_t pixel) const {
    const SimtStrides& t = p.view.target;
    if (p.dense) {
      uint32_t sample = static_cast<uint32_t>(pixel);
      const int64_t line = p.plane.split(sample);
      return sample * t.n + line * t.column;
    }
    int64_t n;
    int i, j;
    split(pixel, n, i, j);
    return n * t.n + (row().target + int64_t{i} * p.view.rows.target_step) * t.row +
           (column().target + int64_t{j} * p.view.columns.target_step) * t.column;
  }

  // Four sums of neighbouring pixels, or channels, become elements of the target. kMasked: there
  // may be samples to leave out.
  template <bool kMasked>
  __device__ __forceinline__ void store(int slot, const typename Tile::Quad& sums) const {
    const int m = at.first_m + Tile::slot_m(slot, p.along_m);
    const int64_t pixel = at.first_pixel + Tile::slot_n(slot, p.along_m);
    if (m >= p.view.M || pixel >= at.pixels) return;
    const int64_t channel = at.group * p.view.M + m;
    const Epilogue<T>& e = p.epilogue;
    const int64_t offset = target_offset(pixel) + channel * p.view.target.c;
    if (p.store_quads) {
      if (kMasked && p.leaves(pixel)) return;
      Vector<T, 4> z, y, residual{};
      if (e.residual != nullptr)
        residual = *reinterpret_cast<const Vector<T, 4>*>(e.residual + offset);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        Wide<T> sum = sums.element[q] + e.bias_of(channel + (p.along_m ? q : 0));
        if (e.residual != nullptr) sum += to_wide(residual.element[q]);
        z.element[q] = from_wide<T>(sum);
        y.element[q] = from_wide<T>(activate(e.activation, sum));
      }
      if (e.preactivation != nullptr)
        *reinterpret_cast<Vector<T, 4>*>(e.preactivation + offset) = z;
      *reinterpret_cast<Vector<T, 4>*>(e.y + offset) = y;
      return;
    }
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      // A register array has no index at run time.
      const Wide<T> sum = q < 2 ? (q == 0 ? sums.element[0] : sums.element[1])
                                : (q == 2 ? sums.element[2] : sums.element[3]);
      if (p.along_m) {
        if (m + q < p.view.M && !(kMasked && p.leaves(pixel)))
          e.store(sum + e.bias_of(channel + q), offset + q);
      } else if (pixel + q < at.pixels && !(kMasked && p.leaves(pixel + q))) {
        e.store(sum + e.bias_of(channel), target_offset(pixel + q) + channel * p.view.target.c);
      }
    }
  }
};

// Fetches the panels. A thread gathers always the same pixels: one pixel's term after term, or with
// kQuads four channels of each of its pixels at once.
template <typename T, typename Tile, bool kQuads>
class SimtGatherLoader {
  using W = Wide<T>;
  using Quad = typename Tile::Quad;
  static constexpr int kThreads = Tile::kThreads, kTerms = Tile::kTerms;
  static constexpr int kWeightThreads = Tile::kM * kTerms / 4;
  static constexpr int kPixels = kQuads ? Tile::kN * 2 / kThreads : 1;
  static constexpr int kLoads = kQuads ? 1 : Tile::kN * kTerms / kThreads;  // of a pixel
  static_assert((kQuads || kThreads % Tile::kN == 0) && kWeightThreads <= kThreads);

 public:
  __device__ __forceinline__ SimtGatherLoader(const SimtGatherBlock<T, Tile>& block,
                                              typename Tile::Shared& shared)
      : block_(block) {
    const SimtGather<T>& p = block.p;
    const SimtStrides& s = p.view.source;
    weights_ = p.weights.terms(block.at.group, block.at.row_phase, block.at.column_phase) +
               static_cast<uint32_t>(block.at.chunks.first * Tile::kChunk + weight_term()) *
                   p.weights.width +
               static_cast<uint32_t>(block.at.first_m + weight_m());
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const int64_t pixel = block.at.first_pixel + pixel_of(k);
      ImagePoint point{kNowhere, kNowhere};
      origin_[k] = nullptr;
      if (pixel < block.at.pixels) {
        int64_t n;
        int i, j;
        block.split(pixel, n, i, j);
        point = {i * p.view.rows.step, j * p.view.columns.step};
        origin_[k] =
            reinterpret_cast<const char*>(p.source + n * s.n + block.at.group * p.view.C * s.c +
                                          point.h * s.row + point.w * s.column);
      }
      shared.column[pixel_of(k)] = point;
    }
  }

  __device__ __forceinline__ int begin(typename Tile::Shared& shared, int chunk) {
    const SimtGather<T>& p = block_.p;
    const int count = min(Tile::kChunk, block_.terms() - chunk * Tile::kChunk);
    const TermOrder order{p.channels, static_cast<uint32_t>(block_.taps()),
                          static_cast<uint32_t>(block_.column().taps)};
    for (int i = threadIdx.x; i < Tile::kChunk; i += kThreads) {
      Reach reach{0, {kNowhere, kNowhere}};
      if (i < count) {
        int c, r, s;
        order.split(static_cast<uint32_t>(chunk * Tile::kChunk + i), c, r, s);
        reach.at.h = block_.row().source + r * block_.row().source_step;
        reach.at.w = block_.column().source + s * block_.column().source_step;
        reach.bytes = (c * p.view.source.c + reach.at.h * p.view.source.row +
                       reach.at.w * p.view.source.column) *
                      static_cast<int64_t>(sizeof(T));
      }
      shared.reach[i] = reach;
    }
    return count;
  }

  __device__ __forceinline__ void load(const typename Tile::Shared& shared, int step) {
    const SimtGather<T>& p = block_.p;
    if (loads_weights()) weight_ = *reinterpret_cast<const Quad*>(p.weights.data + weights_);
    weights_ += kTerms * p.weights.width;
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const ImagePoint point = shared.column[pixel_of(k)];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const Reach reach = shared.reach[step * kTerms + term_of(l)];
        const bool inside =
            static_cast<unsigned>(point.h + reach.at.h) < static_cast<unsigned>(p.view.rows.size) &&
            static_cast<unsigned>(point.w + reach.at.w) <
                static_cast<unsigned>(p.view.columns.size);
        Loaded value = {};
        if (inside) value = *reinterpret_cast<const Loaded*>(origin_[k] + reach.bytes);
        pixel_[k][l] = value;
      }
    }
  }

  __device__ __forceinline__ void store(typename Tile::Shared& shared, int buffer) {
    if (loads_weights())
      *reinterpret_cast<Quad*>(&shared.a[buffer][weight_term()][weight_m()]) = weight_;
#pragma unroll
    for (int k = 0; k < kPixels; ++k)
#pragma unroll
      for (int l = 0; l < kLoads; ++l)
#pragma unroll
        for (int q = 0; q < Loaded::kCount; ++q)
          shared.b[buffer][term_of(l) + q][pixel_of(k)] = to_wide(pixel_[k][l].element[q]);
  }

 private:
  using Loaded = Vector<T, kQuads ? 4 : 1>;

  static __device__ __forceinline__ bool loads_weights() {
    return kWeightThreads == kThreads || threadIdx.x < kWeightThreads;
  }
  static __device__ __forceinline__ int weight_term() { return threadIdx.x / (Tile::kM / 4); }
  static __device__ __forceinline__ int weight_m() { return threadIdx.x % (Tile::kM / 4) * 4; }
  static __device__ __forceinline__ int pixel_of(int k) {
    return kQuads ? threadIdx.x / 2 + k * (kThreads / 2) : threadIdx.x % Tile::kN;
  }
  static __device__ __forceinline__ int term_of(int l) {
    return kQuads ? threadIdx.x % 2 * 4 : threadIdx.x / Tile::kN + l * (kThreads / Tile::kN);
  }

  const SimtGatherBlock<T, Tile>& block_;
  uint32_t weights_;  // an offset
  const char* origin_[kPixels];
  Quad weight_;
  Loaded pixel_[kPixels][kLoads];
};

// kApart: every chunk's sums go to memory.
template <typename T, typename Tile, bool kQuads, bool kApart>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    simt_gather(const __grid_constant__ SimtGather<T> p) {
  __shared__ SimtPlace place;
  if (!SimtGatherBlock<T, Tile>::template find<kMaskable<T>>(p, place)) return;
  const SimtGatherBlock<T, Tile> block{p, place};
  auto& shared = *dynamic_shared<typename Tile::Shared>();
  SimtGatherLoader<T, Tile, kQuads> loader(block, shared);
  typename Tile::Sums sums;
  Tile::template run<kApart>(shared, loader, place.chunks, sums, [&](int chunk) {
    auto* slots = reinterpret_cast<typename Tile::Quad*>(p.chunk_sums) +
                  (int64_t{blockIdx.x} * p.most_chunks + chunk) * (Tile::kSlots * Tile::kThreads) +
                  threadIdx.x;
    sums.write(slots, p.along_m);
  });
  if constexpr (!kApart) {
    // Through the thread's own shared memory, which has an index at run time.
    typename Tile::Quad* own = &shared.sums[0][threadIdx.x];
    sums.save(own);
#pragma unroll 1
    for (int slot = 0; slot < Tile::kSlots; ++slot)
      block.template store<kMaskable<T>>(slot, Tile::saved(own, slot, p.along_m));
  }
}

// A block for each tile and slot.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    simt_gather_finish(const __grid_constant__ SimtGather<T> p) {
  __shared__ SimtPlace place;
  if (!SimtGatherBlock<T, Tile>::template find<false>(p, place)) return;
  const SimtGatherBlock<T, Tile> block{p, place};
  const int slot = static_cast<int>(blockIdx.y);
  const auto* sums = reinterpret_cast<const typename Tile::Quad*>(p.chunk_sums) +
                     (int64_t{blockIdx.x} * p.most_chunks * Tile::kSlots + slot) * Tile::kThreads +
                     threadIdx.x;
  typename Tile::Quad total{};
#pragma unroll 4
  for (int chunk = 0; chunk < block.all_chunks(); ++chunk) {
    const typename Tile::Quad sum = sums[int64_t{chunk} * Tile::kSlots * Tile::kThreads];
#pragma unroll
    for (int q = 0; q < 4; ++q) total.element[q] += sum.element[q];
  }
  block.template store<false>(slot, total);
}

}  // namespace torchconv::cuda
