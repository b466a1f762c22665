// What every packer shares, compiled once: transposed copies, panels of weights, and how a
// reduction is cut into blocks.
#include "cpu/conv_pack.h"

namespace torchconv::cpu {

std::vector<ReductionBlock> reduction_blocks(int64_t C, int64_t T, int64_t limit) {
  std::vector<ReductionBlock> blocks;
  if (C == 0 || T == 0) return blocks;
  // Even blocks: a short last one would cost as much to add up as a full one.
  const int64_t taps = ceil_div(T, ceil_div(T, limit));
  const int64_t most = std::max<int64_t>(limit / taps, 1);
  const int64_t channels = taps < T ? 1 : ceil_div(C, ceil_div(C, most));
  for (int64_t c = 0; c < C; c += channels)
    for (int64_t t = 0; t < T; t += taps)
      blocks.push_back({c, std::min(channels, C - c), t, std::min(taps, T - t)});
  return blocks;
}

// Up to this step all that lies between is read too: an element for a lane, put together from
// scalars, takes longer.
constexpr int64_t kNearStep = 8;

template <typename T>
void take_lanes_strided(const T* p, int64_t step, int64_t begin, int64_t end, bool more_follow,
                        Wide<T>* lanes) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  if constexpr (kPermutesLanes<Wide<T>>) {
    if (0 < step && step <= kNearStep && begin < end) {
      using Index = Vec<LaneIndex<Wide<T>>>;
      const bool whole = begin == 0 && end == kL && more_follow;
      const T* vector = p - step * begin;  // lane 0's element, which may not exist
      const int64_t first = step * begin, last = step * (end - 1) + 1;
      auto element = Index::iota() * static_cast<LaneIndex<Wide<T>>>(step);
      auto all = typename V::Type{};
      for (int64_t at = 0; at < last; at += kL, vector += kL, element -= kL) {
        const int64_t from = std::clamp(first - at, int64_t{0}, kL), to = std::min(last - at, kL);
        const auto elements = whole ? V::load(vector) : load_lanes(vector, from, to);
        all = element >= 0 && element < kL ? permute(elements, element) : all;
      }
      return V::Registers::store(lanes, all);
    }
  }
  for (int64_t l = 0; l < kL; ++l)
    lanes[l] = begin <= l && l < end ? to_wide(p[(l - begin) * step]) : Wide<T>{0};
}

template <typename T>
void pack_transposed(const T* src, int64_t src_stride, int64_t rows, int64_t columns, Wide<T>* dst,
                     int64_t dst_stride) {
  using V = WideVec<T>;
  constexpr int kL = V::kLanes;
  constexpr int64_t kFew = 4;  // columns that do not repay a tile in registers
  for (int64_t r = 0; r < rows; r += kL, src += kL * src_stride, dst += kL) {
    const int64_t lanes = std::min<int64_t>(rows - r, kL);
    for (int64_t c = 0; c < columns; c += kL) {
      const int64_t n = std::min<int64_t>(columns - c, kL);
      if (n < kFew) {
        for (int64_t i = 0; i < n; ++i) {
          if (src_stride <= kNearStep) {
            const auto column =
                load_lanes_strided(src + c + i, src_stride, 0, lanes, rows - r > kL);
            V::Registers::store_partial(dst + (c + i) * dst_stride, column, lanes);
            continue;
          }
          for (int64_t l = 0; l < lanes; ++l)
            dst[(c + i) * dst_stride + l] = to_wide(src[l * src_stride + c + i]);
        }
        continue;
      }
      typename V::Type tile[kL];
      if (n == kL && lanes == kL) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) tile[i] = V::load(src + i * src_stride + c);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          tile[i] = i < lanes ? V::load_partial(src + i * src_stride + c, n) : typename V::Type{};
      }
      transpose_steps<1>(tile);
      if (n == kL && lanes == kL) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) V::Registers::store(dst + (c + i) * dst_stride, tile[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          if (i < n) V::Registers::store_partial(dst + (c + i) * dst_stride, tile[i], lanes);
      }
    }
  }
}

template <typename T>
void pack_weight_rows(const T* w, int64_t weight_k, const int64_t* offsets, int64_t depth,
                      int64_t rows, Wide<T>* dst) {
  for_weight_runs(offsets, depth, [&](int64_t k, int64_t n) {
    for (int64_t m = 0; m < rows; ++m)
      copy_wide(dst + m * kARow<Wide<T>> + k, w + m * weight_k + offsets[k], n);
  });
}

template <typename T>
void pack_weight_panel(const T* w, int64_t weight_k, const int64_t* offsets, int64_t depth,
                       int64_t columns, int64_t width, Wide<T>* dst) {
  if (weight_k == 1) {
    for (int64_t k = 0; k < depth; ++k) copy_wide(dst + k * width, w + offsets[k], columns);
  } else {
    for_weight_runs(offsets, depth, [&](int64_t k, int64_t n) {
      pack_transposed(w + offsets[k], weight_k, columns, n, dst + k * width, width);
    });
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = columns; n < width; ++n) dst[k * width + n] = 0;
}

#define TORCHCONV_CONV_PACK(T)                                                                   \
  template void take_lanes_strided(const T*, int64_t, int64_t, int64_t, bool, Wide<T>*);         \
  template void pack_transposed(const T*, int64_t, int64_t, int64_t, Wide<T>*, int64_t);         \
  template void pack_weight_rows(const T*, int64_t, const int64_t*, int64_t, int64_t, Wide<T>*); \
  template void pack_weight_panel(const T*, int64_t, const int64_t*, int64_t, int64_t, int64_t,  \
                                  Wide<T>*);
TORCHCONV_CONV_PACK(float)
TORCHCONV_CONV_PACK(double)
TORCHCONV_CONV_PACK(BFloat16)
TORCHCONV_CONV_PACK(Float16)
#undef TORCHCONV_CONV_PACK

}  // namespace torchconv::cpu
