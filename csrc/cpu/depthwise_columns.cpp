// NHWC depthwise convolution by pairs of output rows; wgrad by slabs of rows that the shape alone
// cuts, whose sums are added up in order.
#include "cpu/depthwise_columns.h"

#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "cpu/channel_band.h"
#include "cpu/depthwise_taps.h"
#include "cpu/microkernels/channel_columns.h"
#include "cpu/parallel_range.h"
#include "cpu/thread_copies.h"

namespace torchconv::cpu {
namespace {

// The least rows and columns of a dilation's residue.
constexpr int64_t kResidueSize = 2;

// Images and outputs of so many bytes are not in the second cache, in which a band is read again.
constexpr int64_t kSecondCache = 3 << 18;
// Of so many they are read from memory, so the next rows are asked for. From the last cache the
// hardware reads ahead well enough, and asking only costs time, unless a stride leaves few products
// for what is read.
constexpr int64_t kFarBytes = kStreamedBytes / 2, kFarBytesStrided = kStreamedBytes / 8;

// Those of each vector of channels, [vector][tap][lanes]; the last vector ends with the channels.
template <typename T>
void pack_vectors(const DepthwiseTaps& grid, int64_t channels, const T* w, Wide<T>* packed) {
  constexpr int64_t kL = WideVec<T>::kLanes;
  for (int64_t c = 0; c < channels; c += kL, packed += grid.rows * grid.columns * kL)
    pack_taps(grid, kL, w + std::min(c, channels - kL) * grid.filter, packed);
}

// What a gather of either kind does: `pairs` pairs of output rows of each sample, `apart` from each
// other, of which pair's first is row(pair) and rows outside [0, rows) are not there. call(n, pair,
// sum).
template <typename T>
struct RowPairs {
  int64_t N, pairs, apart, rows, columns, channels, taps;
  int64_t dst_n, dst_row, dst_column;

  // kept: the packed weights, or null.
  template <typename Row, typename Call>
  void run(const DepthwiseTaps& grid, const T* w, const Wide<T>* kept, const T* bias,
           const Epilogue<T>& epilogue, const Parallel& pool, Row&& row, Call&& call) const {
    using A = Wide<T>;
    constexpr int64_t kL = WideVec<T>::kLanes;
    const int64_t vectors = ceil_div(channels, kL);
    const ThreadCopies copies;
    const bool in_place = epilogue.clamps_at_most() && epilogue.activates_only();
    const int64_t line = columns * channels;
    const WorkSplit split(
        N * pairs, static_cast<double>(2 * columns * channels) * static_cast<double>(taps + 8));
    constexpr bool kNarrow = !std::is_same_v<T, A>;
    const int64_t run = dst_column == channels ? columns : 1;  // pixels side by side
    const bool streams = !kNarrow && in_place && dst_column == channels &&
                         WideVec<T>::streams(epilogue.y, N * dst_n, channels);
    Buffer<A> lines(in_place ? 0 : split.slots * kColumnLines * line);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      const auto make = [&] {
        return copies.get<A>(vectors * taps * kL + channels, [&](A* packed) {
          pack_vectors(grid, channels, w, packed);
          A* start = packed + vectors * taps * kL;
          for (int64_t c = 0; c < channels; ++c)
            start[c] = bias != nullptr ? to_wide(bias[c]) : A{0};
        });
      };
      const A* const weights = kept != nullptr ? kept : make();
      const A* start = weights + vectors * taps * kL;
      if constexpr (!kNarrow)
        if (kept != nullptr && bias != nullptr) start = bias;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / pairs, pair = item % pairs;
        ChannelColumnsSum<T> sum;
        sum.out_step = in_place || kNarrow ? dst_column : channels;
        sum.wide_step = channels;
        sum.weights = weights;
        sum.start = start;
        sum.next = nullptr;
        sum.streams = streams;
        sum.clamps = in_place && epilogue.clamps();
        sum.most = epilogue.most();
        A* sums[kColumnLines];
        int64_t dst[kColumnLines];
        for (int64_t l = 0; l < kColumnLines; ++l) {
          const int64_t i = row(pair) + l * apart;
          const bool there = i >= 0 && i < rows;
          dst[l] = n * dst_n + i * dst_row;
          sums[l] = in_place || !there ? nullptr : lines.get() + (slot * kColumnLines + l) * line;
          sum.wide[l] = sums[l];
          sum.out[l] = there ? epilogue.y + dst[l] : nullptr;
          if constexpr (!kNarrow)
            if (sums[l] != nullptr) sum.out[l] = sums[l];
        }
        // Not what another thread writes.
        const int64_t next = row(pair + 1);
        const bool fetches = in_place && !streams && item + 1 < end && pair + 1 < pairs &&
                             next + (kColumnLines - 1) * apart < rows;
        for (int64_t l = 0; l < kColumnLines; ++l)
          sum.next_out[l] =
              fetches ? epilogue.y + n * dst_n + (next + l * apart) * dst_row : nullptr;
        call(n, pair, sum);
        if (streams) stream_fence();
        for (int64_t l = 0; l < kColumnLines; ++l)
          for (int64_t j = 0; j < columns && sums[l] != nullptr; j += run)
            epilogue.store(sums[l] + j * channels, run * channels, dst[l] + j * dst_column, 1);
      }
    });
  }
};

