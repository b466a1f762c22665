// See direct_run.h.
#include "cpu/microkernels/direct_run.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/processor.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// A pointer whose sums with other values the compiler cannot keep beside it.
template <typename P>
TORCHCONV_INLINE void keep_apart([[maybe_unused]] P& p) {
  __asm__("" : "+r"(p));
}

// f(row, where it starts).
template <int kRows, typename T, typename F>
TORCHCONV_INLINE void for_rows(T* first, int64_t step, F&& f) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m, first += step) {
    keep_apart(first);
    f(m, first);
  }
}

// f(std::true_type) or f(std::false_type): one jump for all rows, not one for each.
template <typename F>
TORCHCONV_INLINE void if_whole(bool whole, F&& f) {
  if (whole)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Of vectors of two halves: a half twice, one of the two, and one's first behind which lies the
// other's second. GCC would take permutations, on fewer units.
template <typename V, typename Half>
TORCHCONV_INLINE V twice(Half half) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(V) == 64)
    return bit_cast<V>(_mm512_maskz_broadcast_f32x8(0xFFFF, bit_cast<__m256>(half)));
#endif
  const Half both[2] = {half, half};
  return bit_cast<V>(both);
}
template <typename Half, int kHalf, typename V>
TORCHCONV_INLINE Half half_of(V v) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(V) == 64)
    return bit_cast<Half>(_mm512_extractf32x8_ps(bit_cast<__m512>(v), kHalf));
#endif
  Half halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return halves[kHalf];
}
template <typename V, int... I>
TORCHCONV_INLINE V join_halves(V low, V high, std::integer_sequence<int, I...>) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return bit_cast<V>(_mm512_mask_blend_ps(0xFF00, bit_cast<__m512>(low), bit_cast<__m512>(high)));
#endif
  constexpr int kCount = sizeof...(I);
  return shuffle<(I < kCount / 2 ? I : kCount + I)...>(low, high);
}

