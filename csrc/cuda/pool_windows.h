// Pooling's forward for any window, ordinary and adaptive, in both layouts.
//
// pool_windows: one thread for each output, or in NHWC for 16 bytes of the channels of one, reads
// its window's valid taps. Bound: loads, which find the taps of neighbouring windows in the caches.
//
// pool_large_windows: several threads share the taps of one window, tap by tap in turns, and their
// parts are merged in a tree, so global pooling of few images fills the GPU. How many follows from
// the window and the layout alone.
#pragma once

#include "cuda/pool_channel_windows.h"
#include "cuda/pool_geometry.h"
#include "cuda/pool_pairs.h"
#include "cuda/pool_planes.h"
#include "cuda/pool_rules.h"
#include "cuda/pool_select_tiles.h"
#include "cuda/pool_strips.h"
#include "cuda/pool_tiles.h"

namespace torchconv::cuda {

template <typename T, int n>
__device__ __forceinline__ Vector<T, n> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, n>*>(p);
}

// One vector of results and their codes.
template <typename Rule, int n, typename I>
__device__ __forceinline__ void store_outputs(const PoolView<I>& v, const Rule& rule,
                                              const typename Rule::State (&state)[n], I thread,
                                              const PoolPlace<I>& at, typename Rule::Element* y,
                                              const SelectedOutput& selected) {
  using T = typename Rule::Element;
  const int64_t position = static_cast<int64_t>(thread) * n;
  using Value = typename Rule::Value;
  const Division<Value> over(Rule::kSelects ? Value{1}
                                            : v.template divisor_of<Value>(at.row, at.column));
  store_all<T, n>(y + position, [&](int i) { return rule.finish(state[i], over); });
  if constexpr (Rule::kSelects) {
    if (selected.data == nullptr) return;
    store_codes<n>(
        selected, position, [&](int i) { return state[i].code; },
        [&](int i) {
          return v.index_of(state[i].code, static_cast<uint32_t>(v.row_codes), at.row, at.column);
        });
  }
}

template <typename Rule, int n, typename I>
__global__ void __launch_bounds__(kPoolThreads)
    pool_windows(PoolView<I> v, Rule rule, const typename Rule::Element* __restrict__ x,
                 typename Rule::Element* __restrict__ y, SelectedOutput selected) {
  using T = typename Rule::Element;
  const I thread = pool_thread<I>();
  if (thread >= v.threads) return;
  const PoolPlace<I> at(v, thread, n);
  const WindowTaps<I> rows = v.h.window(at.row), columns = v.w.window(at.column);
  const bool empty = rows.count == 0 || columns.count == 0;
  uint32_t row_code = static_cast<uint32_t>(rows.tap) * static_cast<uint32_t>(v.row_codes) +
                      static_cast<uint32_t>(columns.tap);
  typename Rule::State total[n];
#pragma unroll
  for (int i = 0; i < n; i++) total[i] = Rule::start(empty ? ~uint32_t{0} : row_code);
  const I row_step = v.h.dilation * v.w.size * v.channels, step = v.w.dilation * v.channels;
  I row = ((at.image * v.h.size + rows.element) * v.w.size + columns.element) * v.channels + at.c;
  for (I r = empty ? rows.count : 0; r < rows.count; r++) {
    typename Rule::State state[n];
#pragma unroll
    for (int i = 0; i < n; i++) state[i] = Rule::begin_row(total[i]);
#pragma unroll 4
    for (I s = 0; s < columns.count; s++) {
      const auto vector = load_vector<T, n>(x + row + s * step);
#pragma unroll
      for (int i = 0; i < n; i++)
        Rule::fold(state[i], rule.prepare(vector.element[i]), row_code + static_cast<uint32_t>(s));
    }
#pragma unroll
    for (int i = 0; i < n; i++) Rule::end_row(total[i], state[i]);
    row += row_step;
    row_code += static_cast<uint32_t>(v.row_codes);
  }
  store_outputs(v, rule, total, thread, at, y, selected);
}

