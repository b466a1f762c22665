// The gather of simt_view.h, of one phase, in exact float32 over NCHW as a matrix product of packed
// weights by planes: M target channels of a group by pixels of the target (all samples in a row),
// over terms (block of sixteen channels, tap, channel in the block). The sixteen terms of a panel
// are of one tap, so that a pixel's place is looked at once a panel: of several taps channels are
// whole blocks. Of 1x1 kernels whose planes are whole quads a thread copies four pixels at a time.
// Bound by the FMA units.
//
// dgrad of 1x1 kernels with a stride of two is a view of four phases, three of them zeros, which
// are stored along with the one that is computed.
//
// Blocks stay, and take one tile after another: the panels of the next are on their way while this
// one's sums are stored.
//
// A sum is taken in the chunks of simt_tile.h and in its order: which of the two kernels computes
// it, which may depend on the batch, changes no bit.
#include <algorithm>
#include <cstddef>

#include "core/range.h"
#include "cuda/divmod.h"
#include "cuda/shared_memory.h"
#include "cuda/simt_panels.h"
#include "cuda/simt_planes.h"
#include "cuda/simt_tile.h"
#include "cuda/simt_weights.h"
#include "cuda/tensor_core.h"

namespace torchconv::cuda {
namespace {

using namespace panels;

using Large = Tile<128, 128>;
using Medium = Tile<64, 128>;

constexpr int kChunkSteps = SimtTile<float, 128, 128, 8, 8, 2>::kChunk / kTerms;

// Of the taps, or of the positions of the target, along one axis: where they are in the source.
struct Steps {
  int first, step, count;
};

struct Planes {
  const float *source, *w;
  Epilogue<float> epilogue;
  int64_t source_sample, source_channel, target_sample, target_channel;
  uint32_t w_width, w_group;
  int C, M, H, W;  // of a group; of the source
  Steps row_taps, column_taps;
  int row_step, column_step;
  int steps;  // panels of a tile
  uint32_t pixels, tiles;
  Divisor plane, columns;  // of the target
  Divisor m_tiles, n_tiles;
  bool store_quads;
  bool spread;  // zeros between: the target is twice as high and wide
};

template <typename T>
struct Place {
  int first_m, group;
  uint32_t first_pixel;

  __device__ __forceinline__ Place(const Planes& p, uint32_t tile) {
    first_m = static_cast<int>(p.m_tiles.split(tile)) * T::kM;
    first_pixel = p.n_tiles.split(tile) * T::kN;
    group = static_cast<int>(tile);
  }
};

// Copies one panel after another of the block's tiles. A thread copies the same columns of every
// few rows.
template <typename T, bool kQuads>
class Loader {
  static constexpr int kEach = kQuads ? 4 : 1;
  static constexpr int kRowsA = T::kThreads / (T::kM / 4);
  static constexpr int kRowsB = T::kThreads / (T::kN / kEach);
  static constexpr int kFloat = static_cast<int>(sizeof(float));
  static_assert(kRowsA > 0 && kRowsB > 0);

 public:
  __device__ __forceinline__ Loader(const Planes& p, typename T::Shared& shared)
      : p_(p),
        to_a_(shared_address(&shared.a[0][row_a()][column_a()])),
        to_b_(shared_address(&shared.b[0][row_b()][column_b()])),
        tile_(blockIdx.x) {}

  __device__ __forceinline__ void next(int stage) {
    if (tile_ < p_.tiles) {
      if (step_ == 0) begin();
      copy(stage);
      advance();
    }
    copy_async_commit();
  }

 private:
  static __device__ __forceinline__ int row_a() { return threadIdx.x / (T::kM / 4); }
  static __device__ __forceinline__ int column_a() { return threadIdx.x % (T::kM / 4) * 4; }
  static __device__ __forceinline__ int row_b() { return threadIdx.x / (T::kN / kEach); }
  static __device__ __forceinline__ int column_b() { return threadIdx.x % (T::kN / kEach) * kEach; }

  __device__ __forceinline__ void begin() {
    const Place<T> place(p_, tile_);
    w_ = static_cast<uint32_t>(place.group) * p_.w_group +
         static_cast<uint32_t>(row_a()) * p_.w_width +
         static_cast<uint32_t>(place.first_m + column_a());
    source_ = p_.source + (int64_t{place.group} * p_.C + row_b()) * p_.source_channel;
    h_ = w_position_ = kNowhere;
    uint32_t sample = place.first_pixel + static_cast<uint32_t>(column_b());
    if (sample < p_.pixels) {
      uint32_t row = p_.plane.split(sample);
      source_ += sample * p_.source_sample;
      if constexpr (kQuads) {
        source_ += row;
        h_ = 0;
      } else {
        const uint32_t column = p_.columns.split(row);
        h_ = static_cast<int>(row) * p_.row_step;
        w_position_ = static_cast<int>(column) * p_.column_step;
        source_ += int64_t{h_} * p_.W + w_position_;
      }
    }
    row_tap_ = column_tap_ = 0;
    rest_ = p_.C;
  }

