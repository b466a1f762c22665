// Vectors run along channels in either layout: where pixels are neighbours in memory, the rows of a
// vector of channels are first transposed into a band. The columns of the band are transformed once
// for all tiles that share them, then the rows of each tile; every store is a whole line of V. With
// dilation the columns of all phases lie in one band, where a tile finds its own some steps apart.
#include "cpu/winograd_input.h"

#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd {
namespace {

// The pixels of a strip's source: rows [0, points) of one phase and columns [0, width) of all
// phases, those inside the image being [row.begin, row.end) and [column.begin, column.end).
struct Window {
  int64_t h, w, width;
  Range row, column;

  Window(const Grid& plan, const Segment* segments, int64_t count) {
    const TileAxis& columns = plan.columns;
    h = plan.rows.begin(segments[0].i) + plan.h;
    int64_t begin = columns.begin(segments[0].j), end = 0;
    for (const Segment* s = segments; s != segments + count; ++s) {
      const int64_t first = columns.begin(s->j);
      const int64_t positions = (columns.full - 1) * s->count + s->wide + plan.side - 1;
      begin = std::min(begin, first);
      end = std::max(end, first + (positions - 1) * columns.dilation + 1);
    }
    w = begin + plan.w;
    width = end - begin;
    const int64_t points = kPoints - (plan.rows.is_full(segments[0].i) ? 0 : 1);
    row = valid_range(points, plan.rows.dilation, h, plan.view.H);
    column = valid_range(width, 1, w, plan.view.W);
  }
};

// No strip is wider.
int64_t max_width(const Grid& plan, int64_t slots) {
  const TileAxis& columns = plan.columns;
  if (columns.dilation == 1) return columns.full * std::min(slots, columns.count) + plan.side - 1;
  return columns.outputs + (kPoints - 1) * columns.dilation;
}

// band[row][column][lane] from planes of neighbouring pixels, for `channels` of a vector.
template <typename T>
void transpose_window(const Grid& plan, const Window& window, const T* src, int64_t channels,
                      Wide<T>* band) {
  constexpr int64_t kVector = kLanes<Wide<T>>;
  const ConvView& view = plan.view;
  const int64_t width = window.column.size(), next_row = plan.rows.dilation * view.src.row;
  src += window.h * view.src.row + window.row.begin * next_row + window.w + window.column.begin;
  // Whole rows of the image are one run.
  const bool whole = width == view.W && next_row == view.W;
  const int64_t runs = whole ? 1 : window.row.size();
  const int64_t run = whole ? window.row.size() * width : width;
  for (int64_t r = 0; r < runs; ++r) {
    const T* row = src + r * next_row;
    Wide<T>* to = band + r * width * kVector;
    for (int64_t p = 0; p < run; p += kVector) {
      for (int64_t c = 0; c < channels; ++c)
        __builtin_prefetch(row + p + c * view.src.c + plan.rows.full * next_row, 0, 2);
      transpose_tile(row + p, view.src.c, channels, std::min(run - p, kVector), to + p * kVector,
                     kVector, std::min(run - p, kVector));
    }
  }
}

// columns[column][point]: B^T applied down the columns. A row is at rows[r], its columns `step`
// apart, of which the first `lanes` lanes are read. ahead: from a row to that of the tiles below,
// in the image, or 0; from row `fresh` on those are not in this window.
template <bool kTall, bool kPartial, typename T>
void transform_columns(const Window& window, const T* const (&rows)[kPoints], int64_t step,
                       int64_t ahead, int fresh, int64_t lanes, Wide<T>* columns) {
  using V = Vec<Wide<T>>;
  constexpr int64_t kVector = V::kLanes;
  constexpr int kRows = kTall ? kPoints : kPoints - 1;
  const auto zero = [&](int64_t column) {
    for (int r = 0; r < kRows; ++r)
      V::store(columns + (column * kPoints + r) * kVector, typename V::Type{});
  };
  for (int64_t c = 0; c < window.column.begin; ++c) zero(c);
  for (int64_t c = window.column.end; c < window.width; ++c) zero(c);
  typename V::Type d[kPoints] = {}, v[kPoints];
  for (int64_t c = window.column.begin; c < window.column.end; ++c) {
    const int64_t at = (c - window.column.begin) * step;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      if (r >= window.row.begin && r < window.row.end)
        d[r] = kPartial ? WideVec<T>::load_partial(rows[r] + at, lanes)
                        : WideVec<T>::load(rows[r] + at);
    // The rows that the tiles below add.
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      if (ahead != 0 && r >= fresh && rows[r] != nullptr)
        __builtin_prefetch(rows[r] + at + ahead, 0, 2);
    transform_input<kTall>(d, v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) V::store(columns + (c * kPoints + r) * kVector, v[r]);
  }
}

// V from the columns of `count` tiles; those of one tile are `step` elements apart, and `next` to
// those of the next tile.
template <bool kTall, bool kWide, typename A>
void transform_rows(const A* columns, int64_t step, int64_t next, int64_t count, int64_t point,
                    A* v, bool streams) {
  using V = Vec<A>;
  constexpr int64_t kVector = V::kLanes;
  constexpr int kRows = kTall ? kPoints : kPoints - 1, kColumns = kWide ? kPoints : kPoints - 1;
  for (int64_t tile = 0; tile < count; ++tile, columns += next, v += kVector) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      typename V::Type d[kPoints], row[kPoints];
#pragma GCC unroll 6
      for (int s = 0; s < kColumns; ++s) d[s] = V::load(columns + s * step + r * kVector);
      transform_input<kWide>(d, row);
#pragma GCC unroll 6
      for (int s = 0; s < kColumns; ++s)
        WideVec<A>::store(v + (r * kPoints + s) * point, row[s], streams);
    }
  }
}

