// Chunks of pixels: shapes only, no data is read.
#include "cpu/wgrad_pixels.h"

#include <algorithm>
#include <set>

namespace torchconv::cpu {
namespace {

// Pixels of a chunk: whole images where they are small, else whole vectors.
constexpr int64_t kChunk = 192;
constexpr int64_t kMostPixels = 200;
// So few that the first-level cache holds a panel of columns, for 1x1 layers in channels_last whose
// narrower side has so many channels: a panel of one vector is small enough, and the pixels of more
// channels lie too far apart.
constexpr int64_t kNearChunk = 96;
constexpr int64_t kNearChannels = 24, kFarChannels = 256;
constexpr int64_t kLine = 64;

int64_t chunk_size(const ConvView& view) {
  const int64_t image = view.pixels(), all = view.N * image, side = std::min(view.C, view.K);
  if (image <= kMostPixels) return std::min(all, kMostPixels / image * image);
  const bool near = view.taps.size() == 1 && view.groups == 1 && view.src.c == 1 &&
                    view.dst.c == 1 && side >= kNearChannels && side < kFarChannels;
  return std::min(all, round_up(ceil_div(all, ceil_div(all, near ? kNearChunk : kChunk)), 16));
}

}  // namespace

void FetchList::add(const void* p, int64_t offset, int64_t bytes) {
  using V = Vec<uint64_t>;
  const uint64_t begin = reinterpret_cast<uintptr_t>(p) + static_cast<uint64_t>(offset);
  uint64_t line = begin / kLine * kLine;
  if (size_ > 0 && lines_[size_ - 1] == line) line += kLine;
  const int64_t count =
      static_cast<int64_t>(begin + static_cast<uint64_t>(bytes) - line + kLine - 1) / kLine;
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
      chunk_(chunk_size(view)),
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
    add_run(
        {0, p->n * view_.dst.n + p->i * view_.dst.row + p->j * view_.dst.column, p->term, p->count},
        0, dz_step_, runs, &found);
  return found;
}

// Joins a piece of memory to the one before it where the gap between them is less than a line.
void WgradPixels::add_range(Range range, int64_t size, Range* ranges, int64_t* found) {
  if (*found > 0) {
    Range& last = ranges[*found - 1];
    if (range.begin >= last.begin && range.begin <= last.end + kLine / size) {
      last.end = std::max(last.end, range.end);
      return;
    }
  }
  ranges[(*found)++] = range;
}

int64_t WgradPixels::new_rows() const { return std::min(view_.step_h, rows_); }

int64_t WgradPixels::x_ranges(int64_t size, const PixelPiece* pieces, int64_t count,
                              Range* ranges) const {
  int64_t found = 0;
  for (const PixelPiece* p = pieces; p < pieces + count; ++p) {
    const int64_t begin = std::max(p->j * view_.step_w + first_w_, int64_t{0});
    const int64_t end = std::min((p->j + p->count - 1) * view_.step_w + last_w_ + 1, view_.W);
    if (begin >= end) continue;
    for (int64_t row = new_rows() - 1; row >= 0; --row) {
      const int64_t h = p->i * view_.step_h + last_h_ - row;
      if (h < 0 || h >= view_.H) continue;
      const int64_t at = p->n * view_.src.n + h * view_.src.row;
      add_range({at + begin * view_.src.column, at + end * view_.src.column}, size, ranges, &found);
    }
  }
  return found;
}

int64_t WgradPixels::dz_ranges(int64_t size, const PixelPiece* pieces, int64_t count,
                               Range* ranges) const {
  int64_t found = 0;
  for (const PixelPiece* p = pieces; p < pieces + count; ++p) {
    const int64_t at = p->n * view_.dst.n + p->i * view_.dst.row + p->j * view_.dst.column;
    add_range({at, at + p->count * view_.dst.column}, size, ranges, &found);
  }
  return found;
}

void WgradPixels::fetch(const void* data, int64_t size, const ConvStrides& stride, int64_t step,
                        int64_t c, int64_t n, const Range* ranges, int64_t count,
                        FetchList* list) const {
  if (stride.column == 1) {
    for (int64_t channel = c; channel < c + n; ++channel)
      for (const Range* r = ranges; r < ranges + count; ++r)
        list->add(data, (channel * stride.c + r->begin) * size, r->size() * size);
  } else if (step == 1 && n == stride.column) {
    for (const Range* r = ranges; r < ranges + count; ++r)
      list->add(data, r->begin * size, r->size() * size);
  } else {
    for (const Range* r = ranges; r < ranges + count; ++r)
      for (int64_t at = r->begin; at < r->end; at += step * stride.column)
        list->add(data, (at + c) * size, n * size);
  }
}

void WgradPixels::fetch_x(const void* x, int64_t size, int64_t c, int64_t n,
                          const PixelPiece* pieces, int64_t count, Range* ranges,
                          FetchList* list) const {
  const int64_t step = columns_ == 1 ? view_.step_w : 1;
  fetch(x, size, view_.src, step, c, n, ranges, x_ranges(size, pieces, count, ranges), list);
}

void WgradPixels::fetch_dz(const void* dz, int64_t size, int64_t c, int64_t n,
                           const PixelPiece* pieces, int64_t count, Range* ranges,
                           FetchList* list) const {
  fetch(dz, size, view_.dst, 1, c, n, ranges, dz_ranges(size, pieces, count, ranges), list);
}

}  // namespace torchconv::cpu
