// Packers: they copy what a tile product needs into panels, converting to the computing type and
// writing zeros where a tap leaves the image, so that the product itself has no edges.
//
// A reduction over (c, t) is cut into blocks of at most kDepth terms (ReductionBlock). What a block
// needs of the source is planned once for each panel, as a list of copies with bounds worked out,
// and the plan then runs for every channel or row. This is im2col on the fly, one cache-sized panel
// at a time (Chetlur et al., "cuDNN", 2014, section 3).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Channels [c0, c0 + cn) and taps [t0, t0 + tn).
struct ReductionBlock {
  int64_t c0, cn, t0, tn;
  int64_t size() const { return cn * tn; }
};

// Cuts C x T into even blocks of at most limit. The inner index (all taps of a channel, or all
// channels of a tap) is kept whole where it fits.
std::vector<ReductionBlock> reduction_blocks(int64_t C, int64_t T, int64_t limit, bool taps_inner);

// Lanes [begin, end) of the vector at p, zero elsewhere; no other memory is touched.
template <typename T>
TORCHCONV_INLINE typename WideVec<T>::Type load_lanes(const T* p, int64_t begin, int64_t end) {
  using V = WideVec<T>;
#if defined(TORCHCONV_MASKED_MOVES) && defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t mask = (uint32_t{1} << end) - (uint32_t{1} << begin);
    return bit_cast<typename V::Type>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else if constexpr (std::is_same_v<T, double>) {
    const uint32_t mask = (uint32_t{1} << end) - (uint32_t{1} << begin);
    return bit_cast<typename V::Type>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  }
#endif
#if defined(TORCHCONV_MASKED_MOVES) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_set1_epi32(static_cast<int>(begin) - 1);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(end));
    const __m256i inside =
        _mm256_and_si256(_mm256_cmpgt_epi32(lane, low), _mm256_cmpgt_epi32(high, lane));
    return bit_cast<typename V::Type>(_mm256_maskload_ps(p, inside));
  }
#endif
  if (begin == 0) return V::load_partial(p, end);
  Wide<T> lanes[V::kLanes] = {};
  for (int64_t l = begin; l < end; ++l) lanes[l] = to_wide(p[l]);
  return V::Registers::load(lanes);
}

// The even lanes of two vectors.
template <typename V, typename Type, int... I>
TORCHCONV_INLINE Type even_lanes(Type a, Type b, std::integer_sequence<int, I...>) {
  return shuffle<2 * I...>(a, b);
}

// Lane begin + l from p[l*step] for begin + l < end, zero elsewhere. more_follow: the lane after
// the last may be read too. p is that of the first lane read: a huge step must not be taken before
// it.
template <typename T>
TORCHCONV_INLINE typename WideVec<T>::Type load_lanes_strided(const T* p, int64_t step,
                                                              int64_t begin, int64_t end,
                                                              bool more_follow) {
  using V = WideVec<T>;
  if (step == 2 && begin == 0 && end == V::kLanes && more_follow)
    return even_lanes<V>(V::load(p), V::load(p + V::kLanes),
                         std::make_integer_sequence<int, V::kLanes>());
  Wide<T> lanes[V::kLanes] = {};
  for (int64_t l = begin; l < end; ++l) lanes[l] = to_wide(p[(l - begin) * step]);
  return V::Registers::load(lanes);
}

// dst[i] = src[i], converted.
template <typename T>
TORCHCONV_INLINE void copy_wide(Wide<T>* dst, const T* src, int64_t n) {
  using V = WideVec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::Registers::store(dst + i, V::load(src + i));
  if (i < n) V::Registers::store_partial(dst + i, V::load_partial(src + i, n - i), n - i);
}

// row[i] = src[i*step] for begin <= i < end, else 0, for i < width. Whole vectors are stored, so up
// to a vector past the end is overwritten with zeros: write rows in ascending order.
template <typename T>
TORCHCONV_INLINE void copy_padded_row(Wide<T>* row, const T* src, int64_t step, int64_t begin,
                                      int64_t end, int64_t width) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t i = 0; i < width; i += kL) {
    const int64_t first = std::max(begin - i, int64_t{0}), last = std::min(end - i, kL);
    auto lanes = typename V::Type{};
    if (first < last) {
      if (step == 1)
        lanes = first == 0 && last == kL ? V::load(src + i) : load_lanes(src + i, first, last);
      else
        lanes = load_lanes_strided(src + (i + first) * step, step, first, last, i + kL < end);
    }
    V::Registers::store(row + i, lanes);
  }
}

