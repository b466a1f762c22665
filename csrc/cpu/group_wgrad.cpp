// wgrad with few channels in a group, by the tiles of microkernels/group_tile.h: a lane is a
// filter, dz has the band of fprop's x (group_band.h) beside it, and the products of some taps and
// channels are summed in registers over some rows. Those sums are short, longer ones compensated
// (compensated_sum.h). They meanwhile fetch the next band. A task is a block of groups and a slab
// of bands; what a slab holds follows from the problem alone, and slabs are added in order.
#include "cpu/group_wgrad.h"

#include "core/buffer.h"
#include "cpu/compensated_sum.h"
#include "cpu/group_band.h"
#include "cpu/group_weights.h"
#include "cpu/group_winograd_wgrad.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Products that are added up in registers, and such sums that are added up plainly.
constexpr int64_t kDotLength = 192, kPlainSums = 64;
// Enough for several threads.
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kBlocksTogether = 4;

template <typename T>
class GroupWgrad {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  // winograd: what forms the products (of float), or null.
  GroupWgrad(const ConvView& view, const GroupWinogradDot* winograd, const T* dz, const T* x, T* dw)
      : view_(view),
        winograd_(winograd),
        band_(winograd != nullptr ? winograd->band()
                                  : GroupBand(view, sizeof(A), kPermutesLanes<A>)),
        lanes_(band_.source_lanes<A>(view)),
        runs_(group_runs(view)),
        pieces_(group_pieces(group_terms({&view}, band_, 1), kL)),
        dz_(dz),
        x_(x),
        dw_(dw) {
    const int64_t units = view.N * band_.bands;
    // Neighbouring blocks read the same rows of memory in channels_last.
    together_ = winograd != nullptr && winograd->reads_rows() ? band_.blocks
                : view.src.c == 1 ? std::min(band_.blocks, kBlocksTogether)
                                  : 1;
    sets_ = ceil_div(band_.blocks, together_);
    slab_ = ceil_div(units, std::clamp<int64_t>(kTasksWanted / sets_, 1, units));
    slabs_ = ceil_div(units, slab_);
    // Sums [vector of filters][vector of channels][run][channel][tap][lanes]
    channels_ = band_.groups > 1 ? view.C : std::min(view.C, kL);
    taps_ = static_cast<int64_t>(view.taps.size());
    sums_ = band_.dst_vectors * band_.src_vectors * channels_ * taps_ * kL;
    columns_ = std::min(view.J, kDotLength);
    rows_ = ceil_div(band_.band, ceil_div(band_.band * view.J, kDotLength));
    band_dots_ = ceil_div(band_.band, rows_) * ceil_div(view.J, columns_);
    for (int64_t v = 0; v < band_.src_vectors; ++v)
      tiles_ += ceil_div(channels_of(v), int64_t{kDotChannels});
    tiles_ *= band_dots_ * band_.dst_vectors * static_cast<int64_t>(runs_.size());
    if (winograd != nullptr) {
      sums_ = winograd->sums();
      band_dots_ = winograd->dots();
    }
    compensated_ = slab_ * band_dots_ > kPlainSums;
  }

