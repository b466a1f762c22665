// Batch normalisation backward. With g, dy where the activation is not constant, and d = x - shift:
// a first pass sums g and g * d, a second makes dx of g, d and these sums. Whether the activation
// is constant is computed again from x, by the forward pass's own operations, or seen in y where
// there was a residual; the residual's gradient is g, which the second pass then reads.
#include "cpu/batch_norm.h"
#include "cpu/batch_norm_lanes.h"

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

template <typename T>
class BatchNormBackward : NormLanes<T> {
  using L = NormLanes<T>;
  using L::kLanes;
  using typename L::Lane;
  using typename L::Lanes;
  using typename L::Sum;
  using typename L::V;
  static constexpr int kConstants = 5;  // shift, scale, offset; slope and constant of dx

 public:
  BatchNormBackward(const BatchNormProblem& p, const BackwardArguments& a)
      : p_(p),
        a_(a),
        dy_(static_cast<const T*>(a.dy)),
        x_(static_cast<const T*>(a.x)),
        y_(static_cast<const T*>(a.y)),
        g_(static_cast<T*>(a.to.dresidual)),
        dx_(static_cast<T*>(a.to.dx)),
        bounds_(unrounded_bounds(p)),
        second_bounds_(g_ == nullptr ? bounds_ : activation_bounds(Activation::kNone)) {
    const int64_t row = runs_as_pixels(p) ? p.C : p.H * p.W;
    streams_ = dx_ != nullptr && L::W::streams(dx_, p.N * p.C * p.H * p.W, row);
  }

  void run() const {
    if (runs_as_pixels(p_)) {
      run_pixels();
    } else {
      run_planes();
    }
  }

 private:
  void run_planes() const {
    const int64_t plane = p_.H * p_.W, image = p_.C * plane;
    const double operations = 2 * kNormOperations * static_cast<double>(p_.N * plane);
    parallel_for(a_.pool, 0, p_.C, work_grain(operations), [&](int64_t begin, int64_t end) {
      alignas(kVectorBytes) Lane constants[kConstants * kLanes];
      for (int64_t c = begin; c < end; ++c) {
        const Affine affine = affine_at(c);
        alignas(kVectorBytes) double sums[2 * kLanes] = {};
        L::fill(constants, {affine.shift, affine.scale, affine.offset});
        add_products(c * plane, {p_.N, plane, image}, constants, kLanes, sums, kLanes,
                     planes_ahead(p_));
        const InputGradient by = gradients(c, affine, L::total(sums), L::total(sums + kLanes));
        L::fill(constants + 3 * kLanes, {by.slope, by.constant});
        const int64_t last = (p_.N - 1) * image + c * plane;
        if (dx_ != nullptr) write_dx(last, {p_.N, plane, -image}, constants, kLanes, 0);
      }
      if (streams_) stream_fence();
    });
  }

