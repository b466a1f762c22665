// Pooling of small planes (NCHW) through shared memory, any window, both directions: where rows of
// a plane are not whole vectors, or windows are large, planes are read and written as one run of
// memory all the same. A block takes some whole planes.
//
// Forward: each row of x is folded across the taps of every column of outputs, then those rows are
// folded down each window, R + S steps instead of R * S. Backward of an average: the quotients of
// dy, once each, are gathered by the elements of dx. Backward of a selection: every window sums
// what those around it have for the element that it selected, so no atomics, and writes it. Bound:
// bytes moved; for small windows of 16-bit elements the steps come close.
#pragma once

#include <numeric>

#include "cuda/pool_bands.h"

namespace torchconv::cuda {

struct PlaneTiles {
  PoolView<int32_t> v;
  int32_t planes, group;  // of all blocks and of one
  int32_t in_area, out_area;
  bool vectors;         // whether the runs of memory are aligned
  bool direct;          // whether windows are so small that rows are not folded beforehand
  bool disjoint;        // whether no two windows hold the same element
  int32_t down, right;  // how far apart windows with a common element are at most

  __device__ __forceinline__ int32_t first() const {
    return static_cast<int32_t>(blockIdx.x) * group;
  }
  __device__ __forceinline__ int32_t count() const {
    const int32_t rest = planes - first();
    return rest < group ? rest : group;
  }
};

// A window along one axis, and its factor of an average's divisor.
struct alignas(16) TileWindow {
  int32_t element, tap, count, factor;

  static __device__ __forceinline__ TileWindow of(const PoolView<int32_t>& v,
                                                  const Axis<int32_t>& axis, int32_t o) {
    const WindowTaps<int32_t> taps = axis.window(o);
    return {taps.element, taps.tap, taps.count, axis.factor(o, v.include_pad)};
  }
};

template <typename Rule>
__global__ void __launch_bounds__(kPoolThreads)
    pool_tiles(PlaneTiles b, Rule rule, const typename Rule::Element* __restrict__ x,
               typename Rule::Element* __restrict__ y, SelectedOutput selected) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  using Value = typename Rule::Value;
  constexpr int n = kLanes<T>;
  const PoolView<int32_t>& v = b.v;
  auto* const rows = reinterpret_cast<TileWindow*>(dynamic_shared<unsigned char>());
  TileWindow* const columns = rows + v.h.out;
  auto* const copy = reinterpret_cast<T*>(columns + v.w.out);
  auto* const folded = reinterpret_cast<State*>(copy + (b.group * b.in_area + n - 1) / n * n);
  const int id = static_cast<int>(threadIdx.x);
  const int32_t first = b.first(), planes = b.count(), total = planes * b.in_area;

  const T* const from = x + first * b.in_area;
  const int32_t whole = b.vectors ? total / n : 0;
#pragma unroll 4
  for (int32_t i = id; i < whole; i += kPoolThreads)
    reinterpret_cast<Vector<T, n>*>(copy)[i] = reinterpret_cast<const Vector<T, n>*>(from)[i];
#pragma unroll 4
  for (int32_t i = whole * n + id; i < total; i += kPoolThreads) copy[i] = from[i];
  for (int32_t i = id; i < v.h.out; i += kPoolThreads) rows[i] = TileWindow::of(v, v.h, i);
  for (int32_t i = id; i < v.w.out; i += kPoolThreads) columns[i] = TileWindow::of(v, v.w, i);
  __syncthreads();

  const auto fold_row = [&](int32_t row, const TileWindow& column) {
    const T* element = copy + row * v.w.size + column.element;
    State state = Rule::start(0);
#pragma unroll 4
    for (int32_t s = 0; s < column.count; s++)
      Rule::fold(state, rule.prepare(element[s * v.w.dilation]), static_cast<uint32_t>(s));
    return state;
  };
  if (!b.direct) {
    for (int32_t task = id; task < planes * v.h.size * v.w.out; task += kPoolThreads) {
      int32_t row = task;
      const int32_t q = v.w.by_out.split(row);
      folded[task] = fold_row(row, columns[q]);
    }
    __syncthreads();
  }

