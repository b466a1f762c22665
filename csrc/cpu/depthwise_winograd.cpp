// Pairs of output rows are dealt to threads, as in depthwise_columns.cpp. The weights are
// transformed in each call: there are few of them.
#include "cpu/depthwise_winograd.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "core/buffer.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_taps.h"
#include "cpu/microkernels/channel_columns_winograd.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

constexpr int kL = kLanes<float>;

// Columns that tiles may compute twice, as a part of all.
constexpr double kOverlap = 0.15;

// Image and output of so many bytes are not in a core's own cache.
constexpr int64_t kFarBytes = 2 << 20;

// Those of each vector of channels, [vectors][products*R][lanes]; the last vector ends with the
// channels.
void pack_weights(const DepthwiseTaps& taps, int64_t channels, const float* w, float* packed) {
  const int64_t size = winograd_column_products(taps.rows) * taps.rows * kL;
  float direct[7 * 7 * kL];
  for (int64_t c = 0; c < channels; c += kL, packed += size) {
    pack_taps(taps, kL, w + std::min(c, channels - kL) * taps.filter, direct);
    winograd_column_weights(taps.rows, direct, packed);
  }
}

}  // namespace

bool depthwise_winograd_applies(const ConvView& v) {
  if (!kFiltersColumns || v.step_h != 1 || v.J < kWinogradTile) return false;
  const int64_t computed = round_up(v.J, kWinogradTile);
  return static_cast<double>(computed - v.J) <= kOverlap * static_cast<double>(computed) &&
         depthwise_columns_applies<float>(v);
}

double depthwise_winograd_products(const ConvView& v) {
  const int64_t R = DepthwiseTaps(v).rows;
  return static_cast<double>(winograd_column_products(R)) / static_cast<double>(2 * R);
}

std::vector<int64_t> depthwise_winograd(const ConvView& v, const float* src, const float* w,
                                        const float* bias, const Epilogue<float>& to,
                                        const Parallel& pool) {
  const DepthwiseTaps taps(v);
  const Epilogue<float> epilogue = to.at(v.dst_offset);
  const int64_t R = taps.rows, channels = v.groups, products = winograd_column_products(R);
  const int64_t vectors = ceil_div(channels, kL), zeros = (kWinogradTile + R - 1) * channels;
  Buffer<float> weights(vectors * products * R * kL), constants(channels + zeros);
  pack_weights(taps, channels, w, weights.get());
  if (bias != nullptr)
    std::copy(bias, bias + channels, constants.get());
  else
    fill_zero(constants.get(), channels);
  fill_zero(constants.get() + channels, zeros);

  const bool in_place = epilogue.clamps_at_most() && epilogue.activates_only();
  const int64_t run = v.dst.column == channels ? v.J : 1;  // pixels side by side
  const bool streams = in_place && v.dst.column == channels &&
                       WideVec<float>::streams(epilogue.y, v.N * v.dst.n, channels);
  const bool far = v.N * (v.src.n + v.dst.n) * int64_t{sizeof(float)} >= kFarBytes;
  const ChannelColumns shape{R, 1,           channels, v.J, -taps.first_w, v.W - taps.first_w,
                             0, v.src.column};
  const int64_t pairs = ceil_div(v.I, 2), line = v.J * channels;
  const WorkSplit split(v.N * pairs,
                        static_cast<double>(2 * line) * static_cast<double>(products * R / 2 + 8));
  Buffer<float> lines(in_place ? 0 : split.slots * 2 * line);
  const std::unique_ptr<std::atomic<bool>[]> special(
      new std::atomic<bool>[static_cast<size_t>(v.N)]());
  split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
    ChannelColumnsWinograd rows;
    rows.zeros = constants.get() + channels;
    rows.weights = weights.get();
    rows.start = constants.get();
    rows.streams = streams;
    rows.clamps = in_place && epilogue.clamps();
    rows.most = epilogue.most();
    rows.out_step = in_place ? v.dst.column : channels;
    rows.next_row = v.src.row;
    rows.next_out_row = in_place ? v.dst.row : line;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / pairs, i = item % pairs * 2, count = std::min<int64_t>(2, v.I - i);
      const float* image = src + n * v.src.n + taps.first_w * v.src.column;
      const auto row = [&](int64_t h) {
        return h >= 0 && h < v.H ? image + h * v.src.row : nullptr;
      };
      for (int64_t r = 0; r <= R; ++r)
        rows.sources[r] = r < R || count > 1 ? row(i + taps.first_h + r) : nullptr;
      const int64_t next = i + taps.first_h + R + 1;
      rows.next = far && i + 4 <= v.I && row(next + 1) != nullptr ? row(next) : nullptr;
      const int64_t dst = n * v.dst.n + i * v.dst.row;
      rows.next_out = in_place ? epilogue.y + dst + 2 * v.dst.row : lines.get();
      for (int64_t l = 0; l < 2; ++l) {
        rows.out[l] =
            in_place ? epilogue.y + dst + l * v.dst.row : lines.get() + (slot * 2 + l) * line;
        if (l >= count) rows.out[l] = nullptr;
      }
      if (!channel_columns_winograd(shape, rows))
        special[static_cast<size_t>(n)].store(true, std::memory_order_relaxed);
      for (int64_t l = 0; l < count && !in_place; ++l)
        for (int64_t j = 0; j < v.J; j += run)
          epilogue.store(rows.out[l] + j * channels, run * channels,
                         dst + l * v.dst.row + j * v.dst.column, 1);
    }
    if (streams) stream_fence();
  });
  std::vector<int64_t> samples;
  for (int64_t n = 0; n < v.N; ++n)
    if (special[static_cast<size_t>(n)].load(std::memory_order_relaxed)) samples.push_back(n);
  return samples;
}

}  // namespace torchconv::cpu
