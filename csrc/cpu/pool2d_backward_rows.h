// Pooling's backward, row by row: what max, min and average pooling share, in both layouts.
//
// A row of dx is W * C elements and a row of dy Q * C of them, with C = 1 for the planes of NCHW.
// Columns i * stride + phase of one phase receive from the same taps at the same distance, output
// column i + shift, so each tap is a contiguous run of the output row: vectors run over columns and
// channels alike, with no edges. What a tap adds is Sums' business:
//   add<n>(phase, j, sum)  adds to n vectors, for elements j, j + 1, ... of the phase, which are
//                          numbered j = i * C + c
//   one(phase, j)          a single element's sum
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/pool2d_backward.h"
#include "cpu/pool_simd.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// Whether dx is too large to stay in cache, and is written past it.
bool writes_past_cache(const PoolProblem& p, int64_t element_size);

struct RowGeometry {
  RowGeometry(const PoolProblem& p, int64_t element_size);

  // Elements that may be read from the start of an output row on, up to a vector past its taps.
  int64_t reach(int lanes) const { return out_row + phases.right * channels + lanes; }

  int64_t phase_count() const { return static_cast<int64_t>(phases.first.size()) - 1; }
  // Elements of one phase, with room for a vector past the last; and of all of them.
  int64_t line_length(int64_t lanes) const { return phases.columns * channels + lanes; }
  int64_t line_size(int64_t lanes) const { return phase_count() * line_length(lanes); }

  Axis vertical, horizontal;
  int64_t channels, planes;  // planes * channels = N * C
  int64_t in_row, out_row;   // elements
  Contributions windows;     // the output rows of an input row
  Phases phases;
  int64_t left;  // how far before an output row its taps reach, in elements
  bool streams;  // as writes_past_cache
};

// Elements [0, count) of a phase, one after another.
template <typename T, typename Sums>
void write_run(const Sums& sums, size_t phase, int64_t count, bool streams, T* to) {
  using W = WideVec<T>;
  streams = streams && W::streamable(to);
  constexpr int kLanes = W::kLanes;
  constexpr int kUnroll = 4;
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes) {
    typename W::Type sum[kUnroll] = {};
    sums.template add<kUnroll>(phase, j, sum);
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; i++) W::store(to + j + i * kLanes, sum[i], streams);
  }
  for (; j < count; j += kLanes) {
    typename W::Type sum[1] = {};
    sums.template add<1>(phase, j, sum);
    if (j + kLanes <= count) {
      W::store(to + j, sum[0], streams);
    } else {
      W::store_partial(to + j, sum[0], count - j);
    }
  }
}

// Stride 2 and one channel: two phases merged in registers.
template <typename T, typename Sums>
void write_interleaved(const RowGeometry& g, const Sums& sums, T* row) {
  using W = WideVec<T>;
  constexpr int kLanes = W::kLanes;
  const int64_t width = g.horizontal.size;
  const bool streams = g.streams && W::streamable(row);
  for (int64_t i = 0; i < g.phases.columns; i += kLanes) {
    typename W::Type even[1] = {}, odd[1] = {}, low, high;
    sums.template add<1>(0, i, even);
    sums.template add<1>(1, i, odd);
    interleave<Wide<T>>(even[0], odd[0], &low, &high);
    T* to = row + 2 * i;
    const int64_t left = width - 2 * i;
    if (left >= 2 * kLanes) {
      W::store(to, low, streams);
      W::store(to + kLanes, high, streams);
    } else {
      W::store_partial(to, low, left < kLanes ? left : kLanes);
      if (left > kLanes) W::store_partial(to + kLanes, high, left - kLanes);
    }
  }
}

// Pixel by pixel. A pixel's last vector spills into the next one, which is written after it.
template <typename T, typename Sums>
void write_pixels(const RowGeometry& g, const Sums& sums, T* row) {
  using W = WideVec<T>;
  constexpr int kLanes = W::kLanes;
  constexpr int kUnroll = 4;
  const int64_t channels = g.channels, phases = g.phase_count();
  const bool streams = g.streams && W::streamable(row) && channels % kLanes == 0;
  T* const end = row + g.in_row;
  T* to = row;
  for (int64_t from = 0; to < end; from += channels) {
    for (int64_t phase = 0; phase < phases && to < end; phase++, to += channels) {
      int64_t c = 0;
      for (; c + kUnroll * kLanes <= channels; c += kUnroll * kLanes) {
        typename W::Type sum[kUnroll] = {};
        sums.template add<kUnroll>(static_cast<size_t>(phase), from + c, sum);
#pragma GCC unroll 4
        for (int i = 0; i < kUnroll; i++) W::store(to + c + i * kLanes, sum[i], streams);
      }
      for (; c < channels; c += kLanes) {
        typename W::Type sum[1] = {};
        sums.template add<1>(static_cast<size_t>(phase), from + c, sum);
        if (end - (to + c) >= kLanes) {
          W::store(to + c, sum[0], streams);
        } else {
          W::store_partial(to + c, sum[0], channels - c);
        }
      }
    }
  }
}

// Pixels of less than a vector: every phase by itself in `line`, then pixel after pixel.
template <typename T, typename Sums>
void write_narrow_pixels(const RowGeometry& g, const Sums& sums, T* line, T* row) {
  constexpr int64_t kVector = WideVec<T>::kLanes;
  const int64_t channels = g.channels, phases = g.phase_count(), length = g.line_length(kVector);
  for (int64_t phase = 0; phase < phases; phase++) {
    write_run(sums, static_cast<size_t>(phase), g.phases.columns * channels, false,
              line + phase * length);
  }
  T* const end = row + g.in_row;
  T* to = row;
  for (const T* column = line; to < end; column += channels) {
    const T* from = column;
    for (int64_t phase = 0; phase < phases && to < end; phase++, to += channels, from += length) {
      if (end - to >= kVector) {
        std::memcpy(to, from, kVector * sizeof(T));
      } else {
        std::copy_n(from, channels, to);
      }
    }
  }
}

// A whole row of dx; `line` is scratch of g.line_size(kLanes) elements.
template <typename T, typename Sums>
void write_row(const RowGeometry& g, const Sums& sums, T* line, T* row) {
  constexpr int kLanes = WideVec<T>::kLanes;
  const int64_t stride = g.horizontal.stride, width = g.horizontal.size;
  if (stride == 1) {
    write_run(sums, 0, g.in_row, g.streams, row);
  } else if (g.channels >= kLanes) {
    write_pixels(g, sums, row);
  } else if (g.channels > 1) {
    write_narrow_pixels(g, sums, line, row);
  } else if (stride == 2 && width > 1) {
    write_interleaved(g, sums, row);
  } else if (g.phases.columns >= 4) {
    const int64_t length = g.line_length(kLanes);
    for (int64_t phase = 0; phase < g.phase_count(); phase++, line += length) {
      write_run(sums, static_cast<size_t>(phase), g.phases.columns, false, line);
      for (int64_t w = phase, i = 0; w < width; w += stride, i++) row[w] = line[i];
    }
  } else {
    for (int64_t w = 0; w < width; w++)
      row[w] = from_wide<T>(sums.one(static_cast<size_t>(w % stride), w / stride));
  }
}

}  // namespace torchconv::cpu
