// The kernels of grouped_mma_rows.h's gradient by the weights, for the files that instantiate them
// for one type each.
//
//   dw[k, r, s, c] = sum over pixels of dz[pixel, k] * x[place of the pixel + (r, s), c]
//
// An mma takes 16 pixels of a row: its A are two units of x at one tap, or for groups of one unit
// two taps of it, its B is one unit of dz; ldmatrix turns both. A warp has all taps of its units:
// it loads a row of x once and multiplies it with the rows of dz that meet it, which stay in
// registers. A block leaves float32 sums, of which a second kernel adds the parts in order.
#pragma once

#include "cuda/grouped_mma_rows_tile.h"

namespace torchconv::cuda {

// The hardware truncates where it adds: no warp adds more pixels to one sum.
inline constexpr int kRowsChainPixels = 4096;

// Units of x and of dz that a warp has; warps that share a row's pixels, and strips of 16 of each.
template <int Stride, int Units>
struct RowsWgradShape {
  static constexpr int kStride = Stride, kUnits = Units;
  static constexpr int kN = 2, kJobs = kSlabUnits / kN, kHalves = 2;
  static constexpr int kStrips = Units == 1 && Stride == 1 ? 2 : 1;
  static constexpr int kColumns = 16 * kStrips * kHalves, kThreads = 256;
  static constexpr int kBlocks = 2;
  static constexpr int kSteps = 4;
  static constexpr int kCopies = kColumns > 32 ? 3 : 2, kStaged = kCopies * kThreads / kSlabUnits;
  static constexpr int kCopiesDz = kColumns * kSlabUnits > kThreads ? 2 : 1;
  static constexpr int kRowsDz = Stride == 1 ? 3 : 2;  // that meet a row of x
  static constexpr int kMoreSteps = Stride == 1 ? 2 : 1;
  static constexpr int kTiles = Units == 1 ? 5 * kN : 9 * kN;  // of sums
};

// f of the problem's shape.
template <typename F>
auto with_rows_wgrad_shape(const GroupedRowsWgrad& p, F&& f) {
  const bool two = p.c.group_units == 2;
  if (p.h.stride == 1) return two ? f(RowsWgradShape<1, 2>{}) : f(RowsWgradShape<1, 1>{});
  return two ? f(RowsWgradShape<2, 2>{}) : f(RowsWgradShape<2, 1>{});
}

// Shared memory: the ring, and zeros for the pixels that only fill up a strip; at the end the sums
// of a half.
template <typename Shape>
int rows_wgrad_bytes(const GroupedRowsWgrad& p) {
  const int ring = Shape::kSteps * p.cut.slot_bytes + 3 * kPixelBytes;
  const int sums = Shape::kJobs * Shape::kTiles * 4 * 128;
  return ring > sums ? ring : sums;
}

template <typename T, int Stride, int Units>
__global__ void __launch_bounds__(RowsWgradShape<Stride, Units>::kThreads,
                                  RowsWgradShape<Stride, Units>::kBlocks)
    grouped_rows_wgrad_kernel(const __grid_constant__ GroupedRowsWgrad p) {
  using Shape = RowsWgradShape<Stride, Units>;
  constexpr int kN = Shape::kN, kStrips = Shape::kStrips, kThreads = Shape::kThreads;
  constexpr int kSteps = Shape::kSteps, kRowsDz = Shape::kRowsDz;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.y);
  const int first_unit = static_cast<int>(blockIdx.x) * kSlabUnits;
  const int units = min(kSlabUnits, p.c.channels / kUnitChannels - first_unit);
  const int begin = p.cut.first_item(part), end = p.cut.first_item(part + 1);
  const int pitch_x = p.w.source * p.c.channels, pitch_dz = p.w.outputs * p.c.channels;

  unsigned char* shared = dynamic_shared<unsigned char>();
  const SharedAddress ring = shared_address(shared);
  const SharedAddress zeros = ring + static_cast<SharedAddress>(kSteps * p.cut.slot_bytes);
  for (int i = thread; i < 3 * kPixelBytes / 4; i += kThreads)
    store_shared(zeros + static_cast<SharedAddress>(4 * i), 0);