  __device__ __forceinline__ void copy(int stage) {
    const float* from_a = p_.w + w_;
#pragma unroll
    for (int row = 0; row < kTerms; row += kRowsA)
      copy_async<16>(to_a_ + static_cast<SharedAddress>((stage * kTerms + row) * T::kM * kFloat),
                     from_a + static_cast<uint32_t>(row) * p_.w_width, row_a() + row < rest_);
    bool inside = h_ >= 0;
    const float* from_b = source_;
    if constexpr (!kQuads) {
      const int h = p_.row_taps.first + row_tap_ * p_.row_taps.step;
      const int w = p_.column_taps.first + column_tap_ * p_.column_taps.step;
      inside = static_cast<unsigned>(h_ + h) < static_cast<unsigned>(p_.H) &&
               static_cast<unsigned>(w_position_ + w) < static_cast<unsigned>(p_.W);
      from_b += int64_t{h} * p_.W + w;
    }
#pragma unroll
    for (int row = 0; row < kTerms; row += kRowsB)
      copy_async<kEach * kFloat>(
          to_b_ + static_cast<SharedAddress>((stage * kTerms + row) * T::kN * kFloat),
          from_b + row * p_.source_channel, inside && row_b() + row < rest_);
  }

  __device__ __forceinline__ void advance() {
    w_ += kTerms * p_.w_width;
    if (++column_tap_ == p_.column_taps.count) {
      column_tap_ = 0;
      if (++row_tap_ == p_.row_taps.count) {
        row_tap_ = 0;
        source_ += kTerms * p_.source_channel;
        rest_ -= kTerms;
      }
    }
    if (++step_ == p_.steps) step_ = 0, tile_ += gridDim.x;
  }

  const Planes& p_;
  SharedAddress to_a_, to_b_;
  uint32_t tile_, w_ = 0;
  int step_ = 0, row_tap_ = 0, column_tap_ = 0;
  int rest_ = 0;  // channels of this block and those after it
  const float* source_ = nullptr;
  int h_ = 0, w_position_ = 0;
};

// Four neighbouring pixels of a channel, with their bias.
__device__ __forceinline__ void store_quad(const Epilogue<float>& e, int64_t offset, Quad z) {
  if (e.residual != nullptr) {
    const Quad residual = *reinterpret_cast<const Quad*>(e.residual + offset);
#pragma unroll
    for (int q = 0; q < 4; ++q) z.element[q] += residual.element[q];
  }
  if (e.preactivation != nullptr) *reinterpret_cast<Quad*>(e.preactivation + offset) = z;
#pragma unroll
  for (int q = 0; q < 4; ++q) z.element[q] = activate(e.activation, z.element[q]);
  *reinterpret_cast<Quad*>(e.y + offset) = z;
}

// Two neighbouring pixels of a row, and the zeros beside and below them.
__device__ __forceinline__ void store_spread(const Planes& p, uint32_t pixel, int64_t channel,
                                             float left, float right) {
  if (pixel >= p.pixels) return;
  uint32_t row = p.plane.split(pixel);
  const uint32_t column = p.columns.split(row), width = 2 * p.columns.value();
  float* y = p.epilogue.y + (pixel * p.target_sample + channel * p.target_channel +
                             2 * (int64_t{row} * width + column));
  *reinterpret_cast<Quad*>(y) = {{left, 0, right, 0}};
  *reinterpret_cast<Quad*>(y + width) = {};
}

// The sums go through the thread's own shared memory, which has an index at run time, half of them
// at a time.
template <typename T>
__device__ __forceinline__ void store(const Planes& p, const Place<T>& place, Quad* own,
                                      const float (&sums)[kSide][kSide]) {
  const Epilogue<float>& e = p.epilogue;
  const bool plain = !p.spread && p.store_quads && e.residual == nullptr &&
                     e.preactivation == nullptr &&
                     (e.activation == Activation::kNone || e.activation == Activation::kReLU);
  uint32_t pixel[2];
  int64_t offset[2];  // of a quad, in channel 0
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    pixel[part] = place.first_pixel + static_cast<uint32_t>(T::first_n() + part * (T::kN / 2));
    uint32_t sample = pixel[part];
    const uint32_t at = p.plane.split(sample);
    offset[part] = sample * p.target_sample + at;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int slot = 0; slot < kSlots / 2; ++slot)
      own[slot * T::kThreads] = to_slot(sums, half * (kSlots / 2) + slot);
    const int first_m = place.first_m + T::first_m() + half * (T::kM / 2);
#pragma unroll 1
    for (int i = 0; i < 4 && first_m + i < p.M; ++i) {
      const int64_t channel = int64_t{place.group} * p.M + first_m + i;
      const float bias = e.bias_of(channel);
      const int64_t row = channel * p.target_channel;
      if (plain) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          Quad z = from_slot(own[(2 * i + part) * T::kThreads]);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            z.element[q] += bias;
            if (e.activation == Activation::kReLU)
              z.element[q] = activate(Activation::kReLU, z.element[q]);
          }
          if (pixel[part] < p.pixels) *reinterpret_cast<Quad*>(e.y + (offset[part] + row)) = z;
        }
        continue;
      }
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        Quad z = from_slot(own[(2 * i + part) * T::kThreads]);
#pragma unroll
        for (int q = 0; q < 4; ++q) z.element[q] += bias;
        const uint32_t first = part == 0 ? pixel[0] : pixel[1];
        if (p.spread) {
          store_spread(p, first, channel, z.element[0], z.element[1]);
          store_spread(p, first + 2, channel, z.element[2], z.element[3]);
          continue;
        }
        if (p.store_quads) {
          if (first < p.pixels) store_quad(e, (part == 0 ? offset[0] : offset[1]) + row, z);
          continue;
        }