template <typename A>
TORCHCONV_INLINE void fill_zero(A* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = 0;
}

// A run of the grid's pixels in one row, as columns [lane, lane + n) of a panel.
struct PixelRun {
  int64_t i, j, lane, n;
};

// The runs of `count` pixels from flat index `first`; returns how many.
inline int64_t pixel_runs(int64_t first, int64_t count, int64_t J, PixelRun* runs) {
  int64_t found = 0;
  for (int64_t lane = 0; lane < count;) {
    const int64_t i = (first + lane) / J, j = (first + lane) % J;
    const int64_t n = std::min(J - j, count - lane);
    runs[found++] = {i, j, lane, n};
    lane += n;
  }
  return found;
}
inline int64_t max_pixel_runs(int64_t count, int64_t J) { return std::min(count, count / J + 2); }

// ---- Pixels along the vector: panels [c][t][vector] from a source whose pixels are contiguous.

struct LaneCopy {
  int64_t src;  // of lane begin
  int32_t begin, end;
  bool last;         // of its vector
  bool more_follow;  // the run goes on past its last lane
};

// The copies that fill `vectors` vectors for each tap of the block.
template <typename A>
int64_t plan_pixel_panel(const ConvView& view, const ReductionBlock& block, const PixelRun* runs,
                         int64_t run_count, int64_t vectors, LaneCopy* plan) {
  constexpr int64_t kL = kLanes<A>;
  int64_t size = 0;
  for (int64_t t = block.t0; t < block.t0 + block.tn; ++t) {
    const ConvTap& tap = view.taps[t];
    int64_t r = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t start = size;
      for (;; ++r) {
        if (r == run_count || runs[r].lane >= (v + 1) * kL) break;
        const PixelRun& run = runs[r];
        const int64_t h = run.i * view.step_h + tap.h;
        if (h >= 0 && h < view.H) {
          const int64_t w = run.j * view.step_w + tap.w;
          const Range range = valid_range(run.n, view.step_w, w, view.W);
          const int64_t begin = std::max(run.lane + range.begin - v * kL, int64_t{0});
          const int64_t end = std::min(run.lane + range.end - v * kL, kL);
          if (begin < end)
            plan[size++] = {h * view.src.row + w + (begin + v * kL - run.lane) * view.step_w,
                            static_cast<int32_t>(begin), static_cast<int32_t>(end), false,
                            run.lane + range.end - v * kL > end};
        }
        if (run.lane + run.n > (v + 1) * kL) break;  // goes on in the next vector
      }
      if (size == start) plan[size++] = {0, 0, 0, false, false};
      plan[size - 1].last = true;
    }
  }
  return size;
}

// Most copies that a plan can hold.
inline int64_t max_pixel_plan(int64_t taps, int64_t vectors, int64_t runs) {
  return taps * (2 * vectors + runs);
}

// src is at the block's first channel; panel is [cn][tn][vectors].
template <typename T>
void pack_pixel_panel(const ConvView& view, const ReductionBlock& block, const T* src,
                      const LaneCopy* plan, int64_t plan_size, Wide<T>* panel) {
  using V = WideVec<T>;
  for (int64_t c = 0; c < block.cn; ++c, src += view.src.c) {
    auto sum = typename V::Type{};
    for (int64_t i = 0; i < plan_size; ++i) {
      const LaneCopy& copy = plan[i];
      typename V::Type lanes;
      if (view.step_w == 1) {
        lanes = copy.begin == 0 && copy.end == V::kLanes
                    ? V::load(src + copy.src)
                    : load_lanes(src + copy.src - copy.begin, copy.begin, copy.end);
      } else {
        lanes =
            load_lanes_strided(src + copy.src, view.step_w, copy.begin, copy.end, copy.more_follow);
      }
      sum += lanes;
      if (copy.last) {
        V::Registers::store(panel, sum);
        panel += V::kLanes;
        sum = typename V::Type{};
      }
    }
  }
}

// ---- Channels along the vector: rows [pixel][t][c] from a source whose channels are contiguous.

// Copies of one pixel's taps in the block; a run of neighbouring taps is one copy where a pixel's
// channels fill it (one group), so that few channels still move in whole vectors.
struct TapRun {
  int64_t h, w, count;  // taps at w, w + 1, ...
};
std::vector<TapRun> tap_runs(const ConvView& view, const ReductionBlock& block);

