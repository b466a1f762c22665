// Vectors run along channels in either layout: where pixels are neighbours in memory, the rows of a
// vector of channels are first transposed into a band. The columns of the band are transformed once
// for all tiles that share them, then the rows of each tile; every store is a whole line of V.
#include "cpu/winograd_input.h"

#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd {
namespace {

using V = Vec<float>;
using Register = V::Type;

// The pixels of a segment's source: rows [0, points) and columns [0, width), those inside the image
// being [row.begin, row.end) and [column.begin, column.end).
struct Window {
  int64_t h, w, width;
  Range row, column;

  Window(const Plan& plan, const Segment& s) {
    h = plan.rows.begin(s.i) + plan.h;
    w = plan.columns.begin(s.j) + plan.w;
    width = plan.columns.begin(s.j + s.count) - plan.columns.begin(s.j) + kTaps - 1;
    const int64_t points = kPoints - (plan.rows.is_four(s.i) ? 0 : 1);
    row = inside(h, points, plan.view.H);
    column = inside(w, width, plan.view.W);
  }

 private:
  static Range inside(int64_t first, int64_t count, int64_t size) {
    const int64_t begin = std::min(std::max(-first, int64_t{0}), count);
    return {begin, std::max(begin, std::min(count, size - first))};
  }
};

// Columns of at most this many pixels are transposed together.
int64_t max_width(const Plan& plan, int64_t slots) {
  return kOutputs * std::min(slots, plan.columns.count) + kTaps - 1;
}

// band[row][column][lane] from planes of neighbouring pixels, for `channels` of a vector.
void transpose_window(const ConvView& view, const Window& window, const float* src,
                      int64_t channels, float* band) {
  const int64_t width = window.column.size();
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
        __builtin_prefetch(row + p + c * view.src.c + kOutputs * view.src.row, 0, 2);
      transpose_tile(row + p, view.src.c, channels, std::min(run - p, kVector), to + p * kVector,
                     kVector, std::min(run - p, kVector));
    }
  }
}

// columns[column][point]: B^T applied down the columns. A row is at rows[r], its columns `step`
// apart, of which the first `lanes` lanes are read. ahead: from a row to that of the tiles below,
// in the image, or 0.
template <bool kTall, bool kPartial>
void transform_columns(const Window& window, const float* const (&rows)[kPoints], int64_t step,
                       int64_t ahead, int64_t lanes, float* columns) {
  constexpr int kRows = kTall ? kPoints : kPoints - 1;
  const auto zero = [&](int64_t column) {
    for (int r = 0; r < kRows; ++r)
      V::store(columns + (column * kPoints + r) * kVector, Register{});
  };
  for (int64_t c = 0; c < window.column.begin; ++c) zero(c);
  for (int64_t c = window.column.end; c < window.width; ++c) zero(c);
  Register d[kPoints] = {}, v[kPoints];
  for (int64_t c = window.column.begin; c < window.column.end; ++c) {
    const int64_t at = (c - window.column.begin) * step;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      if (r >= window.row.begin && r < window.row.end)
        d[r] = kPartial ? V::load_partial(rows[r] + at, lanes) : V::load(rows[r] + at);
    // The rows that the tiles below add.
#pragma GCC unroll 6
    for (int r = kTaps - 1; r < kRows; ++r)
      if (ahead != 0 && rows[r] != nullptr) __builtin_prefetch(rows[r] + at + ahead, 0, 2);
    transform_input<kTall>(d, v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) V::store(columns + (c * kPoints + r) * kVector, v[r]);
  }
}

// V from the columns of `count` tiles, `step` columns apart.
template <bool kTall, bool kWide>
void transform_rows(const float* columns, int64_t count, int64_t point, float* v) {
  constexpr int kRows = kTall ? kPoints : kPoints - 1, kColumns = kWide ? kPoints : kPoints - 1;
  constexpr int64_t kStep = (kColumns - kTaps + 1) * kPoints * kVector;
  for (int64_t tile = 0; tile < count; ++tile, columns += kStep, v += kVector) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      Register d[kPoints], row[kPoints];
#pragma GCC unroll 6
      for (int s = 0; s < kColumns; ++s) d[s] = V::load(columns + (s * kPoints + r) * kVector);
      transform_input<kWide>(d, row);
#pragma GCC unroll 6
      for (int s = 0; s < kColumns; ++s) V::store(v + (r * kPoints + s) * point, row[s]);
    }
  }
}

template <bool kTall>
void transform_tiles(const Segment& s, const float* columns, const SourceLayout& layout, float* v) {
  transform_rows<kTall, true>(columns, s.wide, layout.point, v + s.wide_slot * kVector);
  transform_rows<kTall, false>(columns + s.wide * kOutputs * kPoints * kVector, s.count - s.wide,
                               layout.point, v + s.narrow_slot * kVector);
}

}  // namespace

int64_t source_scratch(const Plan& plan, int64_t slots) {
  const int64_t width = max_width(plan, slots);
  return 2 * kPoints * width * kVector;
}

void transform_source(const Plan& plan, const Segment& segment, const float* src,
                      const SourceLayout& layout, float* scratch, float* v) {
  const ConvView& view = plan.view;
  const Window window(plan, segment);
  const bool tall = plan.rows.is_four(segment.i);
  float* columns = scratch;
  float* band = scratch + kPoints * window.width * kVector;
  src += segment.n * view.src.n;
  for (int64_t vector = 0; vector < plan.vectors; ++vector) {
    const int64_t channels = std::min(view.C - vector * kVector, kVector);
    const float* from = src + vector * kVector * view.src.c;
    const float* rows[kPoints] = {};
    int64_t step = kVector, ahead = 0;
    bool partial = false;
    if (window.row.empty() || window.column.empty()) {
      // Nothing of the image: no row is read.
    } else if (view.src_pixels_contiguous()) {
      transpose_window(view, window, from, channels, band);
      for (int64_t r = window.row.begin; r < window.row.end; ++r)
        rows[r] = band + (r - window.row.begin) * window.column.size() * kVector;
    } else {
      step = view.src.column;
      ahead = kOutputs * view.src.row;
      partial = channels < kVector;
      for (int64_t r = window.row.begin; r < window.row.end; ++r)
        rows[r] = from + (window.h + r) * view.src.row + (window.w + window.column.begin) * step;
    }
    const auto transform =
        tall      ? partial ? transform_columns<true, true> : transform_columns<true, false>
        : partial ? transform_columns<false, true>
                  : transform_columns<false, false>;
    transform(window, rows, step, ahead, channels, columns);
    float* to = v + vector / plan.block_vectors * layout.block +
                vector % plan.block_vectors * layout.vector;
    if (tall)
      transform_tiles<true>(segment, columns, layout, to);
    else
      transform_tiles<false>(segment, columns, layout, to);
  }
}

}  // namespace torchconv::cpu::winograd
