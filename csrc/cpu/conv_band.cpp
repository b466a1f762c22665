// The geometry of a band, from one sample's shape, and its copies, compiled once.
#include "cpu/conv_band.h"

#include <algorithm>
#include <numeric>

#include "cpu/channel_pairs.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {

namespace {

// Elements of scratch that a band may take.
constexpr int64_t most_elements(int64_t element_size) { return (512 << 10) / element_size; }
// Filters for which a view is cut into pieces, and the least columns of one: many lines of the
// image.
constexpr int64_t kPieceFilters = 8, kPieceColumns = 128;

// Rows of an image into the rows of the planes of a step's phases.
struct SplitRows {
  int64_t rows, src_row, row, plane, phases;
  int64_t first, W, width;
  int64_t ahead;  // elements that follow each at this distance are fetched
};

// to[phase*plane + i] = src[first + kStep*i + phase], zero outside [0, W), for i < width. Whole
// vectors are stored, up to a vector past the last row's end.
template <typename T, int kStep>
void split_padded_rows(const SplitRows& s, const T* src, Wide<T>* to) {
  using V = WideVec<T>;
  using Type = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  for (int64_t i = 0; i < s.width; i += kL) {
    // What follows the last vector of a row is the next row's, which is there already but for the
    // first vector.
    const int64_t stored = i == 0 ? kL : std::min(kL, s.width - i);
    int64_t column[kStep], begin[kStep], end[kStep];
    unroll<kStep>([&](auto part) TORCHCONV_INLINE_LAMBDA {
      column[part] = s.first + kStep * i + part * kL;
      begin[part] = std::min(std::max(-column[part], int64_t{0}), kL);
      end[part] = std::max(std::min(s.W - column[part], kL), begin[part]);
    });
    const T* from = src;
    Wide<T>* row = to + i;
    for (int64_t y = 0; y < s.rows; ++y, from += s.src_row, row += s.row) {
      Type v[kStep];
      unroll<kStep>([&](auto part) TORCHCONV_INLINE_LAMBDA {
        const T* p = from + column[part];
        __builtin_prefetch(p + s.ahead);
        v[part] =
            end[part] - begin[part] == kL ? V::load(p) : load_lanes(p, begin[part], end[part]);
      });
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        if (phase >= s.phases) return;
        const Type lanes = collect_lanes<PhaseLanes<kStep, phase, V::kLanes>, V::kLanes>(v);
        if (stored == kL)
          V::Registers::store(row + phase * s.plane, lanes);
        else
          V::Registers::store_partial(row + phase * s.plane, lanes, stored);
      });
    }
  }
}

template <typename T>
void split_padded_rows(int64_t step, const SplitRows& s, const T* src, Wide<T>* to) {
  if (step == 1) return split_padded_rows<T, 1>(s, src, to);
  if (step == 2) return split_padded_rows<T, 2>(s, src, to);
  if (step == 3) return split_padded_rows<T, 3>(s, src, to);
  split_padded_rows<T, kMostLaneStep>(s, src, to);
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

}  // namespace

bool packs_channels(const ConvView& view, int64_t vector_lanes) {
  return view.C == 1 && view.K == 1 && view.src.c == 1 && view.src.column == view.groups &&
         view.dst.c == 1 && view.dst.column == view.groups && view.groups <= 2 * vector_lanes;
}

BandExtent::BandExtent(const ConvView& view, bool along_pixels, int64_t element_size,
                       int64_t vector_lanes, bool packed)
    : fits(false) {
  const int64_t most = most_elements(element_size);
  const bool two_vectors = view.C == 1 && view.groups * view.K > vector_lanes;
  lanes = along_pixels ? 1 : packed ? view.groups : two_vectors ? 2 * vector_lanes : vector_lanes;
  const Range taps_h = tap_span(view, &ConvTap::h), taps_w = tap_span(view, &ConvTap::w);
  first_h = taps_h.begin, first_w = taps_w.begin;
  const int64_t span_h = taps_h.size() - 1, span_w = taps_w.size() - 1;
  phases_h = std::min(view.step_h, span_h + 1);
  phases_w = std::min(view.step_w, span_w + 1);
  width = view.J + span_w / view.step_w;
  // The zeros right of a row may be those left of the next.
  const int64_t right = view.J - 1 + first_w + span_w - (view.W - 1);
  shared = view.step_w == 1 ? std::max<int64_t>(std::min({-first_w, right, span_w}), 0) : 0;
  width -= shared;
  halo = span_h / view.step_h;
  // The second factor guards the products below.
  if (width > most || halo > most || phases_h > most || phases_w > most) return;
  row = static_cast<double>(view.C) * static_cast<double>(phases_h * phases_w) *
        static_cast<double>(width * lanes);
  fits = row * static_cast<double>(halo + 1) <= static_cast<double>(most);
}