template <typename T>
class ColumnsWgrad {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = WideVec<T>::kLanes;
  // Products that a lane adds up, slabs, and what a band reads: two of them are in the second
  // cache.
  static constexpr int64_t kSteps = 512, kSlabs = 16, kBandBytes = 3 << 17;

  ColumnsWgrad(const ConvView& view, const T* dz, const T* x)
      : v_(view), taps_(view), dz_(dz), x_(x), channels_(view.groups) {
    const int64_t row = (v_.J + v_.W * v_.step_h) * channels_ * int64_t{sizeof(T)};
    band_ = even_piece(v_.I, std::min(kSteps / v_.J, kBandBytes / row));
    bands_ = ceil_div(v_.I, band_);
    const int64_t units = v_.N * bands_;
    slab_ = ceil_div(units, kSlabs);
    slabs_ = ceil_div(units, slab_);
    // Few slabs leave the threads channels to share.
    const int64_t vectors = ceil_div(channels_, kL);
    block_ = ceil_div(vectors, std::clamp<int64_t>(kSlabs / slabs_ / 2, 1, vectors)) * kL;
    blocks_ = ceil_div(channels_, block_);
    if (blocks_ > 1 && channels_ - (blocks_ - 1) * block_ < kL) block_ = channels_, blocks_ = 1;
    fetches_ = blocks_ == 1 && v_.src.row == v_.W * channels_ && v_.dst.row == v_.J * channels_ &&
               v_.N * (v_.src.n + v_.dst.n) * int64_t{sizeof(T)} >= kSecondCache;
  }

  bool run(T* dw, const Parallel& pool) const {
    const int64_t taps = taps_.rows * taps_.columns, width = round_up(channels_, kL);
    const int64_t size = taps * width;
    Buffer<A> sums(slabs_ * size);
    const WorkSplit split(slabs_ * blocks_, static_cast<double>(slab_ * band_ * v_.J) *
                                                static_cast<double>(block_ * (taps + 8)));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slab = task / blocks_, channel = task % blocks_ * block_;
        accumulate(slab, channel, std::min(block_, channels_ - channel), width, task + 1 < end,
                   sums.get() + slab * size + channel);
      }
    });
    for (int64_t s = 1; s < slabs_; ++s)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[s * size + i];
    bool finite = true;
    for (int64_t c = 0; c < channels_; ++c) {
      // The last vector of a channel block that none divides overlaps the one before it.
      const int64_t block = c / block_ * block_, end = std::min(block + block_, channels_);
      const int64_t whole = block + (end - block) / kL * kL;
      const int64_t lane = c < whole ? c : whole + c - (end - kL);
      for (int64_t t = 0; t < taps; ++t) {
        const A total = sums[t * width + lane];
        finite = finite && std::isfinite(total);
        dw[c * taps_.filter + taps_.weight(t / taps_.columns, t % taps_.columns)] =
            from_wide<T>(total);
      }
    }
    return finite;
  }

 private:
  // The thread goes on with the next slab where that `follows`.
  void accumulate(int64_t slab, int64_t channel, int64_t channels, int64_t width, bool follows,
                  A* sums) const {
    const int64_t taps = taps_.rows * taps_.columns;
    for (int64_t t = 0; t < taps; ++t) fill_zero(sums + t * width, round_up(channels, kL));
    const int64_t last = std::min((slab + 1) * slab_, v_.N * bands_);
    for (int64_t unit = slab * slab_; unit < last; ++unit) {
      const int64_t n = unit / bands_, first = unit % bands_ * band_;
      const int64_t next = unit + 1, next_n = next / bands_, next_first = next % bands_ * band_;
      const bool fetches = fetches_ && (next < last || (follows && next < v_.N * bands_));
      // From the first row that this band has not read.
      const int64_t h =
          next_first == 0 ? 0 : (next_first - 1) * v_.step_h + taps_.first_h + taps_.rows;
      const ChannelColumns shape{
          taps_.rows,     taps_.columns,        v_.step_w, channels,     v_.J,
          -taps_.first_w, v_.W - taps_.first_w, 0,         v_.src.column};
      channel_columns_dot<T>(
          shape, {x_ + n * v_.src.n + channel + taps_.first_w * v_.src.column,
                  dz_ + n * v_.dst.n + channel, sums, width, v_.src.row, v_.dst.row, v_.dst.column,
                  first, std::min(first + band_, v_.I), taps_.first_h, v_.H,
                  fetches ? x_ + next_n * v_.src.n + std::clamp<int64_t>(h, 0, v_.H) * v_.src.row
                          : nullptr,
                  fetches ? dz_ + next_n * v_.dst.n + next_first * v_.dst.row : nullptr});
    }
  }

  const ConvView& v_;
  const DepthwiseTaps taps_;
  const T* dz_;
  const T* x_;
  int64_t channels_;
  int64_t band_, bands_;  // rows that are added up in registers
  int64_t slab_, slabs_;
  int64_t block_, blocks_;  // of channels
  bool fetches_;
};

