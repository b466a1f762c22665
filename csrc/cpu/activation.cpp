// Activations, their derivatives and the bias gradient. Written as vectors: of plain loops over
// comparisons the compiler makes masked copies, one for each outcome, divisions included.
#include "cpu/activation.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/activation_math.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// to[i] = f(from[i]), a vector at a time; the two may be the same.
template <typename A, typename F>
TORCHCONV_INLINE void transform(const A* from, A* to, int64_t n, const F& f) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, f(V::load(from + i)));
  if (i < n) V::store_partial(to + i, f(V::load_partial(from + i, n - i)), n - i);
}

// Elements that are converted and multiplied together, and of whole pixels those that are summed
// together: in a first-level cache.
constexpr int64_t kStrip = 256, kPixelStrip = 4096;

// dz of n neighbours in each row, dy * g'(z) from y or from z as derivative_needs_preactivation
// says: into row, and into dz unless that is null. All are dense but dy, whose rows are `pitch`
// apart.
template <typename A>
void multiply_strip(Activation activation, const A* dy, int64_t pitch, const A* saved, A* dz,
                    int64_t rows, int64_t n, A* row) {
  using Math = VectorMath<A>;
  using V = typename Math::V;
  const V zero{};
  const auto run_row = [n](const auto& f, const A* d, const A* z, A* to, A* too) {
    using Lanes = Vec<A>;
    int64_t i = 0;
    for (; i + Lanes::kLanes <= n; i += Lanes::kLanes) {
      const V product = f(Lanes::load(d + i), Lanes::load(z + i));
      Lanes::store(to + i, product);
      if (too != nullptr) Lanes::store(too + i, product);
    }
    if (i == n) return;
    const V product = f(Lanes::load_partial(d + i, n - i), Lanes::load_partial(z + i, n - i));
    Lanes::store_partial(to + i, product, n - i);
    if (too != nullptr) Lanes::store_partial(too + i, product, n - i);
  };
  const auto run = [&](const auto& f) {
    for (int64_t r = 0; r < rows; ++r)
      run_row(f, dy + r * pitch, saved + r * n, row + r * n, dz != nullptr ? dz + r * n : nullptr);
  };
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kReLU:
      return run([&](V d, V y) { return y <= zero ? zero : d; });
    case Activation::kReLU6:
      return run([&](V d, V y) {
        const V below = y >= A{6} ? zero : d;
        return y <= zero ? zero : below;
      });
    case Activation::kSigmoid:
      return run([](V d, V y) { return d * ((A{1} - y) * y); });
    case Activation::kTanh:
      return run([](V d, V y) { return d * (A{1} - y * y); });
    case Activation::kSiLU:
      return run([](V d, V z) { return Math::silu_gradient(d, z); });
    case Activation::kHardswish:
      return run([](V d, V z) { return Math::hardswish_gradient(d, z); });
    case Activation::kGELU:
      return run([](V d, V z) { return d * Math::gelu_derivative(z); });
  }
}

// The same of any type; row has the values before rounding.
template <typename T>
void derivative_strip(Activation activation, const T* dy, const T* saved, T* dz, int64_t n,
                      Wide<T>* row) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (activation != Activation::kNone)
      return multiply_strip(activation, dy, 0, saved, dz, 1, n, row);
    copy_wide(row, dy, n);
  } else {
    copy_wide(row, dy, n);
    if (activation == Activation::kNone) return;
    Wide<T> values[kStrip];
    copy_wide(values, saved, n);
    multiply_strip<Wide<T>>(activation, row, 0, values, nullptr, 1, n, row);
    if (dz != nullptr) copy_narrow(dz, row, n);
  }
}

// The same of any number of rows.
template <typename T>
void derivative_rows(Activation activation, const T* dy, int64_t pitch, const T* saved, T* dz,
                     int64_t rows, int64_t n, Wide<T>* row) {
  if constexpr (std::is_same_v<T, Wide<T>>)
    if (rows > 1) return multiply_strip(activation, dy, pitch, saved, dz, rows, n, row);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t at = r * n + i;
      derivative_strip(activation, dy + r * pitch + i, saved + (saved != nullptr ? at : 0),
                       dz != nullptr ? dz + at : nullptr, std::min(kStrip, n - i), row + at);
    }
}

