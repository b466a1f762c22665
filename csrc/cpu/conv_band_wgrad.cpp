// wgrad over a band of x, the one that fprop uses (conv_band.h): each tap is a dot product of dz
// with the image shifted by the tap, zeros standing where one row's positions run into the next.
// Vectors run along pixels, a few filters at a time (tap_products.h), or along the channels of
// narrow groups (taps.h), packed where they can be. Sums in registers are short, those of a slab
// are compensated where they are long, and slabs are added in order; bands are dealt to slabs by
// the shape alone, never by the thread count.
#include "cpu/conv_band_wgrad.h"

#include <atomic>

#include "core/buffer.h"
#include "cpu/compensated_sum.h"
#include "cpu/microkernels/tap_products.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"
#include "cpu/slabs.h"
#include "cpu/wgrad_pixels.h"

namespace torchconv::cpu {
namespace {

// Products that are added up in registers, and such sums that are added up plainly.
constexpr int64_t kDotLength = 192;
constexpr int64_t kPlainSums = 64;
// Vectors of dz that a first-level cache holds beside those of x.
constexpr int64_t kGradientVectors = 256;
// Slabs, if each has so many products for a sum: adding up the slabs costs a few.
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kSlabProducts = 128;

template <typename T>
class BandWgrad {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  BandWgrad(const ConvView& view, const ConvBand& band, const T* dz, const T* x, T* dw)
      : view_(view), band_(band), dz_(dz), x_(x), dw_(dw), terms_(view.terms()) {
    filter_blocks_ = ceil_div(view.K, int64_t{kMostFilters});
    const int64_t filters = ceil_div(view.K, filter_blocks_);
    chunk_ = std::min(kDotLength, kGradientVectors / filters);
    items_ = view.N * band.bands;
    const int64_t products = band.band * band.width / (band.pixels ? kL : band.unit / band.lanes);
    slabs_ = std::min(kTasksWanted / band.blocks, items_);
    slabs_ = even_slabs(std::max<int64_t>(1, std::min(slabs_, items_ * products / kSlabProducts)));
    slab_ = ceil_div(items_, slabs_);
    sums_size_ = per_block() * terms_ * lanes();
    gradient_size_ = band.pixels ? filters * gradient_step() : units() * band.unit;
  }

  // Whether all of the gradient is finite.
  bool run(const Parallel& pool) {
    const int64_t scratch_size = round_up(band_.size, 16);
    const WorkSplit split(band_.blocks * slabs_,
                          static_cast<double>(slab_ * band_.band * band_.width * lanes_read()) *
                              static_cast<double>(per_block() * terms_ + 8));
    Buffer<A> sums(band_.blocks * slabs_ * sums_size_);
    Buffer<A> scratch(split.slots * (scratch_size + gradient_size_));
    const int64_t totals_size = compensated() ? 2 * sums_size_ : 0;
    Buffer<A> totals(split.slots * totals_size);
    constexpr int64_t kFetches = FetchList::kCapacity + FetchList::kSlack;
    Buffer<uint64_t> fetch_lists(split.slots * kFetches);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* source = scratch.get() + slot * (scratch_size + gradient_size_);
      Scratch s{source, source + scratch_size, totals.get() + slot * totals_size,
                FetchList(fetch_lists.get() + slot * kFetches)};
      for (int64_t task = begin; task < end; ++task)
        accumulate(task / slabs_, task % slabs_, sums.get() + task * sums_size_, s);
    });
    return finish(sums.get(), pool);
  }

 private:
  struct Scratch {
    A* source;    // the band
    A* gradient;  // a chunk of dz; along channels, a row
    A* totals;
    FetchList fetch;
  };

  // Sums that a block holds for each term, and the lanes of a sum: along pixels they are added at
  // the end.
  int64_t per_block() const { return band_.pixels ? view_.K : 1; }
  int64_t lanes() const { return band_.pixels ? kL : band_.unit; }
  int64_t lanes_read() const { return band_.pixels ? 1 : band_.lanes; }
  // Of a row along channels: pixels, or several of them packed.
  int64_t units() const { return ceil_div(view_.J * band_.lanes, band_.unit); }
  // Of the filters of a chunk: an odd number of cache lines.
  int64_t gradient_step() const { return round_up(chunk_, 2) * kL + 64 / sizeof(A); }

  // Sums in registers that a band adds to each sum.
  int64_t band_dots() const {
    return band_.pixels ? ceil_div(band_.positions(band_.band, view_.J), kL * chunk_)
                        : band_.band * ceil_div(units(), kDotLength);
  }
  bool compensated() const { return slab_ * band_dots() > kPlainSums; }

