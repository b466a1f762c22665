// The gradient of a convolution without padding is larger than dz, and as a gather most of its taps
// lie beside dz. As the product of the weights, as they lie, with dz it has the terms that exist
// and no others (Chellapilla et al., "High Performance Convolutional Neural Networks for Document
// Processing", 2006): each pixel of dz gives a patch of dx. Nor are the weights taken apart for the
// phases of a stride, which few pixels would not repay.
//
// The patches, [n][c][r][s][p][q] or in channels_last [n][p][q][r][s][c], are then folded, which is
// a sum over the taps of each pixel of dx. It is formed in registers: to add one patch after the
// other to dx would wait for the stores of the one before.
#include "cpu/col2im.h"

#include <algorithm>
#include <type_traits>

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Of an element of the columns, beside one of the product's.
constexpr double kFoldOperations = 4;

// dst[j] = the sum over `taps` of columns[plane of the tap][row i + h][j + w], j < J. The planes
// are `plane` apart.
template <typename T>
void fold_row(const ConvView& view, Range taps, const Wide<T>* columns, int64_t plane, int64_t i,
              T* dst) {
  using V = Vec<Wide<T>>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t j = 0; j < view.J; j += kL, dst += kL) {
    const int64_t count = std::min(kL, view.J - j);
    auto sum = typename V::Type{};
    for (int64_t t = taps.begin; t < taps.end; ++t) {
      const ConvTap& tap = view.taps[t];
      const int64_t w = j + tap.w;
      const int64_t first = std::max(-w, int64_t{0}), last = std::min(view.W - w, count);
      const Wide<T>* const from = columns + tap.weight * plane + (i + tap.h) * view.W + w;
      if (first == 0 && last == kL)
        sum += V::load(from);
      else if (first < last)
        sum += load_lanes(from, first, last);
    }
    if constexpr (std::is_same_v<T, Wide<T>>)
      V::store_partial(dst, sum, count);
    else
      WideVec<T>::store_partial(dst, sum, count);
  }
}

// dst[c] = the sum over taps of columns[tap][c], c < C.
template <typename T>
void fold_pixel(const std::vector<const T*>& taps, int64_t C, T* dst) {
  using V = Vec<T>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t c = 0; c < C; c += kL) {
    auto sum = typename V::Type{};
    if (c + kL <= C) {
      for (const T* tap : taps) sum += V::load(tap + c);
      V::store(dst + c, sum);
    } else {
      for (const T* tap : taps) sum += V::load_partial(tap + c, C - c);
      V::store_partial(dst + c, sum, C - c);
    }
  }
}

// For each row of a view the taps whose row of the columns exists: they are in ascending or
// descending order.
using RowTaps = std::vector<Range>;
RowTaps row_taps(const ConvView& view) {
  RowTaps rows(static_cast<size_t>(view.I), Range{0, static_cast<int64_t>(view.taps.size())});
  for (int64_t i = 0; i < view.I; ++i) {
    Range& taps = rows[i];
    const auto outside = [&](int64_t t) {
      return i + view.taps[t].h < 0 || i + view.taps[t].h >= view.H;
    };
    while (!taps.empty() && outside(taps.begin)) ++taps.begin;
    while (!taps.empty() && outside(taps.end - 1)) --taps.end;
  }
  return rows;
}

}  // namespace

ColumnFold::ColumnFold(const ConvView& view) : view_(view), inside_(row_taps(view)) {}

void ColumnFold::plane(const float* columns, int64_t step, BFloat16* dx) const {
  for (int64_t i = 0; i < view_.I; ++i)
    fold_row(view_, inside_[i], columns, step, i, dx + view_.dst_offset + i * view_.dst.row);
}

bool col2im_applies(const ConvProblem& p) {
  return p.N > 0 && p.C > 0 && p.K > 0 && p.groups == 1 && p.layout == p.weight_layout;
}

template <typename T>
void col2im(const ConvProblem& p, const std::vector<ConvView>& views, const T* columns, T* dx,
            const Parallel& pool) {
  const bool nchw = p.layout == Layout::kNCHW;
  const int64_t depth = p.C * p.R * p.S, pixels = p.P * p.Q;
  const double operations = kFoldOperations * static_cast<double>(depth * pixels);
  std::vector<RowTaps> inside;
  for (const ConvView& view : views) inside.push_back(row_taps(view));
  if (nchw) {
    const WorkSplit split(p.N * p.C, operations / static_cast<double>(p.C));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t image = begin; image < end; ++image)
        for (size_t v = 0; v < views.size(); ++v)
          for (int64_t i = 0; i < views[v].I; ++i)
            fold_row(views[v], inside[v][i], columns + image * p.R * p.S * pixels, pixels, i,
                     dx + image * p.H * p.W + views[v].dst_offset + i * views[v].dst.row);
    });
    return;
  }
  const WorkSplit split(p.N * p.H, operations / static_cast<double>(p.H));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    std::vector<const T*> taps;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / p.H, h = row % p.H;
      for (size_t v = 0; v < views.size(); ++v) {
        const ConvView& view = views[v];
        const int64_t first_h = view.dst_offset / (p.W * p.C);
        const int64_t i = view.I > 1 ? (h - first_h) / p.stride_h : 0;
        if (h < first_h || i >= view.I || first_h + (view.I > 1 ? i * p.stride_h : 0) != h)
          continue;
        const Range range = inside[v][i];
        for (int64_t j = 0; j < view.J; ++j) {
          taps.clear();
          for (int64_t t = range.begin; t < range.end; ++t) {
            const ConvTap& tap = view.taps[t];
            if (j + tap.w >= 0 && j + tap.w < view.W)
              taps.push_back(columns + tap.weight +
                             ((n * view.H + i + tap.h) * view.W + j + tap.w) * depth);
          }
          fold_pixel(
              taps, p.C,
              dx + n * p.H * p.W * p.C + view.dst_offset + i * view.dst.row + j * view.dst.column);
        }
      }
    }
  });
}

template void col2im(const ConvProblem&, const std::vector<ConvView>&, const float*, float*,
                     const Parallel&);
template void col2im(const ConvProblem&, const std::vector<ConvView>&, const double*, double*,
                     const Parallel&);

}  // namespace torchconv::cpu