// Whether every type has it.
bool is_square(const ConvView& v, const DepthwiseTaps& taps) {
  const int64_t R = taps.rows;
  return R == taps.columns && v.step_h <= 2 && (R == 3 || R == 5 || (R == 7 && v.step_h == 1));
}

}  // namespace

template <typename T>
bool depthwise_columns_applies(const ConvView& v) {
  if (v.C != 1 || v.K != 1 || v.groups < kLanes<Wide<T>> || v.src.c != 1 || v.dst.c != 1 ||
      v.src.column != v.groups)
    return false;
  const DepthwiseTaps taps(v);
  if (!taps.regular || v.step_h != v.step_w || taps.columns < 1 || taps.columns > kMostColumns ||
      taps.rows + v.step_h > kMostSourceRows)
    return false;
  if (v.step_h > 2 && !(v.step_h <= 4 && taps.rows == v.step_h && taps.columns == v.step_h))
    return false;
  if (!columns_of_any_kernel<T>() && !is_square(v, taps)) return false;
  if (taps.gap_h == 1 && taps.gap_w == 1) return true;
  // Each residue has columns enough to be worth its own walk.
  return v.step_h == 1 && v.I >= taps.gap_h * kResidueSize && v.J >= taps.gap_w * kResidueSize &&
         v.W >= taps.gap_w * kResidueSize;
}

template <typename T>
bool depthwise_columns_square_applies(const ConvView& v) {
  const DepthwiseTaps taps(v);
  return is_square(v, taps) && taps.gap_h == 1 && taps.gap_w == 1 &&
         depthwise_columns_applies<T>(v);
}

template <typename T>
int64_t depthwise_columns_weights_size(const ConvView& v) {
  constexpr int64_t kL = WideVec<T>::kLanes;
  return round_up(v.groups, kL) * static_cast<int64_t>(v.taps.size()) + v.groups;
}

// Then zeros in the place of a bias.
template <typename T>
void depthwise_columns_pack_weights(const ConvView& v, const T* w, Wide<T>* packed) {
  pack_vectors(DepthwiseTaps(v), v.groups, w, packed);
  fill_zero(packed + depthwise_columns_weights_size<T>(v) - v.groups, v.groups);
}

template <typename T>
void depthwise_columns_gather(const ConvView& v, const T* src, const T* w, const Wide<T>* packed,
                              const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  const DepthwiseTaps taps(v);
  const int64_t R = taps.rows, step = v.step_h, gap_h = taps.gap_h, gap_w = taps.gap_w;
  const int64_t bytes = v.N * (v.src.n + v.dst.n) * int64_t{sizeof(T)};
  const bool far = bytes >= (step == 1 ? kFarBytes : kFarBytesStrided) &&
                   v.src.row == v.W * v.groups && gap_h * gap_w == 1;
  // The memory bounds these few products, and fetches of what is written would delay the reads.
  const bool waits = far && R == 3 && step == 2;
  // Pairs of the residues of rows follow each other, so that all read one band of the image.
  const RowPairs<T> rows{v.N,
                         ceil_div(ceil_div(v.I, gap_h), 2) * gap_h,
                         gap_h,
                         v.I,
                         v.J,
                         v.groups,
                         R * taps.columns,
                         v.dst.n,
                         v.dst.row,
                         v.dst.column};
  const auto row = [=](int64_t pair) { return pair / gap_h * 2 * gap_h + pair % gap_h; };
  rows.run(taps, w, packed, bias, epilogue.at(v.dst_offset), pool, row,
           [&](int64_t n, int64_t pair, const ChannelColumnsSum<T>& pixels) {
             if (pixels.out[0] == nullptr) return;
             ChannelColumnsSum<T> sum = pixels;
             sum.out_step *= gap_w;
             sum.wide_step *= gap_w;
             const int64_t top = row(pair) * step + taps.first_h;
             sum.src_row = gap_h * v.src.row;
             sum.rows = 0;
             for (int64_t i = 0; i < R + step; ++i) {
               const int64_t h = top + i * gap_h;
               const bool there = h >= 0 && h < v.H && (i < R || sum.out[1] != nullptr);
               sum.rows |= static_cast<uint32_t>(there) << i;
             }
             const int64_t next = top + R + step;
             if (far && next >= 0 && next + 2 * step <= v.H)
               sum.next = src + n * v.src.n + next * v.src.row;
             for (int64_t j0 = 0; j0 < gap_w; ++j0) {
               // Output 0 of the residue reads source column `first` of those that are `column`
               // apart by gap_w.
               const int64_t first = floor_div(j0 + taps.first_w, gap_w);
               const int64_t column = j0 + taps.first_w - first * gap_w;
               const ChannelColumns shape{R,
                                          taps.columns,
                                          step,
                                          v.groups,
                                          ceil_div(v.J - j0, gap_w),
                                          -first,
                                          ceil_div(v.W - column, gap_w) - first,
                                          0,
                                          gap_w * v.groups};
               const T* image = src + n * v.src.n + (j0 + taps.first_w) * v.src.column;
               sum.src = image + top * v.src.row;
               for (int64_t l = 0; l < kColumnLines; ++l) {
                 if (sum.out[l] != nullptr) sum.out[l] = pixels.out[l] + j0 * pixels.out_step;
                 if (sum.wide[l] != nullptr) sum.wide[l] = pixels.wide[l] + j0 * pixels.wide_step;
                 if (sum.next_out[l] != nullptr)
                   sum.next_out[l] = waits ? nullptr : pixels.next_out[l] + j0 * pixels.out_step;
               }
               channel_columns_sum(shape, sum);
             }
           });
}