  RowCopies<Shape::kCopies, kThreads, Stride == 2> copies_x(ring);
  RowCopies<Shape::kCopiesDz, kThreads, false> copies_dz(ring +
                                                         static_cast<SharedAddress>(p.dz_at));
  // The item and step that are copied.
  int copied = begin - 1, copy_step = Shape::kMoreSteps;
  RowsItem copy_at{};
  const auto stage_step = [&](int slot) {
    if (copy_step == copy_at.rows + Shape::kMoreSteps && copied < end && ++copied < end) {
      copy_at = rows_item(p.cut, copied);
      copy_step = 0;
      const int channel = (first_unit + thread % kSlabUnits) * kUnitChannels;
      copies_x.begin(p.cut, p.cut.line, p.cut.by_line, copy_at.image,
                     copy_at.column * Stride - p.w.pad, p.batch, p.h.source, p.w.source,
                     p.c.channels, channel, units);
      copies_dz.begin(p.cut, p.cut.columns, p.cut.by_columns, copy_at.image, copy_at.column,
                      p.batch, p.h.outputs, p.w.outputs, p.c.channels, channel, units);
    }
    if (copy_step < copy_at.rows + Shape::kMoreSteps) {
      const SharedAddress to = static_cast<SharedAddress>(slot * p.cut.slot_bytes);
      const int row = copy_at.row + copy_step;
#pragma unroll
      for (int j = 0; j < Stride; ++j) {
        const int row_x = row * Stride + j - p.h.pad;
        if (row_x >= 0 && row_x < p.h.source && (j == 0 || copy_step < copy_at.rows))
          copies_x.copy(static_cast<const T*>(p.x), row_x * pitch_x,
                        to + static_cast<SharedAddress>(j * p.cut.row_bytes));
      }
      if (copy_step < copy_at.rows) copies_dz.copy(static_cast<const T*>(p.dz), row * pitch_dz, to);
      ++copy_step;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kSteps - 1; ++i) stage_step(i);

  // The first of the warp's units of x, which are those of dz too, and its half of the pixels.
  const int job = warp % Shape::kJobs, half = warp / Shape::kJobs;
  const int first_tile = kN * job;
  const int first_pixel = half * kStrips * 16, of_upper = lane / 8 % 2;
  const int odd_columns = (p.cut.columns + 1) * kPixelBytes;
  // The upper matrices of each two are the next tap or unit; pixels 8 on come last. Pixels that
  // only fill up stay at the zeros: a mask takes away what moves others.
  SharedAddress x_at[kStrips], dz_at[kStrips], mask[kStrips];

  // sums[tap of three rows: 0, 1 | the last tap of the first two rows | of the last][unit], or
  // sums[tap][unit].
  float sums[Shape::kTiles / kN][kN][4];
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i / kN][i % kN][e] = 0.0f;
  uint32_t dz[kRowsDz][kStrips][kN][2];  // of the newest row first
  uint32_t before[Units == 1 ? kStrips : 1][4];
#pragma unroll
  for (int i = 0; i < kRowsDz * kStrips * kN * 2; ++i)
    dz[i / (kStrips * kN * 2)][i / (kN * 2) % kStrips][i / 2 % kN][i % 2] = 0;
#pragma unroll
  for (int m = 0; m < (Units == 1 ? kStrips : 1); ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) before[m][i] = 0;

