// Batch normalisation forward. A channel's planes are read for its moments and then, from a cache
// if they fit, for the output; channels_last reads all pixels before it knows a mean. The second
// pass goes backwards: it begins with what was read last.
#include "cpu/batch_norm.h"

#include <cmath>

#include "cpu/batch_norm_lanes.h"

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

template <typename T>
class BatchNormForward : NormLanes<T> {
  using L = NormLanes<T>;
  using L::kLanes;
  using typename L::Lane;
  using typename L::Lanes;
  using typename L::Sum;
  using typename L::V;
  static constexpr int kConstants = 3;  // shift, scale, offset
  // Double has no wider type for its sums: a second pass takes them about the mean of the first.
  static constexpr int kPasses = std::is_same_v<T, double> ? 2 : 1;

 public:
  BatchNormForward(const BatchNormProblem& p, const ForwardArguments& a)
      : p_(p),
        a_(a),
        x_(static_cast<const T*>(a.x)),
        residual_(static_cast<const T*>(a.residual)),
        y_(static_cast<T*>(a.y)),
        bounds_(activation_bounds(p.activation)) {
    const bool pixels = runs_as_pixels(p);
    streams_ = L::W::streams(y_, p.N * p.C * p.H * p.W, pixels ? p.C : p.H * p.W);
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
    const double operations = kNormOperations * static_cast<double>(p_.N * plane);
    parallel_for(a_.pool, 0, p_.C, work_grain(operations), [&](int64_t begin, int64_t end) {
      alignas(kVectorBytes) Lane constants[kConstants * kLanes];
      for (int64_t c = begin; c < end; ++c) {
        const Affine affine = channel(c, [&] { return plane_moments(c, plane, image); });
        L::fill(constants, {affine.shift, affine.scale, affine.offset});
        const int64_t last = (p_.N - 1) * image + c * plane;
        normalize(last, {p_.N, plane, -image}, constants, kLanes, 0);
      }
      if (streams_) stream_fence();
    });
  }

  void run_pixels() const {
    const PixelBlocks blocks(p_);
    const int64_t width = round_up(p_.C, kLanes);
    const Buffer<Lane> constants(kConstants * width);
    const Buffer<double> moments(3 * width);
    std::fill_n(constants.get(), kConstants * width, Lane{0});
    if (a_.given_mean == nullptr) pixel_moments(blocks, width, constants.get(), moments.get());
    over_channels(blocks, [&](int64_t c) {
      const double* m = moments.get() + c;
      const Affine affine = channel(c, [&] { return Moments{m[0], m[width], m[2 * width]}; });
      L::put(constants.get(), width, c, {affine.shift, affine.scale, affine.offset});
    });
    parallel_for(a_.pool, 0, blocks.count, block_grain(blocks), [&](int64_t begin, int64_t end) {
      for (int64_t b = end - 1; b >= begin; --b)
        normalize(blocks.offset(b), blocks.runs(b), constants.get(), width, 1);
      if (streams_) stream_fence();
    });
  }

  // moments: of a batch whose statistics are not given.
  template <typename F>
  Affine channel(int64_t c, F&& moments) const {
    if (a_.given_mean != nullptr) {
      const auto given = given_statistics(p_, c, a_.given_mean, a_.given_var, a_.eps);
      return affine_of(p_, c, given, a_.weights);
    }
    const Statistics s = batch_statistics(p_, c, moments(), a_.running, a_.eps);
    a_.mean[c] = s.mean, a_.invstd[c] = s.invstd;
    return affine_of(p_, c, s, a_.weights);
  }

  // An element of the channel, about which its sums are taken.
  static Lane finite(T element) {
    const Lane value = to_wide(element);
    return std::isfinite(value) ? value : 0;
  }

