// A band of image rows for convolutions with few channels in a group: copied once into cache-sized
// scratch in the computing type, with the padding written out and the stride's phases apart, so
// that tap t of output pixel (i, j) lies at a constant offset from position i*width + j. The
// kernels then have no edges, no strides and no narrow types: a plane of any width is one long row
// of vectors.
//
// Scratch is [channel of the group][phase_h][phase_w][rows][width][lanes]. Where vectors run along
// pixels there is one lane and one group. Else a lane is an output channel, and holds what that
// channel's group reads: groups narrower than a vector stand side by side in it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// What the taps span, from which follows whether scratch can hold a band. Cheap: no allocation.
struct BandExtent {
  BandExtent(const ConvView& view, bool along_pixels, int64_t element_size, int64_t vector_lanes);

  bool fits;      // else the taps are too far apart for scratch: use the matrix product
  int64_t lanes;  // output channels side by side
  int64_t first_h, first_w, phases_h, phases_w;
  int64_t width;   // positions in a row: J and what the taps add
  int64_t shared;  // of the latter, zeros of two neighbouring rows that are the same ones
  int64_t halo;    // rows of scratch that a band has more than output rows
  double row;      // elements of scratch in a row
};

// A view of a few filters whose band does not fit, in pieces of as many columns as do: the pixels
// of a panel would be packed for too few products. Else the view.
std::vector<ConvView> column_pieces(const ConvView& view, int64_t element_size,
                                    int64_t vector_lanes);

struct ConvBand {
  // The band must fit. most_rows: of a band, if not as many as suits the caches.
  ConvBand(const ConvView& view, bool along_pixels, int64_t element_size, int64_t vector_lanes,
           int64_t most_rows = 0);

  bool pixels;     // vectors run along pixels
  int64_t lanes;   // output channels side by side
  int64_t blocks;  // of groups (pixels) or lanes
  int64_t band;    // output rows in a band
  int64_t bands;
  int64_t width;                 // positions in a row: J and what the taps add
  int64_t size;                  // elements of scratch
  std::vector<int64_t> offsets;  // [C][taps], in elements

  // Vectors of positions that cover `rows` output rows.
  int64_t positions(int64_t rows, int64_t J) const { return (rows - 1) * width + J; }

  // Copies what output rows [i0, i0 + band) of a block need. src is the sample.
  template <typename T>
  void fill(const ConvView& view, const T* src, int64_t block, int64_t i0, Wide<T>* scratch) const;
  // The same of pairs of channels (channel_pairs.h), each where its half of the channels would be.
  // Only along pixels that are neighbours, of step 1.
  bool fills_pairs(const ConvView& view) const {
    return pixels && view.src.column == 1 && view.step_w == 1 && phases_w_ == 1;
  }
  void fill_pairs(const ConvView& view, const BFloat16* src, int64_t block, int64_t i0,
                  float* scratch) const;

 private:
  // Along pixels, from channels that are neighbours in memory.
  template <typename T>
  void fill_transposed(const ConvView& view, const T* src, int64_t i0, Wide<T>* scratch) const;
  template <typename T>
  void clear_slack(Wide<T>* scratch) const;

  int64_t first_h_, phases_h_, phases_w_, rows_;
  int64_t next_band_;                  // in memory, where pixels are neighbours
  int64_t plane_;                      // of one phase: its rows and what the last one may overrun
  std::vector<Range> ranges_;          // [phase_w]: positions inside the image
  std::vector<int64_t> first_column_;  // [phase_w]: source offset of position 0
  std::vector<int64_t> lane_source_;   // of each output channel, from the sample
};

// dst[i] = src[i*step].
template <typename T>
TORCHCONV_INLINE void copy_strided(Wide<T>* dst, const T* src, int64_t n, int64_t step) {
  if (step == 1) return copy_wide(dst, src, n);
  for (int64_t i = 0; i < n; ++i) dst[i] = to_wide(src[i * step]);
}

// even[i] = src[first + 2*i] and odd[i] = src[first + 2*i + 1], zero outside [0, W), for i < width.
// Whole vectors are stored: write rows in ascending order.
template <typename T>
TORCHCONV_INLINE void split_padded_row(Wide<T>* even, Wide<T>* odd, const T* src, int64_t first,
                                       int64_t W, int64_t width) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  constexpr auto kAll = std::make_integer_sequence<int, V::kLanes>();
  const auto load = [&](int64_t column) {
    const int64_t begin = std::min(std::max(-column, int64_t{0}), kL);
    const int64_t end = std::max(std::min(W - column, kL), begin);
    return begin == 0 && end == kL ? V::load(src + column) : load_lanes(src + column, begin, end);
  };
  for (int64_t i = 0; i < width; i += kL) {
    const auto low = load(first + 2 * i), high = load(first + 2 * i + kL);
    V::Registers::store(even + i, alternate_lanes<0>(low, high, kAll));
    V::Registers::store(odd + i, alternate_lanes<1>(low, high, kAll));
  }
}