// transform_columns of the whole strip.
template <typename T>
void transform_all_columns(bool tall, const Window& window, const T* const (&rows)[kPoints],
                           int64_t step, int64_t ahead, int fresh, int64_t channels,
                           Wide<T>* columns) {
  const bool partial = channels < kLanes<Wide<T>>;
  const auto transform =
      tall      ? partial ? transform_columns<true, true, T> : transform_columns<true, false, T>
      : partial ? transform_columns<false, true, T>
                : transform_columns<false, false, T>;
  transform(window, rows, step, ahead, fresh, channels, columns);
}

template <bool kTall, typename A>
void transform_tiles(const Segment& s, const A* columns, int64_t step, int64_t full,
                     const SourceLayout<A>& layout, A* v, bool streams) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t next = full * step;
  transform_rows<kTall, true>(columns, step, next, s.wide, layout.point, v + s.wide_slot * kVector,
                              streams);
  transform_rows<kTall, false>(columns + s.wide * next, step, next - step, s.count - s.wide,
                               layout.point, v + s.narrow_slot * kVector, streams);
}

}  // namespace

template <typename A>
int64_t source_scratch(const Plan<A>& plan, int64_t slots) {
  return 2 * kPoints * max_width(plan, slots) * kLanes<A>;
}

template <typename T>
void transform_source(const Plan<Wide<T>>& plan, const Segment* segments, int64_t count,
                      const T* src, const SourceLayout<Wide<T>>& layout, Wide<T>* scratch,
                      Wide<T>* v, bool streams) {
  using A = Wide<T>;
  constexpr int64_t kVector = kLanes<A>;
  const ConvView& view = plan.view;
  const Window window(plan, segments, count);
  const bool tall = plan.rows.is_full(segments[0].i);
  const int64_t next_row = plan.rows.dilation * view.src.row;
  const int64_t next_column = plan.columns.dilation * kPoints * kVector;
  A* columns = scratch;
  A* band = scratch + kPoints * window.width * kVector;
  src += segments[0].n * view.src.n;
  for (int64_t vector = 0; vector < plan.vectors; ++vector) {
    const int64_t channels = std::min(view.C - vector * kVector, kVector);
    const T* from = src + vector * kVector * view.src.c;
    if (view.src_pixels_contiguous()) {
      const A* rows[kPoints] = {};
      if (!window.row.empty() && !window.column.empty()) {
        transpose_window(plan, window, from, channels, band);
        for (int64_t r = window.row.begin; r < window.row.end; ++r)
          rows[r] = band + (r - window.row.begin) * window.column.size() * kVector;
      }
      transform_all_columns(tall, window, rows, kVector, 0, 0, kVector, columns);
    } else {
      const T* rows[kPoints] = {};
      const int64_t step = view.src.column;
      if (!window.row.empty() && !window.column.empty())
        for (int64_t r = window.row.begin; r < window.row.end; ++r)
          rows[r] = from + window.h * view.src.row + r * next_row +
                    (window.w + window.column.begin) * step;
      transform_all_columns(tall, window, rows, step, plan.rows.full * next_row, plan.side - 1,
                            channels, columns);
    }
    A* to = v + vector / plan.block_vectors * layout.block +
            vector % plan.block_vectors * layout.vector;
    for (const Segment* s = segments; s != segments + count; ++s) {
      const int64_t column = plan.columns.begin(s->j) + plan.w - window.w;
      const auto tiles = tall ? transform_tiles<true, A> : transform_tiles<false, A>;
      tiles(*s, columns + column * kPoints * kVector, next_column, plan.columns.full, layout, to,
            streams);
    }
  }
  if (streams) stream_fence();
}

template <typename T>
void prefetch_source(const Plan<Wide<T>>& plan, const Segment* segments, int64_t count,
                     const T* src, SourcePrefetch& ahead) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  const ConvView& view = plan.view;
  const ConvStrides& stride = view.src;
  const Window window(plan, segments, count);
  const int64_t i = segments[0].i, next_row = plan.rows.dilation * stride.row;
  const bool first = i == 0 || plan.rows.rest(i - 1) == 1;
  const Range rows{std::max(window.row.begin, first ? 0 : int64_t{plan.side - 1}), window.row.end};
  if (rows.empty() || window.column.empty()) return;
  src += segments[0].n * stride.n + window.h * stride.row + rows.begin * next_row +
         (window.w + window.column.begin) * stride.column;
  const bool planes = view.src_pixels_contiguous();
  const int64_t width = window.column.size();
  if (planes && width == next_row)  // whole rows of the image are one run
    return ahead.add(src, view.C, stride.c * kSize, rows.size() * width * kSize);
  for (int64_t r = 0; r < rows.size(); ++r) {
    if (planes)
      ahead.add(src + r * next_row, view.C, stride.c * kSize, width * kSize);
    else
      ahead.add(src + r * next_row, width, stride.column * kSize, view.C * kSize);
  }
}

#define TORCHCONV_INSTANTIATE(T)                                                          \
  template void transform_source(const Plan<Wide<T>>&, const Segment*, int64_t, const T*, \
                                 const SourceLayout<Wide<T>>&, Wide<T>*, Wide<T>*, bool); \
  template void prefetch_source(const Plan<Wide<T>>&, const Segment*, int64_t, const T*,  \
                                SourcePrefetch&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE
template int64_t source_scratch(const Plan<float>&, int64_t);
template int64_t source_scratch(const Plan<double>&, int64_t);

}  // namespace torchconv::cpu::winograd
