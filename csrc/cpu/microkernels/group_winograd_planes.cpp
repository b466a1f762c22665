// The pixels of four vectors are taken apart by their place in a tile within 128 bits, which leaves
// tiles in an order of their own: tile 4 z + q, whose pixels are a quarter q of vector z, is lane
// 4 q + z. Outputs are put together by the same exchange.
#include "cpu/microkernels/group_winograd_planes.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/microkernels/group_winograd_columns.h"
#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {

#if defined(__AVX512F__)
namespace {

constexpr int kTaps = kGroupWinogradTaps, kOutputs = kGroupWinogradOutputs,
              kPoints = kGroupWinogradPoints, kDown = kGroupWinogradDown;
constexpr int kRows = kGroupPlanesRows, kSource = kGroupPlanesSource, kTiles = kRows / 2;
using V = Vec<float>;
using Register = V::Type;
constexpr int64_t kL = V::kLanes;

// Four vectors and their transposition in each quarter.
TORCHCONV_INLINE void transpose_quarters(Register (&v)[4]) {
  const auto low = [](Register a, Register b) {
    return shuffle<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b);
  };
  const auto high = [](Register a, Register b) {
    return shuffle<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b);
  };
  const auto lows = [](Register a, Register b) {
    return shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(a, b);
  };
  const auto highs = [](Register a, Register b) {
    return shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(a, b);
  };
  const Register a = low(v[0], v[1]), b = high(v[0], v[1]), c = low(v[2], v[3]),
                 d = high(v[2], v[3]);
  v[0] = lows(a, c);
  v[1] = highs(a, c);
  v[2] = lows(b, d);
  v[3] = highs(b, d);
}

using Bits = Vec<int32_t>::Type;
using Mask = uint16_t;

// Elements of a segment's finished rows, and of what the last vector of these may write behind
// them.
int64_t staged_run(const GroupPlanes& p) { return kRows * p.J + kL; }

// Where the vectors of some rows of all segments lie in planes: those of pixels, from the first tap
// on and a tile on, that are in the image, and those of outputs that exist.
class Rows {
 public:
  int64_t src[kSource][4], dst[kRows][4], count[kRows][4], staged[kRows][4];
  Mask inside[kSource][4], after[kSource][4];
  Bits keep;  // lanes whose next tile is of the same segment

  explicit Rows(const GroupPlanes& p) : p_(p) {
    const int64_t vectors = 4 / p.segments;
    for (int z = 0; z < 4; ++z) {
      segment_[z] = z / vectors * p.segment_rows;
      column_[z] = z % vectors * kL;
      inside_[z] = mask(column_[z] + p.first_w, p.W);
      after_[z] = mask(column_[z] + p.first_w + kOutputs, p.W);
    }
    for (int l = 0; l < kL; ++l) keep[l] = l < 3 * 4 || (l % 4 + 1) % vectors != 0 ? -1 : 0;
  }

  // Rows from i of each segment on.
  void set(int64_t i) {
    for (int z = 0; z < 4; ++z) {
      for (int k = 0; k < kSource; ++k) {
        const int64_t h = segment_[z] + i + k + p_.first_h;
        const bool exists = h >= 0 && h < p_.H;
        src[k][z] = h * p_.src_row + column_[z] + p_.first_w;
        inside[k][z] = exists ? inside_[z] : 0;
        after[k][z] = exists ? after_[z] : 0;
      }
      for (int r = 0; r < kRows; ++r) {
        const bool exists = i + r < p_.segment_rows && segment_[z] + i + r < p_.I;
        dst[r][z] = (segment_[z] + i + r) * p_.dst_row + column_[z];
        staged[r][z] = segment_[z] / p_.segment_rows * staged_run(p_) + r * p_.J + column_[z];
        count[r][z] = exists ? std::clamp<int64_t>(p_.J - column_[z], 0, kL) : 0;
      }
    }
  }

 private:
  static Mask mask(int64_t first, int64_t size) {
    const int64_t begin = std::clamp<int64_t>(-first, 0, kL),
                  end = std::clamp<int64_t>(size - first, begin, kL);
    return static_cast<Mask>((1u << end) - (1u << begin));
  }

  const GroupPlanes& p_;
  int64_t segment_[4], column_[4];
  Mask inside_[4], after_[4];
};

TORCHCONV_INLINE Register load_masked(const float* p, Mask mask) {
#if defined(TORCHCONV_MASKED_MOVES)
  return bit_cast<Register>(_mm512_maskz_loadu_ps(mask, p));
#else
  Register v{};
  for (int l = 0; l < kL; ++l)
    if ((mask >> l & 1) != 0) v[l] = p[l];
  return v;
#endif
}