  void accumulate(int64_t block, int64_t slab, A* sums, Scratch& s) const {
    const int64_t last = (slab + 1) * items_ / slabs_;
    int64_t dots = 0;
    bool fresh = true, first = true;  // sums, totals
    for (int64_t item = slab * items_ / slabs_; item < last; ++item) {
      const int64_t i0 = item % band_.bands * band_.band;
      const int64_t rows = std::min(band_.band, view_.I - i0);
      band_.fill(view_, x_ + item / band_.bands * view_.src.n, block, i0, s.source);
      if (band_.pixels)
        add_pixels(block, item, item + 1 < last, rows, !fresh, sums, s);
      else
        add_channels(item_gradient(item), block * band_.lanes, rows, !fresh, sums, s);
      fresh = false;
      dots += band_dots();
      const bool end = item + 1 == last;
      if (compensated() && (dots > kPlainSums || end)) {
        add_compensated(sums, sums_size_, first, end, s.totals);
        first = false;
        fresh = true;
        dots = 0;
      }
    }
  }

  const T* item_gradient(int64_t item) const {
    return dz_ + item / band_.bands * view_.dst.n + item % band_.bands * band_.band * view_.dst.row;
  }

  void add_pixels(int64_t block, int64_t item, bool more, int64_t rows, bool add, A* sums,
                  Scratch& s) const {
    const int64_t size = chunk_ * kL, positions = band_.positions(rows, view_.J);
    for (int64_t begin = 0; begin < positions; begin += size) {
      const Range chunk{begin, std::min(begin + size, positions)};
      const bool inside = chunk.end < positions;
      const Range next{inside ? chunk.end : 0,
                       std::min(inside ? chunk.end + size : size, positions)};
      for (int64_t part = 0; part < filter_blocks_; ++part) {
        const int64_t k = part * view_.K / filter_blocks_;
        const int64_t filters = (part + 1) * view_.K / filter_blocks_ - k;
        const int64_t channel = (block * view_.K + k) * view_.dst.c;
        copy_gradient(item_gradient(item) + channel, filters, chunk, s.gradient);
        s.fetch.clear();
        if (inside || more)
          fetch_gradient(item_gradient(inside ? item : item + 1) + channel, filters, next, s.fetch);
        s.fetch.close(s.gradient);
        tap_products<A>({s.gradient, s.source + begin, band_.offsets.data(), sums + k * terms_ * kL,
                         filters, terms_, gradient_step(), ceil_div(chunk.size(), kL),
                         add || begin > 0, s.fetch.from(0), s.fetch.size()});
      }
    }
  }

  // What copy_gradient reads.
  void fetch_gradient(const T* dz, int64_t filters, Range positions, FetchList& fetch) const {
    const auto offset = [&](int64_t at) {
      return at / band_.width * view_.dst.row +
             std::min(at % band_.width, view_.J) * view_.dst.column;
    };
    const int64_t begin = offset(positions.begin), end = offset(positions.end);
    const int64_t size = static_cast<int64_t>(sizeof(T));
    if (view_.dst.column > 1) return fetch.add(dz, begin * size, (end - begin) * size);
    for (int64_t f = 0; f < filters; ++f)
      fetch.add(dz, (f * view_.dst.c + begin) * size, (end - begin) * size);
  }

  // dz at `positions` in whole vectors, zero where there are no pixels.
  void copy_gradient(const T* dz, int64_t filters, Range positions, A* to) const {
    const int64_t end = positions.begin + round_up(positions.size(), kL);
    int64_t i = positions.begin / band_.width, j = positions.begin % band_.width;
    for (int64_t at = positions.begin; at < end; ++i, j = 0) {
      const int64_t next = std::min(at + band_.width - j, end);
      const int64_t pixels =
          at < positions.end ? std::max<int64_t>(std::min(view_.J - j, next - at), 0) : 0;
      copy_pixels(dz + i * view_.dst.row + j * view_.dst.column, filters, pixels, next - at, to);
      to += next - at;
      at = next;
    }
  }

  // n pixels, and zeros up to `size`. Up to a vector of zeros may follow.
  void copy_pixels(const T* from, int64_t filters, int64_t n, int64_t size, A* to) const {
    const int64_t step = gradient_step();
    if (n > 0 && view_.dst.c == 1 && view_.dst.column != 1) {
      pack_transposed(from, view_.dst.column, n, filters, to, step);
      for (int64_t f = 0; f < filters; ++f) fill_zero(to + f * step + n, size - n);
      return;
    }
    for (int64_t f = 0; f < filters; ++f)
      copy_padded_row(to + f * step, from + f * view_.dst.c, view_.dst.column, 0, n, size);
  }

  void add_channels(const T* dz, int64_t channel, int64_t rows, bool add, A* sums,
                    Scratch& s) const {
    if (!add) fill_zero(sums, sums_size_);
    A* const gradient = s.gradient;
    const int64_t lanes = band_.lanes, unit = band_.unit;
    const int64_t used = std::min(lanes, view_.groups * view_.K - channel);
    for (int64_t i = 0; i < rows; ++i) {
      if (band_.packed) {
        const int64_t size = view_.J * lanes;
        copy_wide(gradient, dz + i * view_.dst.row, size);
        fill_zero(gradient + size, units() * unit - size);
      }
      for (int64_t j = 0; j < view_.J && !band_.packed; ++j) {
        A* to = gradient + j * lanes;
        copy_strided(to, dz + channel * view_.dst.c + i * view_.dst.row + j * view_.dst.column,
                     used, view_.dst.c);
        fill_zero(to + used, lanes - used);
      }
      const A* row = s.source + i * band_.width * lanes;
      for (int64_t u = 0; u < units(); u += kDotLength)
        tap_dot<A>({gradient + u * unit, row + u * unit, band_.offsets.data(), sums, terms_, unit,
                    std::min(kDotLength, units() - u), unit, unit, unit / kL});
    }
  }

