// Vectors run along filters. The outputs of a segment go to a band of pixels first, [pixel]
// [kPanel] in the order of rows and columns; the epilogue then takes runs of it, or of its
// transposition where pixels are neighbours in memory.
#include "cpu/winograd_output.h"

#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd {
namespace {

template <typename A>
using Register = typename Vec<A>::Type;

// One tile's vector of filters to band, whose rows are band_row apart; returns a vector that holds
// a NaN where an output is not finite. rows and columns: how many outputs exist.
template <int kFull, bool kTall, bool kWide, typename A>
TORCHCONV_INLINE Register<A> transform_tile(const A* m, Register<A> bias, int64_t rows,
                                            int64_t columns, A* band, int64_t band_row) {
  using V = Vec<A>;
  constexpr int64_t kFilters = kPanel<A>;
  constexpr int kRows = kTall ? kFull : kFull - 1, kColumns = kWide ? kFull : kFull - 1;
  constexpr int kRowPoints = kPoints - kFull + kRows, kColumnPoints = kPoints - kFull + kColumns;
  Register<A> sums[kFull][kPoints];
#pragma GCC unroll 6
  for (int s = 0; s < kColumnPoints; ++s) {
    Register<A> column[kPoints], y[kFull];
#pragma GCC unroll 6
    for (int r = 0; r < kRowPoints; ++r) column[r] = V::load(m + (r * kPoints + s) * kFilters);
    transform_output<kTall>(column, y);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r][s] = y[r];
  }
  Register<A> special{};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    Register<A> y[kFull];
    transform_output<kWide>(sums[r], y);
#pragma GCC unroll 4
    for (int s = 0; s < kColumns; ++s) {
      special += y[s] * 0.0f;
      if (r < rows && s < columns) V::store(band + r * band_row + s * kFilters, y[s] + bias);
    }
  }
  return special;
}

// `count` tiles side by side, to band and the rest of its rows, `columns` pixels.
template <int kFull, bool kTall, bool kWide, typename A>
Register<A> transform_tiles(const A* m, int64_t count, const A* bias, int64_t vectors, int64_t rows,
                            int64_t columns, A* band, int64_t band_row) {
  using V = Vec<A>;
  constexpr int64_t kVector = V::kLanes;
  constexpr int64_t kStep = kWide ? kFull : kFull - 1;
  Register<A> special{};
  for (int64_t tile = 0; tile < count; ++tile) {
    for (int64_t v = 0; v < vectors; ++v)
      special += transform_tile<kFull, kTall, kWide>(m + v * kVector, V::load(bias + v * kVector),
                                                     rows, columns, band + v * kVector, band_row);
    m += kProductSlot<A>;
    band += kStep * kPanel<A>;
    columns -= kStep;
  }
  return special;
}

template <int kFull, bool kTall, typename A>
Register<A> transform_segment(const Segment& s, const A* m, const A* bias, int64_t vectors,
                              int64_t rows, int64_t columns, A* band) {
  const int64_t wide = s.wide * kFull, band_row = columns * kPanel<A>;
  return transform_tiles<kFull, kTall, true>(m + s.wide_slot * kProductSlot<A>, s.wide, bias,
                                             vectors, rows, columns, band, band_row) +
         transform_tiles<kFull, kTall, false>(m + s.narrow_slot * kProductSlot<A>, s.count - s.wide,
                                              bias, vectors, rows, columns - wide,
                                              band + wide * kPanel<A>, band_row);
}

template <int kFull, typename A>
constexpr auto segment_transform(bool tall) {
  return tall ? transform_segment<kFull, true, A> : transform_segment<kFull, false, A>;
}

// The outputs of a segment, and where those of the first filter go.
struct Outputs {
  int64_t rows, columns, dst;
  ConvStrides strides;

  Outputs(const Grid& plan, const Segment& s) {
    const ConvView& view = plan.view;
    const int64_t last = s.j + s.count - 1, step = plan.columns.dilation;
    rows = plan.rows.outputs_of(s.i);
    columns =
        (plan.columns.begin(last) - plan.columns.begin(s.j)) / step + plan.columns.outputs_of(last);
    dst = view.dst_offset + s.n * view.dst.n + plan.rows.begin(s.i) * view.dst.row +
          plan.columns.begin(s.j) * view.dst.column;
    strides = {0, view.dst.c, plan.rows.dilation * view.dst.row, step * view.dst.column};
  }
  // Whole rows of the image are one run.
  bool whole_rows() const { return strides.column == 1 && strides.row == columns; }
};