  void run_pixels() const {
    const PixelBlocks blocks(p_);
    const int64_t width = round_up(p_.C, kLanes);
    const Buffer<Lane> constants(kConstants * width);
    const Buffer<double> sums(blocks.count * 2 * width);
    std::fill_n(constants.get(), kConstants * width, Lane{0});
    parallel_for(a_.pool, 0, p_.C, channel_grain(blocks), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Affine affine = affine_at(c);
        L::put(constants.get(), width, c, {affine.shift, affine.scale, affine.offset});
      }
    });
    const int64_t grain = work_grain(kNormOperations * static_cast<double>(blocks.size * p_.C));
    parallel_for(a_.pool, 0, blocks.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        add_pixels(blocks.offset(b), blocks.runs(b).count, constants.get(), width,
                   sums.get() + b * 2 * width);
    });
    const Buffer<double> total(2 * width);
    parallel_for(a_.pool, 0, p_.C, channel_grain(blocks), [&](int64_t begin, int64_t end) {
      for (const int64_t at : {int64_t{0}, width})
        add_blocks(blocks, 2 * width, sums.get(), at + begin, at + end, total.get());
      for (int64_t c = begin; c < end; ++c) {
        const InputGradient by = gradients(c, affine_at(c), total[c], total[width + c]);
        L::put(constants.get() + 3 * width, width, c, {by.slope, by.constant});
      }
    });
    if (dx_ == nullptr) return;
    parallel_for(a_.pool, 0, blocks.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = end - 1; b >= begin; --b)
        write_dx(blocks.offset(b), blocks.runs(b), constants.get(), width, 1);
      if (streams_) stream_fence();
    });
  }

  Affine affine_at(int64_t c) const {
    return affine_of(p_, c, {a_.mean[c], a_.invstd[c]}, a_.weights);
  }
  InputGradient gradients(int64_t c, Affine affine, double sum, double products) const {
    return channel_gradients(p_, c, {a_.mean[c], a_.invstd[c]}, affine, sum, products, a_.training,
                             a_.to);
  }

  void add_pixels(int64_t at, int64_t count, const Lane* constants, int64_t width,
                  double* sums) const {
    std::fill_n(sums, 2 * width, 0.0);
    for (int64_t r = 0; r < count; r += kPixelRows, at += kPixelRows * p_.C) {
      const int64_t rows = std::min(kPixelRows, count - r);
      for (int64_t c = 0; c < p_.C; c += kLanes)
        add_products(at + c, {rows, std::min<int64_t>(kLanes, p_.C - c), p_.C}, constants + c,
                     width, sums + c, width, kPixelRows * p_.C);
    }
  }

  // dy, or zero where the activation is constant; for z of NaN it is not.
  static TORCHCONV_INLINE V gradient(V dy, V z, V low, V high) {
    return (z <= low) | (z >= high) ? V{} : dy;
  }

  // The sums of g, and `width` after them those of g * d, by lanes. A few are added up in the type
  // of the lanes before they go to double.
  void add_products(int64_t at, Runs runs, const Lane* constants, int64_t row, double* sums,
                    int64_t width, int64_t ahead) const {
    constexpr int kFew = 16;
    const Input from{x_,
                     dy_,
                     y_,
                     g_,
                     L::broadcast(bounds_.low),
                     L::broadcast(bounds_.high),
                     Lanes::load(constants),
                     Lanes::load(constants + row),
                     Lanes::load(constants + 2 * row)};
    Sum sum = Sum::load(sums), products = Sum::load(sums + width);
    V few{}, few_products{};
    int count = 0;
    const auto widen = [&] {
      const Sum wide = L::widen(few), wide_products = L::widen(few_products);
#pragma GCC unroll 2
      for (int k = 0; k < L::kParts; ++k) {
        sum.part[k] += wide.part[k];
        products.part[k] += wide_products.part[k];
      }
      few = few_products = V{};
      count = 0;
    };
    for (int64_t r = 0; r < runs.count; ++r, at += runs.pitch) {
      int64_t i = 0;
      for (; i + kLanes <= runs.length; i += kLanes) {
        __builtin_prefetch(from.x + at + i + ahead);
        __builtin_prefetch(from.dy + at + i + ahead);
        from.template add<false>(at + i, kLanes, few, few_products);
        if (++count == kFew) widen();
      }
      if (i < runs.length) {
        from.template add<true>(at + i, runs.length - i, few, few_products);
        if (++count == kFew) widen();
      }
    }
    widen();
    sum.store(sums);
    products.store(sums + width);
  }

  // What a loop reads and writes, by value: a store might else have changed what a member says.
  struct Input {
    const T *x, *dy, *y;
    T* g;
    V low, high, shift, scale, offset;

    // Of n lanes; in the others dy is loaded as zero.
    template <bool kPartial>
    TORCHCONV_INLINE void add(int64_t at, int64_t n, V& sum, V& products) const {
      const V d = L::template load<kPartial>(x + at, n) - shift;
      const V z = y != nullptr ? L::template load<kPartial>(y + at, n) : d * scale + offset;
      const V gradient_of_z = gradient(L::template load<kPartial>(dy + at, n), z, low, high);
      if (g != nullptr) L::template store<kPartial>(g + at, gradient_of_z, n, false);
      sum += gradient_of_z;
      products += gradient_of_z * d;
    }
  };

  void write_dx(int64_t at, Runs runs, const Lane* constants, int64_t width, int64_t step) const {
    const Output to{x_,
                    g_ != nullptr ? g_ : dy_,
                    dx_,
                    L::broadcast(second_bounds_.low),
                    L::broadcast(second_bounds_.high),
                    width,
                    a_.training,
                    streams_};
    for (int64_t r = 0; r < runs.count; ++r, at += runs.pitch) {
      int64_t i = 0;
      for (; i + kLanes <= runs.length; i += kLanes)
        to.template write<false>(at + i, kLanes, constants + i * step);
      if (i < runs.length) to.template write<true>(at + i, runs.length - i, constants + i * step);
    }
  }

  struct Output {
    const T* x;
    const T* dy;
    T* dx;
    V low, high;
    int64_t width;
    bool training, streams;

    template <bool kPartial>
    TORCHCONV_INLINE void write(int64_t at, int64_t n, const Lane* constants) const {
      const V scale = Lanes::load(constants + width);
      const V d = L::template load<kPartial>(x + at, n) - Lanes::load(constants);
      const V z = d * scale + Lanes::load(constants + 2 * width);
      V g = gradient(L::template load<kPartial>(dy + at, n), z, low, high) * scale;
      if (training)
        g += d * Lanes::load(constants + 3 * width) + Lanes::load(constants + 4 * width);
      L::template store<kPartial>(dx + at, g, n, streams);
    }
  };

  const BatchNormProblem& p_;
  const BackwardArguments& a_;
  const T* dy_;
  const T* x_;
  const T* y_;
  T* g_;
  T* dx_;
  Bounds bounds_, second_bounds_;
  bool streams_;
};

}  // namespace

void batch_norm_backward(const BatchNormProblem& p, const void* dy, const void* x, const void* y,
                         BatchNormWeights weights, const double* mean, const double* invstd,
                         bool training, BatchNormGradients to, const Parallel& pool) {
  run_typed<BatchNormBackward>(
      p, BackwardArguments{dy, x, y, weights, mean, invstd, training, to, pool});
}

}  // namespace torchconv::cpu