// kVectors vectors of so many lanes, kRows pixels at a time; kTerm: elements of a term in b.
// kShares: the last vector has no more lanes than half of it, so that two pixels share it, half by
// half, and an odd last pixel has one to itself. Vectors beyond a panel's are those of the panel
// behind it, of one vector.
template <int kN, int kVectors, int kTerm, int kRows, bool kShares = false>
void direct_run(const DirectTile<float>& tile) {
  using V = Vec<float, kN>;
  using Register = typename V::Type;
  using Last = Vec<float, kShares ? kN / 2 : kN>;  // of a pixel
  static_assert(kMaxRows % kRows == 0);
  constexpr bool kJoins = kVectors * kN > kPanel<float>;
  static_assert(!kJoins || (kN == kLanes<float> && kVectors == kMaxVectors + 1));
  // Vectors that each pixel has to itself; the sums of all rows in these, then those in the last.
  constexpr int kOwn = kVectors - 1, kOwnSums = kRows * kOwn;
  constexpr int kStep = kShares ? 2 : 1, kSums = kOwnSums + (kRows + kStep - 1) / kStep;
  constexpr auto kIndices = std::make_integer_sequence<int, kN>();
  // Of five rows one has a pointer, which the others lie multiples of the step behind.
  constexpr int kApart = 5, kPointers = (kRows + kApart - 1) / kApart;
  constexpr int64_t kSize = sizeof(float), kLine = 64;
  const int64_t step = tile.pixel_step * kSize, c_step = tile.c_step;
  // Of the last vector, which may be the second half of one as wide as the tile's.
  constexpr bool kSecondHalf = kN < kLanes<float> && kVectors % 2 == 0;
  const int64_t lanes = tile.lanes - (kSecondHalf ? kN : 0);
  const auto* const first = reinterpret_cast<const char*>(tile.a + tile.pixels[0]);
  const auto *next = static_cast<const char*>(tile.next),
             *also = static_cast<const char*>(tile.also);
  const int64_t next_step = tile.next_step;
  // From what it asks for to the next: in turn in the one image and in the other.
  const int64_t also_step = (tile.also_row != 0 ? tile.also_row : 2 * tile.also_step),
                apart = (tile.also_row != 0 ? 0 : tile.also_step) + tile.also_apart;
  // The rows' first line and their second, over and over.
  const int64_t ask_terms = tile.also_row != 0 ? 2 * kAskedRows : INT64_MAX;
  int64_t line = kLine;
  const float *panel = tile.b, *bias = tile.bias;
  int64_t column = tile.c_rows[0];
  const auto last_filters = [](const float* from) TORCHCONV_INLINE_LAMBDA {
    if constexpr (kShares)
      return twice<Register>(Last::load(from));
    else
      return V::load(from);
  };
  for (int64_t panels = kJoins ? 1 : tile.panels; panels > 0; --panels) {
    for (int64_t part = 0; part < tile.rows; part += kRows) {
      Register sum[kSums], start[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kOwn; ++v) start[v] = V::load(bias + v * kN);
      start[kOwn] = last_filters(bias + kOwn * kN);
      const char* row[kPointers];
#pragma GCC unroll 16
      for (int r = 0; r < kPointers; ++r) row[r] = first + (part + r * kApart) * step;
      const auto broadcast_row = [&](int m) TORCHCONV_INLINE_LAMBDA {
        return V::broadcast(*reinterpret_cast<const float*>(row[m / kApart] + m % kApart * step));
      };
      const float *b = panel, *b_last = kJoins ? panel + tile.panel_size : panel + kOwn * kN;
      for (const TermSegment* segment = tile.segments;; ++segment) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kOwn; ++v) sum[m * kOwn + v] = start[v];
#pragma GCC unroll 16
        for (int i = kOwnSums; i < kSums; ++i) sum[i] = start[kOwn];
        int64_t left = segment->end - segment->begin;
        while (left > 0) {
          const int64_t terms = std::min(left, ask_terms);
          const char* asked = also;
          int64_t ask_step = apart;
          for (int64_t term = terms; term > 0; --term) {
            Register filters[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kOwn; ++v) filters[v] = V::load(b + v * kN);
            filters[kOwn] = last_filters(b_last);
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(asked, 0, 3);
            const auto add_own = [&](int m, Register x) TORCHCONV_INLINE_LAMBDA {
#pragma GCC unroll 4
              for (int v = 0; v < kOwn; ++v) sum[m * kOwn + v] += x * filters[v];
            };
#pragma GCC unroll 16
            for (int m = 0; m < kRows; m += kStep) {
              Register x = broadcast_row(m);
              add_own(m, x);
              if (kShares && m + 1 < kRows) {
                const Register y = broadcast_row(m + 1);
                add_own(m + 1, y);
                x = join_halves(x, y, kIndices);
              }
              sum[kOwnSums + m / kStep] += x * filters[kOwn];
            }
#pragma GCC unroll 16
            for (int r = 0; r < kPointers; ++r) {
              row[r] += kSize;
              keep_apart(row[r]);
            }
            b += kTerm, b_last += kJoins ? kN : kTerm;
            next += next_step;
            asked += ask_step;
            ask_step = also_step - ask_step;
          }
          if (tile.also_row != 0)
            also += line, line = -line;
          else
            also += terms * tile.also_step;
          left -= terms;
        }
        if (segment != tile.segments) {
#pragma GCC unroll 32
          for (int i = 0; i < kSums; ++i) sum[i] += V::load(tile.totals + i * kN);
        }
        if (segment->last) break;
#pragma GCC unroll 32
        for (int i = 0; i < kSums; ++i) V::store(tile.totals + i * kN, sum[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) start[v] = Register{};
      }
      typename Last::Type last[kRows];
      unroll<kRows>([&](auto m) TORCHCONV_INLINE_LAMBDA {
        if constexpr (kShares)
          last[m] = half_of<typename Last::Type, m % 2>(sum[kOwnSums + m / 2]);
        else
          last[m] = sum[kOwnSums + m];
      });
      const int64_t at = column + part * c_step;
      if (tile.before != nullptr)
        if_whole(lanes == Last::kLanes, [&](auto whole) TORCHCONV_INLINE_LAMBDA {
          for_rows<kRows>(tile.before + at, c_step,
                          [&](int m, const float* from) TORCHCONV_INLINE_LAMBDA {
                            for (int v = 0; v < kOwn; ++v)
                              sum[m * kOwn + v] += V::load(from + v * kN);
                            from += kOwn * kN;
                            last[m] += whole ? Last::load(from) : Last::load_partial(from, lanes);
                          });
        });
      if (tile.clamp) {
        // ReLU has no upper bound to compare with.
        if_whole(tile.high == std::numeric_limits<float>::infinity(),
                 [&](auto unbounded) TORCHCONV_INLINE_LAMBDA {
                   const auto clamp = [&](auto& value) TORCHCONV_INLINE_LAMBDA {
                     using Value = std::decay_t<decltype(value)>;
                     const Value low = Value{} + tile.low, high = Value{} + tile.high;
                     value = value < low ? low : value;
                     if (!unbounded) value = value > high ? high : value;
                   };
#pragma GCC unroll 32
                   for (int i = 0; i < kOwnSums; ++i) clamp(sum[i]);
#pragma GCC unroll 16
                   for (int m = 0; m < kRows; ++m) clamp(last[m]);
                 });
      }
      if (!kShares && tile.stream) {
        for_rows<kRows>(tile.c + at, c_step, [&](int m, float* to) TORCHCONV_INLINE_LAMBDA {
          for (int v = 0; v < kOwn; ++v) stream_bytes(to + v * kN, sum[m * kOwn + v]);
          stream_bytes(to + kOwn * kN, last[m]);
        });
      } else {
        if_whole(lanes == Last::kLanes, [&](auto whole) TORCHCONV_INLINE_LAMBDA {
          for_rows<kRows>(tile.c + at, c_step, [&](int m, float* to) TORCHCONV_INLINE_LAMBDA {
            for (int v = 0; v < kOwn; ++v) V::store(to + v * kN, sum[m * kOwn + v]);
            if (whole)
              Last::store(to + kOwn * kN, last[m]);
            else
              Last::store_partial(to + kOwn * kN, last[m], lanes);
          });
        });
      }
    }
    panel += tile.panel_size, bias += kTerm, column += kTerm;
  }
}

}  // namespace

