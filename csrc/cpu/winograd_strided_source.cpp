// Vectors run along channels in either layout: where pixels are neighbours in memory, the rows of a
// vector of channels are first transposed into a band. The columns of the band are transformed once
// for all tiles that share them, then the rows of each tile; every store is a whole line of V.
#include "cpu/winograd_strided_source.h"

#include "cpu/transpose_tile.h"
#include "cpu/winograd_strided_fold.h"

namespace torchconv::cpu::winograd_strided {
namespace {

using V = Vec<float>;
using Register = V::Type;

// Most products, and most source positions, of a tile along an axis.
constexpr int kMost = pair::kPoints + pair::kOutputs;

// One axis of a tile: kUsed points, kPlain plain products, kIn positions of the source.
template <Axis kForm, bool kTall>
struct Tile {
  static constexpr Shape kShape{kForm};
  static constexpr int kUsed = kShape.points - (kTall ? 0 : 1);
  static constexpr int kUnits = static_cast<int>(kShape.units) - (kTall ? 0 : 1);
  static constexpr int kPlain = kShape.has_plain() ? kUnits : 0;
  static constexpr int kStep = kForm == Axis::kDown ? 2 * kUnits : kUnits;
  static constexpr int kIn = kForm == Axis::kDown ? kStep + 1 : kUsed;
  static constexpr int kProducts = kUsed + kPlain;
  static constexpr int plain(int i) {
    return kForm == Axis::kDown ? 2 * i + 1 : kForm == Axis::kUpFirst ? i + 1 : i;
  }

  // The products of d, points first.
  static TORCHCONV_INLINE void transform(const Register (&d)[kMost], Register (&v)[kMost]) {
    if constexpr (folds(kForm)) {
      Register points[quad::kPoints], u[quad::kPoints];
#pragma GCC unroll 8
      for (int i = 0; i < kUsed; ++i) points[i] = d[i];
      winograd::transform_input<kTall>(points, u);
#pragma GCC unroll 8
      for (int i = 0; i < kUsed; ++i) v[i] = u[i];
    } else {
      Register points[kUsed];
#pragma GCC unroll 8
      for (int i = 0; i < kUsed; ++i) points[i] = d[kForm == Axis::kDown ? 2 * i : i];
      pair::transform_input<kTall>(points, v);
#pragma GCC unroll 8
      for (int i = 0; i < kPlain; ++i) v[kUsed + i] = d[plain(i)];
    }
  }
};

// The pixels of a segment's source: `height` rows and `width` columns, those inside the image being
// [row.begin, row.end) and [column.begin, column.end).
struct Window {
  int64_t h, w, height, width;
  Range row, column;

