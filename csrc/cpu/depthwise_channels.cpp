// NHWC depthwise convolution row by row. The taps that lie inside the image are the same for a
// whole row of output but for its first and last columns: the columns between run through the
// register kernels with the image itself as operand, the few outside take their own taps one by
// one. A number of channels that no vector divides is closed by a last vector that overlaps the one
// before.
#include "cpu/depthwise_channels.h"

#include <algorithm>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Taps [first, end) of an axis are inside.
struct TapRange {
  int64_t first, end;
};

template <typename T>
class DepthwiseChannels {
 public:
  using A = Wide<T>;
  using V = Vec<A>;
  static constexpr int64_t kL = V::kLanes;
  // Whether sums may lie in the output.
  static constexpr bool kSumsOut = std::is_same_v<T, A>;

  explicit DepthwiseChannels(const ConvView& view)
      : view_(view),
        channels_(view.groups),
        whole_(channels_ / kL * kL),
        has_tail_(whole_ < channels_),
        interior_{0, view.J} {
    // view.taps is the product of its rows and columns.
    for (const ConvTap& tap : view.taps) {
      if (tap.h == view.taps[0].h) columns_.push_back(tap.w);
      if (tap.w == view.taps[0].w) rows_.push_back(tap.h);
    }
    for (const int64_t w : columns_) {
      const Range range = valid_range(view.J, view.step_w, w, view.W);
      interior_.begin = std::max(interior_.begin, range.begin);
      interior_.end = std::min(interior_.end, range.end);
    }
    if (interior_.begin >= interior_.end) interior_ = {0, 0};
  }

  int64_t taps() const { return static_cast<int64_t>(view_.taps.size()); }

