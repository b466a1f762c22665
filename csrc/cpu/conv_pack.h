// Packers: they copy what a tile product needs into panels, converting to the computing type and
// writing zeros where a tap leaves the image, so that the product itself has no edges.
//
// A reduction over (c, t) is cut into blocks of limited size (ReductionBlock). Here are the weights
// and the pieces that the packers of sources share; pixel_panel.h and conv_band.h are those.
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

// Cuts C x T into even blocks of at most limit; all taps of a channel are kept together where they
// fit.
std::vector<ReductionBlock> reduction_blocks(int64_t C, int64_t T, int64_t limit);

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
  if constexpr (kPermutesLanes<Wide<T>>) {
    // The first lanes turn up at `begin`, and of those that are zero as many before it.
    using Index = Vec<LaneIndex<Wide<T>>>;
    const auto turned = Index::iota() - static_cast<LaneIndex<Wide<T>>>(begin);
    return permute(V::load_partial(p + begin, end - begin), turned & (V::kLanes - 1));
  }
  Wide<T> lanes[V::kLanes] = {};
  for (int64_t l = 0; l < V::kLanes; ++l)
    if (begin <= l && l < end) lanes[l] = to_wide(p[l]);
  return V::Registers::load(lanes);
}

// The even (kFirst = 0) or odd lanes of two vectors.
template <int kFirst, typename Type, int... I>
TORCHCONV_INLINE Type alternate_lanes(Type a, Type b, std::integer_sequence<int, I...>) {
  return shuffle<(2 * I + kFirst)...>(a, b);
}

// Lane i of the result is lane Map::lane(i) of v[Map::vector(i)]. Vectors from the second on, and
// lanes, are compared by constants: one shuffle for each vector but the first.
template <typename Map, int kVector, typename Type, int kN, int... I>
TORCHCONV_INLINE Type add_collected(Type lanes, const Type (&v)[kN],
                                    std::integer_sequence<int, I...> all) {
  if constexpr (kVector == kN) {
    return lanes;
  } else {
    constexpr int kLanes = sizeof...(I);
    return add_collected<Map, kVector + 1>(
        shuffle<(Map::vector(I) == kVector             ? kLanes + Map::lane(I)
                 : kVector == 1 && Map::vector(I) == 0 ? Map::lane(I)
                                                       : I)...>(lanes, v[kVector]),
        v, all);
  }
}
template <typename Map, int kLanes, typename Type, int kN>
TORCHCONV_INLINE Type collect_lanes(const Type (&v)[kN]) {
  return add_collected<Map, 1>(v[0], v, std::make_integer_sequence<int, kLanes>());
}

// The largest step by which rows are taken apart, and put together, in registers.
inline constexpr int64_t kMostLaneStep = 4;
// Lanes kPhase, kPhase + kStep, ... of kStep vectors that follow each other, and vector kPart of
// those that have the lanes of kStep such phases in turn.
template <int kStep, int kPhase, int kLanes>
struct PhaseLanes {
  static constexpr int vector(int i) { return (i * kStep + kPhase) / kLanes; }
  static constexpr int lane(int i) { return (i * kStep + kPhase) % kLanes; }
};
template <int kStep, int kPart, int kLanes>
struct InterleavedLanes {
  static constexpr int vector(int i) { return (kPart * kLanes + i) % kStep; }
  static constexpr int lane(int i) { return (kPart * kLanes + i) / kStep; }
};

// load_lanes_strided for any step, to memory.
template <typename T>
void take_lanes_strided(const T* p, int64_t step, int64_t begin, int64_t end, bool more_follow,
                        Wide<T>* lanes);

// Lane begin + l from p[l*step] for begin + l < end, zero elsewhere. more_follow: the lane after
// the last may be read too. p is that of the first lane read: a huge step must not be taken before
// it.
template <typename T>
TORCHCONV_INLINE typename WideVec<T>::Type load_lanes_strided(const T* p, int64_t step,
                                                              int64_t begin, int64_t end,
                                                              bool more_follow) {
  using V = WideVec<T>;
  if (step == 2 && begin == 0 && end == V::kLanes && more_follow)
    return alternate_lanes<0>(V::load(p), V::load(p + V::kLanes),
                              std::make_integer_sequence<int, V::kLanes>());
  if (step == 2) {
    constexpr int64_t kL = V::kLanes;
    const T* first = p - 2 * begin;  // lane 0's element, which may not exist
    const int64_t from = 2 * begin, to = std::max(2 * end - 1, from);
    return alternate_lanes<0>(
        load_lanes(first, std::min(from, kL), std::min(to, kL)),
        load_lanes(first + kL, std::max(from - kL, int64_t{0}), std::max(to - kL, int64_t{0})),
        std::make_integer_sequence<int, V::kLanes>());
  }
  alignas(64) Wide<T> lanes[V::kLanes];
  take_lanes_strided(p, step, begin, end, more_follow, lanes);
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
                     int64_t dst_stride);

// ---- Weights: the operand that all samples share.

// Whether several threads will read the packed weights. They are then best written past the caches:
// every core still holds their lines since an earlier call, and to take those back from other
// last-level caches costs more than memory.
inline bool shared_by_threads(const ConvView& view) {
  const double products = static_cast<double>(view.N * view.pixels()) *
                          static_cast<double>(view.groups * view.K * view.terms());
  return products >= 0.5e6 * kVectorBytes;
}

// Offset of term k of the block in a filter, in the order of the panels.
inline void weight_offsets(const ConvView& view, const ReductionBlock& block, int64_t* offsets) {
  for (int64_t c = 0; c < block.cn; ++c)
    for (int64_t t = 0; t < block.tn; ++t)
      *offsets++ = (block.c0 + c) * view.weight_c + view.taps[block.t0 + t].weight;
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
                      int64_t rows, Wide<T>* dst);

// A panel [depth][width] of `columns` filters, padded with zeros to its width.
template <typename T>
void pack_weight_panel(const T* w, int64_t weight_k, const int64_t* offsets, int64_t depth,
                       int64_t columns, int64_t width, Wide<T>* dst);

}  // namespace torchconv::cpu
