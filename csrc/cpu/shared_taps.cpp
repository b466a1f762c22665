// fprop and dgrad by kernels of 3x1, 1x3, 5x1 and 1x5 with few filters in channels_last. Where the
// filters fill one vector, the matrix product of direct_gemm.h loads an element for each product
// and waits for the loads. Here the outputs of a register tile lie in lines along the kernel, so
// that an element is loaded once for all taps (microkernels/shared_taps.h).
//
// Along a row a tile is one line of pixels; down a column it is several columns side by side, since
// rows of an image may lie a power of two apart. Whole tiles read the image and write the result in
// place; for others what they read is copied with the padding written out, and what exists of what
// they write is stored behind them.
#include "cpu/shared_taps.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/channel_pairs.h"
#include "cpu/microkernels/shared_taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kL = Vec<float>::kLanes;
// Most channels, or pairs of them, and from a copied pixel to the next.
constexpr int64_t kMostDepth = 64, kPixel = kMostDepth;
// The part of a tile's filters, and of its outputs, that must exist.
constexpr double kFiltersUsed = 0.75, kOutputsUsed = 0.8;
// Fewer channels leave a tile few products.
constexpr int64_t kLeastDepth = 8;

// Taps by their offsets along the kernel's axis.
std::vector<ConvTap> sorted_taps(const ConvView& view, int64_t ConvTap::* along) {
  std::vector<ConvTap> taps = view.taps;
  std::sort(taps.begin(), taps.end(),
            [&](const ConvTap& a, const ConvTap& b) { return a.*along < b.*along; });
  return taps;
}

// Whether the taps follow each other along one axis, and do not differ in the other.
bool taps_along(const ConvView& view, int64_t ConvTap::* along, int64_t ConvTap::* across) {
  const std::vector<ConvTap> taps = sorted_taps(view, along);
  for (size_t t = 1; t < taps.size(); ++t)
    if (taps[t].*along != taps[t - 1].*along + 1 || taps[t].*across != taps[0].*across)
      return false;
  return true;
}

// The part of whole tiles that exists.
double used(int64_t outputs, int64_t of_tile) {
  return static_cast<double>(outputs) / static_cast<double>(round_up(outputs, of_tile));
}

bool runs_along_rows(const ConvView& view) { return view.taps[0].h == view.taps[1].h; }

template <typename T>
class SharedTaps {
  static constexpr bool kPairs = std::is_same_v<T, BFloat16>;
  static constexpr int64_t kOfTerm = kPairs ? 2 : 1;  // elements

