// channel_columns_winograd. With rows d and taps g of a column of the kernel the two outputs are
//   y0 = A + B + C, y1 = B - C + D, and of the taps 0, 1, 2
//   A = (d0 - d2) g0, B = (d1 + d2) (g0 + g1 + g2) / 2, C = (d2 - d1) (g0 - g1 + g2) / 2,
//   D = (d3 - d1) g2, to which each further pair of taps f, f + 1 adds
//   A += (d[f] - d[f+1]) g[f], B += d[f+1] (g[f] + g[f+1]), D += (d[f+2] - d[f+1]) g[f+1].
// A and D go straight into the outputs of a tile. Additions have pipes of their own on many
// machines.
#include "cpu/microkernels/channel_columns_winograd.h"

#include <algorithm>

#include "core/range.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;

template <int R>
struct Tile {
  const float* rows[R + 1];  // at the first source column of the tile
  int64_t pitch;
  uint32_t inside;  // bit c: source column c is there
  float* out[2];
  int64_t out_step;
  const float* next;
  float* next_out;
  int64_t next_row, next_out_row;
  bool streams, clamps;
  float most;
};

// Kept out of filter_tile, whose registers are all in use. GCC takes a function of prefetches alone
// for one without effect and leaves its calls out.
template <int R>
__attribute__((noinline)) void fetch_ahead(const Tile<R>& t, int64_t at) {
  __asm__ volatile("");
  for (int64_t line = 0; line < 2; ++line) {
    const float* next = t.next + line * t.next_row + at;
    for (int64_t c = 0; c < kWinogradTile; ++c) __builtin_prefetch(next + c * t.pitch, 0, 2);
    if (t.next_out == nullptr) continue;
    const float* out = t.next_out + line * t.next_out_row + at;
    for (int64_t c = 0; c < kWinogradTile; ++c) __builtin_prefetch(out + c * t.out_step, 1);
  }
}