  for (int32_t task = id; task < planes * b.out_area; task += kPoolThreads) {
    int32_t plane = task;
    const int32_t q = v.w.by_out.split(plane), p = v.h.by_out.split(plane);
    const TileWindow row = rows[p], column = columns[q];
    const bool empty = row.count == 0 || column.count == 0;
    const auto first_code = static_cast<uint32_t>(row.tap * v.row_codes + column.tap);
    State state = Rule::start(empty ? ~uint32_t{0} : first_code);
    const int32_t top = plane * v.h.size + row.element, count = empty ? 0 : row.count;
    const auto code_of = [&](int32_t r) {
      return first_code + static_cast<uint32_t>(r * v.row_codes);
    };
    if (b.direct) {
#pragma unroll 1
      for (int32_t r = 0; r < count; r++)
        Rule::join(state, fold_row(top + r * v.h.dilation, column), code_of(r));
    } else {
#pragma unroll 4
      for (int32_t r = 0; r < count; r++)
        Rule::join(state, folded[(top + r * v.h.dilation) * v.w.out + q], code_of(r));
    }
    Value divisor{1};
    if (!Rule::kSelects && !empty)
      divisor = v.divisor != 0 ? static_cast<Value>(v.divisor)
                               : static_cast<Value>(row.factor) * static_cast<Value>(column.factor);
    const int32_t position = first * b.out_area + task;
    y[position] = rule.finish(state, Division<Value>(divisor));
    if constexpr (Rule::kSelects) {
      if (selected.data == nullptr) continue;
      store_codes<1>(
          selected, position, [&](int) { return state.code; },
          [&](int) { return v.index_of(state.code, static_cast<uint32_t>(v.row_codes), p, q); });
    }
  }
}

// n elements of dx from `position` of a block's planes on, as far as there are such.
template <typename T, typename F>
__device__ __forceinline__ void store_tile(T* dx, bool vectors, int32_t rest, F&& element) {
  constexpr int n = kLanes<T>;
  if (vectors && rest >= n) {
    store_all<T, n>(dx, [&](int i) { return from_wide<T>(element(i)); });
  } else {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i < rest) dx[i] = from_wide<T>(element(i));
  }
}

// The windows that hold a row's or a column's elements.
struct alignas(8) TileVisits {
  int32_t begin, count;

