// Asks for memory that will be copied soon, a few cache lines at a time between other work: short
// strided pieces, which the hardware's prefetchers do not foresee.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/range.h"

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
    if (stride <= bytes) bytes += (count - 1) * stride, count = 1;
    // Where not all parts start alike, one may reach a line more.
    const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(first) % kLine);
    const int64_t lines = ceil_div(bytes + (stride % kLine == 0 ? skew : kLine - 1), kLine);
    pieces_.push_back({static_cast<const char*>(first), count, stride, lines});
    lines_ += count * lines;
  }
  int64_t lines() const { return lines_; }

  void ask(int64_t lines) {
    while (lines > 0 && piece_ < static_cast<int64_t>(pieces_.size())) {
      const Piece& piece = pieces_[piece_];
      const char* p = piece.first + part_ * piece.stride;
      const int64_t end = std::min(piece.lines, line_ + lines);
      lines -= end - line_;
      for (; line_ < end; ++line_) __builtin_prefetch(p + line_ * kLine, 0, 2);
      if (line_ < piece.lines) return;
      line_ = 0;
      if (++part_ < piece.count) continue;
      part_ = 0;
      ++piece_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Piece {
    const char* first;
    int64_t count, stride, lines;
  };
  std::vector<Piece> pieces_;
  int64_t piece_ = 0, part_ = 0, line_ = 0, lines_ = 0;
};

}  // namespace torchconv::cpu