int64_t max_pixels(const Grid& plan, int64_t slots) {
  return plan.rows.full * plan.columns.full * std::min(slots, plan.columns.count);
}

}  // namespace

template <typename A>
int64_t product_scratch(const Plan<A>& plan, int64_t slots) {
  return band_size<A>(max_pixels(plan, slots));
}

template <typename T>
bool transform_products(const Plan<Wide<T>>& plan, const Segment& s, int64_t panel,
                        const Wide<T>* m, const Wide<T>* bias, const Epilogue<T>& epilogue,
                        Wide<T>* scratch) {
  using A = Wide<T>;
  constexpr int64_t kVector = kLanes<A>, kFilters = kPanel<A>;
  const ConvView& view = plan.view;
  const int64_t filters = std::min(view.K - panel * kFilters, kFilters);
  const int64_t vectors = ceil_div(filters, kVector);
  const Outputs out(plan, s);
  const bool tall = plan.rows.is_full(s.i);
  const auto transform = plan.side == 3 ? segment_transform<tile_outputs(3), A>(tall)
                                        : segment_transform<tile_outputs(5), A>(tall);
  A* band = scratch;
  const bool finite = !has_nan(transform(s, m, bias, vectors, out.rows, out.columns, band));

  store_band(out.strides, out.dst + panel * kFilters * view.dst.c, filters, out.rows, out.columns,
             epilogue, band);
  return finite;
}

template <typename T>
void prefetch_destination(const Plan<Wide<T>>& plan, const Segment& s, Range panels, const T* y,
                          SourcePrefetch& ahead) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  constexpr int64_t kFilters = kPanel<Wide<T>>;
  const Outputs out(plan, s);
  const int64_t filters = std::min(plan.view.K - panels.begin * kFilters, panels.size() * kFilters);
  y += out.dst + panels.begin * kFilters * out.strides.c;
  if (out.whole_rows())
    return ahead.add(y, filters, out.strides.c * kSize, out.rows * out.columns * kSize);
  for (int64_t r = 0; r < out.rows; ++r) {
    if (out.strides.c == 1)
      ahead.add(y + r * out.strides.row, out.columns, out.strides.column * kSize, filters * kSize);
    else
      ahead.add(y + r * out.strides.row, filters, out.strides.c * kSize,
                out.columns * out.strides.column * kSize);
  }
}

template <typename T>
void store_band(const ConvStrides& strides, int64_t dst, int64_t filters, int64_t rows,
                int64_t columns, const Epilogue<T>& epilogue, Wide<T>* band) {
  constexpr int64_t kVector = kLanes<Wide<T>>, kFilters = kPanel<Wide<T>>;
  if (strides.c == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        epilogue.store(band + (r * columns + c) * kFilters, filters,
                       dst + r * strides.row + c * strides.column, 1);
    return;
  }
  const int64_t pixels = rows * columns, plane = odd_lines<Wide<T>>(pixels);
  Wide<T>* planes = band + pixels * kFilters;
  for (int64_t k = 0; k < filters; k += kVector) {
    const int64_t lanes = std::min(filters - k, kVector);
    for (int64_t p = 0; p < pixels; p += kVector)
      transpose_tile(band + p * kFilters + k, kFilters, std::min(pixels - p, kVector), lanes,
                     planes + k * plane + p, plane, lanes);
  }
  // Whole rows of the image are one run.
  const bool whole = strides.column == 1 && strides.row == columns;
  const int64_t runs = whole ? 1 : rows, run = whole ? pixels : columns;
  for (int64_t k = 0; k < filters; ++k)
    for (int64_t r = 0; r < runs; ++r)
      epilogue.store(planes + k * plane + r * run, run, dst + k * strides.c + r * strides.row,
                     strides.column);
}

#define TORCHCONV_INSTANTIATE(T)                                                                  \
  template bool transform_products(const Plan<Wide<T>>&, const Segment&, int64_t, const Wide<T>*, \
                                   const Wide<T>*, const Epilogue<T>&, Wide<T>*);                 \
  template void prefetch_destination(const Plan<Wide<T>>&, const Segment&, Range, const T*,       \
                                     SourcePrefetch&);                                            \
  template void store_band(const ConvStrides&, int64_t, int64_t, int64_t, int64_t,                \
                           const Epilogue<T>&, Wide<T>*);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE
template int64_t product_scratch(const Plan<float>&, int64_t);
template int64_t product_scratch(const Plan<double>&, int64_t);

}  // namespace torchconv::cpu::winograd
