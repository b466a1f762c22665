// How dz is cut into tiles for the weight gradient in Winograd's domain.
//
// The d*d phases of a dilated kernel (every d-th row and column of dz and x) are problems without
// dilation whose gradients add up. An axis of a phase is cut into tiles of kTile gradients and,
// where that covers it too, of one fewer. A segment is a few neighbouring tiles of one row of
// tiles; a block is a run of segments whose tiles are transformed together. Blocks follow from the
// problem alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"

namespace torchconv::cpu::winograd_gradient {

// Neighbouring tiles of one row of tiles of a phase of a sample: wide ones, then narrow ones.
struct Segment {
  int64_t n, row, column;      // of the first gradient, in dz
  int64_t height;              // of its tiles
  int64_t wide, narrow;        // tiles
  int64_t wide_at, narrow_at;  // the first of each in the planes of the block
};

// The planes hold the tiles of a block in the order tall narrow, tall wide, short wide, short
// narrow, so that those which have the last value of an axis, or of both, are neighbours.
struct Block {
  int64_t first, segments;
  int64_t tiles[4];
  int64_t begin(bool last_column) const { return last_column ? tiles[0] : 0; }
  int64_t end(bool last_row, bool last_column) const {
    return tiles[0] + tiles[1] + (last_row ? 0 : tiles[2]) +
           (last_row || last_column ? 0 : tiles[3]);
  }
};

struct TileAxis {
  int64_t tile, wide, narrow;
  TileAxis(int64_t size, int64_t tile_size)
      : tile(tile_size), wide(ceil_div(size, tile)), narrow(std::min(wide, wide * tile - size)) {
    wide -= narrow;
  }
  int64_t count() const { return wide + narrow; }
  int64_t start(int64_t i) const { return i * tile - std::max<int64_t>(0, i - wide); }
};

// All tiles of a problem.
struct Tiling {
  std::vector<Segment> segments;
  std::vector<Block> blocks;
  int64_t tiles = 0;
  int64_t block_tiles = 0;    // at most, in a block
  int64_t segment_tiles = 0;  // at most, in a segment

  // Segments of at most segment_most tiles; cut_blocks has yet to be called.
  Tiling(const ConvView& view, int64_t tile, int64_t dilation_h, int64_t dilation_w,
         int64_t segment_most) {
    const int64_t h = std::min(dilation_h, view.I), w = std::min(dilation_w, view.J);
    for (int64_t n = 0; n < view.N; ++n) {
      for (int64_t i = 0; i < h; ++i) {
        const TileAxis rows(ceil_div(view.I - i, dilation_h), tile);
        for (int64_t row = 0; row < rows.count(); ++row) {
          for (int64_t j = 0; j < w; ++j) {
            const TileAxis columns(ceil_div(view.J - j, dilation_w), tile);
            const int64_t parts = ceil_div(columns.count(), segment_most);
            for (int64_t p = 0; p < parts; ++p) {
              const int64_t first = columns.count() * p / parts;
              const int64_t count = columns.count() * (p + 1) / parts - first;
              Segment s{};
              s.n = n;
              s.row = i + rows.start(row) * dilation_h;
              s.column = j + columns.start(first) * dilation_w;
              s.height = row < rows.wide ? tile : tile - 1;
              s.wide = std::min(std::max<int64_t>(0, columns.wide - first), count);
              s.narrow = count - s.wide;
              segments.push_back(s);
              tiles += count;
              segment_tiles = std::max(segment_tiles, count);
            }
          }
        }
      }
    }
  }

  // Cuts the segments into blocks of about equal size, at most `most` tiles or one segment.
  void cut_blocks(int64_t most, int64_t tile) {
    const int64_t count = ceil_div(tiles, most);
    most = std::max(segment_tiles, std::min(most, ceil_div(tiles, count) + segment_tiles - 1));
    const int64_t size = static_cast<int64_t>(segments.size());
    for (int64_t i = 0; i < size;) {
      Block b{i, 0, {}};
      int64_t held = 0;
      for (; i < size; ++i) {
        const Segment& s = segments[i];
        if (held > 0 && held + s.wide + s.narrow > most) break;
        held += s.wide + s.narrow;
        b.tiles[s.height == tile ? 1 : 2] += s.wide;
        b.tiles[s.height == tile ? 0 : 3] += s.narrow;
      }
      b.segments = i - b.first;
      int64_t at[4] = {};
      for (int type = 1; type < 4; ++type) at[type] = at[type - 1] + b.tiles[type - 1];
      for (int64_t j = b.first; j < i; ++j) {
        Segment& s = segments[j];
        int64_t& wide = at[s.height == tile ? 1 : 2];
        int64_t& narrow = at[s.height == tile ? 0 : 3];
        s.wide_at = wide;
        s.narrow_at = narrow;
        wide += s.wide;
        narrow += s.narrow;
      }
      block_tiles = std::max(block_tiles, held);
      blocks.push_back(b);
    }
  }
};

}  // namespace torchconv::cpu::winograd_gradient
