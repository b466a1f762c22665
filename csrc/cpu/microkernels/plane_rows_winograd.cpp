// plane_rows_winograd: pairs of output rows from top to bottom, strips of a vector from left to
// right. Source rows are read by whole vectors, with what lies beyond a row taken out of their
// differences; only at the end of memory are rows copied first.
#include "cpu/microkernels/plane_rows_winograd.h"

#include <algorithm>

#include "cpu/microkernels/plane_rows_impl.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using Register = V::Type;
using Lanes = LaneRange<float, V::kLanes>;
constexpr int kL = V::kLanes;

alignas(64) constexpr float kZeros[kMostWinogradColumns + kL] = {};

// The lanes of a vector of source columns that are there, and those of its outputs.
struct Strip {
  Lanes source, out;
};

// Copies of rows that are too near the end of memory to be read by whole vectors.
template <int kRows>
struct Copies {
  float rows[kRows][kMostWinogradColumns + kL];

  // By value: pointers that a function changes by reference would stay in memory.
  struct Sources {
    const float* rows[kRows];
  };
  __attribute__((noinline)) Sources of(Sources from, const float* last, int64_t width) {
    for (int r = 0; r < kRows; ++r) {
      if (from.rows[r] == kZeros || from.rows[r] <= last) continue;
      std::copy(from.rows[r], from.rows[r] + width, rows[r]);
      std::fill(rows[r] + width, rows[r] + width + kL, 0.0f);
      from.rows[r] = rows[r];
    }
    return from;
  }
};

// The outputs of a vector of source columns come `late` lanes late. kOne: a single vector has all
// of a row, and as much of the kernel lies left of it as right: columns left of the middle one are
// then moved up and those right of it down, and outputs are not late.
template <int R, bool kOne>
Register filter_planes(const PlaneRows p, const PlaneRowsWinograd& t, const Strip* strips,
                       int64_t late) {
  constexpr int kParts = R / 2;
  const PlaneRowsSum<float> sum = t.sum;
  const int64_t width = p.right - p.left,
                count = kOne ? 1 : ceil_div(p.columns + late, int64_t{kL});
  const float* const last = t.src_end - count * kL;
  Copies<R + 1> copies;
  Register total{};
  for (int64_t plane = 0; plane < sum.planes; ++plane) {
    const float* weights = sum.weights + plane * sum.weight_plane;
    const auto weight = [&](int product, int s) TORCHCONV_INLINE_LAMBDA {
      return V::broadcast(weights[product * R + s]);
    };
    const Register start = V::broadcast(sum.bias != nullptr ? sum.bias[plane] : 0.0f);
    const float* src = sum.src + plane * sum.src_plane + p.left;
    for (int64_t i = sum.first; i < sum.last; i += 2) {
      const float* rows[R + 1];
      unroll<R + 1>([&](auto r) TORCHCONV_INLINE_LAMBDA {
        const int64_t y = i + r;
        rows[r] = y >= p.top && y < p.bottom ? src + y * p.pitch : kZeros;
      });
      if (src + (i + R) * p.pitch > last) {
        typename Copies<R + 1>::Sources from;
        unroll<R + 1>([&](auto r) TORCHCONV_INLINE_LAMBDA { from.rows[r] = rows[r]; });
        from = copies.of(from, last, width);
        unroll<R + 1>([&](auto r) TORCHCONV_INLINE_LAMBDA { rows[r] = from.rows[r]; });
      }
      float* out = sum.out + plane * sum.out_plane + i * sum.out_pitch - late;
      float* second = i + 1 < sum.last ? out + sum.out_pitch : nullptr;
      // What the strip before pushes out before each column of the kernel.
      Register before[2][R - 1];
      if constexpr (!kOne)
        unroll<2 * (R - 1)>([&](auto k) TORCHCONV_INLINE_LAMBDA { before[k % 2][k / 2] = start; });
      for (int64_t strip = 0, column = 0; strip < count; ++strip, column += kL) {
        Register y[2];
        const auto move = [&](auto s) TORCHCONV_INLINE_LAMBDA {
          unroll<2>([&](auto line) TORCHCONV_INLINE_LAMBDA {
            // Up by a lane, after the last one of the strip before.
            const Register moved =
                consecutive_lanes<float, kL, kL - 1>(before[line][s - 1], y[line]);
            before[line][s - 1] = y[line];
            y[line] = moved;
          });
        };
        Register left[2], right[2];  // of one vector: the columns on either side of the middle one
        const auto up = [](Register v) TORCHCONV_INLINE_LAMBDA {
          return consecutive_lanes<float, kL, kL - 1>(Register{}, v);
        };
        const auto down = [](Register v) TORCHCONV_INLINE_LAMBDA {
          return consecutive_lanes<float, kL, 1>(v, Register{});
        };
        // The k-th column outwards in, on the left and on the right in turn; last the middle one.
        const auto add_to_one = [&](auto k, const Register(&z)[2]) TORCHCONV_INLINE_LAMBDA {
          constexpr int kAt = decltype(k)::value;
          unroll<2>([&](auto line) TORCHCONV_INLINE_LAMBDA {
            if constexpr (kAt + 1 == R) {
              y[line] = (left[line] + right[line]) + (z[line] + start);
            } else if constexpr (kAt % 2 == 0) {
              left[line] = up(kAt == 0 ? z[line] : left[line] + z[line]);
            } else {
              right[line] = down(kAt == 1 ? z[line] : right[line] + z[line]);
            }
          });
        };
        if (kOne || column < width) {
          Register a[kParts], b[kParts], c, d[kParts], x[4];
          const Lanes there = strips[strip].source;
          const auto source = [&](int r)
                                  TORCHCONV_INLINE_LAMBDA { return V::load(rows[r] + column); };
          unroll<4>([&](auto r) TORCHCONV_INLINE_LAMBDA { x[r] = source(r); });
          a[0] = there.keep(x[0] - x[2]);
          b[0] = there.keep(x[1] + x[2]);
          c = there.keep(x[2] - x[1]);
          d[0] = there.keep(x[3] - x[1]);
          unroll<kParts - 1>([&](auto part) TORCHCONV_INLINE_LAMBDA {
            const Register middle = source(2 * part + 4), last = source(2 * part + 5);
            a[part + 1] = there.keep(x[3] - middle);
            b[part + 1] = there.keep(middle);
            d[part + 1] = there.keep(last - middle);
            x[3] = last;
          });
          unroll<R>([&](auto k) TORCHCONV_INLINE_LAMBDA {
            constexpr int s = !kOne ? k : k % 2 == 0 ? k / 2 : R - 1 - k / 2;
            Register sums = b[0] * weight(product_b(0), s), differences = c * weight(kProductC, s);
            unroll<kParts - 1>([&](auto part) TORCHCONV_INLINE_LAMBDA {
              sums += b[part + 1] * weight(product_b(part + 1), s);
            });
            keep_in_register(sums);
            keep_in_register(differences);
            Register y0 = sums + differences, y1 = sums - differences;
            unroll<kParts>([&](auto part) TORCHCONV_INLINE_LAMBDA {
              y0 += a[part] * weight(product_a(R, part), s);
              y1 += d[part] * weight(product_a(R, part) + 1, s);
            });
            if constexpr (kOne) {
              add_to_one(k, {y0, y1});
            } else if constexpr (s == 0) {
              y[0] = start + y0;
              y[1] = start + y1;
            } else {
              move(k);
              y[0] += y0;
              y[1] += y1;
            }
          });
        } else {
          y[0] = y[1] = start;
          unroll<R - 1>(
              [&](auto s) TORCHCONV_INLINE_LAMBDA { move(std::integral_constant<int, s + 1>{}); });
        }
        total += y[0] * 0.0f;
        total += y[1] * 0.0f;
        strips[strip].out.store(out + column, sum.clamped<kL>(y[0]));
        if (second != nullptr) strips[strip].out.store(second + column, sum.clamped<kL>(y[1]));
      }
    }
  }
  return total;
}

