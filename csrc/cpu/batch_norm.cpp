// Batch normalisation forward. The first pass sums x - shift and its squares, where shift is the
// mean of a few elements; the second writes the output. A few of these are added up in the
// elements' own type before they go to double, which is as good where the shift is near the mean;
// where it turns out not to be, they are taken again, about the mean and all of them in double.
#include "cpu/batch_norm.h"

#include <cmath>

#include "cpu/batch_norm_curves.h"
#include "cpu/batch_norm_passes.h"

namespace torchconv::cpu {
namespace {

struct ForwardArguments {
  const void *x, *residual;
  void* y;
  BatchNormWeights weights;
  double eps;
  // Where there are given statistics the rest does not count.
  const void *given_mean, *given_var;
  RunningStatistics running;
  double *mean, *invstd;
  const Parallel& pool;
};

template <typename T, typename Curve>
class BatchNormForward : NormLanes<T> {
  using L = NormLanes<T>;
  using L::kLanes;
  using typename L::Lane;
  using typename L::V;
  using Rows = ConstantRows<Lane>;

 public:
  static constexpr int kConstants = 3;  // shift, scale, offset
  static constexpr bool kTwice = true;
  static constexpr int kVectors = 8;

  BatchNormForward(const BatchNormProblem& p, const ForwardArguments& a)
      : p_(p),
        a_(a),
        x_(static_cast<const T*>(a.x)),
        residual_(static_cast<const T*>(a.residual)),
        y_(static_cast<T*>(a.y)),
        curve_(Curve::at(p.activation, activation_bounds(p.activation))) {
    const int64_t plane = p.H * p.W, elements = p.N * plane;
    const bool pixels = runs_as_pixels(p);
    streams_ = L::W::streams(y_, elements * p.C, pixels ? p.C : plane);
    channel_ = pixels ? 1 : plane;
    for (int64_t k = 0; k < kSamples; ++k) {
      const int64_t i = (k * kSteps + (k + 1) * kStride % kSteps) * elements / (kSamples * kSteps);
      samples_[k] = pixels ? i * p.C : i / plane * p.C * plane + i % plane;
    }
  }

  void run() const { NormPasses<T, BatchNormForward>(p_, a_.pool, *this).run(); }

  int reads() const { return a_.given_mean == nullptr ? 1 : 0; }
  bool writes() const { return true; }
  bool streams() const { return streams_; }

  void prepare(Channels c, Rows constants) const {
    if (reads() == 0) return;
    for (int64_t i = 0; i < c.count; ++i) {
      Lane sum = 0;
      for (const int64_t at : samples_) sum += to_wide(x_[at + (c.first + i) * channel_]);
      constants.first[i] = finite(sum / kSamples);
    }
  }

  struct Source {
    const T* x;
    V shift;

    int arrays() const { return 1; }
    template <typename Constants>
    TORCHCONV_INLINE void take(const Constants& constants) {
      shift = constants[0];
    }
    void prefetch(int64_t at) const { __builtin_prefetch(x + at); }
    template <bool kPartial>
    TORCHCONV_INLINE Terms<V> terms(int64_t at, int64_t n) const {
      V v = L::template load<kPartial>(x + at, n);
      if (kPartial) v = L::first(v, n, shift);
      return {v - shift, v - shift};
    }
  };
  Source source() const { return {x_, V{}}; }

  bool accepts(Channels c, Rows constants, const double* sums, int64_t width) const {
    const Moments m = moments(c, constants, sums, width);
    if (near_enough(p_, c, m)) return true;
    const double n = static_cast<double>(p_.N * p_.H * p_.W);
    for (int64_t i = 0; i < c.count; ++i)
      constants.first[i] = finite(static_cast<Lane>(m.shift[i] + m.sum[i] / n));
    return false;
  }

  void finish(Channels c, Rows constants, const double* sums, int64_t width) const {
    Statistics s;
    if (reads() == 0) {
      s = given_statistics(p_, c, a_.given_mean, a_.given_var, a_.eps);
    } else {
      s = batch_statistics(p_, c, moments(c, constants, sums, width), a_.running, a_.eps);
      std::copy_n(s.mean.of, c.count, a_.mean + c.first);
      std::copy_n(s.invstd.of, c.count, a_.invstd + c.first);
    }
    const Affine affine = affine_of(p_, c, s, a_.weights);
    L::put(constants.row(0), c.count, affine.shift);
    L::put(constants.row(1), c.count, affine.scale);
    L::put(constants.row(2), c.count, affine.offset);
  }

  // By value, in registers: a store might else have changed what a member says.
  struct Target {
    const T* x;
    const T* residual;
    T* y;
    Curve curve;
    V shift, scale, offset;
    bool streams;

    int arrays() const { return residual == nullptr ? 2 : 3; }
    template <typename Constants>
    TORCHCONV_INLINE void take(const Constants& constants) {
      shift = constants[0];
      scale = constants[1];
      offset = constants[2];
    }
    template <bool kPartial>
    TORCHCONV_INLINE void write(int64_t at, int64_t n) const {
      V v = (L::template load<kPartial>(x + at, n) - shift) * scale + offset;
      if (residual != nullptr) v += L::template load<kPartial>(residual + at, n);
      L::template store<kPartial>(y + at, curve.value(v), n, streams);
    }
  };

  Target target() const { return {x_, residual_, y_, curve_, V{}, V{}, V{}, streams_}; }

 private:
  // Spread over all images, and there by the golden ratio over rows and columns: an image's first
  // elements, or those at its edges, may be of another kind.
  static constexpr int64_t kSamples = 8, kSteps = 55, kStride = 34;

  static Lane finite(Lane value) { return std::isfinite(value) ? value : 0; }

  Moments moments(Channels c, Rows constants, const double* sums, int64_t width) const {
    Moments m{};
    std::copy_n(constants.first, c.count, m.shift.of);
    std::copy_n(sums, c.count, m.sum.of);
    std::copy_n(sums + width, c.count, m.squares.of);
    return m;
  }

  const BatchNormProblem& p_;
  const ForwardArguments& a_;
  const T* x_;
  const T* residual_;
  T* y_;
  Curve curve_;
  bool streams_;
  int64_t channel_;  // from one to the next
  int64_t samples_[kSamples];
};

}  // namespace

void batch_norm_training(const BatchNormProblem& p, const void* x, const void* residual,
                         BatchNormWeights weights, RunningStatistics running, double eps, void* y,
                         double* mean, double* invstd, const Parallel& pool) {
  run_kernel<BatchNormForward>(p, ForwardArguments{x, residual, y, weights, eps, nullptr, nullptr,
                                                   running, mean, invstd, pool});
}

void batch_norm_inference(const BatchNormProblem& p, const void* x, const void* residual,
                          BatchNormWeights weights, const void* mean, const void* var, double eps,
                          void* y, const Parallel& pool) {
  run_kernel<BatchNormForward>(
      p, ForwardArguments{x, residual, y, weights, eps, mean, var, {}, nullptr, nullptr, pool});
}

}  // namespace torchconv::cpu
