// The body of direct_even_microkernel, see direct_tile.h, instantiated for each kind of term.
#pragma once

#include "cpu/microkernels/direct_tile_impl.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {

// Neighbouring terms are read from one address.
inline constexpr int64_t kTermsTogether = 4;

// Rows [begin, end) of the tile.
template <typename Product, int kRows>
void even_rows(const DirectTile<typename Product::Element>& tile, int64_t begin, int64_t end_row) {
  using T = typename Product::Element;
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes, kSize = sizeof(T);
  // Of seven rows one has a pointer, which the others lie multiples of the step behind.
  constexpr int kApart = 7, kLines = (kRows + kApart - 1) / kApart;
  const int64_t step = tile.pixel_step * kSize;
  Register sum[kRows];
  const char* next = static_cast<const char*>(tile.next);
  const int64_t next_step = tile.next_step;
  // Terms are runs of neighbours, as long as a tap has channels: the ends tell the rest.
  const int64_t together = tile.run >= kTermsTogether ? kTermsTogether : INT64_MAX;
  const bool rounds = Product::kRounds && tile.rounded != nullptr;
  // Two rows of c fill a vector, which take no sums of other chunks nor a residual.
  const bool rounds_pairs =
      rounds && tile.packed && tile.before == nullptr && tile.residual == nullptr;
  for (int64_t part = begin; part < end_row; part += kRows) {
    const char* line[kLines];
#pragma GCC unroll 32
    for (int r = 0; r < kLines; ++r)
      line[r] = reinterpret_cast<const char*>(tile.a + tile.pixels[part]) + r * kApart * step;
    int64_t at = 0;  // the term that they point to
    const TermSegment* segment = tile.segments;
    Register start = V::load(tile.bias);
    for (bool first = true;; first = false) {
#pragma GCC unroll 32
      for (int m = 0; m < kRows; ++m) sum[m] = start;
      for (;; ++segment) {
        const int32_t* term = tile.terms + segment->begin;
        const int32_t* const end = tile.terms + segment->end;
        const T* b = tile.b + segment->begin * kL;
        int64_t ahead = 0;
        const auto add = [&](int q) TORCHCONV_INLINE_LAMBDA {
#pragma GCC unroll 32
          for (int r = 0; r < kLines; ++r) {
            line[r] += q == 0 ? ahead : kSize;
            // Or GCC keeps sums with the step, more than there are registers for.
            __asm__("" : "+r"(line[r]));
          }
          const Register filters = V::load(b + q * kL);
          __builtin_prefetch(next, 0, 2);
          next += next_step;
#pragma GCC unroll 32
          for (int m = 0; m < kRows; ++m)
            Product::add_element(
                sum[m], reinterpret_cast<const T*>(line[m / kApart] + m % kApart * step), filters);
        };
        while (term != end) {
          ahead = (*term - at) * kSize;
          at = *term;
          if (end - term >= together && term[kTermsTogether - 1] - term[0] == kTermsTogether - 1) {
            unroll<kTermsTogether>(add);
            at += kTermsTogether - 1;
            term += kTermsTogether, b += kTermsTogether * kL;
          } else {
            add(0);
            ++term, b += kL;
          }
        }
        if (segment->ends_block) break;
      }
      if (!first) {
#pragma GCC unroll 32
        for (int m = 0; m < kRows; ++m) sum[m] += V::load(tile.totals + m * kL);
      }
      if (segment++->last) break;
#pragma GCC unroll 32
      for (int m = 0; m < kRows; ++m) V::store(tile.totals + m * kL, sum[m]);
      start = Register{};
    }
    Register finished[kRows][1];
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) finished[m][0] = sum[m];
    if constexpr (Product::kRounds) {
      if (rounds_pairs) {
        if (tile.clamp) clamp_sums(finished, V::broadcast(tile.low), V::broadcast(tile.high));
        BFloat16* const to = tile.rounded + tile.rounded_rows[part];
#pragma GCC unroll 32
        for (int m = 0; m < kRows; m += 2) {
          const Register two[2] = {finished[m][0], finished[m + 1][0]};
          Product::store(to + m * kL, two, kL);
        }
        continue;
      }
    }
    finish_rows<Product>(tile, finished, tile.c_rows + part,
                         rounds ? tile.rounded_rows + part : nullptr, 0);
  }
}

// Where the registers allow, twice the rows of other tiles: as many sums wait less for each other.
template <typename Product>
void direct_even_tile(const DirectTile<typename Product::Element>& tile) {
  constexpr int kTall = kVectorBytes == 64 ? 2 * kMaxRows : kMaxRows;
  static_assert(kTall * Vec<typename Product::Element>::kLanes <=
                kTileSize<typename Product::Element>);
  const int64_t tall = tile.rows / kTall * kTall;
  even_rows<Product, kTall>(tile, 0, tall);
  if (tall < tile.rows) even_rows<Product, kMaxRows>(tile, tall, tile.rows);
}

}  // namespace torchconv::cpu