std::vector<ConvView> column_pieces(const ConvView& view, int64_t element_size,
                                    int64_t vector_lanes) {
  const BandExtent extent(view, true, element_size, vector_lanes);
  if (extent.fits || view.groups > 1 || view.K > kPieceFilters || !view.src_pixels_contiguous())
    return {view};
  const double columns = static_cast<double>(most_elements(element_size)) /
                         static_cast<double>(view.C * extent.phases_h * extent.phases_w) /
                         static_cast<double>(extent.halo + 1);
  const auto most = static_cast<int64_t>(columns) - (extent.width - view.J);
  if (most < kPieceColumns) return {view};
  const int64_t width = std::min(most, ceil_div(view.J, ceil_div(view.J, most)));
  std::vector<ConvView> pieces;
  for (int64_t j = 0; j < view.J; j += width) {
    ConvView& piece = pieces.emplace_back(view);
    piece.J = std::min(width, view.J - j);
    piece.dst_offset += j * view.dst.column;
    for (ConvTap& tap : piece.taps) tap.w += j * view.step_w;
  }
  return pieces;
}

ConvBand::ConvBand(const ConvView& view, bool along_pixels, int64_t element_size,
                   int64_t vector_lanes, int64_t most_rows, bool packs)
    : pixels(along_pixels), packed(packs) {
  const BandExtent extent(view, along_pixels, element_size, vector_lanes, packed);
  lanes = extent.lanes;
  unit = std::lcm(lanes, vector_lanes);
  first_h_ = extent.first_h;
  phases_h_ = extent.phases_h, phases_w_ = extent.phases_w;
  width = extent.width;
  // Bands are cut to stay in the first-level cache (one plane) or the second.
  const int64_t budget = (pixels && view.C == 1 ? 32 << 10 : 384 << 10) / element_size;
  const int64_t channels = view.groups * view.K;
  blocks = pixels ? view.groups : (channels + lanes - 1) / lanes;
  if (!pixels) {
    lane_source_.reserve(static_cast<size_t>(channels));
    for (int64_t channel = 0; channel < channels; ++channel)
      lane_source_.push_back(channel / view.K * view.C * view.src.c);
  }
  const int64_t halo = extent.halo;
  const double row = extent.row;
  const int64_t affordable = static_cast<int64_t>(static_cast<double>(budget) / row) - halo;
  // At least as many rows as the halo repeats, where they exist.
  band = std::min(view.I, std::max({affordable, std::min(halo, int64_t{8}), int64_t{1}}));
  if (most_rows > 0) band = std::min(view.I, most_rows);
  bands = (view.I + band - 1) / band;
  band = (view.I + bands - 1) / bands;
  bands = (view.I + band - 1) / band;
  rows_ = band + halo;
  next_band_ = std::min(view.H, band * view.step_h) * view.src.row;
  plane_ = rows_ * width * lanes + (pixels ? vector_lanes : unit) + extent.shared * lanes;
  size = view.C * phases_h_ * phases_w_ * plane_;
  ranges_.reserve(static_cast<size_t>(phases_w_));
  first_column_.reserve(static_cast<size_t>(phases_w_));
  for (int64_t phase = 0; phase < phases_w_; ++phase) {
    ranges_.push_back(valid_range(width, view.step_w, extent.first_w + phase, view.W));
    first_column_.push_back((extent.first_w + phase) * view.src.column);
  }
  offsets.reserve(static_cast<size_t>(view.terms()));
  for (int64_t c = 0; c < view.C; ++c) {
    for (const ConvTap& tap : view.taps) {
      const int64_t h = tap.h - first_h_, w = tap.w - extent.first_w;
      const int64_t phase = (c * phases_h_ + h % view.step_h) * phases_w_ + w % view.step_w;
      offsets.push_back(phase * plane_ + (h / view.step_h * width + w / view.step_w) * lanes);
    }
  }
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

template <typename T>
void ConvBand::fill_split(const ConvView& view, const T* src, int64_t i0, Wide<T>* scratch) const {
  for (int64_t c = 0; c < view.C; ++c, src += view.src.c)
    for (int64_t phase = 0; phase < phases_h_; ++phase, scratch += phases_w_ * plane_) {
      const int64_t h = i0 * view.step_h + first_h_ + phase;
      const Range inside = valid_range(rows_, view.step_h, h, view.H);
      if (!inside.empty())
        split_padded_rows<T>(view.step_w,
                             {inside.size(), view.step_h * view.src.row, width, plane_, phases_w_,
                              first_column_[0], view.W, width, next_band_},
                             src + (h + inside.begin * view.step_h) * view.src.row,
                             scratch + inside.begin * width);
      for (int64_t p = 0; p < phases_w_; ++p) {
        fill_zero(scratch + p * plane_, inside.begin * width);
        fill_zero(scratch + p * plane_ + inside.end * width, plane_ - inside.end * width);
      }
    }
}

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
  // Columns of larger steps are taken one by one.
  if (pixels && view.src.column == 1 && step <= kMostLaneStep) {
    fill_split(view, src, i0, scratch);
    return;
  }
  for (int64_t c = 0; c < view.C; ++c, src += view.src.c) {
    // Rows in the order of memory, which is what the hardware prefetches.
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t phase_h = 0; phase_h < phases_h_; ++phase_h) {
        const int64_t h = (i0 + row) * view.step_h + first_h_ + phase_h;
        Wide<T>* dst =
            scratch + (c * phases_h_ + phase_h) * phases_w_ * plane_ + row * width * lanes;
        for (int64_t phase_w = 0; phase_w < phases_w_; ++phase_w, dst += plane_) {
          const Range range = h < 0 || h >= view.H ? Range{0, 0} : ranges_[phase_w];
          if (range.begin >= range.end) {
            fill_zero(dst, width * lanes);
            continue;
          }
          const T* from = src + h * view.src.row + first_column_[phase_w];
          if (pixels) {
            copy_padded_row(dst, from, step, range.begin, range.end, width);
            continue;
          }
          fill_zero(dst, range.begin * lanes);
          Wide<T>* to = dst + range.begin * lanes;
          if (neighbours && lanes == step && used == lanes) {
            copy_wide(to, from + range.begin * step, range.size() * lanes);
            fill_zero(dst + range.end * lanes, (width - range.end) * lanes);
            continue;
          }
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

#define TORCHCONV_CONV_BAND(T) \
  template void ConvBand::fill(const ConvView&, const T*, int64_t, int64_t, Wide<T>*) const;
TORCHCONV_CONV_BAND(float)
TORCHCONV_CONV_BAND(double)
TORCHCONV_CONV_BAND(BFloat16)
TORCHCONV_CONV_BAND(Float16)
#undef TORCHCONV_CONV_BAND

void ConvBand::fill_pairs(const ConvView& view, const BFloat16* src, int64_t block, int64_t i0,
                          float* scratch) const {
  using Bits = Vec<uint32_t>;
  constexpr int64_t kL = Bits::kLanes;
  src += block * view.C * view.src.c;
  for (int64_t c = 0; c < view.C; c += 2, src += 2 * view.src.c) {
    const bool both = c + 1 < view.C;
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t phase = 0; phase < phases_h_; ++phase) {
        const int64_t h = (i0 + row) * view.step_h + first_h_ + phase;
        float* const to = scratch + (c / 2 * phases_h_ + phase) * plane_ + row * width;
        const Range range = h < 0 || h >= view.H ? Range{0, 0} : ranges_[0];
        if (range.begin >= range.end) {
          fill_zero(to, width);
          continue;
        }
        fill_zero(to, range.begin);
        const BFloat16* const even = src + h * view.src.row + first_column_[0];
        const BFloat16* const odd = both ? even + view.src.c : even;
        for (int64_t i = range.begin; i < range.end; i += kL) {
          const int64_t n = std::min(kL, range.end - i);
          __builtin_prefetch(even + next_band_ + i);
          __builtin_prefetch(odd + next_band_ + i);
          Bits::store_partial(to + i, zip_pairs(even + i, n, odd + i, both ? n : 0), n);
        }
        fill_zero(to + range.end, width - range.end);
      }
  }
  clear_slack<BFloat16>(scratch);
}

}  // namespace torchconv::cpu