  Moments plane_moments(int64_t c, int64_t plane, int64_t image) const {
    const T* x = x_ + c * plane;
    Moments m{finite(*x), 0, 0};
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pass > 0) m.shift += m.sum / static_cast<double>(p_.N * plane);
      alignas(kVectorBytes) Lane shift[kLanes];
      alignas(kVectorBytes) double sums[2 * kLanes] = {};
      L::fill(shift, {m.shift});
      add_moments(x, {p_.N, plane, image}, shift, sums, kLanes, planes_ahead(p_));
      m.sum = L::total(sums), m.squares = L::total(sums + kLanes);
    }
    return m;
  }

  // moments: shifts, sums and sums of squares, `width` each. shifts: room for as many.
  void pixel_moments(const PixelBlocks& blocks, int64_t width, Lane* shifts,
                     double* moments) const {
    const Buffer<double> sums(blocks.count * 2 * width);
    for (int64_t c = 0; c < p_.C; ++c) moments[c] = finite(x_[c]);
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int64_t c = 0; c < p_.C; ++c) {
        if (pass > 0) moments[c] += moments[width + c] / static_cast<double>(blocks.pixels);
        shifts[c] = static_cast<Lane>(moments[c]);
      }
      parallel_for(a_.pool, 0, blocks.count, block_grain(blocks), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          add_pixels(x_ + blocks.offset(b), blocks.runs(b).count, width, shifts,
                     sums.get() + b * 2 * width);
      });
      parallel_for(a_.pool, 0, 2 * width, channel_grain(blocks), [&](int64_t begin, int64_t end) {
        add_blocks(blocks, 2 * width, sums.get(), begin, end, moments + width);
      });
    }
  }

  void add_pixels(const T* x, int64_t count, int64_t width, const Lane* shifts,
                  double* sums) const {
    std::fill_n(sums, 2 * width, 0.0);
    for (int64_t r = 0; r < count; r += kPixelRows, x += kPixelRows * p_.C) {
      const int64_t rows = std::min(kPixelRows, count - r);
      for (int64_t c = 0; c < p_.C; c += kLanes)
        add_moments(x + c, {rows, std::min<int64_t>(kLanes, p_.C - c), p_.C}, shifts + c, sums + c,
                    width, kPixelRows * p_.C);
    }
  }

  // The sums of x - shift, and `width` after them those of its squares, by lanes.
  static void add_moments(const T* x, Runs runs, const Lane* shift, double* sums, int64_t width,
                          int64_t ahead) {
    const V around = Lanes::load(shift);
    const Sum wide_shift = L::widen(around);
    Sum sum = Sum::load(sums), squares = Sum::load(sums + width);
    const auto add = [&](V v) {
      const Sum wide = L::widen(v);
#pragma GCC unroll 2
      for (int k = 0; k < L::kParts; ++k) {
        const auto d = wide.part[k] - wide_shift.part[k];
        sum.part[k] += d;
        squares.part[k] += d * d;
      }
    };
    for (int64_t r = 0; r < runs.count; ++r, x += runs.pitch) {
      int64_t i = 0;
      for (; i + kLanes <= runs.length; i += kLanes) {
        __builtin_prefetch(x + i + ahead);
        add(L::W::load(x + i));
      }
      const int64_t rest = runs.length - i;
      if (rest > 0) add(L::first(L::W::load_partial(x + i, rest), rest, around));
    }
    sum.store(sums);
    squares.store(sums + width);
  }

  void normalize(int64_t offset, Runs runs, const Lane* constants, int64_t width,
                 int64_t step) const {
    const Output to{x_,    residual_, y_, L::broadcast(bounds_.low), L::broadcast(bounds_.high),
                    width, streams_};
    for (int64_t r = 0; r < runs.count; ++r, offset += runs.pitch) {
      int64_t i = 0;
      for (; i + kLanes <= runs.length; i += kLanes)
        to.template write<false>(offset + i, kLanes, constants + i * step);
      if (i < runs.length)
        to.template write<true>(offset + i, runs.length - i, constants + i * step);
    }
  }

  // By value, in registers: a store might else have changed what a member says.
  struct Output {
    const T* x;
    const T* residual;
    T* y;
    V low, high;
    int64_t width;
    bool streams;

    template <bool kPartial>
    TORCHCONV_INLINE void write(int64_t at, int64_t n, const Lane* constants) const {
      V v = L::template load<kPartial>(x + at, n) - Lanes::load(constants);
      v = v * Lanes::load(constants + width) + Lanes::load(constants + 2 * width);
      if (residual != nullptr) v += L::template load<kPartial>(residual + at, n);
      v = v < low ? low : v;
      v = v > high ? high : v;
      L::template store<kPartial>(y + at, v, n, streams);
    }
  };

  template <typename F>
  void over_channels(const PixelBlocks& blocks, const F& f) const {
    parallel_for(a_.pool, 0, p_.C, channel_grain(blocks), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c);
    });
  }

  int64_t block_grain(const PixelBlocks& blocks) const {
    return work_grain(kNormOperations * static_cast<double>(blocks.size * p_.C));
  }

  const BatchNormProblem& p_;
  const ForwardArguments& a_;
  const T* x_;
  const T* residual_;
  T* y_;
  Bounds bounds_;
  bool streams_;
};

}  // namespace

void batch_norm_training(const BatchNormProblem& p, const void* x, const void* residual,
                         BatchNormWeights weights, RunningStatistics running, double eps, void* y,
                         double* mean, double* invstd, const Parallel& pool) {
  run_typed<BatchNormForward>(p, ForwardArguments{x, residual, y, weights, eps, nullptr, nullptr,
                                                  running, mean, invstd, pool});
}

void batch_norm_inference(const BatchNormProblem& p, const void* x, const void* residual,
                          BatchNormWeights weights, const void* mean, const void* var, double eps,
                          void* y, const Parallel& pool) {
  run_typed<BatchNormForward>(
      p, ForwardArguments{x, residual, y, weights, eps, mean, var, {}, nullptr, nullptr, pool});
}

}  // namespace torchconv::cpu
