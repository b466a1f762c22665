// Vectors run along filters. Clamped, and with a residual, they go to where they belong, else to a
// band of pixels first, [pixel][kPanel] in the order of rows and columns; the epilogue then takes
// runs of it, or of its transposition where pixels are neighbours in memory.
#include "cpu/winograd_output.h"

#include <limits>

#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd {
namespace {

template <typename A>
using Register = typename Vec<A>::Type;

// Whole vectors of filters of a pixel of a band.
template <typename A>
TORCHCONV_INLINE void store_pixel(const A* band, int64_t filters, const Epilogue<A>& epilogue,
                                  int64_t dst) {
  using V = Vec<A>;
  const Clamp<A> clamp(epilogue);
  for (int64_t k = 0; k < filters; k += V::kLanes) {
    Register<A> z = V::load(band + k);
    if (epilogue.residual != nullptr) z += V::load(epilogue.residual + dst + k);
    V::store(epilogue.y + dst + k, clamp(z));
  }
}

// A vector of filters of some pixels of a band, to rows of pixels. residual: null, or those of the
// first of them.
template <typename A>
TORCHCONV_INLINE void store_transposed(const A* band, int64_t pixels, A* dst, int64_t next_filter,
                                       int64_t filters, const A* residual, const Clamp<A>& clamp) {
  using V = Vec<A>;
  constexpr int kVector = V::kLanes;
  Register<A> square[kVector];
#pragma GCC unroll 16
  for (int p = 0; p < kVector; ++p)
    square[p] = p < pixels ? V::load(band + p * kPanel<A>) : Register<A>{};
  transpose_steps<1>(square);
#pragma GCC unroll 16
  for (int k = 0; k < kVector; ++k) {
    if (k >= filters) break;
    if (residual != nullptr)
      square[k] += pixels == kVector ? V::load(residual + k * next_filter)
                                     : V::load_partial(residual + k * next_filter, pixels);
    const Register<A> z = clamp(square[k]);
    if (pixels == kVector)
      V::store(dst + k * next_filter, z);
    else
      V::store_partial(dst + k * next_filter, z, pixels);
  }
}

// Where the outputs of a segment go, a band or the destination, and what they have added there, or
// null.
template <typename A>
struct Target {
  A* first;
  const A* residual;
  int64_t row, column;  // strides
  const Clamp<A>* clamp;

  // Where element `at` of the first is the first.
  Target from(int64_t at) const {
    return {first + at, residual != nullptr ? residual + at : nullptr, row, column, clamp};
  }
};

// Not finite where one of the first kCount is not; at worst a large sum is taken for an overflow.
template <int kCount, typename V, int kFull>
TORCHCONV_INLINE V sum_of(const V (&y)[kFull]) {
  V sum = y[0];
#pragma GCC unroll 4
  for (int i = 1; i < kCount; ++i) sum += y[i];
  return sum;
}

// A row of a tile, `columns` of its kCount outputs; returns a vector with a NaN where
// an output is not finite.
template <int kCount, typename A, int kFull>
TORCHCONV_INLINE Register<A> store_row(const Register<A> (&y)[kFull], Register<A> bias,
                                       const Clamp<A>& clamp, const Target<A>& target, int64_t row,
                                       int64_t columns) {
  A* const first = target.first + row * target.row;
  const A* const residual = target.residual;
#pragma GCC unroll 4
  for (int s = 0; s < kCount; ++s) {
    Register<A> z = y[s] + bias;
    if (residual != nullptr && s < columns)
      z += Vec<A>::load(residual + row * target.row + s * target.column);
    z = clamp(z);
    if (s < columns) Vec<A>::store(first + s * target.column, z);
  }
  return sum_of<kCount>(y) * 0.0f;
}

// One tile's vector of filters to target.first; returns a vector that holds a NaN where an output
// is not finite. rows and columns: how many outputs exist.
template <int kFull, bool kTall, bool kWide, typename A>
TORCHCONV_INLINE Register<A> transform_tile(const A* m, Register<A> bias, int64_t rows,
                                            int64_t columns, const Target<A>& target) {
  using V = Vec<A>;
  const Clamp<A> clamp = *target.clamp;
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
    special += store_row<kColumns>(y, bias, clamp, target, r, r < rows ? columns : 0);
  }
  return special;
}

// `count` tiles side by side, to target.first and the rest of its rows, `columns` pixels.
template <int kFull, bool kTall, bool kWide, typename A>
Register<A> transform_tiles(const A* m, int64_t count, const A* bias, int64_t vectors, int64_t rows,
                            int64_t columns, Target<A> target) {
  using V = Vec<A>;
  constexpr int64_t kVector = V::kLanes;
  constexpr int64_t kStep = kWide ? kFull : kFull - 1;
  Register<A> special{};
  for (int64_t tile = 0; tile < count; ++tile) {
    for (int64_t v = 0; v < vectors; ++v)
      special += transform_tile<kFull, kTall, kWide>(m + v * kVector, V::load(bias + v * kVector),
                                                     rows, columns, target.from(v * kVector));
    m += kProductSlot<A>;
    target = target.from(kStep * target.column);
    columns -= kStep;
  }
  return special;
}