// to[l] = from[sources[l]] for the n lanes of a vector, where the sources ascend within one.
template <typename T>
class LanePermutation {
 public:
  LanePermutation(const int64_t* sources, int64_t n)
      : first_(sources[0]), span_(sources[n - 1] - sources[0] + 1) {
    for (int64_t l = 0; l < n; ++l) lanes_[l] = static_cast<Index>(sources[l] - first_);
  }
  TORCHCONV_INLINE void copy(Wide<T>* to, const T* from) const {
    const auto vector = V::load_partial(from + first_, span_);
    V::Registers::store(to, permute(vector, Vec<Index>::load(lanes_)));
  }

 private:
  using V = WideVec<T>;
  using Index = std::conditional_t<sizeof(Wide<T>) == 8, int64_t, int32_t>;
  int64_t first_, span_;
  Index lanes_[V::kLanes] = {};
};

template <typename T>
void ConvBand::fill(const ConvView& view, const T* src, int64_t block, int64_t i0,
                    Wide<T>* scratch) const {
  const int64_t first_lane = block * lanes;  // along channels
  const int64_t used = std::min(lanes, view.groups * view.K - first_lane);
  const bool neighbours = view.C == 1 && view.K == 1 && view.src.c == 1;
  const int64_t step = view.step_w * view.src.column;
  const int64_t no_source = 0;
  const int64_t* sources = pixels ? &no_source : lane_source_.data() + first_lane;
  // One vector of sources holds all that one vector of lanes reads.
  const bool permuted =
      !pixels && lanes == WideVec<T>::kLanes && sources[used - 1] - sources[0] < WideVec<T>::kLanes;
  const LanePermutation<T> permutation(sources, permuted ? used : 1);
  if (pixels) src += block * view.C * view.src.c;
  if (pixels && view.src.c == 1 && view.C > 1) {
    fill_transposed(view, src, i0, scratch);
    return;
  }
  for (int64_t c = 0; c < view.C; ++c, src += view.src.c) {
    // Rows in the order of memory, which is what the hardware prefetches.
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t phase_h = 0; phase_h < phases_h_; ++phase_h) {
        const int64_t h = (i0 + row) * view.step_h + first_h_ + phase_h;
        Wide<T>* dst =
            scratch + (c * phases_h_ + phase_h) * phases_w_ * plane_ + row * width * lanes;
        if (pixels && step == 2 && phases_w_ == 2 && h >= 0 && h < view.H) {
          split_padded_row(dst, dst + plane_, src + h * view.src.row, first_column_[0], view.W,
                           width);
          continue;
        }
        for (int64_t phase_w = 0; phase_w < phases_w_; ++phase_w, dst += plane_) {
          const Range range = h < 0 || h >= view.H ? Range{0, 0} : ranges_[phase_w];
          if (range.begin >= range.end) {
            fill_zero(dst, width * lanes);
            continue;
          }
          const T* from = src + h * view.src.row + first_column_[phase_w];
          if (pixels) {
            // Planes are often shorter than a page, at whose end the hardware prefetcher stops.
            if (phase_w == 0 && step == 1)
              for (int64_t i = range.begin; i < range.end;
                   i += 64 / static_cast<int64_t>(sizeof(T)))
                __builtin_prefetch(from + next_band_ + i);
            copy_padded_row(dst, from, step, range.begin, range.end, width);
            continue;
          }
          fill_zero(dst, range.begin * lanes);
          Wide<T>* to = dst + range.begin * lanes;
          for (int64_t m = range.begin; m < range.end; ++m, to += lanes) {
            const T* pixel = from + m * step;
            if (neighbours)
              copy_wide(to, pixel + first_lane, used);
            else if (permuted)
              permutation.copy(to, pixel);
            else
              for (int64_t l = 0; l < used; ++l) to[l] = to_wide(pixel[sources[l]]);
            fill_zero(to + used, lanes - used);
          }
          fill_zero(to, (width - range.end) * lanes);
        }
      }
    }
  }
  clear_slack<T>(scratch);
}

template <typename T>
void ConvBand::clear_slack(Wide<T>* scratch) const {
  const int64_t slack = plane_ - rows_ * width * lanes;
  for (Wide<T>* plane = scratch; plane < scratch + size; plane += plane_)
    fill_zero(plane + plane_ - slack, slack);
}

template <typename T>
void ConvBand::fill_transposed(const ConvView& view, const T* src, int64_t i0,
                               Wide<T>* scratch) const {
  const int64_t stride = phases_h_ * phases_w_ * plane_;  // between channels
  const int64_t step = view.step_w * view.src.column;
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t phase_h = 0; phase_h < phases_h_; ++phase_h) {
      const int64_t h = (i0 + row) * view.step_h + first_h_ + phase_h;
      for (int64_t phase_w = 0; phase_w < phases_w_; ++phase_w) {
        Wide<T>* dst = scratch + (phase_h * phases_w_ + phase_w) * plane_ + row * width;
        const Range range = h < 0 || h >= view.H ? Range{0, 0} : ranges_[phase_w];
        for (int64_t c = 0; c < view.C; ++c) {
          fill_zero(dst + c * stride, range.begin);
          fill_zero(dst + c * stride + range.end, width - range.end);
        }
        if (range.begin < range.end)
          pack_transposed(src + h * view.src.row + first_column_[phase_w] + range.begin * step,
                          step, range.size(), view.C, dst + range.begin, stride);
      }
    }
  }
  clear_slack<T>(scratch);
}

}  // namespace torchconv::cpu
