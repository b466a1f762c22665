// The body of direct_pair_run_microkernel, see direct_tile.h: as direct_run.h, of pairs.
#pragma once

#include "cpu/microkernels/direct_tile_impl.h"

namespace torchconv::cpu {

template <typename Product, int kVectors>
void direct_pair_run(const DirectTile<float>& tile) {
  using V = Vec<float>;
  using Register = V::Type;
  // Of three rows one has a pointer: the others lie once and twice the step behind it.
  constexpr int kRows = kMaxRows, kApart = 3, kPointers = (kRows + kApart - 1) / kApart;
  constexpr int64_t kL = V::kLanes, kSize = sizeof(float), kTerm = kVectors * kL;
  const int64_t step = tile.pixel_step * kSize;
  const auto* next = static_cast<const char*>(tile.next);
  const int64_t next_step = tile.next_step;
  const bool rounds = tile.rounded != nullptr;
  const BFloat16* const rounded = tile.residual != nullptr ? tile.residual : tile.rounded;
  const float* panel = tile.b;
  for (int64_t at_panel = 0, column = 0; at_panel < tile.panels;
       ++at_panel, panel += tile.panel_size, column += kTerm) {
    for (int64_t part = 0; part < tile.rows; part += kRows) {
      // What is written, or read as well, a row at a time.
      const int64_t* const places = (rounds ? tile.rounded_rows : tile.c_rows) + part;
      const char* const result = rounds
                                     ? reinterpret_cast<const char*>(rounded + places[0] + column)
                                     : reinterpret_cast<const char*>(tile.c + places[0] + column);
      const int64_t result_step = (places[1] - places[0]) * (rounds ? 2 : kSize);
      const auto* const first = reinterpret_cast<const char*>(tile.a + tile.pixels[part]);
      Register sum[kRows][kVectors], start[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) start[v] = V::load(tile.bias + column + v * kL);
      for (const TermSegment* segment = tile.segments;; ++segment) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[m][v] = start[v];
        const char* row[kPointers];
#pragma GCC unroll 8
        for (int r = 0; r < kPointers; ++r)
          row[r] = first + tile.terms[segment->begin] * kSize + r * kApart * step;
        const float* b = panel + segment->begin * kTerm;
        const int64_t terms = segment->end - segment->begin;
        for (int64_t term = 0; term < terms; ++term, b += kTerm, next += next_step) {
          Register filters[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) filters[v] = V::load(b + v * kL);
          __builtin_prefetch(next, 0, 2);
          __builtin_prefetch(result + (term & (kAskedRows - 1)) * result_step, 1, 3);
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const auto* const p =
                reinterpret_cast<const float*>(row[m / kApart] + m % kApart * step);
            if constexpr (kVectors == 1) {
              Product::add_element(sum[m][0], p, filters[0]);
              continue;
            }
            const Register x = V::broadcast(*p);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) Product::add(sum[m][v], x, filters[v]);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kPointers; ++r) {
            row[r] += kSize;
            // Or the compiler keeps sums with the step, more than there are registers for.
            __asm__("" : "+r"(row[r]));
          }
        }
        if (segment != tile.segments) {
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
              sum[m][v] += V::load(tile.totals + (m * kVectors + v) * kL);
        }
        if (segment->last) break;
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            V::store(tile.totals + (m * kVectors + v) * kL, sum[m][v]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) start[v] = Register{};
      }
      finish_rows<Product>(tile, sum, tile.c_rows + part,
                           rounds ? tile.rounded_rows + part : nullptr, column);
    }
  }
}

}  // namespace torchconv::cpu