  // dw from the slabs' sums, in order: a vector of terms of one filter at a time.
  bool finish(const A* sums, const Parallel& pool) const {
    const int64_t tiles = ceil_div(terms_, kL);
    const int64_t filters = band_.pixels ? view_.K : band_.lanes;
    std::atomic<bool> finite{true};
    const WorkSplit split(view_.groups * view_.K * tiles,
                          kFarAddition * static_cast<double>(kL * lanes() * (slabs_ + 4)));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      bool all = true;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t channel = item / tiles, term = item % tiles * kL;
        const int64_t within = channel % filters;
        const A* first = sums + channel / filters * slabs_ * sums_size_ +
                         (band_.pixels ? (within * terms_ + term) * kL : term * lanes() + within);
        A totals[kL] = {};
        const int64_t n = std::min(kL, terms_ - term);
        if (band_.pixels)
          add_slabs(first, n, totals);
        else
          for (int64_t slab = 0; slab < slabs_; ++slab)
            for (int64_t t = 0; t < n; ++t)
              for (int64_t l = 0; l + within < lanes(); l += band_.lanes)
                totals[t] += first[slab * sums_size_ + t * lanes() + l];
        all = store(channel, term, n, totals) && all;
      }
      if (!all) finite.store(false);
    });
    return finite.load();
  }

  // totals[t] is the sum of vector t of n over all slabs and lanes.
  void add_slabs(const A* first, int64_t n, A* totals) const {
    using V = Vec<A>;
    typename V::Type sum[kL];
    for (int64_t t = 0; t < kL; ++t) {
      sum[t] = typename V::Type{};
      if (t >= n) continue;
      for (int64_t slab = 0; slab < slabs_; ++slab)
        sum[t] += V::load(first + slab * sums_size_ + t * kL);
    }
    transpose_steps<1>(sum);
#pragma GCC unroll 8
    for (int half = kL / 2; half > 0; half /= 2)
#pragma GCC unroll 16
      for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
    V::store(totals, sum[0]);
  }

  // False if any is not finite.
  bool store(int64_t channel, int64_t term, int64_t n, const A* totals) const {
    const int64_t taps = static_cast<int64_t>(view_.taps.size());
    T* dw = dw_ + channel / view_.K * view_.weight_group + channel % view_.K * view_.weight_k;
    bool finite = true;
    int64_t c = term / taps, tap = term % taps;
    for (int64_t t = 0; t < n; ++t) {
      const T value = from_wide<T>(totals[t]);
      finite = finite && to_wide(value) * 0 == 0;
      dw[c * view_.weight_c + view_.taps[tap].weight] = value;
      if (++tap == taps) {
        tap = 0;
        ++c;
      }
    }
    return finite;
  }

  const ConvView& view_;
  const ConvBand& band_;
  const T* dz_;
  const T* x_;
  T* dw_;
  int64_t terms_, filter_blocks_;
  int64_t chunk_;         // vectors of positions
  int64_t items_;         // bands of all samples
  int64_t slabs_, slab_;  // of this many bands or one less
  int64_t sums_size_, gradient_size_;
};

// Bands that there should be of all samples and blocks, for the threads.
constexpr int64_t kBandsWanted = 16;

}  // namespace

ConvBand band_wgrad_band(const ConvView& view, bool along_pixels, int64_t element_size,
                         int64_t vector_lanes) {
  const bool packed = !along_pixels && packs_channels(view, vector_lanes);
  const ConvBand band(view, along_pixels, element_size, vector_lanes, 0, packed);
  const int64_t wanted = std::min(ceil_div(kBandsWanted, view.N * band.blocks), view.I);
  if (band.bands >= wanted) return band;
  return ConvBand(view, along_pixels, element_size, vector_lanes, ceil_div(view.I, wanted), packed);
}

template <typename T>
bool band_wgrad(const ConvView& view, bool along_pixels, const T* dz, const T* x, T* dw,
                const Parallel& pool) {
  const ConvBand band = band_wgrad_band(view, along_pixels, sizeof(Wide<T>), kLanes<Wide<T>>);
  return BandWgrad<T>(view, band, dz, x, dw).run(pool);
}

template bool band_wgrad(const ConvView&, bool, const float*, const float*, float*,
                         const Parallel&);
template bool band_wgrad(const ConvView&, bool, const double*, const double*, double*,
                         const Parallel&);
template bool band_wgrad(const ConvView&, bool, const BFloat16*, const BFloat16*, BFloat16*,
                         const Parallel&);
template bool band_wgrad(const ConvView&, bool, const Float16*, const Float16*, Float16*,
                         const Parallel&);

}  // namespace torchconv::cpu