  const bool busy = first_tile < units;
#pragma unroll 1
  for (int item = begin, slot = 0; item < end; ++item) {
    const RowsItem at = rows_item(p.cut, item);
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const int pixel = first_pixel + 16 * m + lane / 16 * 8 + lane % 8;
      uint32_t image = static_cast<uint32_t>(pixel);
      const int column = static_cast<int>(p.cut.by_columns.split(image));
      const bool any = static_cast<int>(image) < p.cut.images &&
                       at.image + static_cast<int>(image) < p.batch &&
                       at.column + column < p.w.outputs;
      mask[m] = any ? ~SharedAddress{0} : 0;
      const auto place = [&](int row, int in_row, int unit) {
        return (any ? ring + static_cast<SharedAddress>(row + in_row * kPixelBytes) : zeros) +
               static_cast<SharedAddress>(unit * kUnitBytes);
      };
      x_at[m] = place(0, static_cast<int>(image) * p.cut.line + column, first_tile);
      dz_at[m] = place(p.dz_at, pixel, first_tile + of_upper);
    }
    const int steps = at.rows + Shape::kMoreSteps;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kSteps - 2>();
      __syncthreads();
      stage_step(slot == 0 ? kSteps - 1 : slot - 1);
      const SharedAddress first = static_cast<SharedAddress>(slot * p.cut.slot_bytes);
      slot = slot + 1 == kSteps ? 0 : slot + 1;
      if (!busy) continue;
      // Row r of the filters meets dz's row step - r, of stride 1; of stride 2 rows 0 and 1 meet
      // this one and row 2 the one before.
      const auto met = [&](int row) { return row >= 0 && row < at.rows; };
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
#pragma unroll
        for (int i = kRowsDz - 1; i > 0; --i)
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int word = 0; word < 2; ++word) dz[i][m][n][word] = dz[i - 1][m][n][word];
        if (met(step)) {
          uint32_t word[4];
          load_matrices_transposed(word, dz_at[m] + (first & mask[m]));
#pragma unroll
          for (int i = 0; i < 4; ++i) dz[0][m][i % 2][i / 2] = word[i];
        }
        const auto has = [&](int j) {
          const int row = (at.row + step) * Stride + j - p.h.pad;
          return row >= 0 && row < p.h.source && (j == 0 || step + 1 < steps);
        };
        // f(row of taps, row of dz) of those that meet row j of x.
        const auto for_each_row = [&](int j, auto&& f) {
          const auto call = [&](int r, int row_dz) {
            if (met(step - row_dz)) f(r, row_dz);
          };
          if constexpr (Stride == 1) {
            call(0, 0);
            call(1, 1);
            call(2, kRowsDz - 1);
          } else if (j == 0) {
            call(0, 0);
            call(2, 1);
          } else {
            call(1, 0);
          }
        };
        // From the strip's first pixel of row 0 to its place in row j at a tap.
        const auto address = [&](int j, int tap) {
          const int moved = j * p.cut.row_bytes;
          const int column = Stride == 2 ? (tap == 0   ? 0
                                            : tap == 1 ? odd_columns
                                                       : kPixelBytes)
                                         : tap * kPixelBytes;
          return (first + static_cast<SharedAddress>(moved + column)) & mask[m];
        };
        if constexpr (Units == 1) {
          uint32_t last[2][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) last[0][i] = last[1][i] = 0;
#pragma unroll
          for (int j = 0; j < Stride; ++j) {
            if (!has(j)) continue;
            uint32_t a[2][4];
            const SharedAddress two_taps =
                x_at[m] + (of_upper != 0 ? address(j, 1) : address(j, 0));
            load_matrices_transposed(a[0], two_taps);
            load_matrices_transposed(a[1], two_taps + kUnitBytes);
            load_matrices_transposed(
                last[j],
                x_at[m] + address(j, 2) + static_cast<SharedAddress>(of_upper * kUnitBytes));
            for_each_row(j, [&](int r, int row_dz) {
#pragma unroll
              for (int n = 0; n < 2; ++n)
                mma<T>(sums[r][n], a[n], dz[row_dz][m][n][0], dz[row_dz][m][n][1]);
            });
          }
          // The last tap of the first two rows, of which the upper is the later.
          const auto& lower = Stride == 1 ? before[m] : last[0];
          const auto& later = Stride == 1 ? last[0] : last[1];
          constexpr int kRow = Stride == 1 ? 1 : 0;
          if (met(step - kRow)) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const uint32_t a[4] = {lower[n], later[n], lower[2 + n], later[2 + n]};
              mma<T>(sums[3][n], a, dz[kRow][m][n][0], dz[kRow][m][n][1]);
            }
          }
          if (met(step - kRowsDz + 1)) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const uint32_t a[4] = {last[0][n], 0, last[0][2 + n], 0};
              mma<T>(sums[4][n], a, dz[kRowsDz - 1][m][n][0], dz[kRowsDz - 1][m][n][1]);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) before[m][i] = last[0][i];
        } else {
#pragma unroll
          for (int j = 0; j < Stride; ++j) {
            if (!has(j)) continue;
#pragma unroll
            for (int s = 0; s < 3; ++s) {
              uint32_t a[4];
              load_matrices_transposed(
                  a, x_at[m] + address(j, s) + static_cast<SharedAddress>(of_upper * kUnitBytes));
              for_each_row(j, [&](int r, int row_dz) {
#pragma unroll
                for (int n = 0; n < kN; ++n)
                  mma<T>(sums[3 * r + s][n], a, dz[row_dz][m][n][0], dz[row_dz][m][n][1]);
              });
            }
          }
        }
      }
    }
  }

  copy_async_wait<0>();
  __syncthreads();
  float* const half_sums = reinterpret_cast<float*>(shared) + job * Shape::kTiles * 4 * 32 + lane;
  if (half > 0) {
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; ++i)
      half_sums[32 * i] = sums[i / 4 / kN][i / 4 % kN][i % 4];
  }
  __syncthreads();
  if (half > 0) return;
  // In dw's order: of a tile, channel g of two units or taps, and filters 2t and 2t + 1.
  float* const to = p.sums + int64_t{part} * p.c.channels * 9 * p.c.group;