  Window(const Plan& plan, const Segment& s) {
    h = plan.rows.source_begin(s.i);
    w = plan.columns.source_begin(s.j);
    const int64_t most = plan.shape().units, units = (most - 1) * s.count + s.wide;
    width = plan.columns.source_size(units);
    height = plan.rows.source_size(plan.rows.is_tall(s.i) ? most : most - 1);
    const bool folded = plan.rows.form == Axis::kFold;  // its band has the padding
    row = folded ? Range{0, height} : valid_range(height, 1, h, plan.view.H);
    column = folded ? Range{0, width} : valid_range(width, 1, w, plan.view.W);
  }
};

int64_t max_width(const Plan& plan, int64_t slots) {
  return plan.columns.source_size(plan.shape().units * std::min(slots, plan.columns.count));
}

// band[row][column][lane] from planes of neighbouring pixels, for `channels` of a vector.
void transpose_window(const Plan& plan, const Window& window, const float* src, int64_t channels,
                      float* band) {
  const ConvView& view = plan.view;
  const int64_t width = window.column.size();
  const int64_t ahead = plan.shape().units * plan.rows.step() * view.src.row;
  src += (window.h + window.row.begin) * view.src.row + window.w + window.column.begin;
  // Whole rows of the image are one run.
  const bool whole = width == view.W && view.src.row == view.W;
  const int64_t runs = whole ? 1 : window.row.size();
  const int64_t run = whole ? window.row.size() * width : width;
  for (int64_t r = 0; r < runs; ++r) {
    const float* row = src + r * view.src.row;
    float* to = band + r * width * kVector;
    for (int64_t p = 0; p < run; p += kVector) {
      for (int64_t c = 0; c < channels; ++c)
        __builtin_prefetch(row + p + c * view.src.c + ahead, 0, 2);
      transpose_tile(row + p, view.src.c, channels, std::min(run - p, kVector), to + p * kVector,
                     kVector, std::min(run - p, kVector));
    }
  }
}

// columns[column][product]: the transform down the columns. A row is at rows[r], its columns `step`
// apart, of which the first `lanes` lanes are read. ahead: from a row to that of the tiles below,
// in the image, or 0.
template <Axis kForm, bool kTall, bool kPartial>
void transform_columns(const Window& window, const float* const (&rows)[kMost], int64_t step,
                       int64_t ahead, int64_t lanes, float* columns) {
  using Across = Tile<kForm, kTall>;
  const auto zero = [&](int64_t column) {
    for (int r = 0; r < Across::kProducts; ++r)
      V::store(columns + (column * kMost + r) * kVector, Register{});
  };
  for (int64_t c = 0; c < window.column.begin; ++c) zero(c);
  for (int64_t c = window.column.end; c < window.width; ++c) zero(c);
  Register d[kMost] = {}, v[kMost];
  for (int64_t c = window.column.begin; c < window.column.end; ++c) {
    const int64_t at = (c - window.column.begin) * step;
#pragma GCC unroll 9
    for (int r = 0; r < Across::kIn; ++r)
      if (r >= window.row.begin && r < window.row.end)
        d[r] = kPartial ? V::load_partial(rows[r] + at, lanes) : V::load(rows[r] + at);
    // The rows that the tiles below add.
#pragma GCC unroll 9
    for (int r = 1; r < Across::kIn; ++r)
      if (ahead != 0 && rows[r] != nullptr) __builtin_prefetch(rows[r] + at + ahead, 0, 2);
    Across::transform(d, v);
#pragma GCC unroll 9
    for (int r = 0; r < Across::kProducts; ++r) V::store(columns + (c * kMost + r) * kVector, v[r]);
  }
}

// Where a product of the rows goes: `points` is the first tile's row in the plane of the columns'
// first point, `plain` its first row in that of their middle tap, and the steps lead to the next
// tile's.
struct RowTarget {
  float *points, *plain;
  int64_t plane, points_step, plain_step;
};

// The rows of `count` tiles from their columns.
template <Axis kForm, bool kWide>
void transform_rows(const float* columns, int64_t count, int64_t products,
                    const RowTarget (&targets)[kMost]) {
  using Across = Tile<kForm, kWide>;
  for (int64_t tile = 0; tile < count; ++tile, columns += Across::kStep * kMost * kVector) {
    for (int64_t r = 0; r < products; ++r) {
      const RowTarget& to = targets[r];
      float* points = to.points + tile * to.points_step;
      float* plain = to.plain + tile * to.plain_step;
      Register d[kMost], v[kMost];
#pragma GCC unroll 9
      for (int s = 0; s < Across::kIn; ++s) d[s] = V::load(columns + (s * kMost + r) * kVector);
      Across::transform(d, v);
#pragma GCC unroll 9
      for (int s = 0; s < Across::kUsed; ++s) V::store(points + s * to.plane, v[s]);
#pragma GCC unroll 9
      for (int s = 0; s < Across::kPlain; ++s) V::store(plain + s * kVector, v[Across::kUsed + s]);
    }
  }
}

// v: of the vector of channels, in the plane of each kind.
template <Axis kForm, bool kWide>
void transform_tiles(const TileBlock& block, int64_t slot, int64_t count, bool tall,
                     const float* columns, const SourceLayout& layout, float* const (&v)[kKinds]) {
  const Shape shape(kForm);
  const int64_t used = shape.points - (tall ? 0 : 1), down = shape.units - (tall ? 0 : 1);
  const int64_t across = Tile<kForm, kWide>::kUnits, plain = shape.has_plain() ? down : 0;
  const Rows rows = block.rows(slot);
  RowTarget targets[kMost];
  for (int64_t r = 0; r < used; ++r)
    targets[r] = {v[kBoth] + r * shape.points * layout.plane[kBoth] + rows.of[kBoth] * kVector,
                  v[kRows] + r * layout.plane[kRows] + rows.of[kRows] * kVector,
                  layout.plane[kBoth], kVector, across * kVector};
  for (int64_t i = 0; i < plain; ++i)
    targets[used + i] = {v[kColumns] + (rows.of[kColumns] + i) * kVector,
                         v[kNeither] + (rows.of[kNeither] + i * across) * kVector,
                         layout.plane[kColumns], down * kVector, down * across * kVector};
  transform_rows<kForm, kWide>(columns, count, used + plain, targets);
}

template <Axis kForm>
void transform_segment(const TileBlock& block, const Segment& s, bool tall, const float* columns,
                       const SourceLayout& layout, float* const (&v)[kKinds]) {
  transform_tiles<kForm, true>(block, s.wide_slot, s.wide, tall, columns, layout, v);
  transform_tiles<kForm, false>(block, s.narrow_slot, s.count - s.wide, tall,
                                columns + s.wide * Tile<kForm, true>::kStep * kMost * kVector,
                                layout, v);
}

template <Axis kForm>
void columns_of_form(bool tall, bool partial, const Window& window,
                     const float* const (&rows)[kMost], int64_t step, int64_t ahead, int64_t lanes,
                     float* columns) {
  const auto transform =
      tall ? partial ? transform_columns<kForm, true, true> : transform_columns<kForm, true, false>
      : partial ? transform_columns<kForm, false, true>
                : transform_columns<kForm, false, false>;
  transform(window, rows, step, ahead, lanes, columns);
}

// Calls f with the form as a constant.
template <typename F>
void with_form(Axis form, F&& f) {
  if (form == Axis::kDown) return f(std::integral_constant<Axis, Axis::kDown>());
  if (form == Axis::kUpFirst) return f(std::integral_constant<Axis, Axis::kUpFirst>());
  if (form == Axis::kUpSecond) return f(std::integral_constant<Axis, Axis::kUpSecond>());
  // Once folded, the source is like any other.
  f(std::integral_constant<Axis, Axis::kUnfold>());
}

}  // namespace

int64_t source_scratch(const Plan& plan, int64_t slots) {
  const int64_t width = max_width(plan, slots);
  const int64_t columns = kMost * width * kVector;
  if (plan.rows.form != Axis::kFold) return 2 * columns;
  return columns + folded_band_size(plan, kSide, width) + fold_scratch(plan, width);
}

void transform_source(const Plan& plan, const TileBlock& block, const Segment& segment,
                      const float* src, const SourceLayout& layout, float* scratch, float* v) {
  const ConvView& view = plan.view;
  const Window window(plan, segment);
  const bool tall = plan.rows.is_tall(segment.i);
  float* columns = scratch;
  float* band = scratch + kMost * window.width * kVector;
  src += segment.n * view.src.n;
  const bool folded = plan.rows.form == Axis::kFold;
  if (folded)
    fold_source(plan, src, window.h, window.w, window.height, window.width, band,
                band + folded_band_size(plan, window.height, window.width));
  for (int64_t vector = 0; vector < plan.vectors; ++vector) {
    const int64_t channels = std::min(view.C - vector * kVector, kVector);
    const float* from = src + vector * kVector * view.src.c;
    const float* rows[kMost] = {};
    int64_t step = kVector, ahead = 0;
    bool partial = false;
    if (folded) {
      step = plan.vectors * kVector;
      for (int64_t r = 0; r < window.height; ++r)
        rows[r] = band + r * window.width * step + vector * kVector;
    } else if (window.row.empty() || window.column.empty()) {
      // Nothing of the image: no row is read.
    } else if (view.src_pixels_contiguous()) {
      transpose_window(plan, window, from, channels, band);
      for (int64_t r = window.row.begin; r < window.row.end; ++r)
        rows[r] = band + (r - window.row.begin) * window.column.size() * kVector;
    } else {
      step = view.src.column;
      ahead = plan.shape().units * plan.rows.step() * view.src.row;
      partial = channels < kVector;
      for (int64_t r = window.row.begin; r < window.row.end; ++r)
        rows[r] = from + (window.h + r) * view.src.row + (window.w + window.column.begin) * step;
    }
    float* to[kKinds];
    for (int k = 0; k < kKinds; ++k)
      to[k] = v + vector / plan.block_vectors * layout.block + layout.kind[k] +
              vector % plan.block_vectors * layout.vector[k];
    with_form(plan.rows.form, [&](auto form) {
      columns_of_form<form()>(tall, partial, window, rows, step, ahead, channels, columns);
    });
    with_form(plan.columns.form, [&](auto form) {
      transform_segment<form()>(block, segment, tall, columns, layout, to);
    });
  }
}

}  // namespace torchconv::cpu::winograd_strided