template <typename A>
A sum_strip(const A* row, int64_t n) {
  A lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) lanes[l] += row[i + l];
  for (; i < n; ++i) lanes[i % 16] += row[i];
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// to[i] += from[i]
template <typename A>
void add_row(A* to, const A* from, int64_t n) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load(to + i) + V::load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// run(g), g of a vector.
template <typename A, typename Run>
TORCHCONV_INLINE void with_activation(Activation activation, const Run& run) {
  using Math = VectorMath<A>;
  using V = typename Math::V;
  switch (activation) {
    case Activation::kNone:
      return run([](V x) { return x; });
    case Activation::kReLU:
      return run([](V x) { return Math::at_least(x, 0); });
    case Activation::kReLU6:
      return run([](V x) { return Math::at_most(Math::at_least(x, 0), 6); });
    case Activation::kSigmoid:
      return run([](V x) { return Math::sigmoid(x); });
    case Activation::kTanh:
      return run([](V x) { return Math::tanh(x); });
    case Activation::kSiLU:
      return run([](V x) { return Math::silu(x); });
    case Activation::kHardswish:
      return run([](V x) { return Math::hardswish(x); });
    case Activation::kGELU:
      return run([](V x) { return Math::gelu(x); });
  }
}

}  // namespace

template <typename A>
void activate(Activation activation, const A* from, A* to, int64_t n) {
  with_activation<A>(activation, [&](const auto& g) { transform(from, to, n, g); });
}

template <typename A>
void activate_rows(Activation activation, const A* from, A* to, const int64_t* offsets,
                   int64_t rows, int64_t n) {
  with_activation<A>(activation, [&](const auto& g) {
    for (int64_t m = 0; m < rows; ++m) transform(from + offsets[m], to + offsets[m], n, g);
  });
}

// dst[i*stride] = src[i], rounded.
template <typename T>
void write(T* dst, const Wide<T>* src, int64_t n, int64_t stride) {
  if (stride == 1) return copy_narrow(dst, src, n);
  for (int64_t i = 0; i < n; ++i) dst[i * stride] = from_wide<T>(src[i]);
}