  void gather(const T* src, const T* w, const T* bias, const Epilogue<T>& epilogue,
              const Parallel& pool) const {
    // [tap][channel]
    Buffer<A> weights(taps() * channels_);
    Buffer<A> start(channels_);
    for (int64_t c = 0; c < channels_; ++c) start[c] = bias != nullptr ? to_wide(bias[c]) : A{0};
    for (int64_t t = 0; t < taps(); ++t)
      for (int64_t c = 0; c < channels_; ++c)
        weights[t * channels_ + c] = to_wide(w[c * view_.weight_group + view_.taps[t].weight]);
    const bool in_place =
        kSumsOut && epilogue.activation == Activation::kNone && epilogue.activates_only();
    const int64_t row_size = in_place ? 0 : view_.J * channels_;
    const WorkSplit split(view_.N * view_.I, static_cast<double>(view_.J * channels_) *
                                                 static_cast<double>(taps() + 2) / 4);
    Buffer<A> rows(split.slots * row_size);
    Buffer<int64_t> offset_lists(split.slots * taps());
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      int64_t* offsets = offset_lists.get() + slot * taps();
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / view_.I, i = item % view_.I;
        const int64_t dst = view_.dst_offset + n * view_.dst.n + i * view_.dst.row;
        A* out = rows.get() + slot * row_size;
        if constexpr (kSumsOut)
          if (in_place) out = epilogue.y + dst;
        const int64_t step = in_place ? view_.dst.column : channels_;
        gather_row(src + n * view_.src.n, i, weights.get(), start.get(), offsets, out, step);
        for (int64_t j = 0; j < view_.J && !in_place; ++j)
          epilogue.store(out + j * channels_, channels_, dst + j * view_.dst.column, 1);
      }
    });
  }

  void wgrad(const T* dz, const T* x, T* dw, const Parallel& pool) const {
    // A slab is a run of output rows, by the shape alone; the last vector has sums of its own.
    constexpr int64_t kSlabs = 32, kRows = 8;
    const int64_t rows = view_.N * view_.I;
    const int64_t slab = std::max(kRows, (rows + kSlabs - 1) / kSlabs);
    const int64_t slabs = (rows + slab - 1) / slab;
    const int64_t width = whole_ + kL, size = taps() * width;
    const WorkSplit split(slabs, static_cast<double>(slab * view_.J) *
                                     static_cast<double>(channels_ * (taps() + 2)) / 4);
    Buffer<A> sums(slabs * size);
    Buffer<int64_t> offset_lists(split.slots * taps());
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t s = begin; s < end; ++s) {
        A* sum = sums.get() + s * size;
        std::fill(sum, sum + size, A{0});
        for (int64_t row = s * slab; row < std::min((s + 1) * slab, rows); ++row)
          wgrad_row(dz + row / view_.I * view_.dst.n + row % view_.I * view_.dst.row,
                    x + row / view_.I * view_.src.n, row % view_.I,
                    offset_lists.get() + slot * taps(), sum, width);
      }
    });
    for (int64_t t = 0; t < taps(); ++t) {
      for (int64_t c = 0; c < channels_; ++c) {
        const int64_t lane = c < whole_ ? c : whole_ + c - (channels_ - kL);
        A total = 0;
        for (int64_t s = 0; s < slabs; ++s) total += sums[s * size + t * width + lane];
        dw[c * view_.weight_group + view_.taps[t].weight] = from_wide<T>(total);
      }
    }
  }

 private:
  // Offsets run evenly along an axis, so those inside are neighbours.
  static TapRange inside(const std::vector<int64_t>& offsets, int64_t at, int64_t size) {
    const auto count = static_cast<int64_t>(offsets.size());
    TapRange range{0, count};
    const auto out = [&](int64_t t) { return at + offsets[t] < 0 || at + offsets[t] >= size; };
    while (range.first < count && out(range.first)) ++range.first;
    range.end = range.first;
    while (range.end < count && !out(range.end)) ++range.end;
    return range;
  }

  // Source offsets, for column 0, of the taps of the rows that are inside; returns those rows.
  TapRange row_offsets(int64_t i, int64_t* offsets) const {
    const TapRange rows = inside(rows_, i * view_.step_h, view_.H);
    for (int64_t r = rows.first; r < rows.end; ++r)
      for (const int64_t w : columns_)
        *offsets++ = (i * view_.step_h + rows_[r]) * view_.src.row + w * view_.src.column;
    return rows;
  }

  // f(j) for the columns that do not see all taps.
  template <typename F>
  void for_edges(F&& f) const {
    for (int64_t j = 0; j < interior_.begin; ++j) f(j);
    for (int64_t j = interior_.end; j < view_.J; ++j) f(j);
  }

  // f(lane, vectors, slot) for the whole vectors and for the last, whose sums have a slot of their
  // own.
  template <typename F>
  void for_lanes(F&& f) const {
    f(int64_t{0}, whole_ / kL, int64_t{0});
    if (has_tail_) f(channels_ - kL, int64_t{1}, whole_);
  }

  void gather_row(const T* src, int64_t i, const A* weights, const A* start, int64_t* offsets,
                  A* out, int64_t step) const {
    const int64_t columns = static_cast<int64_t>(columns_.size());
    const TapRange rows = row_offsets(i, offsets);
    const int64_t src_step = view_.step_w * view_.src.column;
    weights += rows.first * columns * channels_;
    if (interior_.begin < interior_.end)
      for_lanes([&](int64_t lane, int64_t vectors, int64_t) {
        const int64_t taps = (rows.end - rows.first) * columns;
        for (int64_t t = 0; t == 0 || t < taps; t += kDepth)
          tap_sum<T>({src + interior_.begin * src_step + lane, out + interior_.begin * step + lane,
                      offsets + t, weights + t * channels_ + lane, t == 0 ? start + lane : nullptr,
                      std::min(kDepth, taps - t), channels_, interior_.end - interior_.begin,
                      src_step, step, vectors});
      });
    for_edges([&](int64_t j) {
      const TapRange in = inside(columns_, j * view_.step_w, view_.W);
      for_lanes([&](int64_t lane, int64_t vectors, int64_t) {
        for (int64_t v = 0; v < vectors; ++v, lane += kL) {
          auto sum = V::load(start + lane);
          for (int64_t r = 0; r < rows.end - rows.first; ++r)
            for (int64_t t = r * columns + in.first; t < r * columns + in.end; ++t)
              sum += V::load(weights + t * channels_ + lane) *
                     WideVec<T>::load(src + j * src_step + offsets[t] + lane);
          V::store(out + j * step + lane, sum);
        }
      });
    });
  }

  void wgrad_row(const T* dz, const T* x, int64_t i, int64_t* offsets, A* sums,
                 int64_t width) const {
    const int64_t columns = static_cast<int64_t>(columns_.size());
    const TapRange rows = row_offsets(i, offsets);
    const int64_t src_step = view_.step_w * view_.src.column, dz_step = view_.dst.column;
    const int64_t count = (rows.end - rows.first) * columns;
    sums += rows.first * columns * width;
    for_lanes([&](int64_t lane, int64_t vectors, int64_t slot) {
      if (interior_.begin < interior_.end)
        tap_dot<T>({dz + interior_.begin * dz_step + lane, x + interior_.begin * src_step + lane,
                    offsets, sums + slot, count, width, interior_.end - interior_.begin, dz_step,
                    src_step, vectors});
    });
    for_edges([&](int64_t j) {
      const TapRange in = inside(columns_, j * view_.step_w, view_.W);
      for_lanes([&](int64_t lane, int64_t vectors, int64_t slot) {
        for (int64_t v = 0; v < vectors; ++v, lane += kL, slot += kL) {
          const auto gradient = WideVec<T>::load(dz + j * dz_step + lane);
          for (int64_t r = 0; r < rows.end - rows.first; ++r) {
            for (int64_t t = r * columns + in.first; t < r * columns + in.end; ++t) {
              A* sum = sums + t * width + slot;
              V::store(sum, V::load(sum) +
                                gradient * WideVec<T>::load(x + j * src_step + offsets[t] + lane));
            }
          }
        }
      });
    });
  }

  const ConvView& view_;
  int64_t channels_, whole_;  // whole_: in whole vectors
  bool has_tail_;
  std::vector<int64_t> rows_, columns_;  // offsets of the taps along each axis
  Range interior_;                       // output columns that see every tap column
};

}  // namespace

