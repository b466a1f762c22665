// Vectors run along filters. The filters of a few channels are first gathered tap by tap, in the
// way that suits how the weights lie in memory, then transformed.
#include "cpu/winograd_weights.h"

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"
#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd {
namespace {

template <typename A>
using Register = typename Vec<A>::Type;

// Elements of one tap of a panel and a vector of channels.
template <typename A>
constexpr int64_t kTapElements = kLanes<A> * kPanel<A>;

// Lanes 4q to 4q + 3 from p + q*step.
TORCHCONV_INLINE Register<float> load_quads(const float* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
  return bit_cast<Register<float>>(_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3));
#elif defined(__AVX2__)
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return bit_cast<Register<float>>(_mm256_insertf128_ps(v, _mm_loadu_ps(p + step), 1));
#else
  static_assert(kLanes<float> == 4, "a vector of one quad");
  return Vec<float>::load(p);
#endif
}
TORCHCONV_INLINE Register<double> load_quads(const double* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  const __m512d v = _mm512_castpd256_pd512(_mm256_loadu_pd(p));
  return bit_cast<Register<double>>(
      _mm512_maskz_insertf64x4(0xff, v, _mm256_loadu_pd(p + step), 1));
#else
  return Vec<double>::load(p);
#endif
}

// taps[i] = p[k*weight_k + i] with filters k along the lanes, i < 4.
template <typename A>
TORCHCONV_INLINE void load_taps(const A* p, int64_t weight_k, Register<A> (&taps)[4]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<A>>();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) taps[j] = load_quads(p + j * weight_k, 4 * weight_k);
  exchange_blocks<1>(taps[0], taps[1], kAll);
  exchange_blocks<1>(taps[2], taps[3], kAll);
  exchange_blocks<2>(taps[0], taps[2], kAll);
  exchange_blocks<2>(taps[1], taps[3], kAll);
}

// The taps of a filter's channel are neighbours in memory, in any order: order[i] is the tap at the
// i-th place after the first.
bool taps_contiguous(const TapOffsets& taps, int64_t* first, int64_t (&order)[kMostTaps]) {
  *first = *std::min_element(taps.at, taps.at + taps.count);
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    if (taps[tap] - *first >= taps.count) return false;
    order[taps[tap] - *first] = tap;
  }
  return true;
}

// g[tap][kPanel] of a vector of filters of one channel, `lanes` of them, whose taps are
// neighbours at p, the filters weight_k apart.
template <typename A>
void gather_filters(const A* p, int64_t weight_k, int64_t lanes, int64_t count,
                    const int64_t* order, A* g) {
  using V = Vec<A>;
  constexpr int64_t kVector = V::kLanes, kFilters = kPanel<A>;
  if constexpr (kVector >= 4) {
    if (lanes == kVector) {
      for (int64_t quad = 0; quad < count; quad += 4) {
        const int64_t begin = std::min(quad, count - 4);
        Register<A> taps[4];
        load_taps(p + begin, weight_k, taps);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) V::store(g + order[begin + i] * kFilters, taps[i]);
      }
      return;
    }
  }
  A taps[kVector * kVector];
  for (int64_t begin = 0; begin < count; begin += kVector) {
    const int64_t columns = std::min(count - begin, kVector);
    transpose_tile(p + begin, weight_k, lanes, columns, taps, kVector, columns);
    for (int64_t i = 0; i < columns; ++i)
      V::store(g + order[begin + i] * kFilters, V::load(taps + i * kVector));
  }
}

// The taps of one panel and vector of channels; channels beyond the last are zero.
template <typename A>
void gather_vector(const Plan<A>& plan, const A* w, int64_t panel, int64_t vector, A* g) {
  constexpr int64_t kVector = kLanes<A>, kFilters = kPanel<A>;
  const ConvView& view = plan.view;
  const int64_t k = panel * kFilters, c = vector * kVector;
  const int64_t channels = std::min(view.C - c, kVector);
  const TapOffsets taps = plan.taps();
  gather_taps(view, taps, w + k * view.weight_k + c * view.weight_c, std::min(view.K - k, kFilters),
              channels, g);
  std::fill(g + channels * taps.count * kFilters, g + taps.count * kTapElements<A>, A{0});
}

}  // namespace