template <typename T>
void Epilogue<T>::store_sums(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const {
  if (preactivation != nullptr) write(preactivation + offset, z, n, stride);
  if constexpr (std::is_same_v<T, Wide<T>>)
    if (stride == 1) return activate(activation, z, y + offset, n);
  if (activation != Activation::kNone) activate(activation, z, z, n);
  write(y + offset, z, n, stride);
}

template <typename T>
void Epilogue<T>::store(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const {
  if (residual != nullptr) return add_and_store(z, n, offset, stride);
  store_sums(z, n, offset, stride);
}

template <typename T>
void Epilogue<T>::add_and_store(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const {
  using V = WideVec<T>;
  using R = typename V::Registers;
  const T* added = residual + offset;
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) z[i] += to_wide(added[i * stride]);
    return store_sums(z, n, offset, stride);
  }
  const bool in_registers = preactivation == nullptr &&
                            (activation == Activation::kNone || activation == Activation::kReLU);
  const auto low = R::broadcast(
      activation == Activation::kReLU ? Wide<T>{0} : -std::numeric_limits<Wide<T>>::infinity());
  const auto clamped = [&](typename V::Type sum) { return sum < low ? low : sum; };
  const int64_t whole = n / V::kLanes * V::kLanes, rest = n - whole;
  T* const to = y + offset;
  for (int64_t i = 0; i < whole; i += V::kLanes) {
    const auto sum = R::load(z + i) + V::load(added + i);
    if (in_registers)
      V::store(to + i, clamped(sum));
    else
      R::store(z + i, sum);
  }
  if (rest > 0) {
    const auto sum = R::load_partial(z + whole, rest) + V::load_partial(added + whole, rest);
    if (in_registers)
      V::store_partial(to + whole, clamped(sum), rest);
    else
      R::store_partial(z + whole, sum, rest);
  }
  if (!in_registers) store_sums(z, n, offset, stride);
}

template <typename T>
void activation_backward(const ConvProblem& p, const T* dy, const T* saved, T* dz, T* db,
                         const Parallel& pool) {
  // Memory is rows of `inner` neighbours: a channel's plane, or a pixel's channels. Partial sums of
  // db belong to fixed blocks: a plane, or kPixels pixels of a sample.
  constexpr int64_t kPixels = 512;
  if (p.K == 0) return;
  const int64_t pixels = p.P * p.Q;
  const int64_t whole = p.pixel_channels > 0 ? p.pixel_channels : p.K;  // channels of dy's image
  const bool planes = p.layout == Layout::kNCHW;
  const int64_t blocks = planes ? 1 : (pixels + kPixels - 1) / kPixels;
  // [n][block][k]
  Buffer<Wide<T>> partial(db != nullptr ? p.N * blocks * p.K : 0);
  const double work = 4.0 * static_cast<double>(planes ? pixels : kPixels * p.K);
  const int64_t items = planes ? p.N * p.K : p.N * blocks;
  WorkSplit(items, work).run(pool, [&](int64_t begin, int64_t end, int64_t) {
    Wide<T> row[kPixelStrip];
    for (int64_t item = begin; item < end; ++item) {
      if (planes) {
        double sum = 0;
        const T* const gradient = dy + (item + item / p.K * (whole - p.K)) * pixels;
        for (int64_t i = 0; i < pixels; i += kStrip) {
          const int64_t n = std::min(kStrip, pixels - i), at = item * pixels + i;
          derivative_strip(p.activation, gradient + i, saved + (saved != nullptr ? at : 0),
                           dz != nullptr ? dz + at : nullptr, n, row);
          if (db != nullptr) sum += static_cast<double>(sum_strip(row, n));
        }
        if (db != nullptr) partial[item] = static_cast<Wide<T>>(sum);
        continue;
      }
      const int64_t n = item / blocks, first = item % blocks * kPixels;
      const int64_t last = std::min(first + kPixels, pixels);
      Wide<T>* sums = partial.get() + item * p.K;
      if (db != nullptr) std::fill(sums, sums + p.K, Wide<T>{0});
      // A strip is part of a pixel's channels or several whole pixels.
      const int64_t together = std::max<int64_t>(1, kPixelStrip / p.K);
      for (int64_t pixel = first; pixel < last; pixel += together) {
        const int64_t count = std::min(together, last - pixel);
        for (int64_t k = 0; k < p.K; k += kPixelStrip) {
          const int64_t channels = std::min(kPixelStrip, p.K - k);
          const int64_t size = count * channels, at = (n * pixels + pixel) * p.K + k;
          const bool is_part = whole != p.K;
          derivative_rows(p.activation, dy + (n * pixels + pixel) * whole + k, whole,
                          saved + (saved != nullptr ? at : 0), dz != nullptr ? dz + at : nullptr,
                          is_part ? count : 1, is_part ? channels : size, row);
          if (db == nullptr) continue;
          // Pixels are added in halves, which keeps the rounding error low.
          for (int64_t rest = count; rest > 1; rest -= rest / 2)
            add_row(row, row + (rest - rest / 2) * channels, rest / 2 * channels);
          add_row(sums + k, row, channels);
        }
      }
    }
  });
  if (db == nullptr) return;
  WorkSplit(p.K, static_cast<double>(p.N * blocks)).run(pool, [&](int64_t k0, int64_t k1, int64_t) {
    for (int64_t k = k0; k < k1; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < p.N * blocks; ++i) sum += static_cast<double>(partial[i * p.K + k]);
      db[k] = from_wide<T>(static_cast<Wide<T>>(sum));
    }
  });
}

template void activate(Activation, const float*, float*, int64_t);
template void activate(Activation, const double*, double*, int64_t);
template void activate_rows(Activation, const float*, float*, const int64_t*, int64_t, int64_t);
template void activate_rows(Activation, const double*, double*, const int64_t*, int64_t, int64_t);
template void Epilogue<float>::store(float*, int64_t, int64_t, int64_t) const;
template void Epilogue<double>::store(double*, int64_t, int64_t, int64_t) const;
template void Epilogue<BFloat16>::store(float*, int64_t, int64_t, int64_t) const;
template void Epilogue<Float16>::store(float*, int64_t, int64_t, int64_t) const;
template void activation_backward(const ConvProblem&, const float*, const float*, float*, float*,
                                  const Parallel&);
template void activation_backward(const ConvProblem&, const double*, const double*, double*,
                                  double*, const Parallel&);
template void activation_backward(const ConvProblem&, const BFloat16*, const BFloat16*, BFloat16*,
                                  BFloat16*, const Parallel&);
template void activation_backward(const ConvProblem&, const Float16*, const Float16*, Float16*,
                                  Float16*, const Parallel&);

}  // namespace torchconv::cpu
