// The im2col matrix of few outputs is small beside weights that each of them meets once. With a row
// for each output, these are a matrix product's other operand as they lie: nothing is packed, where
// products in place take the weights apart for a few pixels.
//
// A row is made of pieces of image rows, as long as the kernel is wide.
#include "cpu/sample_patches.h"

#include <algorithm>

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Where `follows`, what is written behind the piece is overwritten later.
template <typename T>
TORCHCONV_INLINE void copy_piece(T* to, const T* from, int64_t n, bool follows) {
  using V = Vec<T>;
  for (; n > V::kLanes; n -= V::kLanes, from += V::kLanes, to += V::kLanes)
    V::store(to, V::load(from));
  const auto last = V::load_partial(from, n);
  if (follows)
    V::store(to, last);
  else
    V::store_partial(to, last, n);
}

// From a plane to the one whose pieces are asked for: what memory takes to answer. Small planes are
// read with gaps that the hardware does not foresee.
constexpr int64_t kPlanesAhead = 4;

// A plane at a time.
template <typename T>
void unfold_planes(const ConvProblem& p, const T* x, T* samples, const Parallel& pool) {
  const int64_t kernel = p.R * p.S, depth = p.C * kernel;
  const WorkSplit split(p.N * p.C, 4.0 * static_cast<double>(p.P * p.Q * kernel));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.C, c = item % p.C;
      // Vectors longer than what the next channel writes would reach a thread's neighbour.
      const bool follows = c + 1 < p.C && item + 1 < end && kernel >= Vec<T>::kLanes;
      T* to = samples + n * p.P * p.Q * depth + c * kernel;
      for (int64_t i = 0; i < p.P; ++i) {
        const T* const row = x + (item * p.H + i * p.stride_h) * p.W;
        for (int64_t j = 0; j < p.Q; ++j, to += depth)
          for (int64_t r = 0; r < p.R; ++r) {
            const T* const from = row + r * p.dilation_h * p.W + j * p.stride_w;
            __builtin_prefetch(from + kPlanesAhead * p.H * p.W, 0, 3);
            copy_piece(to + r * p.S, from, p.S,
                       follows || (r + 1) * p.S + Vec<T>::kLanes <= kernel);
          }
      }
    }
  });
}

// An output at a time: a row of its patch is one piece.
template <typename T>
void unfold_pixels(const ConvProblem& p, const T* x, T* samples, const Parallel& pool) {
  const int64_t length = p.S * p.C, row = p.W * p.C;
  const WorkSplit split(p.N * p.P * p.Q, 4.0 * static_cast<double>(p.R * length));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    T* to = samples + begin * p.R * length;
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t n = sample / (p.P * p.Q), i = sample / p.Q % p.P, j = sample % p.Q;
      const T* const from = x + (n * p.H + i * p.stride_h) * row + j * p.stride_w * p.C;
      for (int64_t r = 0; r < p.R; ++r, to += length)
        copy_piece(to, from + r * p.dilation_h * row, length, false);
    }
  });
}

}  // namespace

bool sample_patches_apply(const ConvProblem& p) {
  const auto inside = [](int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                         int64_t outputs, int64_t size) {
    return pad == 0 && outputs > 0 && (outputs - 1) * stride + (taps - 1) * dilation < size;
  };
  return p.N > 0 && p.C > 0 && p.K > 0 && p.groups == 1 && p.layout == p.weight_layout && !p.flip &&
         (p.dilation_w == 1 || p.S == 1) &&
         inside(p.R, p.stride_h, p.pad_top, p.dilation_h, p.P, p.H) &&
         inside(p.S, p.stride_w, p.pad_left, p.dilation_w, p.Q, p.W);
}

ConvProblem sample_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.N = p.N * p.P * p.Q;
  q.C = p.C * p.R * p.S;
  q.H = q.W = q.P = q.Q = 1;
  q.R = q.S = q.stride_h = q.stride_w = q.dilation_h = q.dilation_w = 1;
  q.layout = q.weight_layout = Layout::kNCHW;
  return q;
}

template <typename T>
void unfold_samples(const ConvProblem& p, const T* x, T* samples, const Parallel& pool) {
  if (p.layout == Layout::kNCHW)
    unfold_planes(p, x, samples, pool);
  else
    unfold_pixels(p, x, samples, pool);
}

template void unfold_samples(const ConvProblem&, const float*, float*, const Parallel&);
template void unfold_samples(const ConvProblem&, const double*, double*, const Parallel&);

}  // namespace torchconv::cpu