// One vector of channels, `at` elements from the first; total becomes NaN where the sum of
// the outputs, in an order that nothing but the tile decides, is not finite.
template <int R>
TORCHCONV_INLINE void filter_tile(const Tile<R>& t, int64_t at, const float* weights,
                                  Register start, Register& total) {
  constexpr int kParts = R / 2, kSources = kWinogradTile + R - 1;
  const auto source = [&](int row, int column) TORCHCONV_INLINE_LAMBDA {
    return V::load(t.rows[row] + column * t.pitch + at);
  };
  const auto weight = [&](int product, int s) TORCHCONV_INLINE_LAMBDA {
    Register w = V::load(weights + (product * R + s) * kL);
    keep_in_register(w);
    return w;
  };
  if (t.next != nullptr) fetch_ahead(t, at);
  Register y[2][kWinogradTile];
  unroll<kWinogradTile>([&](auto j) TORCHCONV_INLINE_LAMBDA {
    y[0][j] = start;
    y[1][j] = Register{};
  });
  // outputs[line] += the products of two sums of sources, sums(column, u, v), of which the weights
  // of v are second.
  const auto add_products = [&](int first, int second, auto&& sums) TORCHCONV_INLINE_LAMBDA {
    Register u[kSources], v[kSources];
    unroll<kSources>([&](auto c) TORCHCONV_INLINE_LAMBDA {
      if ((t.inside >> c & 1) != 0)
        sums(c, u[c], v[c]);
      else
        u[c] = v[c] = Register{};
    });
    unroll<R>([&](auto s) TORCHCONV_INLINE_LAMBDA {
      const Register a = weight(first, s), b = weight(second, s);
      unroll<kWinogradTile>([&](auto j) TORCHCONV_INLINE_LAMBDA {
        y[0][j] += a * u[j + s];
        y[1][j] += b * v[j + s];
      });
    });
  };
  // B and C.
  add_products(product_b(0), kProductC,
               [&](int c, Register& u, Register& v) TORCHCONV_INLINE_LAMBDA {
                 Register d1 = source(1, c), d2 = source(2, c);
                 keep_in_register(d1);
                 keep_in_register(d2);
                 u = d1 + d2;
                 v = d2 - d1;
               });
  unroll<kParts - 1>([&](auto p) TORCHCONV_INLINE_LAMBDA {
    constexpr int kPart = decltype(p)::value + 1;
    Register u[kSources];
    unroll<kSources>([&](auto c) TORCHCONV_INLINE_LAMBDA {
      u[c] = (t.inside >> c & 1) != 0 ? source(2 * kPart + 2, c) : Register{};
      keep_in_register(u[c]);
    });
    unroll<R>([&](auto s) TORCHCONV_INLINE_LAMBDA {
      const Register b = weight(product_b(kPart), s);
      unroll<kWinogradTile>([&](auto j) TORCHCONV_INLINE_LAMBDA { y[0][j] += b * u[j + s]; });
    });
  });
  unroll<kWinogradTile>([&](auto j) TORCHCONV_INLINE_LAMBDA {
    const Register b = y[0][j], c = y[1][j];
    y[0][j] = b + c;
    y[1][j] = b - c;
  });
  // A and D.
  unroll<kParts>([&](auto p) TORCHCONV_INLINE_LAMBDA {
    constexpr int kPart = decltype(p)::value, kRow = kPart == 0 ? 0 : 2 * kPart + 1;
    add_products(product_a(R, kPart), product_a(R, kPart) + 1,
                 [&](int c, Register& u, Register& v) TORCHCONV_INLINE_LAMBDA {
                   if constexpr (kPart == 0) {
                     u = source(0, c) - source(2, c);
                     v = source(3, c) - source(1, c);
                   } else {
                     Register middle = source(kRow + 1, c);
                     keep_in_register(middle);
                     u = source(kRow, c) - middle;
                     v = source(kRow + 2, c) - middle;
                   }
                 });
  });
  Register sum{};
  unroll<kWinogradTile>([&](auto j) TORCHCONV_INLINE_LAMBDA { sum += y[0][j] + y[1][j]; });
  total += sum * 0.0f;
  if (t.clamps) {
    const Register most = V::broadcast(t.most);
    unroll<2 * kWinogradTile>([&](auto i) TORCHCONV_INLINE_LAMBDA {
      Register& v = y[i / kWinogradTile][i % kWinogradTile];
      v = clamped(v, most);
    });
  }
  unroll<2>([&](auto line) TORCHCONV_INLINE_LAMBDA {
    if (t.out[line] == nullptr) return;
    float* out = t.out[line] + at;
    if (t.streams)
      unroll<kWinogradTile>(
          [&](auto j) TORCHCONV_INLINE_LAMBDA { stream_bytes(out + j * t.out_step, y[line][j]); });
    else
      unroll<kWinogradTile>(
          [&](auto j) TORCHCONV_INLINE_LAMBDA { V::store(out + j * t.out_step, y[line][j]); });
  });
}

// Of zeros and NaN.
bool is_finite(Register total) {
  float lanes[kL];
  V::store(lanes, total);
  return std::all_of(lanes, lanes + kL, [](float lane) { return lane == 0; });
}

// Two output rows of a strip of columns for a kernel of 3. There is room for all weights in
// registers, so that columns are walked one by one: each source is loaded once, and the four sums
// of three output columns roll on.
struct Walk {
  const float* rows[4];  // at the first source column of the strip
  int64_t pitch[4];      // zero where a row is not there
  int64_t columns;       // outputs
  int64_t left, right;   // source columns that are there
  float* out[2];
  int64_t out_step;
  const float* next;  // two source rows that the next outputs read beside these, or null
  float* next_out;    // two output rows that are written next, or null
  int64_t next_step, next_row, next_out_row;
  bool streams, clamps;
  float most;
};

// A line of each of two rows, into the second cache: in the first one it would not stay until the
// next pair of rows, and what lies in the second comes fast enough.
TORCHCONV_INLINE void fetch(const float* p, int64_t row) {
  __builtin_prefetch(p, 0, 2);
  __builtin_prefetch(p + row, 0, 2);
}

