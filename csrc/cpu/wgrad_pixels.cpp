// Chunks of pixels: shapes only, no data is read.
#include "cpu/wgrad_pixels.h"

#include <algorithm>
#include <set>

namespace torchconv::cpu {
namespace {

// Pixels of a chunk: whole images where they are small, else whole vectors.
constexpr int64_t kChunk = 192;
constexpr int64_t kMostPixels = 200;
constexpr int64_t kLine = 64;

int64_t chunk_size(int64_t image, int64_t all) {
  if (image <= kMostPixels) return std::min(all, kMostPixels / image * image);
  return std::min(all, round_up(ceil_div(all, ceil_div(all, kChunk)), 16));
}

}  // namespace

void FetchList::add(const void* p, int64_t offset, int64_t bytes) {
  using V = Vec<uint64_t>;
  const uint64_t begin = reinterpret_cast<uintptr_t>(p) + static_cast<uint64_t>(offset);
  uint64_t line = begin / kLine * kLine;
  if (size_ > 0 && lines_[size_ - 1] == line) line += kLine;
  const int64_t count = static_cast<int64_t>(begin + static_cast<uint64_t>(bytes) - line + kLine - 1) / kLine;
  if (count <= 0 || size_ + count > kCapacity) return;
  auto lines = V::broadcast(line) + V::iota() * kLine;
  for (int64_t i = 0; i < count; i += V::kLanes, lines += V::kLanes * kLine)
    V::store(lines_ + size_ + i, lines);
  size_ += count;
}

void FetchList::close(const void* p) {
  std::fill(lines_ + size_, lines_ + size_ + kSlack, reinterpret_cast<uintptr_t>(p));
}

WgradPixels::WgradPixels(const ConvView& view)
    : view_(view),
      chunk_(chunk_size(view.pixels(), view.N * view.pixels())),
      chunks_(ceil_div(view.N * view.pixels(), chunk_)),
      shared_(true) {
  x_step_ = view.J > 1 ? view.step_w * view.src.column
                       : (view.I > 1 ? view.step_h * view.src.row : view.src.n);
  dz_step_ = view.J > 1 ? view.dst.column : (view.I > 1 ? view.dst.row : view.dst.n);
  last_h_ = view.taps[0].h;
  first_w_ = last_w_ = view.taps[0].w;
  std::set<int64_t> rows, columns;
  for (const ConvTap& tap : view.taps) {
    ranges_.push_back({valid_range(view.I, view.step_h, tap.h, view.H),
                       valid_range(view.J, view.step_w, tap.w, view.W)});
    const TapRange &first = ranges_.front(), &now = ranges_.back();
    shared_ = shared_ && now.i.begin == first.i.begin && now.i.end == first.i.end &&
              now.j.begin == first.j.begin && now.j.end == first.j.end;
    last_h_ = std::max(last_h_, tap.h);
    first_w_ = std::min(first_w_, tap.w);
    last_w_ = std::max(last_w_, tap.w);
    rows.insert(tap.h);
    columns.insert(tap.w);
  }
  rows_ = static_cast<int64_t>(rows.size());
  columns_ = static_cast<int64_t>(columns.size());
}

int64_t WgradPixels::pieces(int64_t chunk, PixelPiece* pieces) const {
  const int64_t first = chunk * chunk_;
  const int64_t count = std::min(chunk_, view_.N * view_.pixels() - first);
  int64_t n = first / view_.pixels();
  int64_t i = first % view_.pixels() / view_.J, j = first % view_.J;
  int64_t found = 0;
  for (int64_t term = 0; term < count; ++found) {
    const int64_t length = std::min(view_.J - j, count - term);
    pieces[found] = {n, i, j, term, length};
    term += length;
    j = 0;
    if (++i == view_.I) {
      i = 0;
      ++n;
    }
  }
  return found;
}

// Joins a run to the one before it where it continues that.
void WgradPixels::add_run(const TapPixels& run, int64_t x_step, int64_t dz_step, TapPixels* runs,
                          int64_t* found) {
  if (*found > 0) {
    TapPixels& last = runs[*found - 1];
    if (run.x == last.x + last.count * x_step && run.dz == last.dz + last.count * dz_step &&
        run.term == last.term + last.count) {
      last.count += run.count;
      return;
    }
  }
  runs[(*found)++] = run;
}

int64_t WgradPixels::tap_pixels(int64_t tap, const PixelPiece* pieces, int64_t count,
                                TapPixels* runs) const {
  const ConvTap& t = view_.taps[tap];
  const TapRange& range = ranges_[tap];
  int64_t found = 0;
  for (const PixelPiece* p = pieces; p < pieces + count; ++p) {
    if (p->i < range.i.begin || p->i >= range.i.end) continue;
    const int64_t begin = std::max(p->j, range.j.begin);
    const int64_t end = std::min(p->j + p->count, range.j.end);
    if (begin >= end) continue;
    add_run({p->n * view_.src.n + (p->i * view_.step_h + t.h) * view_.src.row +
                 (begin * view_.step_w + t.w) * view_.src.column,
             p->n * view_.dst.n + p->i * view_.dst.row + begin * view_.dst.column,
             p->term + begin - p->j, end - begin},
            x_step_, dz_step_, runs, &found);
  }
  return found;
}

int64_t WgradPixels::dz_pixels(const PixelPiece* pieces, int64_t count, TapPixels* runs) const {
  int64_t found = 0;
  for (const PixelPiece* p = pieces; p < pieces + count; ++p)
    add_run({0, p->n * view_.dst.n + p->i * view_.dst.row + p->j * view_.dst.column, p->term,
             p->count},
            0, dz_step_, runs, &found);
  return found;
}

void WgradPixels::fetch_x(const void* x, int64_t size, int64_t c, int64_t n,
                          const PixelPiece* pieces, int64_t count, FetchList* list) const {
  const ConvStrides& stride = view_.src;
  const bool pixels_inner = stride.column == 1;
  const int64_t step = columns_ == 1 ? view_.step_w : 1;
  for (int64_t channel = 0; channel < (pixels_inner ? n : 1); ++channel) {
    for (const PixelPiece* p = pieces; p < pieces + count; ++p) {
      const int64_t begin = std::max(p->j * view_.step_w + first_w_, int64_t{0});
      const int64_t end =
          std::min((p->j + p->count - 1) * view_.step_w + last_w_ + 1, view_.W);
      if (begin >= end) continue;
      for (int64_t row = std::min(view_.step_h, rows_) - 1; row >= 0; --row) {
        const int64_t h = p->i * view_.step_h + last_h_ - row;
        if (h < 0 || h >= view_.H) continue;
        const int64_t at = p->n * stride.n + h * stride.row + begin * stride.column +
                           (c + channel) * stride.c;
        if (pixels_inner) {
          list->add(x, at * size, (end - begin) * size);
        } else if (step == 1 && n == stride.column) {
          list->add(x, at * size, (end - begin) * n * size);
        } else {
          for (int64_t w = 0; w < end - begin; w += step)
            list->add(x, (at + w * stride.column) * size, n * size);
        }
      }
    }
  }
}

void WgradPixels::fetch_dz(const void* dz, int64_t size, int64_t c, int64_t n,
                           const PixelPiece* pieces, int64_t count, FetchList* list) const {
  const ConvStrides& stride = view_.dst;
  const bool pixels_inner = stride.column == 1;
  for (int64_t channel = 0; channel < (pixels_inner ? n : 1); ++channel) {
    for (const PixelPiece* p = pieces; p < pieces + count; ++p) {
      const int64_t at = p->n * stride.n + p->i * stride.row + p->j * stride.column +
                         (c + channel) * stride.c;
      if (pixels_inner) {
        list->add(dz, at * size, p->count * size);
      } else if (n == stride.column) {
        list->add(dz, at * size, p->count * n * size);
      } else {
        for (int64_t j = 0; j < p->count; ++j)
          list->add(dz, (at + j * stride.column) * size, n * size);
      }
    }
  }
}

}  // namespace torchconv::cpu
