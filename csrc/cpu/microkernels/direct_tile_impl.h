// The body of direct_tile.h, instantiated once for each kind of term in a file of its own.
#pragma once

#include <utility>

#include "cpu/microkernels/clamp_sums.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// A term is one channel.
template <typename T>
struct ChannelProduct {
  using Element = T;
  using Register = typename Vec<T>::Type;
  static constexpr bool kRounds = false;
  static TORCHCONV_INLINE void add(Register& sum, Register x, Register filters) {
    sum += x * filters;
  }
  static TORCHCONV_INLINE void add_element(Register& sum, const T* x, Register filters) {
    sum += *x * filters;
  }
};

// What follows the products of a tile's rows, at `column` of c's rows.
template <typename Product, int kRows, int kVectors, typename Register>
TORCHCONV_INLINE void finish_rows(const DirectTile<typename Product::Element>& tile,
                                  Register (&sum)[kRows][kVectors], const int64_t* c_rows,
                                  const int64_t* rounded_rows, int64_t column) {
  using T = typename Product::Element;
  using V = Vec<T>;
  constexpr int64_t kL = V::kLanes;
  const bool rounds = Product::kRounds && tile.rounded != nullptr;
  const int64_t lanes = tile.lanes;
  if (tile.before != nullptr) {
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
      const T* c = tile.before + c_rows[m] + column;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[m][v] += v + 1 < kVectors || lanes == kL ? V::load(c + v * kL)
                                                     : V::load_partial(c + v * kL, lanes);
    }
  }
  if constexpr (Product::kRounds) {
    if (rounds && tile.residual != nullptr) {
#pragma GCC unroll 32
      for (int m = 0; m < kRows; ++m)
        Product::add_row(sum[m], tile.residual + rounded_rows[m] + column, lanes);
    }
  }
  if (tile.clamp) clamp_sums(sum, V::broadcast(tile.low), V::broadcast(tile.high));
  if constexpr (Product::kRounds) {
    if (rounds) {
#pragma GCC unroll 32
      for (int m = 0; m < kRows; ++m)
        Product::store(tile.rounded + rounded_rows[m] + column, sum[m], lanes);
      return;
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m) {
    T* c = tile.c + c_rows[m] + column;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (tile.stream)
        stream_bytes(c + v * kL, sum[m][v]);
      else if (v + 1 < kVectors || lanes == kL)
        V::store(c + v * kL, sum[m][v]);
      else
        V::store_partial(c + v * kL, sum[m][v], lanes);
    }
  }
}

template <typename Product, int kRows, int kVectors>
void direct_tile(const DirectTile<typename Product::Element>& tile) {
  using T = typename Product::Element;
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  Register sum[kRows][kVectors];
  T* const totals = tile.totals;

  // More pointers than there are registers for are read from memory at each use: GCC would else
  // keep them in vector registers, and moving them from there takes the time of a product.
  constexpr int kNear = 8, kFar = kRows > kNear ? kRows - kNear : 1;
  const T* row[kNear];
  const T* volatile far[kFar];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    if (m < kNear)
      row[m] = tile.a + tile.pixels[m];
    else
      far[m - kNear] = tile.a + tile.pixels[m];
  }
  const bool rounds = Product::kRounds && tile.rounded != nullptr;
  // The lines of c are asked for along the way by a tall tile, which has the time: as many misses
  // at once would hold up its first products. Rows of one vector are mostly neighbours in memory,
  // and so few products do not repay it.
  constexpr bool kAsksAlong = kRows > kNear && kVectors > 1;
  const int64_t result_size = static_cast<int64_t>(rounds ? sizeof(BFloat16) : sizeof(T));
  const int64_t last_byte = (kVectors * kL - 1) * result_size;
  // What is read as well as written, where there is such.
  const BFloat16* const rounded = tile.residual != nullptr ? tile.residual : tile.rounded;
  const T* const result = tile.before != nullptr ? tile.before : tile.c;
  const auto result_row = [&](int m) {
    return rounds ? reinterpret_cast<const char*>(rounded + tile.rounded_rows[m])
                  : reinterpret_cast<const char*>(result + tile.c_rows[m]);
  };
  const bool streams = tile.stream && tile.before == nullptr;
  // A rounded row is mostly one line.
  [[maybe_unused]] const uintptr_t both_ends = rounds ? 0 : 1;
  [[maybe_unused]] const char* volatile ask[16];
  if constexpr (kAsksAlong) {
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m)
      ask[m] = streams ? reinterpret_cast<const char*>(tile.b) : result_row(m < kRows ? m : 0);
  }

  const int32_t* const terms = tile.terms;
  const T* panel = tile.b;
  const char* next = static_cast<const char*>(tile.next);
  const int64_t next_step = tile.next_step;
  for (int64_t at_panel = 0, column = 0; at_panel < tile.panels;
       ++at_panel, panel += tile.panel_size, column += kVectors * kL) {
    if (kRows <= kNear && !streams) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const char* const result_line = result_row(m) + column * result_size;
        __builtin_prefetch(result_line, 1, 3);
        __builtin_prefetch(result_line + last_byte, 1, 3);
      }
    }
    const TermSegment* segment = tile.segments;
    Register start[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) start[v] = V::load(tile.bias + column + v * kL);
    for (bool first = true;; first = false) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = start[v];
      for (;; ++segment) {
        const int32_t* term = terms + segment->begin;
        const int32_t* const end = terms + segment->end;
        const T* b = panel + segment->begin * (kVectors * kL);
        for (; term != end; ++term) {
          const int64_t at = *term;
          Register filters[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) filters[v] = V::load(b + v * kL);
          __builtin_prefetch(next, 0, 2);
          if constexpr (kAsksAlong) {
            const uintptr_t place = reinterpret_cast<uintptr_t>(term) / sizeof(*term);
            __builtin_prefetch(ask[(place >> both_ends) % 16] + (place & both_ends) * last_byte +
                                   column * result_size,
                               1, 3);
          }
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const T* const p = (m < kNear ? row[m] : far[m - kNear]) + at;
            if constexpr (kVectors == 1) {
              Product::add_element(sum[m][0], p, filters[0]);
              continue;
            }
            const Register x = V::broadcast(*p);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) Product::add(sum[m][v], x, filters[v]);
          }
          b += kVectors * kL;
          next += next_step;
        }
        if (segment->ends_block) break;
      }
      if (!first) {
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[m][v] += V::load(totals + (m * kVectors + v) * kL);
      }
      if (segment++->last) break;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) V::store(totals + (m * kVectors + v) * kL, sum[m][v]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) start[v] = Register{};
    }

    finish_rows<Product>(tile, sum, tile.c_rows, tile.rounded_rows, column);
  }
}

// [vectors - 1][rows - 1]
template <typename Product, int... kRow>
DirectMicrokernel<typename Product::Element> find_direct_tile(int64_t rows, int64_t vectors,
                                                              std::integer_sequence<int, kRow...>) {
  static constexpr DirectMicrokernel<typename Product::Element> kTable[kMaxVectors][kMaxRows] = {
      {direct_tile<Product, kRow + 1, 1>...}, {direct_tile<Product, kRow + 1, 2>...}};
  return kTable[vectors - 1][rows - 1];
}

}  // namespace torchconv::cpu