  static __device__ __forceinline__ TileVisits of(const Axis<int32_t>& axis, int32_t element) {
    const auto visits = axis.visits(element);
    return {visits.begin, visits.count};
  }
};

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    spread_tiles(PlaneTiles b, const T* __restrict__ dy, T* __restrict__ dx) {
  constexpr int n = kLanes<T>;
  const PoolView<int32_t>& v = b.v;
  auto* const rows = reinterpret_cast<TileVisits*>(dynamic_shared<unsigned char>());
  TileVisits* const columns = rows + v.h.size;
  auto* const quotients = reinterpret_cast<Wide<T>*>(columns + v.w.size);
  // Where windows are disjoint, each element's own.
  constexpr uint16_t kNoWindow = 0xffff;
  auto* const windows = reinterpret_cast<uint16_t*>(quotients + b.group * b.out_area);
  const int id = static_cast<int>(threadIdx.x);
  const int32_t first = b.first(), planes = b.count(), total = planes * b.in_area;

  for (int32_t i = id; i < v.h.size; i += kPoolThreads) rows[i] = TileVisits::of(v.h, i);
  for (int32_t i = id; i < v.w.size; i += kPoolThreads) columns[i] = TileVisits::of(v.w, i);
  for (int32_t i = id; i < (b.disjoint ? b.in_area : 0); i += kPoolThreads) {
    int32_t h = i;
    const int32_t w = v.w.by_size.split(h);
    const TileVisits row = TileVisits::of(v.h, h), column = TileVisits::of(v.w, w);
    windows[i] = row.count > 0 && column.count > 0
                     ? static_cast<uint16_t>(row.begin * v.w.out + column.begin)
                     : kNoWindow;
  }
  for (int32_t task = id; task < planes * b.out_area; task += kPoolThreads) {
    int32_t plane = task;
    const int32_t q = v.w.by_out.split(plane), p = v.h.by_out.split(plane);
    const Division<Wide<T>> over(v.template divisor_of<Wide<T>>(p, q));
    quotients[task] = over(to_wide(dy[first * b.out_area + task]));
  }
  __syncthreads();

  for (int32_t begin = id * n; begin < total; begin += kPoolThreads * n) {
    int32_t plane = begin;
    int32_t w = v.w.by_size.split(plane), h = v.h.by_size.split(plane);
    Wide<T> sums[n];
    if (b.disjoint) {
      int32_t position = h * v.w.size + w;
      const Wide<T>* from = quotients + plane * b.out_area;
#pragma unroll
      for (int i = 0; i < n; i++) {
        const uint16_t window = begin + i < total ? windows[position] : kNoWindow;
        sums[i] = window != kNoWindow ? from[window] : Wide<T>{0};
        const bool next = ++position == b.in_area;
        position = next ? 0 : position;
        from += next ? b.out_area : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < n; i++) {
        sums[i] = 0;
        if (begin + i >= total) continue;
        const TileVisits row = rows[h], column = columns[w];
        const Wide<T>* from = quotients + (plane * v.h.out + row.begin) * v.w.out + column.begin;
#pragma unroll 1
        for (int32_t p = 0; p < row.count; p++, from += v.w.out) {
          Wide<T> sum = 0;
#pragma unroll 1
          for (int32_t q = 0; q < column.count; q++) sum += from[q];
          sums[i] += sum;
        }
        if (++w == v.w.size) {
          w = 0;
          if (++h == v.h.size) h = 0, plane++;
        }
      }
    }
    store_tile(dx + first * b.in_area + begin, b.vectors, total - begin,
               [&](int i) { return sums[i]; });
  }
}