#pragma unroll
  for (int i = 0; i < Shape::kTiles / kN; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int tile = first_tile + (Units == 1 ? n : e / 2), of_dz = first_tile + n;
        const int tap = Units > 1 ? i : i < 3 ? 3 * i + e / 2 : i == 3 ? 2 + 3 * (e / 2) : 8;
        if (Units == 1 && i == 4 && e >= 2) continue;
        if (tile >= units || of_dz >= units) continue;
        const int c = (first_unit + tile) * kUnitChannels + lane / 4;
        const int k = (first_unit + of_dz) * kUnitChannels + lane % 4 * 2 + e % 2;
        const int group = quotient(c, p.by_group);
        if (Units == 1 && quotient(k, p.by_group) != group) continue;
        to[(k * 9 + tap) * p.c.group + c - group * p.c.group] =
            sums[i][n][e] + half_sums[32 * ((i * kN + n) * 4 + e)];
      }
}

// dw from the parts, four weights a thread: of `Lanes` threads every one adds its share of them.
template <typename T, int Lanes>
__global__ void __launch_bounds__(256)
    grouped_rows_add_parts(const float* sums, int32_t size, int32_t parts, T* dw) {
  constexpr int kColumns = 256 / Lanes;
  __shared__ Vector<float, 4> shared[Lanes][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, lane = thread / kColumns;
  const int i = static_cast<int>(blockIdx.x) * kColumns + column;
  const auto* from = reinterpret_cast<const Vector<float, 4>*>(sums) + i;
  const Vector<float, 4> sum = sum_of_parts(from, size, parts, i < size, lane, column, shared);
  if (i >= size || lane != 0) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) dw[4 * i + e] = from_wide<T>(sum.element[e]);
}

template <typename T>
void run_grouped_rows_wgrad(GroupedRowsWgrad p, const Queue& queue) {
  const int size = p.c.channels * 9 * p.c.group;
  p.sums = queue.scratch<float>(int64_t{p.cut.parts} * size);
  with_rows_wgrad_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    launch(grouped_rows_wgrad_kernel<T, Shape::kStride, Shape::kUnits>,
           dim3(static_cast<unsigned>(p.c.slabs), static_cast<unsigned>(p.cut.parts)),
           dim3(Shape::kThreads), rows_wgrad_bytes<Shape>(p), queue, p);
  });
  const auto add = [&](auto kernel, int lanes) {
    launch(kernel, dim3(static_cast<unsigned>(ceil_div(size / 4, 256 / lanes))), dim3(256), 0,
           queue, p.sums, size / 4, p.cut.parts, static_cast<T*>(p.dw));
  };
  if (p.cut.parts > 8)
    add(grouped_rows_add_parts<T, 16>, 16);
  else
    add(grouped_rows_add_parts<T, 1>, 1);
}

}  // namespace torchconv::cuda
