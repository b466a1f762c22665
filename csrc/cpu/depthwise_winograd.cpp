// Pairs of output rows are dealt to threads, as in depthwise_columns.cpp, or, where a strip of rows
// has room in the first cache, bands of pairs: a source row then comes but once into it. Threads
// that shared a row's channels would take each other's lines away. Weights that nobody keeps are
// transformed by each thread: there are few of them.
#include "cpu/depthwise_winograd.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "core/buffer.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_taps.h"
#include "cpu/microkernels/channel_columns_winograd.h"
#include "cpu/parallel_range.h"
#include "cpu/thread_copies.h"

namespace torchconv::cpu {
namespace {

constexpr int kL = kLanes<float>;

// Columns that tiles may compute twice, as a part of all.
constexpr double kOverlap = 0.15;

// Images and outputs of so many bytes are not in the last cache.
constexpr int64_t kFarBytes = kStreamedBytes;

// Vectors of channels of which a strip of a few rows stays in the first cache.
constexpr int64_t kNarrow = 2;

// Tasks that a few threads can share evenly.
constexpr int64_t kTasksWanted = 8;

ChannelColumns columns_of(const ConvView& v, const DepthwiseTaps& taps) {
  return {taps.rows,     taps.columns,       1, v.groups,    v.J,
          -taps.first_w, v.W - taps.first_w, 0, v.src.column};
}

int64_t transformed_size(int64_t rows, int64_t channels) {
  return ceil_div(channels, kL) * winograd_column_products(rows) * rows * kL;
}

// What a tile may read in the place of a row outside the image.
int64_t zeros_size(int64_t rows, int64_t channels) { return (kWinogradTile + rows - 1) * channels; }

}  // namespace

int64_t depthwise_winograd_weights_size(const ConvView& v) {
  const int64_t rows = DepthwiseTaps(v).rows;
  return transformed_size(rows, v.groups) + zeros_size(rows, v.groups);
}

// Those of each vector of channels, [vectors][products*R][lanes]; the last vector ends with the
// channels. Then the zeros.
void depthwise_winograd_pack_weights(const ConvView& v, const float* w, float* packed) {
  const DepthwiseTaps taps(v);
  const int64_t size = winograd_column_products(taps.rows) * taps.rows * kL;
  float direct[7 * 7 * kL];
  for (int64_t c = 0; c < v.groups; c += kL, packed += size) {
    pack_taps(taps, kL, w + std::min(c, v.groups - kL) * taps.filter, direct);
    winograd_column_weights(taps.rows, direct, packed);
  }
  fill_zero(packed, zeros_size(taps.rows, v.groups));
}

bool depthwise_winograd_applies(const ConvView& v) {
  if (!kFiltersColumns || v.step_h != 1 || v.J < kWinogradTile ||
      !depthwise_columns_square_applies<float>(v))
    return false;
  const int64_t computed = round_up(v.J, kWinogradTile);
  return channel_columns_walk(columns_of(v, DepthwiseTaps(v))) ||
         static_cast<double>(computed - v.J) <= kOverlap * static_cast<double>(computed);
}

double depthwise_winograd_products(const ConvView& v) {
  const int64_t R = DepthwiseTaps(v).rows;
  return static_cast<double>(winograd_column_products(R)) / static_cast<double>(2 * R);
}

std::vector<int64_t> depthwise_winograd(const ConvView& v, const float* src, const float* w,
                                        const float* packed, const float* bias,
                                        const Epilogue<float>& to, const Parallel& pool) {
  const DepthwiseTaps taps(v);
  const Epilogue<float> epilogue = to.at(v.dst_offset);
  const int64_t R = taps.rows, channels = v.groups, products = winograd_column_products(R);
  const int64_t vectors = ceil_div(channels, kL);
  const bool in_place = epilogue.clamps_at_most() && epilogue.activates_only();
  const int64_t run = v.dst.column == channels ? v.J : 1;  // pixels side by side
  const bool streams = in_place && v.dst.column == channels &&
                       WideVec<float>::streams(epilogue.y, v.N * v.dst.n, channels);
  const bool far = v.N * (v.src.n + v.dst.n) * int64_t{sizeof(float)} >= kFarBytes;
  const ChannelColumns shape = columns_of(v, taps);
  const bool narrow = in_place && !far && vectors <= kNarrow;
  const int64_t pairs = ceil_div(v.I, 2), line = v.J * channels;
  const int64_t band = narrow ? ceil_div(pairs, std::min(pairs, ceil_div(kTasksWanted, v.N))) : 1;
  const int64_t bands = ceil_div(pairs, band);
  // Twice those of an output: its vectors run that much faster than work_grain reckons.
  const WorkSplit split(
      v.N * bands, static_cast<double>(2 * band * line) * static_cast<double>(products * R + 16));
  Buffer<float> lines(in_place ? 0 : split.slots * 2 * line);
  const ThreadCopies copies;
  const std::unique_ptr<std::atomic<bool>[]> special(
      new std::atomic<bool>[static_cast<size_t>(v.N)]());
  split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
    ChannelColumnsWinograd rows;
    rows.src_row = v.src.row;
    rows.src_rows = v.H;
    rows.out_row = in_place ? v.dst.row : line;
    rows.out_step = in_place ? v.dst.column : channels;
    rows.first_h = taps.first_h;
    rows.weights = packed != nullptr
                       ? packed
                       : copies.get<float>(depthwise_winograd_weights_size(v), [&](float* own) {
                           depthwise_winograd_pack_weights(v, w, own);
                         });
    rows.zeros = rows.weights + transformed_size(R, channels);
    rows.start = bias != nullptr ? bias : rows.zeros;
    rows.fetches = far;
    rows.streams = streams;
    rows.clamps = in_place && epilogue.clamps();
    rows.most = epilogue.most();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands, i = item % bands * band * 2, dst = n * v.dst.n;
      rows.src = src + n * v.src.n + taps.first_w * v.src.column;
      rows.first = i;
      rows.last = std::min(i + 2 * band, v.I);
      // Rows [i, last) of a sample, or of the lines: this is row i of either.
      rows.out = in_place ? epilogue.y + dst + i * v.dst.row : lines.get() + slot * 2 * line;
      // Not what another thread writes.
      rows.fetch_end = !in_place || streams ? 0 : item + 1 == end ? rows.last : v.I;
      if (!channel_columns_winograd(shape, rows))
        special[static_cast<size_t>(n)].store(true, std::memory_order_relaxed);
      for (int64_t h = i; h < rows.last && !in_place; ++h)
        for (int64_t j = 0; j < v.J; j += run)
          epilogue.store(rows.out + (h - i) * line + j * channels, run * channels,
                         dst + h * v.dst.row + j * v.dst.column, 1);
    }
    if (streams) stream_fence();
  });
  std::vector<int64_t> samples;
  for (int64_t n = 0; n < v.N; ++n)
    if (special[static_cast<size_t>(n)].load(std::memory_order_relaxed)) samples.push_back(n);
  return samples;
}

}  // namespace torchconv::cpu
