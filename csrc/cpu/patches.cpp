// Where the stride is the size of the kernel and nothing is padded, as in the patch embeddings of
// vision transformers (Dosovitskiy et al., arXiv 2010.11929) and the downsampling of ConvNeXt
// (arXiv 2201.03545), every pixel belongs to one patch and one tap. So the im2col matrix of an NCHW
// image is no larger than the image: its rows with each tap's columns side by side ("space to
// depth", Shi et al., arXiv 1609.05158). Whole planes of it make a plain matrix product, where
// taps read one by one would take strided columns of the image apart over and over, and where
// dgrad would write every S-th column of dx, once for each tap.
//
// A row of the image is a matrix of patches by columns of the kernel, which is transposed: in
// registers by taking even from odd lanes for the usual small kernels. A 1x1 kernel with a stride,
// the projection shortcut of residual networks (He et al., arXiv 1512.03385), has patches of one
// pixel with gaps between them: what they leave of the image is copied once, row after row, where
// the product would read a few pixels of every channel's plane at a time, and dx is written with
// its zeros at once.
#include "cpu/patches.h"

#include <algorithm>
#include <utility>

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

template <typename T>
using Lanes = std::make_integer_sequence<int, Vec<T>::kLanes>;

// The first (kFirst = 0) or last halves of two vectors, lane by lane in turn.
template <int kFirst, typename Type, int... I>
TORCHCONV_INLINE Type merge_lanes(Type a, Type b, std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  return shuffle<(I / 2 + I % 2 * kN + kFirst * kN / 2)...>(a, b);
}

// Vector v of those that hold the first n elements at p.
template <typename T>
TORCHCONV_INLINE typename Vec<T>::Type load_some(const T* p, int v, int64_t n) {
  constexpr int64_t kL = Vec<T>::kLanes;
  if (n >= (v + 1) * kL) return Vec<T>::load(p + v * kL);
  return n > v * kL ? Vec<T>::load_partial(p + v * kL, n - v * kL) : typename Vec<T>::Type{};
}
template <typename T>
TORCHCONV_INLINE void store_some(T* p, int v, typename Vec<T>::Type x, int64_t n) {
  constexpr int64_t kL = Vec<T>::kLanes;
  if (n >= (v + 1) * kL)
    Vec<T>::store(p + v * kL, x);
  else if (n > v * kL)
    Vec<T>::store_partial(p + v * kL, x, n - v * kL);
}

// columns[s*step + j] = row[j*kS + s] for j < count and s < kS, which is 2 or 4.
template <int kS, typename T>
void split_columns(const T* row, int64_t count, T* columns, int64_t step) {
  using V = Vec<T>;
  constexpr auto kAll = Lanes<T>();
  for (; count > 0; count -= V::kLanes, row += kS * V::kLanes, columns += V::kLanes) {
    typename V::Type even[kS / 2], odd[kS / 2];
#pragma GCC unroll 2
    for (int i = 0; i < kS / 2; ++i) {
      const auto a = load_some(row, 2 * i, kS * count), b = load_some(row, 2 * i + 1, kS * count);
      even[i] = alternate_lanes<0>(a, b, kAll);
      odd[i] = alternate_lanes<1>(a, b, kAll);
    }
    if constexpr (kS == 2) {
      store_some(columns, 0, even[0], count);
      store_some(columns + step, 0, odd[0], count);
    } else {
      store_some(columns, 0, alternate_lanes<0>(even[0], even[1], kAll), count);
      store_some(columns + step, 0, alternate_lanes<0>(odd[0], odd[1], kAll), count);
      store_some(columns + 2 * step, 0, alternate_lanes<1>(even[0], even[1], kAll), count);
      store_some(columns + 3 * step, 0, alternate_lanes<1>(odd[0], odd[1], kAll), count);
    }
  }
}