template <int kFull, bool kTall, typename A>
Register<A> transform_segment(const Segment& s, const A* m, const A* bias, int64_t vectors,
                              int64_t rows, int64_t columns, const Target<A>& target) {
  const int64_t wide = s.wide * kFull;
  return transform_tiles<kFull, kTall, true>(m + s.wide_slot * kProductSlot<A>, s.wide, bias,
                                             vectors, rows, columns, target) +
         transform_tiles<kFull, kTall, false>(m + s.narrow_slot * kProductSlot<A>, s.count - s.wide,
                                              bias, vectors, rows, columns - wide,
                                              target.from(wide * target.column));
}

template <int kFull, typename A>
constexpr auto segment_transform(bool tall) {
  return tall ? transform_segment<kFull, true, A> : transform_segment<kFull, false, A>;
}

// The rows of `count` tiles side by side whose columns have been transformed.
template <bool kWide, typename A>
Register<A> transform_rows(const A* m, int64_t count, Register<A> bias, int64_t rows,
                           int64_t columns, Target<A> target) {
  using V = Vec<A>;
  constexpr int kFull = tile_outputs(3), kStep = kWide ? kFull : kFull - 1;
  constexpr int kColumnPoints = kWide ? kPoints : kPoints - 1;
  const Clamp<A> clamp = *target.clamp;
  Register<A> special{};
  for (int64_t tile = 0; tile < count; ++tile) {
    for (int64_t r = 0; r < rows; ++r) {
      Register<A> points[kPoints], y[kFull];
#pragma GCC unroll 6
      for (int s = 0; s < kColumnPoints; ++s)
        points[s] = V::load(m + r * kColumnRow<A> + s * V::kLanes);
      transform_output<kWide>(points, y);
      special += store_row<kStep>(y, bias, clamp, target, r, columns);
    }
    m += kColumnSlot<A>;
    target = target.from(kStep * target.column);
    columns -= kStep;
  }
  return special;
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
};

// Of a row of outputs, in the band at a time.
constexpr int64_t kBandPixels = 16;

// Writes the outputs of a segment, and returns whether they are finite. transform(segment, rows,
// columns, target) makes those of a part of it.
template <typename T, typename F>
bool finish_segment(const Grid& plan, const Segment& s, int64_t filter, int64_t filters,
                    const Epilogue<T>& epilogue, Wide<T>* scratch, F&& transform) {
  using A = Wide<T>;
  const Outputs out(plan, s);
  const bool simple = epilogue.preactivation == nullptr && epilogue.clamps_at_most();
  const bool direct =
      std::is_same_v<T, A> && simple && out.strides.c == 1 && filters % kLanes<A> == 0;
  // A band is clamped here, unless it has a residual to come.
  const bool done = direct || (simple && epilogue.residual == nullptr);
  const Epilogue<T> rest = done ? Epilogue<T>{epilogue.y, nullptr, Activation::kNone} : epilogue;
  const Clamp<A> clamp(done ? epilogue : Epilogue<T>{epilogue.y, nullptr, Activation::kNone});
  Target<A> target{scratch, nullptr, 0, kPanel<A>, &clamp};
  // Few at a time, to find them in the first-level cache again, on whole lines where these exist.
  const bool few = std::is_same_v<T, A> && simple && !direct;
  const int64_t most = few ? kBandPixels / plan.columns.full : s.count;
  Register<A> special{};
  Segment part = s;
  for (int64_t tile = 0, column = 0; tile < s.count; tile += part.count) {
    part.count = std::min(few ? most - (s.j + tile) % most : most, s.count - tile);
    part.wide = std::clamp<int64_t>(s.wide - tile, 0, part.count);
    part.wide_slot = s.wide_slot + tile;
    part.narrow_slot = s.narrow_slot + std::max<int64_t>(tile - s.wide, 0);
    const int64_t columns =
        std::min(part.count * (plan.columns.full - 1) + part.wide, out.columns - column);
    const int64_t dst = out.dst + filter * plan.view.dst.c + column * out.strides.column;
    if constexpr (std::is_same_v<T, A>) {
      if (direct) target.first = epilogue.y + dst;
      if (direct && epilogue.residual != nullptr) target.residual = epilogue.residual + dst;
    }
    target.row = direct ? out.strides.row : columns * kPanel<A>;
    if (direct) target.column = out.strides.column;
    special += transform(part, out.rows, columns, target);
    if (!direct) store_band(out.strides, dst, filters, out.rows, columns, rest, scratch);
    column += columns;
  }
  return !has_nan(special);
}

int64_t max_pixels(const Grid& plan, int64_t slots) {
  return plan.rows.full * plan.columns.full * std::min(slots, plan.columns.count);
}

}  // namespace

template <typename A>
int64_t product_scratch(const Plan<A>& plan, int64_t slots) {
  return band_size<A>(max_pixels(plan, slots));
}