// In one function with gather_taps, GCC spills the registers of both.
template <typename A, int kTaps, bool kStreams>
__attribute__((noinline)) void transform_filter(const A* g, A* u, int64_t point) {
  using V = Vec<A>;
  Register<A> columns[kTaps][kPoints];
#pragma GCC unroll 5
  for (int s = 0; s < kTaps; ++s) {
    Register<A> taps[kTaps];
#pragma GCC unroll 5
    for (int r = 0; r < kTaps; ++r) taps[r] = V::load(g + (r * kTaps + s) * kPanel<A>);
    transform_weight(taps, columns[s]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kPoints; ++r) {
    Register<A> taps[kTaps], row[kPoints];
#pragma GCC unroll 5
    for (int s = 0; s < kTaps; ++s) taps[s] = columns[s][r];
    transform_weight(taps, row);
#pragma GCC unroll 6
    for (int s = 0; s < kPoints; ++s) {
      A* to = u + (r * kPoints + s) * point;
      if constexpr (kStreams)
        stream_bytes(to, row[s]);
      else
        V::store(to, row[s]);
    }
  }
}
template void transform_filter<float, 4>(const float*, float*, int64_t);

template <typename A>
__attribute__((noinline)) void gather_taps(const ConvView& view, const TapOffsets& taps, const A* w,
                                           int64_t filters, int64_t channels, A* g) {
  using V = Vec<A>;
  constexpr int64_t kVector = V::kLanes, kFilters = kPanel<A>;
  const int64_t count = taps.count, channel = count * kFilters;
  int64_t first, order[kMostTaps];
  const bool contiguous = taps_contiguous(taps, &first, order);
  if (contiguous && view.weight_c == count && std::is_sorted(order, order + count)) {
    // All taps of all channels are one run, in the order of g.
    const int64_t run = channels * count;
    for (int64_t k = 0; k < filters; k += kVector) {
      const int64_t lanes = std::min(filters - k, kVector);
      const A* from = w + first + k * view.weight_k;
      for (int64_t i = 0; i < run; i += kVector) {
        const int64_t columns = std::min(run - i, kVector);
        transpose_tile(from + i, view.weight_k, lanes, columns, g + i * kFilters + k, kFilters,
                       columns);
      }
    }
  } else if (view.weight_c == 1 || view.weight_k == 1) {
    for (int64_t tap = 0; tap < count; ++tap) {
      const A* from = w + taps[tap];
      A* to = g + tap * kFilters;
      for (int64_t k = 0; k < filters; k += kVector) {
        const int64_t lanes = std::min(filters - k, kVector);
        if (view.weight_c == 1) {
          transpose_tile(from + k * view.weight_k, view.weight_k, lanes, channels, to + k, channel,
                         channels);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c)
          V::store(to + c * channel + k, V::load_partial(from + c * view.weight_c + k, lanes));
      }
    }
  } else if (contiguous) {
    for (int64_t k = 0; k < filters; k += kVector)
      for (int64_t c = 0; c < channels; ++c)
        gather_filters(w + k * view.weight_k + c * view.weight_c + first, view.weight_k,
                       std::min(filters - k, kVector), count, order, g + c * channel + k);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < count; ++tap) {
        const A* from = w + c * view.weight_c + taps[tap];
        A* to = g + c * channel + tap * kFilters;
        for (int64_t k = 0; k < round_up(filters, kVector); ++k)
          to[k] = k < filters ? from[k * view.weight_k] : A{0};
      }
  }
}

template <typename A>
void prefetch_weights(const ConvView& view, const TapOffsets& taps, const A* w, int64_t i) {
  const bool by_tap = view.weight_c == 1 || view.weight_k == 1;
  const bool by_filter = view.weight_k > view.weight_c;
  const int64_t runs = by_filter ? kMaxVectors : 1;
  const int64_t run = by_filter ? kLanes<A> : kPanel<A>;
  for (int64_t j = i * runs; j < (i + 1) * runs; ++j) {
    const A* at = w + j * std::max(view.weight_k, view.weight_c);
    for (int64_t tap = 0; tap < taps.count; ++tap)
      for (int64_t line = 0; line < run; line += kLine<A>)
        __builtin_prefetch(at + line + (by_tap ? taps[tap] : tap * run));
  }
}

namespace {

// Of a panel and a vector of channels in gather_weights' order.
template <typename A>
int64_t gathered_at(const Plan<A>& plan, int64_t panel, int64_t vector) {
  return (panel * plan.vectors + vector) * plan.taps().count * kTapElements<A>;
}

}  // namespace

template <typename A>
int64_t gathered_size(const Plan<A>& plan) {
  return gathered_at(plan, plan.panels, 0);
}

