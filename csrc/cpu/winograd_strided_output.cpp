// Vectors run along filters. Every row of a tile's products gives its sums (fprop) or its elements
// (dgrad) along the columns, and these give the outputs along the rows. The outputs of a segment go
// to a band of pixels first, which the epilogue then takes runs of.
#include "cpu/winograd_strided_output.h"

#include "cpu/winograd_output.h"
#include "cpu/winograd_strided_fold.h"

namespace torchconv::cpu::winograd_strided {
namespace {

using V = Vec<float>;
using Register = V::Type;

using pair::kPoints;
constexpr int kUnits = pair::kOutputs;

// The products of one tile and vector of filters, in each kind.
using TileProducts = const float* [kKinds];

// From one row of a kind to the next, and from one plane to the next.
constexpr int64_t kProductRow = kPoints * kFilters;

enum class Family { kDown, kUp, kFolds };

// Where the units of a tile end up in its outputs along an axis.
struct Place {
  int64_t points, plain;  // the first of each
  explicit Place(Axis form) : points(form == Axis::kUpSecond), plain(form == Axis::kUpFirst) {}
};

// Where the outputs of a run of tiles go: a band, or the destination itself.
struct Piece {
  float* first;
  const float* residual;  // null, or what the first has added
  int64_t row, pixel;     // strides
  int64_t rows, columns;
  winograd::Clamp<float> clamp;

