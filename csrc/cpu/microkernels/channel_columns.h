// The register kernels of depthwise convolution with channels contiguous (NHWC). A lane is a
// channel; a row of pixels is walked from left to right, and every source pixel is loaded once for
// all output columns that it reaches, whose sums are in registers and roll on from column to
// column: plane_rows.h turned by a right angle. Two output rows are walked together and share the
// source rows that both read. What lies outside the image is left out, and a number of channels
// that no vector divides is closed by a vector that overlaps the one before.
#pragma once

#include <cstdint>

#include "cpu/microkernels/direct_tile.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

inline constexpr int kColumnLines = 2;

// Columns of the widest kernel, and rows of the highest with what a second line reads.
inline constexpr int kMostColumns = 11, kMostSourceRows = 32;

// Whether channel_columns_sum takes any kernel of T up to those above: for each there is a function
// of its own for each width. Of bfloat16 that is compiled once for an instruction set: with 512
// bits for the processors that round by one instruction. Other types gain more from what they have.
template <typename T>
bool columns_of_any_kernel() {
  if constexpr (std::is_same_v<T, BFloat16>) return kVectorBytes < 64 || has_pair_products();
  return std::is_same_v<T, float>;
}

// R by S taps; at least a vector of channels.
struct ChannelColumns {
  // Square kernels of 3, 5 or 7 taps, with a step of 1, or 2 if less than 7; with
  // columns_of_any_kernel any with a step of 1 or 2, and with 3 or 4 as large ones.
  int64_t R, S, step;
  int64_t channels, columns;  // output columns
  int64_t left, right;        // source column j*step + s exists for [left, right)
  int64_t pad_w;              // of channel_columns_spread
  int64_t pitch;              // from a source column to the next
};

// out[line][j] of two neighbouring output rows, of which the first is there. Row r of the kernel
// meets source row line * step + r.
template <typename T>
struct ChannelColumnsSum {
  const T* src;  // source row 0, from the column of the first tap on
  int64_t src_row;
  uint32_t rows;         // bit i: source row i is there
  T* out[kColumnLines];  // null: no such line
  int64_t out_step;
  Wide<T>* wide[kColumnLines];  // or, of a narrower T, where the line goes unrounded
  int64_t wide_step;
  const Wide<T>* weights;  // [vectors][R*S][lanes], of which the last vector ends with the channels
  const T* next;  // the source rows that the next two lines read beside these; null if near by
  const T* next_out[kColumnLines];  // the lines that are written next, or null
  bool streams;                     // past the caches
  bool clamps;                      // the outputs, to [0, most]
  Wide<T> most;
  const Wide<T>* start;  // of all sums, by channel
};
template <typename T>
void channel_columns_sum(const ChannelColumns& shape, const ChannelColumnsSum<T>& sum);

// The gradient of a stride of 2: out[line][w] of output rows 2a - pad_h + line, of which either may
// not be there, sums, with source row m row a - m of dz, the taps (2m + line, s) at column
// (w + pad_w - s) / 2 where that is whole. left and right are those of dz.
template <typename T>
void channel_columns_spread(const ChannelColumns& shape, const ChannelColumnsSum<T>& sum);

// sums[R*R][sum_step] += dz * src over output rows [first, last) of a sample.
template <typename T>
struct ChannelColumnsDot {
  const T* src;  // row 0, at the column of the first tap
  const T* dz;
  Wide<T>* sums;
  int64_t sum_step, src_row, dz_row, dz_column;
  int64_t first, last;
  int64_t first_h, rows;        // of the first tap; of the source
  const T *next_src, *next_dz;  // what is read after these rows, in the order of memory; or null
};
template <typename T>
void channel_columns_dot(const ChannelColumns& shape, const ChannelColumnsDot<T>& dot);

}  // namespace torchconv::cpu
