// Adaptive max pooling, forward, where it is not ordinary pooling's kernels that run
// (adaptive_window.h).
//
// Planes (NCHW): the rows of a window are folded with vectors along the row, then the columns one
// by one, by value and then by index. Pixels (NHWC): vectors over channels, a window's elements in
// the order of their indices. Either way the first of equal maxima is selected, the last of several
// NaN. The index is carried along even where only values are wanted: it also decides between 0 and
// -0, and the pass is bound by memory.
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "cpu/adaptive_window.h"
#include "cpu/pool2d.h"
#include "cpu/pool_simd.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

template <typename T>
class AdaptiveMax {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;  // counts within one window
  using V = typename W::Type;
  using C = typename Vec<Code>::Type;
  static constexpr int kLanes = W::kLanes;

 public:
  AdaptiveMax(const AdaptiveProblem& p, const T* x, T* y, int64_t* indices)
      : p_(p),
        x_(x),
        y_(y),
        indices_(indices),
        rows_(adaptive_windows(p.H, p.P)),
        columns_(adaptive_windows(p.W, p.Q)) {}

  void run_planes(const Parallel& pool) const {
    const int64_t bytes = (largest_window(p_.H, p_.P) + 1) * p_.W * static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.P, pool_grain(bytes + 12 * p_.Q),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<Lane> values(p_.W + kLanes);
                                const Buffer<Code> codes(p_.W + kLanes);
                                for (int64_t i = begin; i < end; i++)
                                  plane_row(i, i == begin, values.get(), codes.get());
                              });
  }

  void run_pixels(const Parallel& pool) const {
    const int64_t bytes = (largest_window(p_.H, p_.P) * largest_window(p_.W, p_.Q) + 4) *
                          (ceil_div(p_.C, kLanes) * kLanes) * static_cast<int64_t>(sizeof(T));
    parallel_for(pool, 0, p_.N * p_.P * p_.Q, pool_grain(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) pixel(i);
    });
  }

 private:
  static TORCHCONV_INLINE void fold(V* best, C* code, V candidate, Code candidate_code) {
    const auto better = (candidate > *best) | (candidate != candidate);
    *best = better ? candidate : *best;
    *code = better ? Vec<Code>::broadcast(candidate_code) : *code;
  }

  // Output row i of the N * C * P; not `first` where row i - 1 is there already.
  void plane_row(int64_t i, bool first, Lane* values, Code* codes) const {
    const int64_t out_p = i % p_.P;
    T* y = y_ + i * p_.Q;
    int64_t* indices = indices_ == nullptr ? nullptr : indices_ + i * p_.Q;
    if (!first && repeats(rows_, out_p)) {
      std::memcpy(y, y - p_.Q, static_cast<size_t>(p_.Q) * sizeof(T));
      if (indices != nullptr)
        std::memcpy(indices, indices - p_.Q, static_cast<size_t>(p_.Q) * sizeof(int64_t));
      return;
    }
    const Range rows = at(rows_, out_p);
    const T* top = x_ + (i / p_.P * p_.H + rows.begin) * p_.W;
    int64_t w = 0;
    for (; w + kLanes <= p_.W; w += kLanes) fold_rows<false>(top, rows.size(), w, values, codes);
    if (w < p_.W) fold_rows<true>(top, rows.size(), w, values, codes);
    for (int64_t q = 0; q < p_.Q; q++) {
      const Best best = fold_columns(at(columns_, q), rows.size(), values, codes);
      y[q] = from_wide<T>(best.value);
      if (indices != nullptr) indices[q] = rows.begin * p_.W + best.index;
    }
  }

  struct Best {
    Lane value;
    int64_t index;

    void take(Lane v, int64_t at) {
      const bool better =
          v != v ? value == value || at > index : v > value || (v == value && at < index);
      value = better ? v : value;
      index = better ? at : index;
    }
  };

  // The maximum of some columns of a window. Several vectors of them are folded lane by lane first,
  // where an index fits a lane.
  Best fold_columns(Range columns, int64_t rows, const Lane* values, const Code* codes) const {
    using Codes = Vec<Code>;
    int64_t j = columns.begin;
    Best best{values[j], index_of(codes, j)};
    if (columns.size() >= 2 * kLanes && rows <= INT32_MAX / p_.W) {
      const auto index = [&](int64_t w) {
        return Codes::load(codes + w) * static_cast<Code>(p_.W) + Codes::iota() +
               static_cast<Code>(w);
      };
      V value = Vec<Lane>::load(values + j);
      C where = index(j);
      for (j += kLanes; j + kLanes <= columns.end; j += kLanes) {
        const V v = Vec<Lane>::load(values + j);
        const C at_v = index(j);
        const auto better = (v > value) | ((v == value) & (at_v < where)) |
                            ((v != v) & ((value == value) | (at_v > where)));
        value = better ? v : value;
        where = better ? at_v : where;
      }
      Lane lanes[kLanes];
      Code indices[kLanes];
      Vec<Lane>::store(lanes, value);
      Codes::store(indices, where);
      for (int l = 0; l < kLanes; l++) best.take(lanes[l], indices[l]);
    }
    for (; j < columns.end; j++) best.take(values[j], index_of(codes, j));
    return best;
  }

  // In the plane, from the window's first row on.
  int64_t index_of(const Code* codes, int64_t w) const { return codes[w] * p_.W + w; }

  // The maximum of each column, and its row in the window.
  template <bool kPartial>
  TORCHCONV_INLINE void fold_rows(const T* top, int64_t rows, int64_t w, Lane* values,
                                  Code* codes) const {
    const T* from = top + w;
    V best = kPartial ? W::load_partial(from, p_.W - w) : W::load(from);
    C code{};
    for (int64_t r = 1; r < rows; r++) {
      from += p_.W;
      fold(&best, &code, kPartial ? W::load_partial(from, p_.W - w) : W::load(from),
           static_cast<Code>(r));
    }
    Vec<Lane>::store(values + w, best);
    Vec<Code>::store(codes + w, code);
  }

  // Output pixel i of the N * P * Q.
  void pixel(int64_t i) const {
    const Range rows = at(rows_, i / p_.Q % p_.P), columns = at(columns_, i % p_.Q);
    const int64_t first = rows.begin * p_.W + columns.begin;
    const T* from = x_ + (i / p_.Q / p_.P * p_.H * p_.W + first) * p_.C;
    T* y = y_ + i * p_.C;
    int64_t* indices = indices_ == nullptr ? nullptr : indices_ + i * p_.C;
    int64_t c = 0;
    for (; c + 4 * kLanes <= p_.C; c += 4 * kLanes)
      fold_window<4, false>(from, rows.size(), columns.size(), first, c, y, indices);
    for (; c + kLanes <= p_.C; c += kLanes)
      fold_window<1, false>(from, rows.size(), columns.size(), first, c, y, indices);
    if (c < p_.C) fold_window<1, true>(from, rows.size(), columns.size(), first, c, y, indices);
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void fold_window(const T* from, int64_t rows, int64_t columns, int64_t first,
                                    int64_t c, T* y, int64_t* indices) const {
    const int64_t n = kPartial ? p_.C - c : kLanes;
    V best[kVectors];
    C code[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; k++) {
      best[k] = load<kPartial>(from + c + k * kLanes, n);
      code[k] = C{};
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t s = r == 0 ? 1 : 0; s < columns; s++) {
        const T* element = from + (r * p_.W + s) * p_.C + c;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; k++)
          fold(&best[k], &code[k], load<kPartial>(element + k * kLanes, n),
               static_cast<Code>(r * p_.W + s));
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; k++) {
      const int64_t to = c + k * kLanes;
      if constexpr (kPartial) {
        W::store_partial(y + to, best[k], n);
      } else {
        W::store(y + to, best[k]);
      }
      if (indices == nullptr) continue;
      Code distance[kLanes];
      Vec<Code>::store(distance, code[k]);
      for (int64_t j = 0; j < n; j++) indices[to + j] = first + distance[j];
    }
  }

  template <bool kPartial>
  static TORCHCONV_INLINE V load(const T* from, int64_t n) {
    return kPartial ? W::load_partial(from, n) : W::load(from);
  }

  const AdaptiveProblem& p_;
  const T* x_;
  T* y_;
  int64_t* indices_;
  std::vector<Range> rows_, columns_;
};

template <typename T>
void max_as(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
            const Parallel& pool) {
  const AdaptiveMax<T> max(p, static_cast<const T*>(x), static_cast<T*>(y), indices);
  if (runs_channels_last(p)) {
    max.run_pixels(pool);
  } else {
    max.run_planes(pool);
  }
}

}  // namespace

void adaptive_max_pool2d(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
                         const Parallel& pool) {
  if (is_empty(p)) return;
  if (runs_as_ordinary(p))
    return select_pool2d(ordinary_pooling(p), Select::kMax, x, y, nullptr, indices, pool);
  switch (p.dtype) {
    case DType::kFloat32:
      return max_as<float>(p, x, y, indices, pool);
    case DType::kFloat64:
      return max_as<double>(p, x, y, indices, pool);
    case DType::kBFloat16:
      return max_as<BFloat16>(p, x, y, indices, pool);
    case DType::kFloat16:
      return max_as<Float16>(p, x, y, indices, pool);
    default:
      return;  // csrc/ops refuses the integer types
  }
}

}  // namespace torchconv::cpu