#pragma unroll 1
        for (uint32_t q = 0; q < 4 && first + q < p.pixels; ++q) {
          uint32_t sample = first + q;
          const uint32_t at = p.plane.split(sample);
          // A register array has no index at run time.
          const float value = q < 2 ? (q == 0 ? z.element[0] : z.element[1])
                                    : (q == 2 ? z.element[2] : z.element[3]);
          e.store(value, sample * p.target_sample + row + at);
        }
      }
    }
  }
}

template <typename T, bool kQuads>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    simt_planes_kernel(const __grid_constant__ Planes p) {
  auto& shared = *dynamic_shared<typename T::Shared>();
  Quad* before = &shared.sums[0][threadIdx.x];
  Loader<T, kQuads> loader(p, shared);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) loader.next(stage);
  int stage = 0;
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float sums[kSide][kSide];
    clear(sums);
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      if (step > 0 && step % kChunkSteps == 0) {
        if (step > kChunkSteps) add_slots<T>(before, sums);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) before[slot * T::kThreads] = to_slot(sums, slot);
        clear(sums);
      }
      loader.next(stage == 0 ? kStages - 1 : stage - 1);
      multiply_panels<T>(&shared.a[stage][0][T::first_m()], &shared.b[stage][0][T::first_n()],
                         sums);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    if (p.steps > kChunkSteps) add_slots<T>(before, sums);
    store<T>(p, Place<T>(p, tile), before, sums);
  }
}

int64_t pixels_of(const SimtView& v) { return v.N * v.rows.most_grid * v.columns.most_grid; }

int64_t taps_of(const SimtView& v) {
  return int64_t{v.rows.phase[0].taps} * v.columns.phase[0].taps;
}

bool one_phase(const SimtAxis& axis) { return axis.phases == 1 && axis.target_step == 1; }

// Of a stride of two: all is of the first phase, or zero.
bool spreads(const SimtAxis& axis) {
  return axis.phases == 2 && axis.target_step == 2 && axis.phase[0].taps == 1 &&
         axis.phase[1].taps == 0 && axis.phase[1].grid == axis.phase[0].grid;
}

bool spreads(const SimtView& v) {
  return spreads(v.rows) && spreads(v.columns) && v.columns.most_grid % 2 == 0;
}

int steps_of(const SimtView& v) { return static_cast<int>(ceil_div(v.C, kTerms) * taps_of(v)); }

template <typename T>
int64_t tiles_of(const SimtView& v) {
  return ceil_div(v.M, T::kM) * ceil_div(pixels_of(v), T::kN) * v.groups;
}

template <typename T>
int shared_bytes(const SimtView& v) {
  if (steps_of(v) > kChunkSteps) return static_cast<int>(sizeof(typename T::Shared));
  return static_cast<int>(offsetof(typename T::Shared, sums) +
                          kSlots / 2 * T::kThreads * sizeof(Quad));
}

// Blocks that a multiprocessor holds, of a device that has room for one.
template <typename T>
int resident(const SimtView& v, const Queue& queue) {
  constexpr int kReserved = 1024;  // of every block
  const int room = shared_of_block(queue.capability) + kReserved;
  return std::min(T::kBlocks, room / (shared_bytes<T>(v) + kReserved));
}