// The way back.
template <int kS, typename T>
void merge_columns(const T* columns, int64_t step, int64_t count, T* row) {
  using V = Vec<T>;
  constexpr auto kAll = Lanes<T>();
  for (; count > 0; count -= V::kLanes, row += kS * V::kLanes, columns += V::kLanes) {
    typename V::Type even[kS / 2], odd[kS / 2];
    if constexpr (kS == 2) {
      even[0] = load_some(columns, 0, count);
      odd[0] = load_some(columns + step, 0, count);
    } else {
      const auto a = load_some(columns, 0, count), c = load_some(columns + 2 * step, 0, count);
      const auto b = load_some(columns + step, 0, count);
      const auto d = load_some(columns + 3 * step, 0, count);
      even[0] = merge_lanes<0>(a, c, kAll), even[1] = merge_lanes<1>(a, c, kAll);
      odd[0] = merge_lanes<0>(b, d, kAll), odd[1] = merge_lanes<1>(b, d, kAll);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kS / 2; ++i) {
      store_some(row, 2 * i, merge_lanes<0>(even[i], odd[i], kAll), kS * count);
      store_some(row, 2 * i + 1, merge_lanes<1>(even[i], odd[i], kAll), kS * count);
    }
  }
}

// columns[j] = row[j*step] for j < count.
template <typename T>
void take_columns(const T* row, int64_t step, int64_t count, T* columns) {
  constexpr int64_t kL = Vec<T>::kLanes;
  for (int64_t j = 0; j < count; j += kL) {
    const int64_t n = std::min(kL, count - j);
    const auto lanes = load_lanes_strided(row + j * step, step, 0, n, j + kL < count);
    store_some(columns + j, 0, lanes, n);
  }
}

// The way back: a row of `width` elements, zero between and behind the columns.
template <typename T>
void spread_columns(const T* columns, int64_t step, int64_t count, int64_t width, T* row) {
  using V = Vec<T>;
  constexpr auto kAll = Lanes<T>();
  if (step != 2) {
    fill_zero(row, width);
    for (int64_t j = 0; j < count; ++j) row[j * step] = columns[j];
    return;
  }
  for (; width > 0; count -= V::kLanes, width -= 2 * V::kLanes, columns += V::kLanes) {
    const auto lanes = load_some(columns, 0, count), zero = typename V::Type{};
    store_some(row, 0, merge_lanes<0>(lanes, zero, kAll), width);
    store_some(row, 1, merge_lanes<1>(lanes, zero, kAll), width);
    row += 2 * V::kLanes;
  }
}

// f(n*C + c, i) for every row of patches of every channel. A thread has the pixels that it will
// multiply, or has multiplied: those of some rows, with all of their channels. Few are dealt out
// too: to move them takes several times as long where another core has had them.
template <typename F>
void for_patch_rows(const ConvProblem& p, const Parallel& pool, F&& f) {
  const WorkSplit split(p.N * p.P, 16.0 * static_cast<double>(p.C * p.R * p.W));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / p.P, first = row % p.P, last = std::min(first + end - row, p.P);
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t i = first; i < last; ++i) f(n * p.C + c, i);
      row += last - first;
    }
  });
}

// M is T, or the bits of a two-byte T.
template <typename M>
void fold(const ConvProblem& p, const M* patches, M* x, const Parallel& pool) {
  const int64_t plane = p.P * p.Q, left = p.W - p.Q * p.S;
  for_patch_rows(p, pool, [&](int64_t image, int64_t i) {
    if (p.R * p.S == 1) {
      const int64_t h = i * p.stride_h, next = i + 1 == p.P ? p.H : h + p.stride_h;
      M* row = x + (image * p.H + h) * p.W;
      spread_columns(patches + image * plane + i * p.Q, p.stride_w, p.Q, p.W, row);
      return fill_zero(row + p.W, (next - h - 1) * p.W);
    }
    for (int64_t r = 0; r < p.R; ++r) {
      const M* columns = patches + (image * p.R + r) * p.S * plane + i * p.Q;
      M* row = x + (image * p.H + i * p.R + r) * p.W;
      if (p.S == 2)
        merge_columns<2>(columns, plane, p.Q, row);
      else if (p.S == 4)
        merge_columns<4>(columns, plane, p.Q, row);
      else if constexpr (sizeof(M) > 2)
        pack_transposed(columns, plane, p.S, p.Q, row, p.S);
      else
        for (int64_t j = 0; j < p.Q; ++j)
          for (int64_t s = 0; s < p.S; ++s) row[j * p.S + s] = columns[s * plane + j];
      fill_zero(row + p.Q * p.S, left);
    }
    if (i + 1 == p.P) fill_zero(x + (image * p.H + p.P * p.R) * p.W, (p.H - p.P * p.R) * p.W);
  });
}

}  // namespace

