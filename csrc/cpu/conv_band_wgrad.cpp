// wgrad with few channels in a group: each tap is a dot product of dz with the image shifted by the
// tap. The band of x is the one that fprop uses (conv_band.h); dz is copied beside it with zeros
// where one row's positions run into the next. Sums in registers are short, those of a slab are
// compensated where they are long, and slabs are added in order; samples are dealt to slabs by the
// shape alone, never by the thread count.
#include "cpu/conv_band_wgrad.h"

#include "core/buffer.h"
#include "cpu/compensated_sum.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Products that are added up in registers, and such sums that are added up plainly.
constexpr int64_t kDotLength = 192;
constexpr int64_t kPlainSums = 64;

template <typename T>
class BandWgrad {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  BandWgrad(const ConvView& view, const ConvBand& band, const T* dz, const T* x, T* dw)
      : view_(view), band_(band), dz_(dz), x_(x), dw_(dw), terms_(view.terms()) {
    constexpr int64_t kTasksWanted = 32;
    slabs_ = std::max<int64_t>(1, std::min(view.N, kTasksWanted / band.blocks));
    slab_ = ceil_div(view.N, slabs_);
    slabs_ = ceil_div(view.N, slab_);
    sums_size_ = per_block() * terms_ * lanes();
  }

  void run(const Parallel& pool) {
    const int64_t dz_size = round_up(band_.positions(band_.band, view_.J), kL) * band_.lanes;
    const int64_t scratch_size = round_up(band_.size, 16);
    const WorkSplit split(band_.blocks * slabs_,
                          static_cast<double>(slab_ * band_.bands * dz_size) *
                              static_cast<double>(per_block() * terms_ + 8));
    Buffer<A> sums(band_.blocks * slabs_ * sums_size_);
    Buffer<A> scratch(split.slots * (scratch_size + dz_size));
    const int64_t totals_size = compensated() ? 2 * sums_size_ : 0;
    Buffer<A> totals(split.slots * totals_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* source = scratch.get() + slot * (scratch_size + dz_size);
      for (int64_t task = begin; task < end; ++task)
        accumulate(task / slabs_, task % slabs_, source, source + scratch_size,
                   sums.get() + task * sums_size_, totals.get() + slot * totals_size);
    });
    finish(sums.get());
  }

 private:
  // Sums that a block holds for each term, and the lanes of a sum: along pixels they are added at
  // the end.
  int64_t per_block() const { return band_.pixels ? view_.K : 1; }
  int64_t lanes() const { return band_.pixels ? kL : band_.lanes; }

  // Sums in registers that a band adds to each sum.
  int64_t band_dots() const {
    return band_.pixels ? ceil_div(band_.positions(band_.band, view_.J), kL * kDotLength)
                        : band_.band * ceil_div(view_.J, kDotLength);
  }
  bool compensated() const { return slab_ * band_.bands * band_dots() > kPlainSums; }

  void accumulate(int64_t block, int64_t slab, A* source, A* gradient, A* sums, A* totals) const {
    fill_zero(sums, sums_size_);
    const int64_t last = std::min((slab + 1) * slab_, view_.N);
    int64_t dots = 0;
    bool first = true;
    for (int64_t n = slab * slab_; n < last; ++n) {
      for (int64_t i0 = 0; i0 < view_.I; i0 += band_.band) {
        const int64_t rows = std::min(band_.band, view_.I - i0);
        const T* dz = dz_ + n * view_.dst.n + i0 * view_.dst.row;
        band_.fill(view_, x_ + n * view_.src.n, block, i0, source);
        if (band_.pixels) {
          for (int64_t k = 0; k < view_.K; ++k)
            add_pixels(source, dz + (block * view_.K + k) * view_.dst.c, rows, gradient,
                       sums + k * terms_ * lanes());
        } else {
          add_channels(source, dz, block * band_.lanes, rows, gradient, sums);
        }
        dots += band_dots();
        const bool end = n + 1 == last && i0 + band_.band >= view_.I;
        if (compensated() && (dots > kPlainSums || end)) {
          add_compensated(sums, sums_size_, first, end, totals);
          if (!end) fill_zero(sums, sums_size_);
          first = false;
          dots = 0;
        }
      }
    }
  }

  void add_pixels(const A* source, const T* dz, int64_t rows, A* gradient, A* sums) const {
    const int64_t gap = band_.width - view_.J;
    const int64_t positions = band_.positions(rows, view_.J);
    const int64_t vectors = ceil_div(positions, kL);
    for (int64_t i = 0; i < rows; ++i) {
      A* row = gradient + i * band_.width;
      copy_strided(row, dz + i * view_.dst.row, view_.J, view_.dst.column);
      if (i + 1 < rows) fill_zero(row + view_.J, gap);
    }
    fill_zero(gradient + positions, vectors * kL - positions);
    for (int64_t v = 0; v < vectors; v += kDotLength)
      tap_dot<A>({gradient + v * kL, source + v * kL, band_.offsets.data(), sums, terms_, kL,
                  std::min(kDotLength, vectors - v), kL, kL, 1});
  }

  void add_channels(const A* source, const T* dz, int64_t channel, int64_t rows, A* gradient,
                    A* sums) const {
    const int64_t lanes = band_.lanes;
    const int64_t used = std::min(lanes, view_.groups * view_.K - channel);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < view_.J; ++j) {
        A* to = gradient + j * lanes;
        copy_strided(to, dz + channel * view_.dst.c + i * view_.dst.row + j * view_.dst.column,
                     used, view_.dst.c);
        fill_zero(to + used, lanes - used);
      }
      const A* row = source + i * band_.width * lanes;
      for (int64_t j = 0; j < view_.J; j += kDotLength)
        tap_dot<A>({gradient + j * lanes, row + j * lanes, band_.offsets.data(), sums, terms_,
                    lanes, std::min(kDotLength, view_.J - j), lanes, lanes, lanes / kL});
    }
  }

  void finish(const A* sums) const {
    const int64_t taps = static_cast<int64_t>(view_.taps.size());
    const int64_t per_block = band_.pixels ? view_.K : band_.lanes;
    for (int64_t channel = 0; channel < view_.groups * view_.K; ++channel) {
      const int64_t within = channel % per_block;
      const A* first = sums + channel / per_block * slabs_ * sums_size_ +
                       (band_.pixels ? within * terms_ * kL : within);
      T* dw = dw_ + channel / view_.K * view_.weight_group + channel % view_.K * view_.weight_k;
      for (int64_t term = 0; term < terms_; ++term) {
        A total = 0;
        for (int64_t s = 0; s < slabs_; ++s) {
          const A* sum = first + s * sums_size_ + term * lanes();
          total += band_.pixels ? add_lanes(sum) : *sum;
        }
        dw[term / taps * view_.weight_c + view_.taps[term % taps].weight] = from_wide<T>(total);
      }
    }
  }

  static A add_lanes(const A* sum) {
    A part[kL];
    for (int64_t l = 0; l < kL; ++l) part[l] = sum[l];
    for (int64_t half = kL / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) part[l] += part[l + half];
    return part[0];
  }

  const ConvView& view_;
  const ConvBand& band_;
  const T* dz_;
  const T* x_;
  T* dw_;
  int64_t terms_, slabs_, slab_, sums_size_;
};

}  // namespace

template <typename T>
void band_wgrad(const ConvView& view, const ConvBand& band, const T* dz, const T* x, T* dw,
                const Parallel& pool) {
  BandWgrad<T>(view, band, dz, x, dw).run(pool);
}

template void band_wgrad(const ConvView&, const ConvBand&, const float*, const float*, float*,
                         const Parallel&);
template void band_wgrad(const ConvView&, const ConvBand&, const double*, const double*, double*,
                         const Parallel&);
template void band_wgrad(const ConvView&, const ConvBand&, const BFloat16*, const BFloat16*,
                         BFloat16*, const Parallel&);
template void band_wgrad(const ConvView&, const ConvBand&, const Float16*, const Float16*, Float16*,
                         const Parallel&);

}  // namespace torchconv::cpu