// Source row k of all segments and channels to to[point * stride], channels kSource vectors apart.
template <bool kWraps>
__attribute__((noinline)) void transform_row(const GroupPlanes& p, const Rows& rows, int64_t k,
                                             float* to, int64_t stride) {
  const float* src = p.src;
  const int64_t channels = p.channels, next_channel = p.src_channel;
  const int64_t at0 = rows.src[k][0], at1 = rows.src[k][1], at2 = rows.src[k][2],
                at3 = rows.src[k][3];
  const Mask in0 = rows.inside[k][0], in1 = rows.inside[k][1], in2 = rows.inside[k][2],
             in3 = rows.inside[k][3];
  const Bits keep = rows.keep;
  for (int64_t c = 0; c < channels; ++c, src += next_channel, to += kSource * kL) {
    Register d[kPoints], points[kPoints], after[4];
    Register at[4] = {load_masked(src + at0, in0), load_masked(src + at1, in1),
                      load_masked(src + at2, in2), load_masked(src + at3, in3)};
    if (kWraps) {
#pragma GCC unroll 4
      for (int z = 0; z < 4; ++z)
        after[z] = load_masked(src + rows.src[k][z] + kOutputs, rows.after[k][z]);
    }
    transpose_quarters(at);
#pragma GCC unroll 4
    for (int s = 0; s < kOutputs; ++s) d[s] = at[s];
    if (kWraps) {
      transpose_quarters(after);
      d[4] = after[0], d[5] = after[1];
    } else {
      // The next tile of lane 4 q + z: 4 (q + 1) + z, or z + 1 of the next vector.
      const auto next = [&](Register v) {
        v = shuffle<4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 1, 2, 3, 0>(v, v);
        return bit_cast<Register>(bit_cast<Bits>(v) & keep);
      };
      d[4] = next(d[0]), d[5] = next(d[1]);
    }
    winograd::transform_input<true>(d, points);
#pragma GCC unroll 6
    for (int n = 0; n < kPoints; ++n) V::store(to + n * stride, points[n]);
  }
}

// A point of the rows of kFilters filters and kCount tiles, one below the other. from: [channel]
// [source row]; weights: of the first filter; to: [row], filters filter_stride apart.
template <int kFilters, int kCount>
TORCHCONV_INLINE void multiply(const float* from, const int64_t* slots, int64_t channels,
                               const float* weights, float* to, int64_t filter_stride) {
  Register sums[kFilters][kCount][kDown] = {};
  for (int64_t c = 0; c < channels; ++c, from += kSource * kL, weights += kDown * kL) {
    Register v[kCount][kDown];
    transform_columns(from, slots, v);
#pragma GCC unroll 4
    for (int q = 0; q < kDown; ++q) {
#pragma GCC unroll 4
      for (int f = 0; f < kFilters; ++f) {
        Register weight = V::broadcast(weights[q * kL + f]);
        keep_in_register(weight);
#pragma GCC unroll 2
        for (int t = 0; t < kCount; ++t) sums[f][t][q] += v[t][q] * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int f = 0; f < kFilters; ++f) finish_columns(sums[f], to + f * filter_stride, kL);
}

// All points and filters, from [point][channel][source row] to [filter][point][row].
template <int kCount>
__attribute__((noinline)) void multiply_all(const GroupPlanes& p, const float* points,
                                            const int64_t* slots, float* sums) {
  constexpr int kFilters = kTiles * 2 / kCount;
  constexpr int64_t kFilter = kPoints * kRows * kL;
  const int64_t channels = p.channels, filters = p.filters, point = channels * kSource * kL;
  const float* w = p.weights;
  for (int n = 0; n < kPoints;
       ++n, w += channels * kDown * kL, points += point, sums += kRows * kL) {
    p.fetch->ask(p.lines);
    int64_t f = 0;
    for (; f + kFilters <= filters; f += kFilters)
      multiply<kFilters, kCount>(points, slots, channels, w + f, sums + f * kFilter, kFilter);
    for (; f < filters; ++f)
      multiply<1, kCount>(points, slots, channels, w + f, sums + f * kFilter, kFilter);
  }
}

// Where finished rows go.
enum class To { kImage, kStage, kCallback };

// Row r of all segments and filters, from their points [filter][point][row]. staged: whole vectors,
// of which the next row overwrites what is beyond its first ones.
template <To kTo>
__attribute__((noinline)) Register finish_row(const GroupPlanes& p, const Rows& rows, int64_t r,
                                              const float* sums, float* staged) {
  const Register most = V::broadcast(p.high);
  const bool clamp = p.clamp, stream = p.stream;
  const int64_t filters = p.filters,
                next_filter = kTo == To::kStage ? kGroupPlanesStaged : p.dst_filter;
  const float* bias = p.bias;
  float* dst = kTo == To::kStage ? staged : p.dst;
  const int64_t n0 = rows.count[r][0], n1 = rows.count[r][1], n2 = rows.count[r][2],
                n3 = rows.count[r][3];
  const int64_t* const at = kTo == To::kStage ? rows.staged[r] : rows.dst[r];
  const int64_t at0 = at[0], at1 = at[1], at2 = at[2], at3 = at[3];
  Register all{};
  for (int64_t f = 0; f < filters; ++f, sums += kPoints * kRows * kL, dst += next_filter) {
    Register m[kPoints], y[kOutputs];
#pragma GCC unroll 6
    for (int n = 0; n < kPoints; ++n) m[n] = V::load(sums + n * kRows * kL);
    winograd::transform_output<true>(m, y);
    all += (y[0] + y[1]) + (y[2] + y[3]);
    const Register added = V::broadcast(bias[f]);
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j) y[j] += added;
    if (clamp) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) y[j] = clamped(y[j], most);
    }
    transpose_quarters(y);
    const auto store = [&](int z, int64_t n, int64_t at) {
      if (kTo == To::kStage) {
        if (n > 0) V::store(dst + at, y[z]);
      } else if (kTo == To::kCallback) {
        float rest[kL];
        V::store(rest, y[z]);
        if (n > 0) p.store(rest, n, f * next_filter + at, p.context);
      } else if (n == kL) {
        WideVec<float>::store(dst + at, y[z], stream);
      } else if (n > 0) {
        V::store_partial(dst + at, y[z], n);
      }
    };
    store(0, n0, at0);
    store(1, n1, at1);
    store(2, n2, at2);
    store(3, n3, at3);
  }
  return all * 0.0f;
}