  void run(const Parallel& pool) const {
    const int64_t outputs = band_.dst_vectors * band_.band * view_.J * kL;
    const int64_t source = round_up(winograd_ != nullptr ? winograd_->scratch() : band_.size, 16);
    const int64_t gradient = winograd_ != nullptr ? 0 : outputs;
    const int64_t totals = compensated_ ? 2 * sums_ * together_ : 0;
    const int64_t slot_size = round_up(source + gradient + totals, 16);
    const WorkSplit split(sets_ * slabs_,
                          static_cast<double>(slab_ * outputs * together_) *
                              static_cast<double>(band_.src_vectors * channels_ * taps_ + 8));
    Buffer<A> sums(band_.blocks * slabs_ * sums_);
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* const band = scratch.get() + slot * slot_size;
      for (int64_t task = begin; task < end; ++task)
        accumulate(task / slabs_ * together_, task % slabs_, sums.get(), band, band + source,
                   band + source + gradient);
    });
    const WorkSplit finishing(band_.blocks, static_cast<double>(slabs_ * sums_));
    finishing.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t block = begin; block < end; ++block)
        finish(block, sums.get() + block * slabs_ * sums_);
    });
  }

 private:
  // The blocks of a set from `block` on.
  void accumulate(int64_t block, int64_t slab, A* all_sums, A* band, A* gradient, A* totals) const {
    const int64_t blocks = std::min(together_, band_.blocks - block);
    const auto sums_of = [&](int64_t b) {
      return all_sums + ((block + b) * slabs_ + slab) * sums_;
    };
    for (int64_t b = 0; b < blocks; ++b) fill_zero(sums_of(b), sums_);
    const int64_t last = std::min((slab + 1) * slab_, view_.N * band_.bands);
    int64_t dots = 0;
    bool first = true;
    SourcePrefetch ahead;
    for (int64_t unit = slab * slab_; unit < last; ++unit) {
      const int64_t n = unit / band_.bands, i0 = unit % band_.bands * band_.band;
      const int64_t rows = std::min(band_.band, view_.I - i0);
      dots += band_dots_;
      const bool end = unit + 1 == last, flush = compensated_ && (dots > kPlainSums || end);
      for (int64_t b = 0; b < blocks; ++b) {
        A* const sums = sums_of(b);
        ahead.clear();
        if (winograd_ == nullptr && b + 1 < blocks)
          expect(unit, block + b + 1, ahead);
        else if (winograd_ == nullptr && !end)
          expect(unit + 1, block, ahead);
        add_band(n, block + b, {block, block + blocks}, i0, rows, band, gradient, sums, ahead);
        if (!flush) continue;
        add_compensated(sums, sums_, first, end, totals + 2 * b * sums_);
        if (!end) fill_zero(sums, sums_);
      }
      if (flush) {
        first = false;
        dots = 0;
      }
    }
  }

  void add_band(int64_t n, int64_t block, [[maybe_unused]] const Range& together, int64_t i0,
                int64_t rows, A* band, A* gradient, A* sums, SourcePrefetch& ahead) const {
    const T* const x = x_ + n * view_.src.n;
    const T* const dz = dz_ + n * view_.dst.n;
    if constexpr (std::is_same_v<T, float>)
      if (winograd_ != nullptr) return winograd_->add(dz, x, block, together, i0, rows, band, sums);
    band_.fill(view_, x, block, i0, band);
    fill_gradient(dz, block, i0, rows, gradient);
    add_products(band, gradient, rows, sums, ahead);
  }

  // What a band of a block reads.
  void expect(int64_t unit, int64_t block, SourcePrefetch& ahead) const {
    const int64_t n = unit / band_.bands, i0 = unit % band_.bands * band_.band;
    band_.expect(view_, x_ + n * view_.src.n, block, i0, ahead);
    prefetch_planes(
        dz_ + n * view_.dst.n + i0 * view_.dst.row + block * band_.groups * view_.K * view_.dst.c,
        view_.dst, band_.groups_in(view_, block) * view_.K, std::min(band_.band, view_.I - i0),
        view_.J, ahead);
  }

  int64_t gradient_plane() const { return band_.band * view_.J * kL; }

  void fill_gradient(const T* dz, int64_t block, int64_t i0, int64_t rows, A* gradient) const {
    dz += block * band_.groups * view_.K * view_.dst.c;
    for (int64_t v = 0; v < band_.dst_vectors; ++v)
      copy_group_window<T>(
          {view_.dst, band_.filters_in(view_, block, v), view_.I, view_.J, i0, rows, 0, view_.J, 0},
          dz + v * band_.vector_filters * view_.dst.c, gradient + v * gradient_plane());
  }

  void add_products(const A* band, const A* gradient, int64_t rows, A* sums,
                    SourcePrefetch& ahead) const {
    const int64_t lines = ceil_div(ahead.lines(), tiles_);
    GroupDot<A> d{};
    d.step = view_.step_w;
    d.dz_row = view_.J * kL;
    d.src_row = view_.step_h * band_.width * kL;
    for (int64_t i = 0; i < rows; i += rows_)
      for (int64_t j = 0; j < view_.J; j += columns_) {
        d.rows = std::min(rows_, rows - i);
        d.count = std::min(columns_, view_.J - j);
        A* sum = sums;
        for (int64_t to = 0; to < band_.dst_vectors; ++to) {
          d.lanes = band_.groups > 1 ? lanes_.data() + to * kL : nullptr;
          d.dz = gradient + to * gradient_plane() + (i * view_.J + j) * kL;
          for (int64_t from = 0; from < band_.src_vectors; ++from) {
            const A* src = band + from * band_.plane + i * d.src_row + j * view_.step_w * kL;
            const int64_t channels = channels_of(from);
            for (const GroupRun& run : runs_) {
              d.src = src + band_.offset(run.h, run.w);
              for (int64_t c = 0; c < channels; c += kDotChannels) {
                d.first_channel = c;
                d.channels = std::min<int64_t>(kDotChannels, channels - c);
                d.sums = sum + c * run.count * kL;
                const SourcePrefetch::Run next =
                    ahead.take(std::min(lines, d.count / kDotTile * d.rows * kNextDotLines));
                d.next = next.first;
                d.next_lines = next.lines;
                d.next_step = next.step;
                group_dot(d, run.count);
                ahead.ask(lines - next.lines);
              }
              sum += channels * run.count * kL;
            }
          }
        }
      }
  }

  int64_t channels_of(int64_t vector) const {
    return band_.groups > 1 ? view_.C : std::min(kL, view_.C - vector * kL);
  }

  void finish(int64_t block, A* sums) const {
    for (int64_t slab = 1; slab < slabs_; ++slab)
      for (int64_t i = 0; i < sums_; i += kL)
        Vec<A>::store(sums + i, Vec<A>::load(sums + i) + Vec<A>::load(sums + slab * sums_ + i));
    Buffer<A> taps(winograd_ != nullptr ? sums_ : 0);
    if constexpr (std::is_same_v<T, float>) {
      if (winograd_ != nullptr) {
        winograd_->transform(sums, taps.get());
        sums = taps.get();
      }
    }
    using V = WideVec<T>;
    for (int64_t to = 0; to < band_.dst_vectors; ++to, sums += view_.terms() * kL) {
      const int64_t lanes = band_.filters_in(view_, block, to);
      T* filter[kL];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t k = to * band_.vector_filters + l;
        filter[l] = dw_ + (block * band_.groups + k / view_.K) * view_.weight_group +
                    k % view_.K * view_.weight_k;
      }
      // Between terms lie taps that reach no pixel, whose gradients are zeros.
      for (const GroupPiece& piece : pieces_) {
        typename V::Type tile[kL];
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          tile[i] =
              piece.at[i] >= 0 ? V::Registers::load(sums + piece.at[i] * kL) : typename V::Type{};
        transpose_steps<1>(tile);
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l)
          if (l < lanes) V::store_partial(filter[l] + piece.offset, tile[l], piece.count);
      }
    }
  }

  const ConvView& view_;
  const GroupWinogradDot* winograd_;
  const GroupBand band_;
  const std::vector<LaneIndex<A>> lanes_;
  const std::vector<GroupRun> runs_;
  const std::vector<GroupPiece> pieces_;
  const T* dz_;
  const T* x_;
  T* dw_;
  int64_t together_, sets_;  // of blocks
  int64_t slab_, slabs_;     // slab_: bands in one
  int64_t channels_, taps_, sums_;
  int64_t rows_, columns_;  // of a sum in registers
  int64_t band_dots_;       // such sums in a band
  int64_t tiles_ = 0;       // calls that form them
  bool compensated_;
};