// Where in a plane is what window (p, q) selected; negative where that is not one of its taps.
__device__ __forceinline__ int32_t selected_element(const PoolView<int32_t>& v,
                                                    const SelectedArray& selected, int32_t position,
                                                    int32_t p, int32_t q) {
  const WindowTaps<int32_t> rows = v.h.window(p), columns = v.w.window(q);
  int32_t down, right;  // taps from the first valid one
  if (selected.kind == Selected::kIndex64) {
    const int64_t index = static_cast<const int64_t*>(selected.data)[position];
    if (index < 0 || index >= v.h.size * v.w.size) return -1;
    down = static_cast<int32_t>(index);
    right = v.w.by_size.split(down) - columns.element;
    down -= rows.element;
    if (down < 0 || right < 0) return -1;
    if (v.h.by_dilation.split(down) != 0 || v.w.by_dilation.split(right) != 0) return -1;
  } else {
    const uint32_t code = load_code(selected, position);
    const auto width = static_cast<uint32_t>(v.row_codes), r = code / width;
    down = static_cast<int32_t>(r) - rows.tap;
    right = static_cast<int32_t>(code - r * width) - columns.tap;
    if (down < 0 || right < 0) return -1;
  }
  if (down >= rows.count || right >= columns.count) return -1;
  return (rows.element + down * v.h.dilation) * v.w.size + columns.element + right * v.w.dilation;
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    scatter_tiles(PlaneTiles b, const T* __restrict__ dy, SelectedArray selected,
                  T* __restrict__ dx) {
  constexpr int n = kLanes<T>;
  const PoolView<int32_t>& v = b.v;
  auto* const image = reinterpret_cast<Vector<T, n>*>(dynamic_shared<unsigned char>());
  T* const elements = image->element;
  // Each window's value and its element of the block's planes.
  auto* const values = reinterpret_cast<Wide<T>*>(image + (b.group * b.in_area + n - 1) / n);
  auto* const targets = reinterpret_cast<int32_t*>(values + b.group * b.out_area);
  const int id = static_cast<int>(threadIdx.x);
  const int32_t first = b.first(), planes = b.count(), total = planes * b.in_area;
  const int32_t windows = planes * b.out_area;

  for (int32_t i = id; i * n < total; i += kPoolThreads) image[i] = {};
  for (int32_t task = id; task < windows; task += kPoolThreads) {
    int32_t plane = task;
    const int32_t q = v.w.by_out.split(plane), p = v.h.by_out.split(plane);
    const int32_t position = first * b.out_area + task;
    values[task] = to_wide(dy[position]);
    const int32_t element = selected_element(v, selected, position, p, q);
    targets[task] = element < 0 ? -1 : plane * b.in_area + element;
  }
  __syncthreads();
  // Every window that selected an element finds the same sum for it, over those near enough.
  for (int32_t task = id; task < windows; task += kPoolThreads) {
    int32_t plane = task;
    const int32_t q = v.w.by_out.split(plane), p = v.h.by_out.split(plane);
    const int32_t target = targets[task];
    if (target < 0) continue;
    Wide<T> sum = 0;
    for (int32_t down = -b.down; down <= b.down; down++) {
      if (static_cast<uint32_t>(p + down) >= static_cast<uint32_t>(v.h.out)) continue;
      for (int32_t right = -b.right; right <= b.right; right++) {
        const int32_t other = task + down * v.w.out + right;
        if (static_cast<uint32_t>(q + right) < static_cast<uint32_t>(v.w.out) &&
            targets[other] == target)
          sum += values[other];
      }
    }
    elements[target] = from_wide<T>(sum);
  }
  __syncthreads();
  T* const to = dx + first * b.in_area;
  const int32_t whole = b.vectors ? total / n : 0;
  for (int32_t i = id; i < whole; i += kPoolThreads)
    reinterpret_cast<Vector<T, n>*>(to)[i] = image[i];
  for (int32_t i = whole * n + id; i < total; i += kPoolThreads) to[i] = elements[i];
}

// Whether planes should go through shared memory: not where bands read and write vectors of `width`
// elements, if memory is aligned to those.
template <typename T>
bool tiles_fit(const PoolShape& s, int width, bool is_aligned) {
  constexpr int64_t kMost = 4096;
  if (s.channels != 1 || s.h.size * s.w.size > kMost || s.h.out * s.w.out > kMost) return false;
  if (!s.adaptive && (s.h.stride > s.h.taps || s.w.stride > s.w.taps)) return false;
  const bool vectors = is_aligned && s.w.size % width == 0 && s.w.out % width == 0;
  return band_window<T>(s, true) == BandWindow::kNone || !vectors;
}

template <typename T>
PlaneTiles plane_tiles(const PoolShape& s, int64_t planes, const void* run, const Queue& queue) {
  constexpr int64_t kElements = 4096;  // of a block, where enough blocks are left
  const int64_t in = s.h.size * s.w.size, out = s.h.out * s.w.out;
  const int64_t unit = kLanes<T> / std::gcd(in, int64_t{kLanes<T>});  // planes of whole vectors
  const int64_t most = planes / (int64_t{4} * queue.multiprocessors);
  int64_t group = std::clamp<int64_t>(std::min(kElements / std::max(in, out), most), 1, 256);
  if (group >= unit) group = group / unit * unit;
  return {PoolView<int32_t>(s, planes, 1, true),
          static_cast<int32_t>(planes),
          static_cast<int32_t>(group),
          static_cast<int32_t>(in),
          static_cast<int32_t>(out),
          group % unit == 0 && aligned<T>(run, kLanes<T>),
          !s.adaptive && s.h.taps * s.w.taps <= 6,
          !s.adaptive && s.h.stride >= s.h.taps && s.w.stride >= s.w.taps,
          0,
          0};
}

inline constexpr int64_t kMostTileBytes = 48 * 1024;

// How far apart windows with a common element are at most. Of adaptive windows neighbours share
// elements, where none repeats one.
inline int64_t windows_apart(const PoolShape& s, const PoolAxis& a) {
  return s.adaptive ? (a.out <= a.size ? 1 : int64_t{256})
                    : std::min((a.taps - 1) * a.dilation / a.stride, a.out);
}

inline dim3 tile_grid(const PlaneTiles& b) {
  return dim3(static_cast<unsigned>(ceil_div(b.planes, b.group)));
}

// Each runs its kernel where it takes the problem, and says whether.
template <typename Rule>
bool run_pool_tiles(const PoolShape& s, int64_t planes, const Rule& rule,
                    const typename Rule::Element* x, typename Rule::Element* y,
                    const SelectedOutput& selected, const Queue& queue) {
  using T = typename Rule::Element;
  constexpr int n = kLanes<T>;
  if (!tiles_fit<T>(s, n / 2,
                    aligned<T>(x, n / 2) && aligned<T>(y, n / 2) &&
                        aligned_codes(selected.kind, selected.data, n / 2)))
    return false;
  const PlaneTiles b = plane_tiles<T>(s, planes, x, queue);
  const auto state = static_cast<int64_t>(sizeof(typename Rule::State));
  const int64_t bytes = (s.h.out + s.w.out) * static_cast<int64_t>(sizeof(TileWindow)) +
                        ceil_div(b.group * s.h.size * s.w.size, n) * 16 +
                        (b.direct ? 0 : b.group * s.h.size * s.w.out * state);
  if (bytes > kMostTileBytes) return false;
  launch(pool_tiles<Rule>, tile_grid(b), dim3(kPoolThreads), static_cast<int>(bytes), queue, b,
         rule, x, y, selected);
  return true;
}

template <typename T>
bool run_spread_tiles(const PoolShape& s, int64_t planes, const T* dy, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  if (!tiles_fit<T>(s, n, aligned<T>(dx, n) && aligned<T>(dy, n))) return false;
  const PlaneTiles b = plane_tiles<T>(s, planes, dx, queue);
  const int64_t bytes = b.group * s.h.out * s.w.out * static_cast<int64_t>(sizeof(Wide<T>)) +
                        (s.h.size + s.w.size) * static_cast<int64_t>(sizeof(TileVisits)) +
                        s.h.size * s.w.size * 2;
  if (bytes > kMostTileBytes) return false;
  launch(spread_tiles<T>, tile_grid(b), dim3(kPoolThreads), static_cast<int>(bytes), queue, b, dy,
         dx);
  return true;
}

template <typename T>
bool run_scatter_tiles(const PoolShape& s, int64_t planes, const T* dy,
                       const SelectedArray& selected, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  if (!tiles_fit<T>(s, n,
                    selected.kind == Selected::kOffset8 && aligned<T>(dx, n) && aligned<T>(dy, n) &&
                        aligned_codes(selected.kind, selected.data, n)))
    return false;
  PlaneTiles b = plane_tiles<T>(s, planes, dx, queue);
  const int64_t down = windows_apart(s, s.h), right = windows_apart(s, s.w);
  const int64_t bytes = ceil_div(b.group * s.h.size * s.w.size, n) * 16 +
                        b.group * s.h.out * s.w.out * (static_cast<int64_t>(sizeof(Wide<T>)) + 4);
  if ((2 * down + 1) * (2 * right + 1) > 49 || bytes > kMostTileBytes) return false;
  b.down = static_cast<int32_t>(down), b.right = static_cast<int32_t>(right);
  launch(scatter_tiles<T>, tile_grid(b), dim3(kPoolThreads), static_cast<int>(bytes), queue, b, dy,
         selected, dx);
  return true;
}

}  // namespace torchconv::cuda