template <typename T>
bool transform_products(const Plan<Wide<T>>& plan, const Segment& segment, int64_t panel,
                        const Wide<T>* m, const Wide<T>* bias, const Epilogue<T>& epilogue,
                        Wide<T>* scratch) {
  using A = Wide<T>;
  constexpr int64_t kFilters = kPanel<A>;
  const int64_t filters = std::min(plan.view.K - panel * kFilters, kFilters);
  const int64_t vectors = ceil_div(filters, kLanes<A>);
  const bool tall = plan.rows.is_full(segment.i);
  const auto transform = plan.side == 3 ? segment_transform<tile_outputs(3), A>(tall)
                                        : segment_transform<tile_outputs(5), A>(tall);
  return finish_segment(
      plan, segment, panel * kFilters, filters, epilogue, scratch,
      [&](const Segment& s, int64_t rows, int64_t columns, const Target<A>& target) {
        return transform(s, m, bias, vectors, rows, columns, target);
      });
}

template <typename T>
bool transform_column_products(const Plan<Wide<T>>& plan, const Segment& segment, int64_t filter,
                               const Wide<T>* m, const Wide<T>* bias, const Epilogue<T>& epilogue,
                               Wide<T>* scratch) {
  using A = Wide<T>;
  const int64_t filters = std::min(plan.view.K - filter, kLanes<A>);
  const auto added = Vec<A>::load(bias);
  return finish_segment(
      plan, segment, filter, filters, epilogue, scratch,
      [&](const Segment& s, int64_t rows, int64_t columns, const Target<A>& target) {
        const int64_t wide = s.wide * tile_outputs(3);
        return transform_rows<true>(m + s.wide_slot * kColumnSlot<A>, s.wide, added, rows, columns,
                                    target) +
               transform_rows<false>(m + s.narrow_slot * kColumnSlot<A>, s.count - s.wide, added,
                                     rows, columns - wide, target.from(wide * target.column));
      });
}

template <typename T>
void prefetch_destination(const Plan<Wide<T>>& plan, const Segment& s, Range range, const T* y,
                          SourcePrefetch& ahead) {
  const Outputs out(plan, s);
  prefetch_planes(y + out.dst + range.begin * out.strides.c, out.strides, range.size(), out.rows,
                  out.columns, ahead);
}

template <typename T>
void store_band(const ConvStrides& strides, int64_t dst, int64_t filters, int64_t rows,
                int64_t columns, const Epilogue<T>& epilogue, Wide<T>* band) {
  constexpr int64_t kVector = kLanes<Wide<T>>, kFilters = kPanel<Wide<T>>;
  [[maybe_unused]] const bool simple =
      std::is_same_v<T, Wide<T>> && epilogue.preactivation == nullptr && epilogue.clamps_at_most();
  if (strides.c == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        Wide<T>* const pixel = band + (r * columns + c) * kFilters;
        const int64_t at = dst + r * strides.row + c * strides.column;
        if constexpr (std::is_same_v<T, Wide<T>>) {
          if (simple && filters % kVector == 0) {
            store_pixel(pixel, filters, epilogue, at);
            continue;
          }
        }
        epilogue.store_few(pixel, filters, at);
      }
    return;
  }
  // Whole rows of the image are one run.
  const bool whole = strides.column == 1 && strides.row == columns;
  const int64_t pixels = rows * columns;
  const int64_t runs = whole ? 1 : rows, run = whole ? pixels : columns;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (strides.column == 1 && simple) {
      const Clamp<T> clamp(epilogue);
      for (int64_t k = 0; k < filters; k += kVector)
        for (int64_t r = 0; r < runs; ++r)
          for (int64_t p = 0; p < run; p += kVector) {
            const int64_t at = dst + k * strides.c + r * strides.row + p;
            store_transposed(band + (r * run + p) * kFilters + k, std::min(run - p, kVector),
                             epilogue.y + at, strides.c, std::min(filters - k, kVector),
                             epilogue.residual != nullptr ? epilogue.residual + at : nullptr,
                             clamp);
          }
      return;
    }
  }
  const int64_t plane = odd_lines<Wide<T>>(pixels);
  Wide<T>* planes = band + pixels * kFilters;
  for (int64_t k = 0; k < filters; k += kVector) {
    const int64_t lanes = std::min(filters - k, kVector);
    for (int64_t p = 0; p < pixels; p += kVector)
      transpose_tile(band + p * kFilters + k, kFilters, std::min(pixels - p, kVector), lanes,
                     planes + k * plane + p, plane, lanes);
  }
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
#define TORCHCONV_INSTANTIATE_COLUMNS(T)                                               \
  template bool transform_column_products(const Plan<float>&, const Segment&, int64_t, \
                                          const float*, const float*, const Epilogue<T>&, float*);
TORCHCONV_INSTANTIATE_COLUMNS(float)
TORCHCONV_INSTANTIATE_COLUMNS(BFloat16)
TORCHCONV_INSTANTIATE_COLUMNS(Float16)
#undef TORCHCONV_INSTANTIATE_COLUMNS
template int64_t product_scratch(const Plan<float>&, int64_t);
template int64_t product_scratch(const Plan<double>&, int64_t);

}  // namespace torchconv::cpu::winograd