// One pixel: row[(t - t0)*cn + (c - c0)]; src is the sample's group at the block's first channel.
template <typename T>
TORCHCONV_INLINE void pack_channel_row(const ConvView& view, const ReductionBlock& block,
                                       const std::vector<TapRun>& runs, const T* src, int64_t i,
                                       int64_t j, Wide<T>* row) {
  const int64_t cn = block.cn;
  for (const TapRun& run : runs) {
    const int64_t h = i * view.step_h + run.h, w = j * view.step_w + run.w;
    if (h >= 0 && h < view.H) {
      const int64_t begin = std::min(std::max(-w, int64_t{0}), run.count);
      const int64_t end = std::max(std::min(view.W - w, run.count), begin);
      fill_zero(row, begin * cn);
      if (begin < end)
        copy_wide(row + begin * cn, src + h * view.src.row + (w + begin) * view.src.column,
                  (end - begin) * cn);
      fill_zero(row + end * cn, (run.count - end) * cn);
    } else {
      fill_zero(row, run.count * cn);
    }
    row += run.count * cn;
  }
}

// ---- Plain matrices.

// One step of a square transposition in registers: blocks of kStep lanes of rows i and i + kStep
// change places.
template <int kStep, typename Type, int... I>
TORCHCONV_INLINE void exchange_blocks(Type& a, Type& b, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  const Type low = shuffle<((I / kStep) % 2 == 0 ? I : kN + I - kStep)...>(a, b);
  const Type high = shuffle<((I / kStep) % 2 == 0 ? I + kStep : kN + I)...>(a, b);
  a = low;
  b = high;
}

template <int kStep, typename Type, int kN>
TORCHCONV_INLINE void transpose_steps(Type (&rows)[kN]) {
  if constexpr (kStep < kN) {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i)
      if ((i / kStep) % 2 == 0)
        exchange_blocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kN>());
    transpose_steps<2 * kStep>(rows);
  }
}

// dst[c*dst_stride + r] = src[r*src_stride + c] for r < rows, c < columns.
template <typename T>
void pack_transposed(const T* src, int64_t src_stride, int64_t rows, int64_t columns, Wide<T>* dst,
                     int64_t dst_stride) {
  using V = WideVec<T>;
  constexpr int kL = V::kLanes;
  int64_t r = 0;
  for (; r + kL <= rows; r += kL) {
    int64_t c = 0;
    for (; c + kL <= columns; c += kL) {
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) tile[i] = V::load(src + (r + i) * src_stride + c);
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) V::Registers::store(dst + (c + i) * dst_stride + r, tile[i]);
    }
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + kL; ++i)
        dst[c * dst_stride + i] = to_wide(src[i * src_stride + c]);
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      dst[c * dst_stride + r] = to_wide(src[r * src_stride + c]);
}

// ---- Weights: the operand that all samples share.

// Offset of term k of the block in a filter, in the order of the panels.
inline void weight_offsets(const ConvView& view, const ReductionBlock& block, bool taps_inner,
                           int64_t* offsets) {
  for (int64_t c = 0; c < block.cn; ++c)
    for (int64_t t = 0; t < block.tn; ++t)
      offsets[taps_inner ? c * block.tn + t : t * block.cn + c] =
          (block.c0 + c) * view.weight_c + view.taps[block.t0 + t].weight;
}

// Calls f(k, n) on the runs [k, k + n) of terms that are neighbours in memory.
template <typename F>
TORCHCONV_INLINE void for_weight_runs(const int64_t* offsets, int64_t depth, F&& f) {
  for (int64_t k = 0; k < depth;) {
    int64_t n = 1;
    while (k + n < depth && offsets[k + n] == offsets[k] + n) ++n;
    f(k, n);
    k += n;
  }
}

// [rows][kARow] from the filters at w, weight_k apart.
template <typename T>
void pack_weight_rows(const T* w, int64_t weight_k, const int64_t* offsets, int64_t depth,
                      int64_t rows, Wide<T>* dst) {
  for_weight_runs(offsets, depth, [&](int64_t k, int64_t n) {
    for (int64_t m = 0; m < rows; ++m)
      copy_wide(dst + m * kARow<Wide<T>> + k, w + m * weight_k + offsets[k], n);
  });
}

// A panel [depth][width] of `columns` filters, padded with zeros to its width.
template <typename T>
void pack_weight_panel(const T* w, int64_t weight_k, const int64_t* offsets, int64_t depth,
                       int64_t columns, int64_t width, Wide<T>* dst) {
  for_weight_runs(offsets, depth, [&](int64_t k, int64_t n) {
    pack_transposed(w + offsets[k], weight_k, columns, n, dst + k * width, width);
  });
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = columns; n < width; ++n) dst[k * width + n] = 0;
}

}  // namespace torchconv::cpu