template <typename A>
void gather_weights(const Plan<A>& plan, const A* w, A* gathered, const Parallel& pool) {
  const int64_t size = gathered_at(plan, 0, 1);
  const WorkSplit split(plan.panels * plan.vectors, static_cast<double>(size));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      A* const g = gathered + i * size;
      fill_zero(g, size);
      gather_vector(plan, w, i / plan.vectors, i % plan.vectors, g);
    }
  });
}

template <typename A>
void transform_weights(const Plan<A>& plan, const Filters<A>& weights, int64_t panel, int64_t block,
                       A* u, bool streams) {
  constexpr int64_t kVector = kLanes<A>, kFilters = kPanel<A>;
  const WeightLayout<A> layout(plan);
  const ConvView& view = plan.view;
  const TapOffsets taps = plan.taps();
  const auto transform = plan.side == 3
                             ? streams ? transform_filter<A, 3, true> : transform_filter<A, 3>
                         : streams ? transform_filter<A, 5, true>
                                   : transform_filter<A, 5>;
  alignas(64) A own[kMostTaps * kTapElements<A>];
  const A* const w = weights.w;
  const int64_t channel = taps.count * kFilters;
  for (int64_t vector = 0; vector < plan.vectors_in(block); ++vector) {
    const int64_t from = block * plan.block_vectors + vector, c = from * kVector;
    if (weights.gathered == nullptr) gather_vector(plan, w, panel, from, own);
    const A* const gathered =
        weights.gathered != nullptr ? weights.gathered + gathered_at(plan, panel, from) : own;
    const A* next = w + panel * kFilters * view.weight_k;
    next += c + kVector < view.C ? (c + kVector) * view.weight_c : kFilters * view.weight_k;
    const int64_t filters = std::min(view.K - panel * kFilters, kFilters);
    const int64_t channels = std::min(round_up(view.C - c, kWinogradStep<A>), kVector);
    for (int64_t i = 0; i < channels; ++i) {
      if (weights.gathered != nullptr)
        for (int64_t line = 0; line < channel; line += kLine<A>)
          __builtin_prefetch(gathered + (kVector + i) * channel + line);
      else
        prefetch_weights(view, taps, next, i);
      for (int64_t k = 0; k < filters; k += kVector)
        transform(gathered + i * channel + k, u + (vector * kVector + i) * kFilters + k,
                  layout.point);
    }
  }
  if (streams) stream_fence();
}

template <typename A>
void prefetch_panel(const Plan<A>& plan, const Filters<A>& weights, int64_t panel, int64_t block,
                    SourcePrefetch& ahead) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(A));
  if (weights.gathered != nullptr) {
    return ahead.add(weights.gathered + gathered_at(plan, panel, block * plan.block_vectors), 1, 0,
                     gathered_at(plan, 0, plan.vectors_in(block)) * kSize);
  }
  const ConvView& view = plan.view;
  const int64_t k = panel * kPanel<A>, filters = std::min(view.K - k, kPanel<A>);
  const int64_t c = block * plan.block_vectors * kLanes<A>;
  const int64_t channels = std::min(view.C - c, plan.vectors_in(block) * kLanes<A>);
  const TapOffsets taps = plan.taps();
  const A* const w = weights.w + k * view.weight_k + c * view.weight_c;
  const bool by_filter = view.weight_k > view.weight_c;
  const int64_t count = by_filter ? filters : channels, run = by_filter ? channels : filters;
  const int64_t stride = std::max(view.weight_k, view.weight_c) * kSize;
  if (std::min(view.weight_k, view.weight_c) > 1)
    return ahead.add(w, count, stride, run * taps.count * kSize);
  for (int64_t tap = 0; tap < taps.count; ++tap)
    ahead.add(w + taps[tap], count, stride, run * kSize);
}

#define TORCHCONV_INSTANTIATE(A)                                                                  \
  template int64_t gathered_size(const Plan<A>&);                                                 \
  template void gather_weights(const Plan<A>&, const A*, A*, const Parallel&);                    \
  template void transform_weights(const Plan<A>&, const Filters<A>&, int64_t, int64_t, A*, bool); \
  template void prefetch_panel(const Plan<A>&, const Filters<A>&, int64_t, int64_t,               \
                               SourcePrefetch&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
#undef TORCHCONV_INSTANTIATE
template void gather_taps(const ConvView&, const TapOffsets&, const float*, int64_t, int64_t,
                          float*);
template void prefetch_weights(const ConvView&, const TapOffsets&, const float*, int64_t);

}  // namespace torchconv::cpu::winograd