// `splits`, a power of two, threads for each vector of outputs: neighbours in a warp where there is
// one channel, otherwise those of neighbouring channels are.
template <typename Rule, int n>
__global__ void __launch_bounds__(kPoolThreads)
    pool_large_windows(PoolView<int32_t> v, Rule rule, const typename Rule::Element* __restrict__ x,
                       typename Rule::Element* __restrict__ y, SelectedOutput selected,
                       int splits) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  constexpr int kBatch = 4;  // loads under way
  __shared__ State parts[n][kPoolThreads];
  const int id = static_cast<int>(threadIdx.x), outputs = kPoolThreads / splits;
  const int split = v.channels == 1 ? id % splits : id / outputs;
  const int own = v.channels == 1 ? id / splits : id % outputs;
  const int32_t thread = static_cast<int32_t>(blockIdx.x) * outputs + own;
  const bool works = thread < v.threads;
  const PoolPlace<int32_t> at(v, works ? thread : 0, n);
  const WindowTaps<int32_t> rows = v.h.window(at.row), columns = v.w.window(at.column);
  const int32_t width = columns.count, count = rows.count * width;
  const uint32_t first_code = static_cast<uint32_t>(rows.tap * v.row_codes + columns.tap);
  State total[n];
#pragma unroll
  for (int i = 0; i < n; i++) total[i] = Rule::start(count == 0 ? ~uint32_t{0} : first_code);
  if (works && split < count) {
    const int32_t row_step = v.h.dilation * v.w.size * v.channels;
    const int32_t step = v.w.dilation * v.channels;
    const T* from =
        x + ((at.image * v.h.size + rows.element) * v.w.size + columns.element) * v.channels + at.c;
    int32_t r = split / width, s = split % width;
    const int32_t rows_on = splits / width, columns_on = splits % width;
    for (int32_t tap = split; tap < count; tap += kBatch * splits) {
      Vector<T, n> batch[kBatch];
      uint32_t codes[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        codes[k] = first_code + static_cast<uint32_t>(r * v.row_codes + s);
        if (tap + k * splits < count) batch[k] = load_vector<T, n>(from + r * row_step + s * step);
        s += columns_on, r += rows_on;
        if (s >= width) s -= width, r++;
      }
      State state[n];
#pragma unroll
      for (int i = 0; i < n; i++) state[i] = Rule::begin_row(total[i]);
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const bool valid = tap + k * splits < count;
#pragma unroll
        for (int i = 0; i < n; i++)
          Rule::fold(state[i], valid ? rule.prepare(batch[k].element[i]) : Rule::none(), codes[k]);
      }
#pragma unroll
      for (int i = 0; i < n; i++) Rule::end_row(total[i], state[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < n; i++) parts[i][split * outputs + own] = total[i];
  for (int half = splits / 2; half > 0; half /= 2) {
    __syncthreads();
    if (split < half) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        Rule::merge(total[i], parts[i][(split + half) * outputs + own]);
        parts[i][split * outputs + own] = total[i];
      }
    }
  }
  if (works && split == 0) store_outputs(v, rule, total, thread, at, y, selected);
}

// How many threads share a window; 1 where pool_windows takes it.
inline int pool_splits(const PoolShape& s) {
  const auto largest = [&](const PoolAxis& a) {
    return s.adaptive ? ceil_div(a.size, std::max<int64_t>(a.out, 1)) + 1
                      : std::min(a.taps, a.size);
  };
  const int64_t taps = largest(s.h) * largest(s.w);
  const bool few = s.h.out * s.w.out <= 64;
  const bool scattered = s.channels == 1 && (s.adaptive || s.w.stride >= 4);
  if (taps < 24 || !(few || scattered)) return 1;
  if (taps <= 256) return 8;
  return taps <= 4096 || s.channels > 1 ? 32 : kPoolThreads;
}