template <int R>
Register filter(const PlaneRows& p, const PlaneRowsWinograd& t) {
  const int64_t width = p.right - p.left;
  const bool one = R > 5 && p.left == R / 2 && std::max(width, p.columns) <= kL;
  const int64_t late = one ? 0 : R - 1 - p.left;
  Strip strips[kMostWinogradColumns / kL + 2];
  for (int64_t column = 0, k = 0; column < p.columns + late; column += kL, ++k)
    strips[k] = {Lanes::of(0, width - column), Lanes::of(late - column, p.columns + late - column)};
  if constexpr (R > 5) {
    if (one) return filter_planes<R, true>(p, t, strips, late);
  }
  return filter_planes<R, false>(p, t, strips, late);
}

// A template, so that only machines that use the kernels compile them.
template <bool kThere>
bool filter_finite(const PlaneRows& p, const PlaneRowsWinograd& t) {
  if constexpr (kThere) {
    float lanes[kL];
    V::store(lanes, p.R == 5 ? filter<5>(p, t) : filter<7>(p, t));
    return std::all_of(lanes, lanes + kL, [](float lane) { return lane == 0; });  // else NaN
  }
  return false;
}

}  // namespace

bool plane_rows_winograd(const PlaneRows& p, const PlaneRowsWinograd& t) {
  return filter_finite<kFiltersColumns>(p, t);
}

void plane_rows_weights(int64_t R, const float* taps, int64_t row, int64_t column, float* weights) {
  using Row = Vec<float, 8>;
  const auto tap = [&](int64_t r) {
    if (column == 1) return Row::load_partial(taps + r * row, R);
    float values[Row::kLanes] = {};
    for (int64_t s = 0; s < R; ++s) values[s] = taps[r * row + s * column];
    return Row::load(values);
  };
  // In ascending order: of what a vector writes beyond its row, the next one is written over.
  const Row::Type ends = tap(0) + tap(2);
  Row::store(weights, (ends + tap(1)) * 0.5f);
  Row::store(weights + kProductC * R, (ends - tap(1)) * 0.5f);
  for (int part = 1; part < R / 2; ++part)
    Row::store(weights + product_b(part) * R, tap(2 * part + 1) + tap(2 * part + 2));
  for (int part = 0; part < R / 2; ++part) {
    float* a = weights + product_a(static_cast<int>(R), part) * R;
    Row::store(a, tap(part == 0 ? 0 : 2 * part + 1));
    Row::store(a + R, tap(2 * part + 2));
  }
}

}  // namespace torchconv::cpu