 public:
  SharedTaps(const ConvView& view, const T* src, const T* w, const T* bias,
             const Epilogue<T>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(epilogue),
        by_rows_(runs_along_rows(view)),
        aligned_(reinterpret_cast<uintptr_t>(src) % alignof(float) == 0),
        taps_(static_cast<int64_t>(view.taps.size())),
        depth_(kPairs ? view.C / 2 : view.C),
        lines_(by_rows_ ? 1 : kSharedTapsLines),
        outputs_(kSharedTapsOutputs / lines_),
        weights_(depth_ * taps_ * kL),
        bias_(kL) {
    const std::vector<ConvTap> taps = sorted_taps(view, by_rows_ ? &ConvTap::w : &ConvTap::h);
    const Axis rows{view.I, view.step_h, taps[0].h, view.H, view.src.row, view.dst.row};
    const Axis columns{view.J, view.step_w, taps[0].w, view.W, view.src.column, view.dst.column};
    along_ = by_rows_ ? columns : rows;
    across_ = by_rows_ ? rows : columns;
    for (int64_t k = 0; k < kL; ++k) {
      bias_[k] = bias != nullptr && k < view.K ? to_wide(bias[k]) : 0.0f;
      for (int64_t c = 0; c < depth_; ++c)
        for (int64_t t = 0; t < taps_; ++t) {
          const T* const from = w + k * view.weight_k + taps[static_cast<size_t>(t)].weight;
          float* const to = &weights_[(c * taps_ + t) * kL + k];
          *to = k < view.K ? term(from, c) : 0.0f;
        }
    }
  }

  void run(const Parallel& pool) {
    const int64_t bands = ceil_div(view_.I, rows_of_tile());
    const WorkSplit split(view_.N * bands,
                          static_cast<double>(rows_of_tile() * view_.J * kL * view_.terms()));
    constexpr int64_t kSums = kSharedTapsOutputs * kL;
    const int64_t source = lines_ * positions() * kPixel;
    Buffer<float> scratch(split.slots * (kSums + source));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const sums = scratch.get() + slot * (kSums + source);
      const SharedTapsMicrokernel kernel = kPairs ? shared_taps_pair_microkernel(taps_, by_rows_)
                                                  : shared_taps_microkernel(taps_, by_rows_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / bands, i = task % bands * rows_of_tile();
        for (int64_t j = 0; j < view_.J; j += columns_of_tile())
          compute(n, i, j, kernel, sums, sums + kSums);
      }
    });
  }

 private:
  struct Axis {
    int64_t outputs, step, first_tap, size, src, dst;

    int64_t first(int64_t output) const { return output * step + first_tap; }
    int64_t at(int64_t output) const { return first(output) * src; }
    // Whether the image has all that `count` positions, `apart` from each other, read from there.
    bool holds(int64_t output, int64_t count, int64_t apart) const {
      return first(output) >= 0 && first(output) + (count - 1) * apart < size;
    }
  };

  int64_t positions() const { return outputs_ + taps_ - 1; }
  int64_t rows_of_tile() const { return by_rows_ ? 1 : outputs_; }
  int64_t columns_of_tile() const { return by_rows_ ? outputs_ : lines_; }

  // Term c of a tap of a filter.
  float term(const T* w, int64_t c) const {
    if constexpr (kPairs) {
      const BFloat16 pair[2] = {w[2 * c * view_.weight_c], w[(2 * c + 1) * view_.weight_c]};
      return bit_cast<float>(pair);
    } else {
      return w[c * view_.weight_c];
    }
  }

  // The tile of outputs [i, ...) x [j, ...) of sample n. sums and source: scratch.
  void compute(int64_t n, int64_t i, int64_t j, SharedTapsMicrokernel kernel, float* sums,
               float* source) const {
    const int64_t along = by_rows_ ? j : i, across = by_rows_ ? i : j;
    SharedTapsTile tile{};
    tile.weights = weights_.get();
    tile.bias = bias_.get();
    tile.depth = depth_;
    tile.lanes = view_.K;
    if (aligned_ && along_.holds(along, positions(), 1) &&
        across_.holds(across, lines_, across_.step)) {
      // Pairs are numbers of 32 bits, in which distances are counted too.
      tile.source = reinterpret_cast<const float*>(src_ + n * view_.src.n + along_.at(along) +
                                                   across_.at(across));
      tile.source_step = along_.src / kOfTerm;
      tile.source_line = across_.step * across_.src / kOfTerm;
    } else {
      copy(n, along, across, source);
      tile.source = source;
      tile.source_step = kPixel;
      tile.source_line = positions() * kPixel;
    }
    const bool whole = i + rows_of_tile() <= view_.I && j + columns_of_tile() <= view_.J;
    if (whole && epilogue_.activates_only() && epilogue_.clamps_at_most()) {
      tile.clamps = epilogue_.clamps();
      tile.most = epilogue_.most();
      tile.step = along_.dst;
      tile.line_step = across_.dst;
      T* const to = epilogue_.y + view_.dst_offset + n * view_.dst.n + i * view_.dst.row +
                    j * view_.dst.column;
      if constexpr (kPairs)
        tile.rounded = to;
      else
        tile.out = to;
      return kernel(tile);
    }
    tile.out = sums;
    tile.lanes = kL;
    tile.line_step = kL;
    tile.step = lines_ * kL;
    kernel(tile);
    store(n, i, j, sums);
  }

  // What the tile of outputs [along, ...) x [across, ...) of sample n reads.
  void copy(int64_t n, int64_t along, int64_t across, float* to) const {
    const int64_t first = along_.first(along);
    const int64_t begin = std::clamp<int64_t>(-first, 0, positions());
    const int64_t end = std::clamp<int64_t>(along_.size - first, begin, positions());
    for (int64_t l = 0; l < lines_; ++l, to += positions() * kPixel) {
      const int64_t at = across_.first(across + l);
      const bool inside = 0 <= at && at < across_.size && across + l < across_.outputs;
      const T* const line = src_ + n * view_.src.n + at * across_.src + first * along_.src;
      for (int64_t p = 0; p < positions(); ++p) {
        float* const pixel = to + p * kPixel;
        if (inside && begin <= p && p < end)
          copy_pixel(line + p * along_.src, pixel);
        else
          std::fill_n(pixel, round_up(depth_, kL), 0.0f);
      }
    }
  }

  TORCHCONV_INLINE void copy_pixel(const T* from, float* to) const {
    using V = Vec<float>;
    int64_t c = 0;
    for (; c + kL <= depth_; c += kL) V::store(to + c, V::load(from + c * kOfTerm));
    if (c < depth_) V::store(to + c, V::load_partial(from + c * kOfTerm, depth_ - c));
  }

  void store(int64_t n, int64_t i, int64_t j, float* out) const {
    const int64_t rows = std::min(rows_of_tile(), view_.I - i);
    const int64_t columns = std::min(columns_of_tile(), view_.J - j);
    const bool whole = view_.K == kL && view_.dst.column == kL;
    for (int64_t y = 0; y < rows; ++y) {
      float* const row = out + y * columns_of_tile() * kL;
      const int64_t to = view_.dst_offset + n * view_.dst.n + (i + y) * view_.dst.row;
      if (whole) {
        epilogue_.store_few(row, columns * kL, to + j * view_.dst.column);
        continue;
      }
      for (int64_t x = 0; x < columns; ++x)
        epilogue_.store_few(row + x * kL, view_.K, to + (j + x) * view_.dst.column);
    }
  }

  const ConvView& view_;
  const T* src_;
  const Epilogue<T>& epilogue_;
  bool by_rows_, aligned_;                  // aligned_: terms in the source
  int64_t taps_, depth_, lines_, outputs_;  // outputs_: of a line of a tile
  Buffer<float> weights_;                   // [term of a tap][tap][kL]
  Buffer<float> bias_;
  Axis along_, across_;  // the kernel
};

}  // namespace