bool direct_run_joins(int64_t filters) {
  static const bool halves = halves_wide_vectors();
  return kVectorBytes == 64 && !halves && 0 < filters && filters <= kLanes<float>;
}

DirectMicrokernel<float> direct_run_microkernel(int64_t filters) {
  constexpr int kL = kLanes<float>, kHalf = kL / 2, kPair = 2 * kL;
  if constexpr (kVectorBytes == 64) {
    if (filters <= kHalf) return direct_run<kHalf, 1, kL, kMaxRows>;
    static const bool halves = halves_wide_vectors();
    if (halves && filters <= kL) return direct_run<kHalf, 2, kL, kMaxRows>;
    if (halves && filters <= kL + kHalf) return direct_run<kHalf, 3, kPair, kMaxRows / 2>;
    if (kL < filters && filters <= kL + kHalf) return direct_run<kL, 2, kPair, kMaxRows, true>;
    if (filters > kPair + kHalf) return direct_run<kL, 3, kPair, kMaxRows / 2>;
    if (filters > kPair) return direct_run<kL, 3, kPair, kMaxRows / 2, true>;
  }
  return filters <= kL ? direct_run<kL, 1, kL, kMaxRows> : direct_run<kL, 2, kPair, kMaxRows>;
}

}  // namespace torchconv::cpu