bool patches_apply(const ConvProblem& p) {
  const auto side_by_side = [](int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                               int64_t outputs, int64_t size) {
    return pad == 0 && (taps == 1 || dilation == 1) && outputs > 0 &&
           (stride == taps || outputs == 1) && outputs * taps <= size;
  };
  const auto apart = [](int64_t stride, int64_t pad, int64_t outputs, int64_t size) {
    return pad == 0 && outputs > 0 && stride <= size && (outputs - 1) * stride < size;
  };
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.layout != Layout::kNCHW ||
      p.weight_layout != Layout::kNCHW || p.groups != 1 || p.flip)
    return false;
  if (p.R * p.S == 1)
    return std::max(p.stride_h, p.stride_w) > 1 && apart(p.stride_h, p.pad_top, p.P, p.H) &&
           apart(p.stride_w, p.pad_left, p.Q, p.W);
  return side_by_side(p.R, p.stride_h, p.pad_top, p.dilation_h, p.P, p.H) &&
         side_by_side(p.S, p.stride_w, p.pad_left, p.dilation_w, p.Q, p.W);
}

ConvProblem patch_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.C = p.C * p.R * p.S;
  q.H = p.P;
  q.W = p.Q;
  q.R = q.S = q.stride_h = q.stride_w = q.dilation_h = q.dilation_w = 1;
  q.pad_top = q.pad_left = 0;
  return q;
}

template <typename T>
void unfold_patches(const ConvProblem& p, const T* x, T* patches, const Parallel& pool) {
  const int64_t plane = p.P * p.Q;
  for_patch_rows(p, pool, [&](int64_t image, int64_t i) {
    if (p.R * p.S == 1)
      return take_columns(x + (image * p.H + i * p.stride_h) * p.W, p.stride_w, p.Q,
                          patches + image * plane + i * p.Q);
    for (int64_t r = 0; r < p.R; ++r) {
      const T* row = x + (image * p.H + i * p.R + r) * p.W;
      T* columns = patches + (image * p.R + r) * p.S * plane + i * p.Q;
      if (p.S == 2)
        split_columns<2>(row, p.Q, columns, plane);
      else if (p.S == 4)
        split_columns<4>(row, p.Q, columns, plane);
      else
        pack_transposed(row, p.S, p.Q, p.S, columns, plane);
    }
  });
}

template <typename T>
void fold_patches(const ConvProblem& p, const T* patches, T* x, const Parallel& pool) {
  using M = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  fold(p, reinterpret_cast<const M*>(patches), reinterpret_cast<M*>(x), pool);
}

template void unfold_patches(const ConvProblem&, const float*, float*, const Parallel&);
template void unfold_patches(const ConvProblem&, const double*, double*, const Parallel&);
template void fold_patches(const ConvProblem&, const float*, float*, const Parallel&);
template void fold_patches(const ConvProblem&, const double*, double*, const Parallel&);
template void fold_patches(const ConvProblem&, const BFloat16*, BFloat16*, const Parallel&);
template void fold_patches(const ConvProblem&, const Float16*, Float16*, const Parallel&);

}  // namespace torchconv::cpu