// Rows from i of each segment on, past the caches.
void stream_rows(const GroupPlanes& p, const float* staged, int64_t i, int64_t rows) {
  const int64_t run = staged_run(p);
  for (int64_t f = 0; f < p.filters; ++f, staged += kGroupPlanesStaged)
    for (int64_t g = 0; g < p.segments; ++g) {
      const int64_t first = g * p.segment_rows + i;
      const int64_t count = std::clamp<int64_t>(p.I - first, 0, rows) * p.J;
      float* const to = p.dst + f * p.dst_filter + first * p.J;
      for (int64_t n = 0; n < count; n += kL)
        WideVec<float>::store(to + n, V::load(staged + g * run + n), true);
    }
}

template <bool kWraps>
bool run(const GroupPlanes& p) {
  Rows rows(p);
  const int64_t channel = kSource * kL, point = p.channels * channel;
  float* const points = p.scratch;               // [point][channel][slot of a source row]
  float* const sums = points + kPoints * point;  // [filter][point][row]
  float* const staged = sums + p.filters * kRows * kGroupWinogradRow;  // [filter]
  const bool stages = p.stream && p.J % kL != 0;
  Register special{};
  for (int64_t i = 0; i < p.segment_rows; i += kRows) {
    rows.set(i);
    const bool half = p.segment_rows - i <= kRows / 2;
    const int64_t count = half ? kRows / 2 : kRows;
    int64_t slots[kSource];
    for (int64_t k = 0; k < kSource; ++k) slots[k] = (i + k) % kSource * kL;
    for (int64_t k = i == 0 ? 0 : kTaps - 1; k < count + kTaps - 1; ++k)
      transform_row<kWraps>(p, rows, k, points + slots[k], point);
    half ? multiply_all<1>(p, points, slots, sums) : multiply_all<kTiles>(p, points, slots, sums);
    for (int64_t r = 0; r < count; ++r)
      special += stages ? finish_row<To::kStage>(p, rows, r, sums + r * kL, staged)
                 : p.store == nullptr
                     ? finish_row<To::kImage>(p, rows, r, sums + r * kL, nullptr)
                     : finish_row<To::kCallback>(p, rows, r, sums + r * kL, nullptr);
    if (stages) stream_rows(p, staged, i, count);
  }
  const auto lanes = special != special;
  int64_t any = 0;
  for (int l = 0; l < kL; ++l) any |= lanes[l];
  return any == 0;
}

}  // namespace

bool group_winograd_planes(const GroupPlanes& p) {
  // Whether the last tile of a segment reads pixels that no lane holds.
  const int64_t held = kGroupPlanesTiles / p.segments * kOutputs;
  const bool wraps = p.J > held - kOutputs && held + p.first_w < p.W;
  return wraps ? run<true>(p) : run<false>(p);
}
#else
bool group_winograd_planes(const GroupPlanes&) { std::abort(); }
#endif

}  // namespace torchconv::cpu