TORCHCONV_INLINE void walk_columns(const Walk& t, int64_t at, const float* weights, Register start,
                                   Register& total) {
  constexpr int R = 3;
  Register w[4][R];
  unroll<4 * R>([&](auto i)
                    TORCHCONV_INLINE_LAMBDA { w[i / R][i % R] = V::load(weights + i * kL); });
  const auto a = [&](int s) TORCHCONV_INLINE_LAMBDA { return w[product_a(R, 0)][s]; };
  const auto b = [&](int s) TORCHCONV_INLINE_LAMBDA { return w[product_b(0)][s]; };
  const auto c = [&](int s) TORCHCONV_INLINE_LAMBDA { return w[kProductC][s]; };
  const auto d = [&](int s) TORCHCONV_INLINE_LAMBDA { return w[product_a(R, 0) + 1][s]; };
  struct Sums {
    Register a{}, b, c{}, d{};
  };
  Sums first, second;  // of the output columns that have had one and two source columns
  first.b = second.b = start;
  const float* rows[4];
  unroll<4>([&](auto r) TORCHCONV_INLINE_LAMBDA { rows[r] = t.rows[r] + at; });
  const bool two = t.out[1] != nullptr;
  float* out = t.out[0] + at;
  float* second_out = two ? t.out[1] + at : nullptr;
  const float* next = t.next != nullptr ? t.next + at : nullptr;
  float* next_out = t.next_out != nullptr ? t.next_out + at : nullptr;
  for (int64_t column = 0; column < t.columns + R - 1; ++column) {
    Sums sums = second, newest;
    second = first;
    newest.b = start;
    if (column >= t.left && column < t.right) {
      const Register d0 = V::load(rows[0]), d1 = V::load(rows[1]), d2 = V::load(rows[2]),
                     d3 = V::load(rows[3]);
      const Register xa = d0 - d2, xb = d1 + d2, xc = d2 - d1, xd = d3 - d1;
      sums.b += b(2) * xb;
      sums.c += c(2) * xc;
      sums.a += a(2) * xa;
      sums.d += d(2) * xd;
      second.b += b(1) * xb;
      second.c += c(1) * xc;
      second.a += a(1) * xa;
      second.d += d(1) * xd;
      newest.b += b(0) * xb;
      newest.c = c(0) * xc;
      newest.a = a(0) * xa;
      newest.d = d(0) * xd;
    }
    first = newest;
    unroll<4>([&](auto r) TORCHCONV_INLINE_LAMBDA { rows[r] += t.pitch[r]; });
    if (column >= R - 1) {
      Register y0 = sums.a + (sums.b + sums.c), y1 = sums.d + (sums.b - sums.c);
      total += (y0 + y1) * 0.0f;
      if (next != nullptr) {
        fetch(next, t.next_row);
        next += t.next_step;
      }
      if (next_out != nullptr) {
        fetch(next_out, t.next_out_row);
        next_out += t.out_step;
      }
      if (t.clamps) {
        const Register most = V::broadcast(t.most);
        y0 = clamped(y0, most);
        y1 = clamped(y1, most);
      }
      if (t.streams) {
        stream_bytes(out, y0);
        if (two) stream_bytes(second_out, y1);
      } else {
        V::store(out, y0);
        if (two) V::store(second_out, y1);
      }
      out += t.out_step;
      if (two) second_out += t.out_step;
    }
  }
}

// Row pairs from top to bottom in each strip of columns, whose rows stay in the first cache.
bool walk_rows(const ChannelColumns& p, const ChannelColumnsWinograd& t) {
  constexpr int64_t R = 3, kStrip = 28;
  const int64_t vectors = ceil_div(p.channels, kL);
  Register total{};
  for (int64_t j = 0; j < p.columns; j += kStrip) {
    Walk walk;
    walk.columns = std::min(kStrip, p.columns - j);
    walk.left = p.left - j;
    walk.right = p.right - j;
    walk.out_step = t.out_step;
    walk.next_step = p.pitch;
    walk.next_row = t.src_row;
    walk.next_out_row = t.out_row;
    walk.streams = t.streams;
    walk.clamps = t.clamps;
    walk.most = t.most;
    for (int64_t i = t.first; i < t.last; i += 2) {
      const bool two = i + 1 < t.last;
      const int64_t y = i + t.first_h, next = y + R + 1;
      const float* src = t.src + y * t.src_row + j * p.pitch;
      unroll<4>([&](auto r) TORCHCONV_INLINE_LAMBDA {
        const bool there = y + r >= 0 && y + r < t.src_rows && (r < R || two);
        walk.rows[r] = there ? src + r * t.src_row : t.zeros;
        walk.pitch[r] = there ? p.pitch : 0;
      });
      walk.out[0] = t.out + (i - t.first) * t.out_row + j * t.out_step;
      walk.out[1] = two ? walk.out[0] + t.out_row : nullptr;
      walk.next =
          next >= 0 && next + 1 < t.src_rows ? src + (R + 1) * t.src_row + p.pitch : nullptr;
      walk.next_out = i + 3 < t.fetch_end ? walk.out[0] + 2 * t.out_row : nullptr;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = std::min(v * kL, p.channels - kL);
        walk_columns(walk, lane, t.weights + v * winograd_column_products(R) * R * kL,
                     V::load(t.start + lane), total);
      }
    }
  }
  return is_finite(total);
}

