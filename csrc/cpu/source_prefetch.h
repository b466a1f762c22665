// Asks for memory that will be copied soon, a few cache lines at a time between other work: short
// strided pieces, which the hardware's prefetchers do not foresee. A product that asks for a line
// with each term takes as many as lie side by side: many at once would hold up its first terms.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/range.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

class SourcePrefetch {
 public:
  void clear() {
    pieces_.clear();
    piece_ = part_ = line_ = lines_ = 0;
  }
  // `count` parts of so many bytes, `stride` bytes apart; they may overlap.
  void add(const void* first, int64_t count, int64_t stride, int64_t bytes) {
    if (count <= 0) return;
    const char* const from = static_cast<const char*>(first);
    // Where not all parts start alike, one may reach a line more.
    const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first) % kLine);
    const int64_t most_skew = stride % kLine == 0 ? skew : kLine - 1;
    const int64_t lines = ceil_div(bytes + most_skew, kLine);
    if (count == 1 || stride <= lines * kLine)
      add_piece(from, 1, 0, ceil_div((count - 1) * stride + bytes + skew, kLine));
    else if (lines == 2 && bytes <= kLine)  // two ends
      add_piece(from, count, stride, 1), add_piece(from + bytes - 1, count, stride, 1);
    else
      add_piece(from, count, stride, lines);
  }
  int64_t lines() const { return lines_; }

  void ask(int64_t lines) {
    while (lines > 0) {
      const Run run = take(lines);
      if (run.lines == 0) return;
      ask_run(run);
      lines -= run.lines;
    }
  }

  static constexpr int64_t kLine = 64;
  struct Run {
    const char* first;
    int64_t lines, step;
  };
  // The next lines that lie side by side, or parts of one line each, at most `most`: for the caller
  // to ask for.
  Run take(int64_t most) {
    if (piece_ == static_cast<int64_t>(pieces_.size())) return {nullptr, 0, 0};
    const Piece& piece = pieces_[piece_];
    const char* const first = piece.first + part_ * piece.stride + line_ * kLine;
    const bool short_parts = piece.lines == 1;
    const Run run{first, std::min(short_parts ? piece.count - part_ : piece.lines - line_, most),
                  short_parts ? piece.stride : kLine};
    if (short_parts) {
      part_ += run.lines;
    } else if ((line_ += run.lines) == piece.lines) {
      line_ = 0;
      ++part_;
    }
    if (part_ == piece.count) part_ = 0, ++piece_;
    return run;
  }
  // The same for a tile of so many terms, whose `next` and `next_step` they become; asks for the
  // rest.
  template <typename Tile>
  void give(int64_t lines, int64_t terms, Tile* tile) {
    const Run run = take(std::min(lines, terms));
    tile->next_step = 0;
    if (run.step != kLine && run.lines < terms) {
      ask_run(run);
    } else if (run.lines > 0) {
      // Fewer that lie side by side are each asked for several times.
      tile->next = run.first;
      tile->next_step = run.lines < terms ? ceil_div(run.lines * kLine, terms) : run.step;
    }
    ask(lines - run.lines);
  }

 private:
  static void ask_run(const Run& run) {
    for (int64_t l = 0; l < run.lines; ++l) __builtin_prefetch(run.first + l * run.step, 0, 2);
  }
  struct Piece {
    const char* first;
    int64_t count, stride, lines;
  };
  void add_piece(const char* first, int64_t count, int64_t stride, int64_t lines) {
    pieces_.push_back({first, count, stride, lines});
    lines_ += count * lines;
  }
  std::vector<Piece> pieces_;
  int64_t piece_ = 0, part_ = 0, line_ = 0, lines_ = 0;
};

// A rectangle of some planes (channels or filters), `width` pixels a row, whose first is at first.
template <typename T>
void prefetch_planes(const T* first, const ConvStrides& strides, int64_t planes, int64_t rows,
                     int64_t width, SourcePrefetch& ahead) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  if (rows <= 0) return;
  // Whole rows are one run.
  const bool whole = strides.row == width * strides.column;
  const int64_t run = whole ? rows * width : width;
  for (int64_t r = 0; r < (whole ? 1 : rows); ++r, first += strides.row) {
    if (strides.c == 1)
      ahead.add(first, run, strides.column * kSize, planes * kSize);
    else
      ahead.add(first, planes, strides.c * kSize, run * strides.column * kSize);
  }
}

}  // namespace torchconv::cpu
