// Batch normalisation backward. With g, dy times the activation's derivative, and d = x - shift: a
// first pass sums g and g * d, a second makes dx of g, d and these sums. What the activation was
// applied to is computed again from x, by the forward pass's own operations, or where it is
// constant seen in y where there was a residual; the residual's gradient is g, which the second
// pass then reads.
#include "cpu/batch_norm.h"
#include "cpu/batch_norm_curves.h"
#include "cpu/batch_norm_passes.h"

namespace torchconv::cpu {
namespace {

struct BackwardArguments {
  const void *dy, *x, *y;
  BatchNormWeights weights;
  const double *mean, *invstd;
  bool training;
  BatchNormGradients to;
  const Parallel& pool;
};

template <typename T, typename Curve>
class BatchNormBackward : NormLanes<T> {
  using L = NormLanes<T>;
  using L::kLanes;
  using typename L::Lane;
  using typename L::V;
  using Rows = ConstantRows<Lane>;

 public:
  static constexpr int kConstants = 5;  // shift, scale, offset; slope and constant of dx
  static constexpr bool kTwice = false;
  // A curve's own constants leave fewer registers.
  static constexpr int kVectors = std::is_same_v<Curve, ClampCurve<Lane>> ? 8 : 4;

  BatchNormBackward(const BatchNormProblem& p, const BackwardArguments& a)
      : p_(p),
        a_(a),
        dy_(static_cast<const T*>(a.dy)),
        x_(static_cast<const T*>(a.x)),
        y_(static_cast<const T*>(a.y)),
        g_(static_cast<T*>(a.to.dresidual)),
        dx_(static_cast<T*>(a.to.dx)),
        curve_(Curve::at(p.activation, unrounded_bounds(p))),
        second_curve_(g_ == nullptr
                          ? curve_
                          : Curve::at(Activation::kNone, activation_bounds(Activation::kNone))) {
    const int64_t row = runs_as_pixels(p) ? p.C : p.H * p.W;
    streams_ = dx_ != nullptr && L::W::streams(dx_, p.N * p.C * p.H * p.W, row);
  }

  void run() const { NormPasses<T, BatchNormBackward>(p_, a_.pool, *this).run(); }

  int reads() const { return 2; }
  bool writes() const { return dx_ != nullptr; }
  bool streams() const { return streams_; }

  void prepare(Channels c, Rows constants) const {
    const Affine affine = affine_of(p_, c, statistics(c), a_.weights);
    L::put(constants.row(0), c.count, affine.shift);
    L::put(constants.row(1), c.count, affine.scale);
    L::put(constants.row(2), c.count, affine.offset);
  }

  // What a loop reads and writes, by value: a store might else have changed what a member says.
  struct Source {
    const T *x, *dy, *y;
    T* g;
    Curve curve;
    V shift, scale, offset;

    int arrays() const { return 2 + (y != nullptr ? 1 : 0) + (g != nullptr ? 1 : 0); }
    template <typename Constants>
    TORCHCONV_INLINE void take(const Constants& constants) {
      shift = constants[0];
      scale = constants[1];
      offset = constants[2];
    }
    void prefetch(int64_t at) const {
      __builtin_prefetch(x + at);
      __builtin_prefetch(dy + at);
      if (y != nullptr) __builtin_prefetch(y + at);
    }
    // Past n lanes dy is loaded as zero.
    template <bool kPartial>
    TORCHCONV_INLINE Terms<V> terms(int64_t at, int64_t n) const {
      const V d = L::template load<kPartial>(x + at, n) - shift;
      const V z = y != nullptr ? L::template load<kPartial>(y + at, n) : d * scale + offset;
      const V gradient_of_z = curve.gradient(L::template load<kPartial>(dy + at, n), z);
      if (g != nullptr) L::template store<kPartial>(g + at, gradient_of_z, n, false);
      return {gradient_of_z, d};
    }
  };
  Source source() const { return {x_, dy_, y_, g_, curve_, V{}, V{}, V{}}; }

  void finish(Channels c, Rows constants, const double* sums, int64_t width) const {
    const Statistics s = statistics(c);
    const Affine affine = affine_of(p_, c, s, a_.weights);
    const InputGradient by =
        channel_gradients(p_, c, s, affine, sums, sums + width, a_.training, a_.to);
    L::put(constants.row(3), c.count, by.slope);
    L::put(constants.row(4), c.count, by.constant);
  }

  struct Target {
    const T* x;
    const T* dy;
    T* dx;
    Curve curve;
    V shift, scale, offset, slope, constant;
    bool training, streams;

    int arrays() const { return 3; }
    template <typename Constants>
    TORCHCONV_INLINE void take(const Constants& constants) {
      shift = constants[0];
      scale = constants[1];
      offset = constants[2];
      slope = constants[3];
      constant = constants[4];
    }
    template <bool kPartial>
    TORCHCONV_INLINE void write(int64_t at, int64_t n) const {
      const V d = L::template load<kPartial>(x + at, n) - shift;
      const V z = d * scale + offset;
      V g = curve.gradient(L::template load<kPartial>(dy + at, n), z) * scale;
      if (training) g += d * slope + constant;
      L::template store<kPartial>(dx + at, g, n, streams);
    }
  };
  Target target() const {
    const T* const g = g_ != nullptr ? g_ : dy_;
    return {x_, g, dx_, second_curve_, V{}, V{}, V{}, V{}, V{}, a_.training, streams_};
  }

 private:
  Statistics statistics(Channels c) const {
    Statistics s{};
    std::copy_n(a_.mean + c.first, c.count, s.mean.of);
    std::copy_n(a_.invstd + c.first, c.count, s.invstd.of);
    return s;
  }

  const BatchNormProblem& p_;
  const BackwardArguments& a_;
  const T* dy_;
  const T* x_;
  const T* y_;
  T* g_;
  T* dx_;
  Curve curve_, second_curve_;
  bool streams_;
};

}  // namespace

void batch_norm_backward(const BatchNormProblem& p, const void* dy, const void* x, const void* y,
                         BatchNormWeights weights, const double* mean, const double* invstd,
                         bool training, BatchNormGradients to, const Parallel& pool) {
  run_kernel<BatchNormBackward>(
      p, BackwardArguments{dy, x, y, weights, mean, invstd, training, to, pool});
}

}  // namespace torchconv::cpu