template <typename T>
bool depthwise_channels_applies(const ConvView& view) {
  return view.C == 1 && view.K == 1 && view.groups >= kLanes<Wide<T>> && view.src.c == 1 &&
         view.dst.c == 1 && !view.taps.empty();
}

template <typename T>
void depthwise_channels_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                               const Epilogue<T>& epilogue, const Parallel& pool) {
  DepthwiseChannels<T>(view).gather(src, w, bias, epilogue, pool);
}

template <typename T>
void depthwise_channels_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                              const Parallel& pool) {
  DepthwiseChannels<T>(view).wgrad(dz, x, dw, pool);
}

#define TORCHCONV_DEPTHWISE_CHANNELS(T)                                                  \
  template bool depthwise_channels_applies<T>(const ConvView&);                          \
  template void depthwise_channels_gather(const ConvView&, const T*, const T*, const T*, \
                                          const Epilogue<T>&, const Parallel&);          \
  template void depthwise_channels_wgrad(const ConvView&, const T*, const T*, T*, const Parallel&);
TORCHCONV_DEPTHWISE_CHANNELS(float)
TORCHCONV_DEPTHWISE_CHANNELS(double)
TORCHCONV_DEPTHWISE_CHANNELS(BFloat16)
TORCHCONV_DEPTHWISE_CHANNELS(Float16)
#undef TORCHCONV_DEPTHWISE_CHANNELS

}  // namespace torchconv::cpu