// Tiles from left to right, and each strip of them from top to bottom. The last tile of a row and
// the last vector of channels overlap the ones before them.
template <int R>
bool filter_rows(const ChannelColumns& p, const ChannelColumnsWinograd& t) {
  constexpr int64_t kProducts = winograd_column_products(R) * R * kL;
  const int64_t vectors = ceil_div(p.channels, kL);
  Register total{};
  for (int64_t column = 0; column < p.columns; column += kWinogradTile) {
    const int64_t j = std::min(column, p.columns - kWinogradTile);
    Tile<R> tile;
    tile.pitch = p.pitch;
    tile.inside = 0;
    for (int c = 0; c < kWinogradTile + R - 1; ++c)
      tile.inside |= static_cast<uint32_t>(j + c >= p.left && j + c < p.right) << c;
    tile.out_step = t.out_step;
    tile.next_row = t.src_row;
    tile.next_out_row = t.out_row;
    tile.streams = t.streams;
    tile.clamps = t.clamps;
    tile.most = t.most;
    for (int64_t i = t.first; i < t.last; i += 2) {
      const bool two = i + 1 < t.last;
      const int64_t y = i + t.first_h, next = y + R + 1;
      const float* src = t.src + y * t.src_row + j * p.pitch;
      unroll<R + 1>([&](auto r) TORCHCONV_INLINE_LAMBDA {
        const bool there = y + r >= 0 && y + r < t.src_rows && (r < R || two);
        tile.rows[r] = there ? src + r * t.src_row : t.zeros;
      });
      float* out = t.out + (i - t.first) * t.out_row + j * t.out_step;
      tile.out[0] = out;
      tile.out[1] = two ? out + t.out_row : nullptr;
      tile.next = t.fetches && next >= 0 && next + 1 < t.src_rows
                      ? src + (R + 1) * t.src_row + R / 2 * p.pitch
                      : nullptr;
      tile.next_out = i + 3 < t.fetch_end ? out + 2 * t.out_row : nullptr;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lane = std::min(v * kL, p.channels - kL);
        filter_tile<R>(tile, lane, t.weights + v * kProducts, V::load(t.start + lane), total);
      }
    }
  }
  return is_finite(total);
}

}  // namespace

bool channel_columns_winograd(const ChannelColumns& p, const ChannelColumnsWinograd& t) {
  if constexpr (kFiltersColumns) {
    if (p.R == 3 && channel_columns_walk(p)) return walk_rows(p, t);
    if (p.R == 3) return filter_rows<3>(p, t);
    if (p.R == 5) return filter_rows<5>(p, t);
    return filter_rows<7>(p, t);
  }
  return false;
}

void winograd_column_weights(int64_t R, const float* taps, float* weights) {
  const auto put = [&](int64_t product, int64_t s, Register w) {
    V::store(weights + (product * R + s) * kL, w);
  };
  for (int64_t s = 0; s < R; ++s) {
    const auto tap = [&](int64_t r) { return V::load(taps + (r * R + s) * kL); };
    const Register ends = tap(0) + tap(2);
    put(product_b(0), s, (ends + tap(1)) * 0.5f);
    put(kProductC, s, (ends - tap(1)) * 0.5f);
    const auto products = static_cast<int>(R);
    put(product_a(products, 0), s, tap(0));
    put(product_a(products, 0) + 1, s, tap(2));
    for (int part = 1; part < R / 2; ++part) {
      const Register first = tap(2 * part + 1), second = tap(2 * part + 2);
      put(product_b(part), s, first + second);
      put(product_a(products, part), s, first);
      put(product_a(products, part) + 1, s, second);
    }
  }
}

}  // namespace torchconv::cpu
