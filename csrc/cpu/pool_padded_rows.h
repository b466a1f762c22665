// Rows of a plane (NCHW) between margins, so that windows which reach into the padding are folded
// by the same vectors as all others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/pool_window.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// The taps of a row's windows that lie in the image for any output, and how far they reach.
struct RowReach {
  RowReach(const Axis& axis, int lanes);
  static constexpr int64_t kMargin = 4096;

  Range taps{0, 0};      // no tap outside this range is in the image
  int64_t origin = 0;    // the column of the first tap of output 0
  int64_t length = 0;    // elements from there on that whole vectors of outputs read
  bool inside = false;   // every tap of every output is in the image
  bool regular = false;  // the margins are not much longer than the row
};

// Copies of consecutive rows of a plane. Several are copied before the first is read: a load that
// straddles what two stores just wrote waits for both.
template <typename T>
class PaddedRows {
 public:
  __attribute__((noinline)) PaddedRows(int64_t width, int64_t height, const RowReach& reach, T fill)
      : width_(width),
        height_(height),
        left_(std::max<int64_t>(0, -reach.origin)),
        origin_(left_ + reach.origin),
        pitch_(reach.regular ? round_up(left_ + std::max(width, reach.origin + reach.length), kUnit)
                             : 0),
        most_(std::min(height, std::max<int64_t>(kFewest, kBytes / (pitch_ + 1)))),
        rows_(most_ * pitch_) {
    std::fill_n(rows_.get(), most_ * pitch_, fill);
  }

  // The first tap of output 0 in row h of the plane; the next `count` <= most() rows are there too,
  // a pitch() apart, as far as the plane has them.
  const T* at(const T* plane, int64_t h, int64_t count) {
    if (plane != plane_ || h < begin_ || std::min(h + count, height_) > end_) fill(plane, h, count);
    return row(h) + origin_;
  }
  int64_t pitch() const { return pitch_; }
  int64_t most() const { return most_; }

 private:
  using Bits =
      std::conditional_t<sizeof(T) == 8, uint64_t,
                         std::conditional_t<sizeof(T) == 4, uint32_t,
                                            std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;
  static constexpr int64_t kUnit = 64 / static_cast<int64_t>(sizeof(T));      // a cache line
  static constexpr int64_t kBytes = 16384 / static_cast<int64_t>(sizeof(T));  // half of L1
  static constexpr int64_t kFewest = 8;

  T* row(int64_t h) const { return rows_.get() + (h - begin_) * pitch_; }

  __attribute__((noinline)) void fill(const T* plane, int64_t h, int64_t count) {
    plane_ = plane;
    begin_ = h;
    end_ = std::min(h + count, height_);
    const int64_t width = width_, pitch = pitch_;
    const T* from = plane + h * width;
    T* to = rows_.get() + left_;
    for (int64_t rows = end_ - begin_; rows > 0; rows--, from += width, to += pitch)
      copy(from, width, to);
  }

  static void copy(const T* from, int64_t width, T* to) {
    using V = Vec<Bits>;
    int64_t i = 0;
    for (; i + V::kLanes <= width; i += V::kLanes) V::store(to + i, V::load(from + i));
    if (i < width) V::store_partial(to + i, V::load_partial(from + i, width - i), width - i);
  }

  int64_t width_, height_, left_, origin_, pitch_, most_;
  Buffer<T> rows_;
  const T* plane_ = nullptr;
  int64_t begin_ = 0, end_ = 0;  // the rows held
};

}  // namespace torchconv::cpu