template <typename T>
bool depthwise_columns_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                             const Parallel& pool) {
  return ColumnsWgrad<T>(view, dz, x).run(dw, pool);
}

template <typename T>
bool depthwise_columns_spread_applies(const ConvProblem& p) {
  return p.layout == Layout::kNHWC && p.C >= kLanes<Wide<T>> && depthwise_spreads(p);
}

template <typename T>
void depthwise_columns_spread(const ConvProblem& p, const T* dz, const T* w, T* dx,
                              const Parallel& pool) {
  const DepthwiseTaps taps = DepthwiseTaps::of(p);
  const ChannelColumns shape{p.R, p.R, 2, p.C, p.W, 0, p.Q, p.pad_left, p.C};
  // Output rows 2a - pad and 2a - pad + 1, from the first that is there.
  const int64_t first = p.pad_top / 2, last = floor_div(p.H - 1 + p.pad_top, 2);
  const RowPairs<T> rows{p.N,       last - first + 1, 1,         p.H, p.W, p.C,
                         p.R * p.S, p.H * p.W * p.C,  p.W * p.C, p.C};
  rows.run(
      taps, w, nullptr, nullptr, Epilogue<T>{dx, nullptr, Activation::kNone}, pool,
      [&](int64_t pair) { return 2 * (first + pair) - p.pad_top; },
      [&](int64_t n, int64_t pair, ChannelColumnsSum<T>& sum) {
        const int64_t h = first + pair;
        sum.src = dz + (n * p.P + h) * p.Q * p.C;
        sum.src_row = -p.Q * p.C;
        sum.rows = 0;
        for (int64_t m = 0; 2 * m < p.R; ++m)
          sum.rows |= static_cast<uint32_t>(h - m >= 0 && h - m < p.P) << m;
        if (first + pair + 1 < p.P) sum.next = dz + (n * p.P + first + pair + 1) * p.Q * p.C;
        channel_columns_spread(shape, sum);
      });
}

#define TORCHCONV_DEPTHWISE_COLUMNS(T)                                                             \
  template bool depthwise_columns_applies<T>(const ConvView&);                                     \
  template bool depthwise_columns_square_applies<T>(const ConvView&);                              \
  template int64_t depthwise_columns_weights_size<T>(const ConvView&);                             \
  template void depthwise_columns_pack_weights(const ConvView&, const T*, Wide<T>*);               \
  template void depthwise_columns_gather(const ConvView&, const T*, const T*, const Wide<T>*,      \
                                         const T*, const Epilogue<T>&, const Parallel&);           \
  template bool depthwise_columns_wgrad(const ConvView&, const T*, const T*, T*, const Parallel&); \
  template bool depthwise_columns_spread_applies<T>(const ConvProblem&);                           \
  template void depthwise_columns_spread(const ConvProblem&, const T*, const T*, T*,               \
                                         const Parallel&);
TORCHCONV_DEPTHWISE_COLUMNS(float)
TORCHCONV_DEPTHWISE_COLUMNS(double)
TORCHCONV_DEPTHWISE_COLUMNS(BFloat16)
TORCHCONV_DEPTHWISE_COLUMNS(Float16)
#undef TORCHCONV_DEPTHWISE_COLUMNS

}  // namespace torchconv::cpu
