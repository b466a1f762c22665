// fprop and dgrad over bands. A task is a band of rows of one group, or of a block of output
// channels side by side: it copies the band once (conv_band.h), computes every position for each
// output channel and hands the finished rows to the epilogue. With several filters in a group they
// are the rows of a matrix product whose other operand is the band itself, read through offsets:
// im2col without its copy; in bfloat16 two channels of the band are joined where the processor
// multiplies pairs. With one or two, and with channels along the vector, it is the depthwise
// kernel.
#include "cpu/conv_band_gather.h"

#include "core/buffer.h"
#include "cpu/channel_pairs.h"
#include "cpu/microkernels/gemm_pairs.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

template <typename T>
class BandGather {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  BandGather(const ConvView& view, const ConvBand& band, const T* src, const T* w, const T* bias,
             const Epilogue<T>& epilogue, const Parallel& pool)
      : view_(view),
        band_(band),
        src_(src),
        epilogue_(epilogue),
        pairs_(std::is_same_v<T, BFloat16> && has_pair_products() && band.pixels && view.C > 1 &&
               view.K >= kFewRows && view.K <= kMaxPairRows),
        terms_(pairs_ ? pair_view(view).terms() : view.terms()),
        channels_(view.groups * view.K),
        padded_(band.blocks * (band.pixels ? view.K : band.unit)),
        blocks_(band.pixels && view.K >= kFewRows ? ceil_div(terms_, kDepth) : 0),
        weights_(blocks_ > 0 ? blocks_ * padded_ * kARow<A> : terms_ * padded_),
        bias_(padded_) {
    // Packed channels are repeated in the pixels of a unit.
    const auto source_of = [&](int64_t channel) {
      return band.packed ? channel % channels_ : channel < channels_ ? channel : -1;
    };
    for (int64_t channel = 0; channel < padded_; ++channel) {
      const int64_t from = bias != nullptr ? source_of(channel) : -1;
      bias_[channel] = from >= 0 ? to_wide(bias[from]) : A{0};
    }
    // [c][t], the order of the band's offsets
    std::vector<int64_t> offsets(static_cast<size_t>(view.terms()));
    weight_offsets(view, {0, view.C, 0, static_cast<int64_t>(view.taps.size())}, offsets.data());
    const WorkSplit split(padded_, 4.0 * static_cast<double>(terms_));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t channel = begin; channel < end; ++channel) {
        const int64_t from = source_of(channel);
        if (from < 0) {
          for (int64_t term = 0; term < terms_; ++term) weights_[weight_at(channel, term)] = 0;
          continue;
        }
        const T* filter = w + from / view.K * view.weight_group + from % view.K * view.weight_k;
        if constexpr (std::is_same_v<T, BFloat16>) {
          if (pairs_) {
            pack_pairs(filter, offsets, channel);
            continue;
          }
        }
        for (int64_t b = 0; b < blocks_; ++b)
          pack_weight_rows(filter, 0, offsets.data() + b * kDepth,
                           std::min(kDepth, terms_ - b * kDepth), 1,
                           weights_.get() + weight_at(channel, b * kDepth));
        if (blocks_ == 0)
          for (int64_t term = 0; term < terms_; ++term)
            weights_[weight_at(channel, term)] = to_wide(filter[offsets[term]]);
      }
    });
  }

  void run(const Parallel& pool) {
    // A small image with many filters is cut by filters too, at the price of copying it again.
    int64_t pieces = 1;
    if (blocks_ > 0)
      pieces = std::min(ceil_div(kTasksWanted, band_.bands * band_.blocks),
                        ceil_div(view_.K, kFiltersPerTask));
    const int64_t piece = ceil_div(view_.K, pieces);
    pieces = ceil_div(view_.K, piece);
    const int64_t tasks = view_.N * band_.bands * band_.blocks * pieces;
    const int64_t row_size =
        round_up(round_up(band_.positions(band_.band, view_.J), kL) * band_.lanes, 16);
    const int64_t out_size = blocks_ > 0 ? row_size * std::min<int64_t>(piece, kMaxRows) : row_size;
    const int64_t scratch_size = round_up(band_.size, 16);
    const int64_t slot_size = scratch_size + out_size + (band_.pixels ? (terms_ + 1) * kL : 0);
    const WorkSplit split(tasks, static_cast<double>(row_size) *
                                     static_cast<double>((band_.pixels ? piece : 1) * terms_ + 8));
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* source = scratch.get() + slot * slot_size;
      A* out = source + scratch_size;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t task = item / pieces, first = item % pieces * piece;
        // What is innermost in memory is innermost here.
        const int64_t block =
            band_.pixels ? task / band_.bands % band_.blocks : task % band_.blocks;
        const int64_t b = band_.pixels ? task % band_.bands : task / band_.blocks % band_.bands;
        const int64_t n = task / (band_.bands * band_.blocks);
        const int64_t i0 = b * band_.band, rows = std::min(band_.band, view_.I - i0);
        const int64_t dst = view_.dst_offset + n * view_.dst.n + i0 * view_.dst.row;
        fill(src_ + n * view_.src.n, block, i0, source);
        if (blocks_ > 0) {
          run_matrix(source, block * view_.K + first, std::min(piece, view_.K - first), rows, dst,
                     out);
        } else if (band_.pixels) {
          for (int64_t channel = block * view_.K; channel < (block + 1) * view_.K; ++channel)
            run_pixels(source, channel, rows, dst + channel * view_.dst.c, out, out + out_size);
        } else {
          if (band_.packed)
            run_packed(source, rows, dst, out);
          else
            run_channels(source, block * band_.lanes, rows, dst, out);
        }
      }
    });
  }

 private:
  // Fewer rows than this do not repay the broadcasts of a matrix tile.
  static constexpr int64_t kFewRows = 3;
  static constexpr int64_t kTasksWanted = 16;
  static constexpr int64_t kFiltersPerTask = 4 * kMaxRows;

  int64_t weight_at(int64_t channel, int64_t term) const {
    if (blocks_ > 0) return (term / kDepth * padded_ + channel) * kARow<A> + term % kDepth;
    return band_.pixels ? channel * terms_ + term : term * padded_ + channel;
  }

  // Of a channel: terms are [pair][tap].
  void pack_pairs(const BFloat16* filter, const std::vector<int64_t>& offsets,
                  int64_t channel) const {
    const auto taps = static_cast<int64_t>(view_.taps.size());
    for (int64_t term = 0; term < terms_; ++term) {
      const int64_t even = term / taps * 2 * taps + term % taps, odd = even + taps;
      const uint32_t low = filter[offsets[even]].bits;
      const uint32_t high = odd < view_.terms() ? filter[offsets[odd]].bits : 0u;
      weights_[weight_at(channel, term)] = bit_cast<A>(low | high << 16);
    }
  }

  void fill(const T* src, int64_t block, int64_t i0, A* source) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (pairs_ && band_.fills_pairs(view_))
        return band_.fill_pairs(view_, src, block, i0, source);
    }
    band_.fill(view_, src, block, i0, source);
    if (pairs_) join_channels(source);
  }

  // Channels 2c and 2c + 1 of the band become its channel c. What a last vector overwrites has been
  // read before.
  void join_channels(A* source) const {
    if constexpr (std::is_same_v<A, float>) {
      const int64_t channel = band_.size / view_.C;
      for (int64_t c = 0; c < view_.C; c += 2) {
        const A* even = source + c * channel;
        A* const to = source + c / 2 * channel;
        for (int64_t i = 0; i < channel; i += kL)
          join_pairs(even + i, c + 1 < view_.C ? even + channel + i : nullptr, to + i);
      }
    }
  }

  // The group's filters as rows of a matrix product whose other operand is the band itself.
  void run_matrix(const A* source, int64_t channel, int64_t filters, int64_t rows, int64_t dst,
                  A* out) const {
    const int64_t positions = band_.positions(rows, view_.J), ld = round_up(positions, kL);
    const int64_t tiles = ceil_div(filters, kMaxRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t n = filters / tiles + (tile < filters % tiles ? 1 : 0);
      for (int64_t b = 0; b < blocks_; ++b) {
        const A* weights = weights_.get() + weight_at(channel, b * kDepth);
        const int64_t depth = std::min(kDepth, terms_ - b * kDepth);
        // Weights of a deep layer come from the third-level cache: ask for the next ones early.
        const bool last = b + 1 == blocks_;
        const A* next = last ? weights_.get() + weight_at(channel + n, 0)
                             : weights_.get() + weight_at(channel, (b + 1) * kDepth);
        const int64_t step = ceil_div(n * kARow<A>, ceil_div(positions, kPanel<A>));
        for (int64_t at = 0; at < positions; at += kPanel<A>, next += step) {
          for (int64_t i = 0; i < step; i += kL) __builtin_prefetch(next + i, 0, 2);
          const int64_t vectors = std::min<int64_t>(kMaxVectors, ceil_div(positions - at, kL));
          const GemmTile<A> product{
              weights, source + at, out + at, depth, ld, b > 0, band_.offsets.data() + b * kDepth};
          if constexpr (std::is_same_v<T, BFloat16>) {
            if (pairs_) {
              gemm_pair_microkernel(n, vectors)(product);
              continue;
            }
          }
          gemm_microkernel<A>(n, vectors)(product);
        }
      }
      for (int64_t k = 0; k < n; ++k, ++channel) {
        A* row = out + k * ld;
        for (int64_t i = 0; i < positions; ++i) row[i] += bias_[channel];
        for (int64_t i = 0; i < rows; ++i)
          epilogue_.store(row + i * band_.width, view_.J,
                          dst + channel * view_.dst.c + i * view_.dst.row, view_.dst.column);
      }
    }
  }

  void run_pixels(const A* source, int64_t channel, int64_t rows, int64_t dst, A* out,
                  A* vectors) const {
    const A* weights = weights_.get() + channel * terms_;
    for (int64_t term = 0; term < terms_; ++term)
      Vec<A>::store(vectors + term * kL, Vec<A>::broadcast(weights[term]));
    Vec<A>::store(vectors + terms_ * kL, Vec<A>::broadcast(bias_[channel]));
    for (int64_t term = 0; term < terms_; term += kDepth)
      tap_sum<A>({source, out, band_.offsets.data() + term, vectors + term * kL,
                  term == 0 ? vectors + terms_ * kL : nullptr, std::min(kDepth, terms_ - term), kL,
                  ceil_div(band_.positions(rows, view_.J), kL), kL, kL, 1});
    for (int64_t i = 0; i < rows; ++i)
      store_row(out + i * band_.width, view_.J, dst + i * view_.dst.row, view_.dst.column);
  }

  // A row that has only to be clamped and rounded needs no call, which costs as much as it does.
  void store_row(A* row, int64_t n, int64_t dst, int64_t stride) const {
    using V = WideVec<T>;
    if (stride != 1 || !epilogue_.activates_only() || !epilogue_.clamps_at_most())
      return epilogue_.store(row, n, dst, stride);
    T* to = epilogue_.y + dst;
    for (int64_t i = 0; i < n; i += kL) {
      auto v = V::Registers::load(row + i);
      if (epilogue_.clamps()) v = clamped(v, V::broadcast(epilogue_.most()));
      if (n - i >= kL)
        V::store(to + i, v);
      else
        V::store_partial(to + i, v, n - i);
    }
  }

  void run_channels(const A* source, int64_t channel, int64_t rows, int64_t dst, A* out) const {
    const int64_t lanes = band_.lanes, used = std::min(lanes, channels_ - channel);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t term = 0; term < terms_; term += kDepth)
        tap_sum<A>({source + i * band_.width * lanes, out, band_.offsets.data() + term,
                    weights_.get() + term * padded_ + channel,
                    term == 0 ? bias_.get() + channel : nullptr, std::min(kDepth, terms_ - term),
                    padded_, view_.J, lanes, lanes, lanes / kL});
      for (int64_t j = 0; j < view_.J; ++j)
        epilogue_.store(out + j * lanes, used,
                        dst + channel * view_.dst.c + i * view_.dst.row + j * view_.dst.column,
                        view_.dst.c);
    }
  }

  void run_packed(const A* source, int64_t rows, int64_t dst, A* out) const {
    const int64_t unit = band_.unit, row = band_.width * band_.lanes;
    for (int64_t term = 0; term < terms_; term += kDepth)
      tap_sum<A>({source, out, band_.offsets.data() + term, weights_.get() + term * padded_,
                  term == 0 ? bias_.get() : nullptr, std::min(kDepth, terms_ - term), padded_,
                  ceil_div(band_.positions(rows, view_.J) * band_.lanes, unit), unit, unit,
                  unit / kL});
    for (int64_t i = 0; i < rows; ++i)
      epilogue_.store(out + i * row, view_.J * band_.lanes, dst + i * view_.dst.row, 1);
  }

  const ConvView& view_;
  const ConvBand& band_;
  const T* src_;
  const Epilogue<T>& epilogue_;
  const bool pairs_;  // a term is a pair of channels
  int64_t terms_, channels_, padded_;
  int64_t blocks_;  // of terms in the matrix product, or 0
  Buffer<A>
      weights_;     // [block][channel][kARow], or [channel][term] along pixels, or [term][channel]
  Buffer<A> bias_;  // [channel]
};

}  // namespace

template <typename T>
void band_gather(const ConvView& view, const ConvBand& band, const T* src, const T* w,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  BandGather<T>(view, band, src, w, bias, epilogue, pool).run(pool);
}

template void band_gather(const ConvView&, const ConvBand&, const float*, const float*,
                          const float*, const Epilogue<float>&, const Parallel&);
template void band_gather(const ConvView&, const ConvBand&, const double*, const double*,
                          const double*, const Epilogue<double>&, const Parallel&);
template void band_gather(const ConvView&, const ConvBand&, const BFloat16*, const BFloat16*,
                          const BFloat16*, const Epilogue<BFloat16>&, const Parallel&);
template void band_gather(const ConvView&, const ConvBand&, const Float16*, const Float16*,
                          const Float16*, const Epilogue<Float16>&, const Parallel&);

}  // namespace torchconv::cpu
