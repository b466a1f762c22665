// Where finished rows of grouped images go, [row][column][lanes] of a vector of filters: pixel by
// pixel in channels_last, else some rows of all filters are transposed together.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// With so few products to an output, stores that first read what they overwrite are a larger part
// of the time than elsewhere (kStreamedBytes).
inline constexpr int64_t kGroupStreamedBytes = kStreamedBytes / 2;

template <typename T>
struct GroupStore {
  using A = Wide<T>;
  using V = WideVec<T>;
  static constexpr int64_t kL = V::kLanes;

  ConvStrides strides;
  int64_t width;  // of a row
  const Epilogue<T>& epilogue;
  bool clamps, simple;  // simple: there is no more to do to a sum than to clamp it to [0, high]
  A high;

  GroupStore(const ConvStrides& dst, int64_t columns, const Epilogue<T>& finish)
      : strides(dst), width(columns), epilogue(finish) {
    clamps = epilogue.clamps();
    high = epilogue.most();
    simple = epilogue.activates_only() && epilogue.clamps_at_most();
  }

  // A row of pixels, overwritten, whose sums are clamped where that is all.
  void store_pixels(A* row, int64_t used, int64_t dst) const {
    for (int64_t j = 0; j < width; ++j, row += kL, dst += strides.column) {
      if (simple)
        V::store_partial(epilogue.y + dst, V::Registers::load(row), used);
      else
        epilogue.store_few(row, used, dst);
    }
  }

  // Rows of planes, from such rows of pixels. planes: scratch.
  int64_t plane(int64_t rows) const { return ceil_div(rows * width, 32) * 32 + 16; }
  int64_t planes_size(int64_t rows) const { return kL * plane(rows); }
  // Whether the planes of so many rows are whole vectors that go where they belong.
  bool planes_in_place(int64_t rows) const {
    return simple && strides.column == 1 && strides.row == width && rows * width % kL == 0;
  }
  // Whether so many vectors of filters, or so many rows of planes, of images of this size go past
  // the caches: all that is stored is whole lines. Outputs are N images of `image` elements.
  bool streams(bool whole_vectors, int64_t rows, int64_t first, int64_t N) const {
    constexpr bool kLine = kL * sizeof(T) == 64;
    const bool pixels = simple && strides.c == 1 && whole_vectors && strides.column % kL == 0 &&
                        strides.row % kL == 0;
    const bool planes = planes_in_place(rows) && strides.c % kL == 0;
    return kLine && (pixels || planes) && strides.n % kL == 0 &&
           V::streamable(epilogue.y + first) &&
           N * strides.n >= kGroupStreamedBytes / static_cast<int64_t>(sizeof(T));
  }
  // streams: where planes_in_place of the rows, which may be the first ones of those.
  void store_planes(const A* pixels, int64_t used, int64_t rows, int64_t dst, A* planes,
                    bool streams = false) const {
    const int64_t next = plane(rows);
    const bool neighbours = strides.row == width && strides.column == 1;
    const int64_t run = neighbours ? rows * width : width, runs = neighbours ? 1 : rows;
    const bool direct = simple && strides.column == 1;
    for (int64_t r = 0; r < runs; ++r, pixels += run * kL, dst += strides.row) {
      for (int64_t p = 0; p < run; p += kL) {
        const int64_t n = std::min(kL, run - p);
        typename V::Type tile[kL];
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l)
          tile[l] = l < n ? V::Registers::load(pixels + (p + l) * kL) : typename V::Type{};
        transpose_steps<1>(tile);
        if (!direct) {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c) V::Registers::store(planes + c * next + p, tile[c]);
        } else if (n == kL) {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c)
            if (c < used) V::store(epilogue.y + dst + c * strides.c + p, tile[c], streams);
        } else {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c)
            if (c < used) V::store_partial(epilogue.y + dst + c * strides.c + p, tile[c], n);
        }
      }
      if (direct) continue;
      for (int64_t c = 0; c < used; ++c) {
        if (simple)
          Epilogue<T>{epilogue.y, nullptr, Activation::kNone}.store(
              planes + c * next, run, dst + c * strides.c, strides.column);
        else
          epilogue.store(planes + c * next, run, dst + c * strides.c, strides.column);
      }
    }
  }
};

}  // namespace torchconv::cpu