// Runs the first of these kernels that takes the problem, averages (a) or selections (s), of
// floating-point types but for the last two, where a part of the images can be counted in int32_t:
//
//   fold_planes             a s  NCHW   one window over the whole plane, of at most 1024 elements
//   average_pairs           a    NCHW   disjoint 2x2 that cover the plane, rows no whole vectors
//   select_tiles              s  NCHW   planes of 16 elements or more for each output that fit in
//                                       shared memory; since Ampere
//   average_strips          a    NCHW   3x3 one apart, 2x2 two apart; rows no whole vectors;
//                                       since Ampere
//   pool_tiles              a s  NCHW   windows without gaps in small planes, which bands do not
//                                       read and write in halves of vectors
//   average_channels        a    NHWC   one window over the image, of 24 to 256 elements
//   pool_patches            a s  both   a: 3x3 one apart (NHWC). s: maxima without codes, 2x2 and
//                                       3x3 two apart
//   pool_bands              a s  both   2x2 and 3x3 two apart, 3x3 one apart; s: maxima
//   select_channel_windows    s  NHWC   24 to 256 taps, at most 64 outputs
//   pool_large_windows      a s  both   24 taps or more, at most 64 outputs or, in NCHW, any number
//                                       of adaptive windows or of those four apart and more
//   pool_windows            a s  both   all others
//
// NHWC's are of channels in whole vectors but for the last two. Only average_pairs, average_strips,
// average_channels, pool_patches, pool_bands and select_channel_windows leave out float64.
// first_choice(images, x, y, selected) may run a kernel for the windows at hand, and says whether:
// average_channels, pool_patches or pool_bands.
template <typename Rule, typename F>
void run_pool_windows(const PoolShape& s, const Rule& rule, const void* x, void* y,
                      const SelectedOutput& selected, const Queue& queue, F&& first_choice) {
  using T = typename Rule::Element;
  constexpr int kVector = std::is_integral_v<T> ? 1 : kLanes<T>;
  const int64_t in = s.h.size * s.w.size * s.channels, out = s.h.out * s.w.out * s.channels;
  if (s.images * out == 0) return;
  const bool vectors = s.channels % kVector == 0 && aligned<T>(x, kVector) &&
                       aligned<T>(y, kVector) &&
                       aligned_codes(selected.kind, selected.data, kVector);
  const int splits = pool_splits(s);
  each_part(s, [&](auto counter, int64_t first, int64_t images) {
    using I = decltype(counter);
    const T* from = static_cast<const T*>(x) + first * in;
    T* to = static_cast<T*>(y) + first * out;
    const SelectedOutput codes = part_of(selected, first * out);
    if constexpr (sizeof(I) == 4) {
      if constexpr (!std::is_integral_v<T>)
        if (run_fold_planes(s, images, rule, from, to, codes, queue)) return;
      if constexpr (!Rule::kSelects && sizeof(T) < 8)
        if (run_average_pairs(s, images, from, to, queue)) return;
      if constexpr (Rule::kSelects && !std::is_integral_v<T>)
        if (run_select_tiles(s, images, rule, from, to, codes, queue)) return;
      if constexpr (!Rule::kSelects && sizeof(T) < 8)
        if (run_average_strips(s, images, from, to, queue)) return;
      if constexpr (!std::is_integral_v<T>)
        if (run_pool_tiles(s, images, rule, from, to, codes, queue)) return;
      if (first_choice(images, from, to, codes)) return;
      if constexpr (Rule::kSelects && !std::is_integral_v<T> && sizeof(T) < 8)
        if (vectors && splits == kWindowSplits)
          return launch_select_channel_windows(s, images, rule, from, to, codes, queue);
      const auto run = [&](auto width) {
        constexpr int n = decltype(width)::value;
        const PoolView<I> view(s, images, n, true);
        const dim3 grid(static_cast<unsigned>(ceil_div(view.threads, kPoolThreads / splits)));
        const dim3 block(kPoolThreads);
        if (splits > 1)
          launch(pool_large_windows<Rule, n>, grid, block, 0, queue, view, rule, from, to, codes,
                 splits);
        else
          launch(pool_windows<Rule, n, I>, grid, block, 0, queue, view, rule, from, to, codes);
      };
      if (vectors)
        run(std::integral_constant<int, kVector>{});
      else
        run(std::integral_constant<int, 1>{});
    } else {
      const PoolView<I> view(s, images, 1, true);
      launch(pool_windows<Rule, 1, I>, pool_grid(view.threads), dim3(kPoolThreads), 0, queue, view,
             rule, from, to, codes);
    }
  });
}

}  // namespace torchconv::cuda