  void advance(int64_t elements) {
    first += elements;
    if (residual != nullptr) residual += elements;
  }
  TORCHCONV_INLINE void store(int64_t r, int64_t c, Register y) const {
    if (r >= rows || c >= columns) return;
    const int64_t at = r * row + c * pixel;
    if (residual != nullptr) y += V::load(residual + at);
    V::store(first + at, clamp(y));
  }
};

// The outputs of a segment: [i, i + rows) x [j, j + columns).
struct Outputs {
  int64_t i, j, rows, columns;
  Outputs(const Plan& plan, const Segment& s)
      : i(plan.rows.output_begin(s.i)),
        j(plan.columns.output_begin(s.j)),
        rows(plan.rows.output_begin(s.i + 1) - i),
        columns(plan.columns.output_begin(s.j + s.count) - j) {}
  int64_t offset(const ConvView& view, const Segment& s) const {
    return view.dst_offset + s.n * view.dst.n + i * view.dst.row + j * view.dst.column;
  }
};

// kUp: a unit is two outputs, else their sum. Returns a vector that holds a NaN where an output is
// not finite.
template <bool kUp, bool kTall, bool kWide>
TORCHCONV_INLINE Register transform_tile(const TileProducts& m, Register bias, Place down,
                                         Place across, const Piece& to) {
  constexpr int kUsedRows = kTall ? kPoints : kPoints - 1, kDown = kUsedRows - 1;
  constexpr int kUsedColumns = kWide ? kPoints : kPoints - 1, kAcross = kUsedColumns - 1;
  constexpr int kPerUnit = kUp ? 2 : 1;
  constexpr int kWidth = kPerUnit * kAcross;
  alignas(64) float sums[(kUsedRows + kDown) * kWidth * kVector];
  const auto along_columns = [&](const float* points, const float* plain, int64_t plain_step,
                                 float* to) {
    Register p[kPoints], y[kUnits];
#pragma GCC unroll 8
    for (int s = 0; s < kUsedColumns; ++s) p[s] = V::load(points + s * kFilters);
    pair::transform_output<kWide>(p, y);
#pragma GCC unroll 8
    for (int s = 0; s < kAcross; ++s) {
      const Register middle = V::load(plain + s * plain_step);
      if constexpr (kUp) {
        V::store(to + (2 * s + across.points) * kVector, y[s]);
        V::store(to + (2 * s + across.plain) * kVector, middle);
      } else {
        V::store(to + s * kVector, y[s] + middle);
      }
    }
  };
  for (int64_t r = 0; r < kUsedRows; ++r)
    along_columns(m[kBoth] + r * kProductRow, m[kRows] + r * kFilters, kProductRow,
                  sums + r * kWidth * kVector);
  for (int64_t i = 0; i < kDown; ++i)
    along_columns(m[kColumns] + i * kProductRow, m[kNeither] + i * kAcross * kFilters, kFilters,
                  sums + (kUsedRows + i) * kWidth * kVector);

  Register special{};
  const auto store = [&](int64_t row, int64_t column, Register y) {
    special += y * 0.0f;
    to.store(row, column, y + bias);
  };
  for (int64_t s = 0; s < kWidth; ++s) {
    const float* from = sums + s * kVector;
    Register p[kPoints], y[kUnits];
#pragma GCC unroll 8
    for (int r = 0; r < kUsedRows; ++r) p[r] = V::load(from + r * kWidth * kVector);
    pair::transform_output<kTall>(p, y);
#pragma GCC unroll 8
    for (int i = 0; i < kDown; ++i) {
      const Register middle = V::load(from + (kUsedRows + i) * kWidth * kVector);
      if constexpr (kUp) {
        store(2 * i + down.points, s, y[i]);
        store(2 * i + down.plain, s, middle);
      } else {
        store(i, s, y[i] + middle);
      }
    }
  }
  return special;
}

// The same of a kernel that folds: all products are points, and outputs are units.
template <bool kTall, bool kWide>
TORCHCONV_INLINE Register transform_folded_tile(const float* m, Register bias, const Piece& to) {
  constexpr int kUsedRows = quad::kPoints - (kTall ? 0 : 1);
  constexpr int kUsedColumns = quad::kPoints - (kWide ? 0 : 1);
  Register sums[quad::kOutputs][quad::kPoints];
#pragma GCC unroll 6
  for (int s = 0; s < kUsedColumns; ++s) {
    Register column[quad::kPoints], y[quad::kOutputs];
#pragma GCC unroll 6
    for (int r = 0; r < kUsedRows; ++r) column[r] = V::load(m + (r * kSide + s) * kFilters);
    winograd::transform_output<kTall>(column, y);
#pragma GCC unroll 3
    for (int r = 0; r < quad::kOutputs - (kTall ? 0 : 1); ++r) sums[r][s] = y[r];
  }
  Register special{};
#pragma GCC unroll 3
  for (int r = 0; r < quad::kOutputs - (kTall ? 0 : 1); ++r) {
    Register y[quad::kOutputs];
    winograd::transform_output<kWide>(sums[r], y);
#pragma GCC unroll 3
    for (int s = 0; s < quad::kOutputs - (kWide ? 0 : 1); ++s) {
      special += y[s] * 0.0f;
      to.store(r, s, y[s] + bias);
    }
  }
  return special;
}

// `count` tiles side by side, the first in `slot`.
template <Family kFamily, bool kTall, bool kWide>
Register transform_tiles(const Plan& plan, const TileBlock& block, int64_t slot, int64_t count,
                         const ProductLayout& layout, const float* m, const float* bias,
                         int64_t vectors, Piece piece) {
  constexpr bool kFolds = kFamily == Family::kFolds, kUp = kFamily == Family::kUp;
  constexpr int64_t kMost = kFolds ? quad::kOutputs : pair::kOutputs;
  constexpr int64_t kDown = kMost - (kTall ? 0 : 1), kAcross = kMost - (kWide ? 0 : 1);
  constexpr int64_t kSteps[kKinds] = {1, kAcross, kDown, kAcross * kDown};
  constexpr int64_t kColumnsOfTile = kAcross * (kUp ? 2 : 1);
  [[maybe_unused]] const Place down(plan.rows.form), across(plan.columns.form);
  const Rows rows = block.rows(slot);
  Register special{};
  for (int64_t tile = 0; tile < count; ++tile) {
    for (int64_t v = 0; v < vectors * kVector; v += kVector) {
      TileProducts from;
      for (int k = 0; k < kKinds; ++k)
        from[k] = m + layout.kind[k] + (rows.of[k] + tile * kSteps[k]) * layout.row[k] + v;
      const Register b = V::load(bias + v);
      Piece to = piece;
      to.advance(v);
      if constexpr (kFolds)
        special += transform_folded_tile<kTall, kWide>(from[kBoth], b, to);
      else
        special += transform_tile<kUp, kTall, kWide>(from, b, down, across, to);
    }
    piece.advance(kColumnsOfTile * piece.pixel);
    piece.columns -= kColumnsOfTile;
  }
  return special;
}

template <Family kFamily, bool kTall>
Register transform_segment(const Plan& plan, const TileBlock& block, const Segment& s,
                           const ProductLayout& layout, const float* m, const float* bias,
                           int64_t vectors, Piece piece) {
  const Register wide = transform_tiles<kFamily, kTall, true>(plan, block, s.wide_slot, s.wide,
                                                              layout, m, bias, vectors, piece);
  const int64_t columns = s.wide * plan.shape().units * (kFamily == Family::kUp ? 2 : 1);
  piece.advance(columns * piece.pixel);
  piece.columns -= columns;
  return wide + transform_tiles<kFamily, kTall, false>(plan, block, s.narrow_slot, s.count - s.wide,
                                                       layout, m, bias, vectors, piece);
}

template <Family kFamily>
Register transform_segment(const Plan& plan, const TileBlock& block, const Segment& s,
                           const ProductLayout& layout, const float* m, const float* bias,
                           int64_t vectors, const Piece& piece) {
  return plan.rows.is_tall(s.i)
             ? transform_segment<kFamily, true>(plan, block, s, layout, m, bias, vectors, piece)
             : transform_segment<kFamily, false>(plan, block, s, layout, m, bias, vectors, piece);
}

}  // namespace

int64_t product_scratch(const Plan& plan, int64_t slots) {
  const int64_t units = plan.shape().units, across = std::min(slots, plan.columns.count) * units;
  if (plan.rows.form == Axis::kUnfold)
    return kFilters * (units * across + odd_lines(across + kVector));
  return winograd::band_size<float>(units * plan.rows.per_unit() * across *
                                    plan.columns.per_unit());
}

bool transform_products(const Plan& plan, const TileBlock& block, const Segment& s, int64_t panel,
                        const ProductLayout& layout, const float* m, const float* bias,
                        const Epilogue<float>& epilogue, float* scratch) {
  const ConvView& view = plan.view;
  const Axis form = plan.rows.form;
  const int64_t filters = std::min(view.K - panel * kFilters, kFilters);
  const Outputs out(plan, s);
  const int64_t dst = out.offset(view, s);
  const bool unfold = form == Axis::kUnfold;
  const bool in_place = epilogue.preactivation == nullptr && epilogue.clamps_at_most() && !unfold &&
                        view.dst.c == 1 && filters % kVector == 0;
  const int64_t rows = unfold ? ceil_div(out.rows, int64_t{2}) : out.rows;
  const int64_t columns = unfold ? ceil_div(out.columns, int64_t{2}) : out.columns;
  const Epilogue<float> here = epilogue.at(dst + panel * kFilters);
  const Epilogue<float> sums{scratch, nullptr, Activation::kNone};
  const Piece piece = in_place ? Piece{here.y,
                                       here.residual,
                                       view.dst.row,
                                       view.dst.column,
                                       rows,
                                       columns,
                                       winograd::Clamp<float>(here)}
                               : Piece{scratch, nullptr, columns * kFilters,          kFilters,
                                       rows,    columns, winograd::Clamp<float>(sums)};
  const auto transform = folds(form)           ? transform_segment<Family::kFolds>
                         : form == Axis::kDown ? transform_segment<Family::kDown>
                                               : transform_segment<Family::kUp>;
  const Register special =
      transform(plan, block, s, layout, m, bias, ceil_div(filters, kVector), piece);
  if (unfold)
    unfold_band(plan, scratch, columns, out.rows, out.columns, epilogue.y + dst,
                scratch + rows * columns * kFilters);
  else if (!in_place)
    winograd::store_band(view.dst, dst + panel * kFilters * view.dst.c, filters, rows, columns,
                         epilogue, scratch);
  return !winograd::has_nan(special);
}

void prefetch_outputs(const Plan& plan, const Segment& s, Range filters, const float* first,
                      SourcePrefetch& ahead) {
  const ConvStrides& strides = plan.view.dst;
  const Outputs out(plan, s);
  prefetch_planes(first + out.offset(plan.view, s) + filters.begin * strides.c, strides,
                  filters.size(), out.rows, out.columns, ahead);
}

}  // namespace torchconv::cpu::winograd_strided