template <typename T>
double cost_of(const SimtView& v, const Queue& queue) {
  // The share of FMAs in what a thread executes; eight warps hide latencies; the last of the large
  // tiles ends with half as many blocks beside it as the last of the medium ones, which takes a
  // part of a tile's time. Fitted to times on an H200.
  const double share = T::kM < 128 ? 0.85 : 0.9, end = T::kM < 128 ? 0 : 0.25;
  const int64_t blocks = ceil_div(tiles_of<T>(v), queue.multiprocessors);
  const int64_t at_once = std::min<int64_t>(blocks, resident<T>(v, queue));
  const int64_t warps = at_once * T::kThreads / 32;
  const double speed = share * std::min(1.0, 0.5 + static_cast<double>(warps) / 16);
  const double chunks = static_cast<double>(steps_of(v)) / kChunkSteps;
  return (static_cast<double>(blocks) + end * static_cast<double>(at_once)) * (chunks + 0.05) *
         (T::kM * T::kN) / speed;
}

bool large_is_best(const SimtView& v, const Queue& queue) {
  return resident<Large>(v, queue) > 0 && cost_of<Large>(v, queue) <= cost_of<Medium>(v, queue);
}

template <typename T>
void run(const SimtView& v, Planes& p, const float* w, bool quads, const Queue& queue) {
  const SimtPacked<float> packed = pack_weights<float>(v, w, T::kM, queue);
  p.w = packed.data, p.w_width = packed.width, p.w_group = packed.group_size;
  p.m_tiles = Divisor(ceil_div(v.M, T::kM));
  p.n_tiles = Divisor(ceil_div(pixels_of(v), T::kN));
  p.tiles = static_cast<uint32_t>(tiles_of<T>(v));
  const int64_t blocks = std::min<int64_t>(p.tiles, queue.multiprocessors * resident<T>(v, queue));
  launch(quads ? simt_planes_kernel<T, true> : simt_planes_kernel<T, false>,
         dim3(static_cast<unsigned>(blocks)), T::kThreads, shared_bytes<T>(v), queue, p);
}

}  // namespace

bool simt_planes_takes(const SimtView& v, const float* target, const Queue& queue) {
  constexpr int64_t kMost = int64_t{1} << 30;  // of what a Divisor splits
  const int64_t taps = taps_of(v), pixels = pixels_of(v);
  return queue.capability >= 80 && v.source.column == 1 && v.target.column == 1 &&
         ((one_phase(v.rows) && one_phase(v.columns)) ||
          (spreads(v) && aligned<float>(target, 4))) &&
         v.C > 0 && taps > 0 && (taps == 1 || channels_together(v) == kTerms) && pixels > 0 &&
         pixels < kMost && tiles_of<Medium>(v) < kMost;
}

double simt_planes_cost(const SimtView& v, const Queue& queue) {
  return large_is_best(v, queue) ? cost_of<Large>(v, queue) : cost_of<Medium>(v, queue);
}

void simt_planes(const SimtView& v, const float* source, const float* w,
                 const Epilogue<float>& epilogue, const Queue& queue) {
  const SimtPhase &row = v.rows.phase[0], &column = v.columns.phase[0];
  const int64_t plane = int64_t{v.rows.most_grid} * v.columns.most_grid;
  Planes p{};
  p.source = source;
  p.epilogue = epilogue;
  p.source_sample = v.source.n, p.source_channel = v.source.c;
  p.target_sample = v.target.n, p.target_channel = v.target.c;
  p.C = static_cast<int>(v.C), p.M = static_cast<int>(v.M);
  p.H = v.rows.size, p.W = v.columns.size;
  p.row_taps = {row.source, row.source_step, row.taps};
  p.column_taps = {column.source, column.source_step, column.taps};
  p.row_step = v.rows.step, p.column_step = v.columns.step;
  p.steps = steps_of(v);
  p.pixels = static_cast<uint32_t>(pixels_of(v));
  p.plane = Divisor(plane), p.columns = Divisor(v.columns.most_grid);
  p.store_quads = plane % 4 == 0 && aligned<float>(epilogue.y, 4) &&
                  aligned<float>(epilogue.preactivation, 4) && aligned<float>(epilogue.residual, 4);
  p.spread = spreads(v);
  const bool same_place = row.source == 0 && column.source == 0 && v.rows.step <= 1 &&
                          v.columns.step <= 1 && v.rows.size == v.rows.most_grid &&
                          v.columns.size == v.columns.most_grid;
  const bool quads = taps_of(v) == 1 && same_place && plane % 4 == 0 && aligned<float>(source, 4);
  if (large_is_best(v, queue)) return run<Large>(v, p, w, quads, queue);
  run<Medium>(v, p, w, quads, queue);
}

}  // namespace torchconv::cuda
