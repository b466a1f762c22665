// See direct_run.h.
#include "cpu/microkernels/direct_run.h"

#include <algorithm>
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

// Of vectors of two halves: the first half of both, the second, and one's first behind which lies
// the other's second.
template <typename V, int... I>
TORCHCONV_INLINE V first_halves(V v, std::integer_sequence<int, I...>) {
  return shuffle<(I % (static_cast<int>(sizeof...(I)) / 2))...>(v, v);
}
template <typename V, int... I>
TORCHCONV_INLINE V second_halves(V v, std::integer_sequence<int, I...>) {
  constexpr int kHalf = sizeof...(I) / 2;
  return shuffle<(kHalf + I % kHalf)...>(v, v);
}
template <typename V, int... I>
TORCHCONV_INLINE V join_halves(V low, V high, std::integer_sequence<int, I...>) {
#if defined(__AVX512F__)
  // GCC would take a permutation, on fewer units.
  if constexpr (sizeof(V) == 64)
    return bit_cast<V>(_mm512_mask_blend_ps(0xFF00, bit_cast<__m512>(low), bit_cast<__m512>(high)));
#endif
  constexpr int kCount = sizeof...(I);
  return shuffle<(I < kCount / 2 ? I : kCount + I)...>(low, high);
}

// kVectors vectors of so many lanes, kRows pixels at a time; kTerm: elements of a term in b.
// kPixels: two where the second of two vectors has no more lanes than half of it, so that two
// pixels share it, half by half, and their three products are those of three vectors, not four.
template <int kN, int kVectors, int kTerm, int kRows, int kPixels = 1>
void direct_run(const DirectTile<float>& tile) {
  using V = Vec<float, kN>;
  using Register = typename V::Type;
  static_assert(kMaxRows % kRows == 0 && kRows % kPixels == 0);
  constexpr bool kShares = kPixels == 2;
  static_assert(!kShares || kVectors == 2);
  constexpr int kGroups = kRows / kPixels, kSums = kShares ? 3 : kVectors;
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
  for (int64_t panels = tile.panels; panels > 0; --panels) {
    for (int64_t part = 0; part < tile.rows; part += kRows) {
      Register sum[kGroups][kSums], start[kSums];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) start[v] = V::load(bias + v * kN);
      if constexpr (kShares) start[2] = first_halves(start[1], kIndices), start[1] = start[0];
      const char* row[kPointers];
#pragma GCC unroll 16
      for (int r = 0; r < kPointers; ++r) row[r] = first + (part + r * kApart) * step;
      const auto broadcast_row = [&](int m) TORCHCONV_INLINE_LAMBDA {
        return V::broadcast(*reinterpret_cast<const float*>(row[m / kApart] + m % kApart * step));
      };
      const float* b = panel;
      for (const TermSegment* segment = tile.segments;; ++segment) {
#pragma GCC unroll 16
        for (int m = 0; m < kGroups; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kSums; ++v) sum[m][v] = start[v];
        int64_t left = segment->end - segment->begin;
        while (left > 0) {
          const int64_t terms = std::min(left, ask_terms);
          const char* asked = also;
          int64_t ask_step = apart;
          for (int64_t term = terms; term > 0; --term) {
            Register filters[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) filters[v] = V::load(b + v * kN);
            if constexpr (kShares) filters[1] = first_halves(filters[1], kIndices);
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(asked, 0, 3);
#pragma GCC unroll 16
            for (int m = 0; m < kRows; m += kPixels) {
              const Register x = broadcast_row(m);
              Register(&sums)[kSums] = sum[m / kPixels];
              if constexpr (kShares) {
                const Register y = broadcast_row(m + 1);
                sums[0] += x * filters[0];
                sums[1] += y * filters[0];
                sums[2] += join_halves(x, y, kIndices) * filters[1];
              } else {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[v] += x * filters[v];
              }
            }
#pragma GCC unroll 16
            for (int r = 0; r < kPointers; ++r) {
              row[r] += kSize;
              keep_apart(row[r]);
            }
            b += kTerm;
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
#pragma GCC unroll 16
          for (int m = 0; m < kGroups; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < kSums; ++v)
              sum[m][v] += V::load(tile.totals + (m * kSums + v) * kN);
        }
        if (segment->last) break;
#pragma GCC unroll 16
        for (int m = 0; m < kGroups; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kSums; ++v) V::store(tile.totals + (m * kSums + v) * kN, sum[m][v]);
#pragma GCC unroll 4
        for (int v = 0; v < kSums; ++v) start[v] = Register{};
      }
      Register result[kRows][kVectors];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        if constexpr (kShares) {
          const Register shared = sum[m / 2][2];
          result[m][0] = sum[m / 2][m % 2];
          result[m][1] = m % 2 == 0 ? shared : second_halves(shared, kIndices);
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) result[m][v] = sum[m][v];
        }
      }
      const int64_t at = column + part * c_step;
      if (tile.before != nullptr)
        if_whole(lanes == kN, [&](auto whole) TORCHCONV_INLINE_LAMBDA {
          for_rows<kRows>(
              tile.before + at, c_step, [&](int m, const float* from) TORCHCONV_INLINE_LAMBDA {
                for (int v = 0; v < kVectors; ++v)
                  result[m][v] += v + 1 < kVectors || whole ? V::load(from + v * kN)
                                                            : V::load_partial(from + v * kN, lanes);
              });
        });
      if (tile.clamp) {
        const Register low = V::broadcast(tile.low), high = V::broadcast(tile.high);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            result[m][v] = result[m][v] < low ? low : result[m][v];
            result[m][v] = result[m][v] > high ? high : result[m][v];
          }
      }
      if (tile.stream) {
        for_rows<kRows>(tile.c + at, c_step, [&](int m, float* to) TORCHCONV_INLINE_LAMBDA {
          for (int v = 0; v < kVectors; ++v) stream_bytes(to + v * kN, result[m][v]);
        });
      } else {
        if_whole(lanes == kN, [&](auto whole) TORCHCONV_INLINE_LAMBDA {
          for_rows<kRows>(tile.c + at, c_step, [&](int m, float* to) TORCHCONV_INLINE_LAMBDA {
            for (int v = 0; v < kVectors; ++v) {
              if (v + 1 < kVectors || whole)
                V::store(to + v * kN, result[m][v]);
              else
                V::store_partial(to + v * kN, result[m][v], lanes);
            }
          });
        });
      }
    }
    panel += tile.panel_size, bias += kTerm, column += kTerm;
  }
}

}  // namespace

DirectMicrokernel<float> direct_run_microkernel(int64_t filters) {
  constexpr int kL = kLanes<float>;
  if constexpr (kVectorBytes == 64) {
    if (filters <= kL / 2) return direct_run<kL / 2, 1, kL, kMaxRows>;
    static const bool halves = halves_wide_vectors();
    if (halves && filters <= kL) return direct_run<kL / 2, 2, kL, kMaxRows>;
    if (halves && filters <= kL + kL / 2) return direct_run<kL / 2, 3, 2 * kL, kMaxRows / 2>;
    if (kL < filters && filters <= kL + kL / 2) return direct_run<kL, 2, 2 * kL, kMaxRows, 2>;
  }
  return filters <= kL ? direct_run<kL, 1, kL, kMaxRows> : direct_run<kL, 2, 2 * kL, kMaxRows>;
}

}  // namespace torchconv::cpu