bool shared_taps_applies(const ConvView& view, bool pairs) {
  const auto taps = static_cast<int64_t>(view.taps.size());
  if (view.groups != 1 || view.src.c != 1 || view.dst.c != 1 || !has_shared_taps(taps))
    return false;
  const int64_t depth = pairs ? view.C / 2 : view.C;
  if (pairs && (view.C % 2 != 0 || !takes_pairs(view))) return false;
  if (depth < kLeastDepth || depth > kMostDepth || depth * taps > kDepth) return false;
  if (view.K > kL || used(view.K, kL) < kFiltersUsed) return false;
  if (runs_along_rows(view))
    return view.step_w == 1 && taps_along(view, &ConvTap::w, &ConvTap::h) &&
           used(view.J, kSharedTapsOutputs) >= kOutputsUsed;
  return view.step_h == 1 && taps_along(view, &ConvTap::h, &ConvTap::w) &&
         used(view.I, kSharedTapsOutputs / kSharedTapsLines) * used(view.J, kSharedTapsLines) >=
             kOutputsUsed;
}

template <typename T>
void shared_taps(const ConvView& view, const T* src, const T* w, const T* bias,
                 const Epilogue<T>& epilogue, const Parallel& pool) {
  SharedTaps<T>(view, src, w, bias, epilogue).run(pool);
}

template void shared_taps(const ConvView&, const float*, const float*, const float*,
                          const Epilogue<float>&, const Parallel&);
template void shared_taps(const ConvView&, const BFloat16*, const BFloat16*, const BFloat16*,
                          const Epilogue<BFloat16>&, const Parallel&);

}  // namespace torchconv::cpu