// The gradients of taps that reach no pixel are zeros.
template <typename T>
bool all_finite(const ConvView& view, const T* dw) {
  using V = WideVec<T>;
  const int64_t size = view.groups * view.weight_group;
  auto check = typename V::Type{};  // NaN once any element is not finite
  int64_t i = 0;
  for (; i + V::kLanes <= size; i += V::kLanes) check += V::load(dw + i) * 0;
  check += V::load_partial(dw + i, size - i) * 0;
  for (int l = 0; l < V::kLanes; ++l)
    if (!(check[l] == 0)) return false;
  return true;
}

}  // namespace

template <typename T>
bool group_wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  GroupWgrad<T>(view, nullptr, dz, x, dw).run(pool);
  return all_finite(view, dw);
}

bool group_winograd_wgrad(const ConvView& view, const float* dz, const float* x, float* dw,
                          const Parallel& pool) {
  const GroupWinogradDot products(view);
  GroupWgrad<float>(view, &products, dz, x, dw).run(pool);
  return all_finite(view, dw);
}

template bool group_wgrad(const ConvView&, const float*, const float*, float*, const Parallel&);
template bool group_wgrad(const ConvView&, const double*, const double*, double*, const Parallel&);
template bool group_wgrad(const ConvView&, const BFloat16*, const BFloat16*, BFloat16*,
                          const Parallel&);
template bool group_wgrad(const ConvView&, const Float16*, const Float16*, Float16*,
                          const Parallel&);

}  // namespace torchconv::cpu
