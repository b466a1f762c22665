// How the problems of grouped_mma_rows.h are cut into items and blocks.
#include <algorithm>

#include "core/range.h"
#include "cuda/grouped_mma_rows.h"
#include "cuda/grouped_mma_rows_kernel.h"
#include "cuda/grouped_mma_rows_wgrad_kernel.h"
#include "cuda/shared_memory.h"

namespace torchconv::cuda {
namespace {

bool takes(const MmaAxis& h, const MmaAxis& w, bool backward) {
  const auto axis = [&](const MmaAxis& a) {
    return a.taps == 3 && a.dilation == 1 && a.stride <= 2 &&
           (!backward || a.stride == 1 || a.pad == 1);
  };
  return axis(h) && axis(w) && h.stride == w.stride;
}

// Of the source, for the first output.
int first_of(const MmaAxis& a, bool backward) {
  if (!backward) return -a.pad;
  return a.stride == 1 ? a.pad - 2 : 0;
}

// Columns of an item, of at most `most`, and images, of at most so many staged pixels a row; a row
// of an item is `scale` times as many pixels and `more`.
void cut_columns(RowsCut& cut, int64_t batch, int most, int staged, int scale, int more) {
  most = std::min(most, (staged - more) / scale);
  cut.tiles = static_cast<int32_t>(ceil_div(cut.all_columns, most));
  cut.columns = static_cast<int32_t>(ceil_div(cut.all_columns, cut.tiles));
  cut.tiles = static_cast<int32_t>(ceil_div(cut.all_columns, cut.columns));
  cut.line = scale * cut.columns + more;
  const int images = cut.tiles > 1 ? 1 : std::min(most / cut.columns, staged / cut.line);
  cut.images = static_cast<int32_t>(ceil_div(batch, ceil_div(batch, images)));
  cut.row_bytes = cut.images * cut.line * kPixelBytes;
  cut.by_line = Divisor(cut.line), cut.by_columns = Divisor(cut.columns);
  cut.by_tiles = Divisor(cut.tiles);
}

// Rows are cut where that keeps more blocks busy: an item costs what surrounds it, besides what the
// first takes to come. chain: rows that a part may have at most, or 0.
void cut_rows(RowsCut& cut, int64_t batch, int64_t slots, int more_steps, int first_steps,
              int64_t chain) {
  constexpr int64_t kMostParts = 65535;
  const int64_t columns = ceil_div(batch, cut.images) * cut.tiles;
  const int64_t fewest = chain > 0 ? ceil_div(cut.all_rows, chain) : 1;
  const int64_t most = std::max(fewest, std::min<int64_t>(cut.all_rows / 4, 64));
  int64_t best = 0;
  for (int64_t segments = fewest; segments <= most; ++segments) {
    const int64_t rows = ceil_div(cut.all_rows, segments), of_rows = ceil_div(cut.all_rows, rows);
    const int64_t items = columns * of_rows;
    int64_t parts = std::max<int64_t>(slots, 1);
    if (chain > 0) parts = std::max(parts, ceil_div(items * rows, chain));
    parts = std::min({parts, items, kMostParts});
    const int64_t turns = ceil_div(items, parts),
                  waves = ceil_div(parts, std::max<int64_t>(slots, 1));
    const int64_t cost = waves * (turns * (rows + more_steps) + first_steps);
    if (best != 0 && cost >= best) continue;
    best = cost;
    cut.rows = static_cast<int32_t>(rows), cut.segments = static_cast<int32_t>(of_rows);
    cut.parts = static_cast<int32_t>(parts);
    cut.least = static_cast<int32_t>(items / parts),
    cut.longer = static_cast<int32_t>(items % parts);
  }
  cut.by_segments = Divisor(cut.segments);
}

}  // namespace

bool plan_grouped_rows(GroupedRows& p, const Queue& queue) {
  const int units = p.c.group_units;
  if (!takes(p.h, p.w, p.backward) || (units != 1 && units != 2 && units != 4 && units != 8))
    return false;
  return with_rows_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    constexpr int kStep = Shape::kDoubled ? 2 : 1;
    const int64_t cells = 9 * units;
    p.filter_bytes = static_cast<int32_t>(cells | 1) * kUnitBytes;
    p.by_cells = Divisor(cells);
    p.cut.all_rows = static_cast<int32_t>(ceil_div(p.h.outputs, kStep));
    p.cut.all_columns = static_cast<int32_t>(ceil_div(p.w.outputs, kStep));
    p.first_h = first_of(p.h, p.backward), p.first_w = first_of(p.w, p.backward);
    cut_columns(p.cut, p.batch, Shape::kColumns, Shape::kStaged, Shape::kStepRows,
                Shape::kSame ? 2 : 1);
    const int most_images = p.cut.images;
    const int most = shared_of_block(queue.capability);
    const auto bytes_of = [&](int images) {
      p.cut.images = images, p.cut.row_bytes = images * p.cut.line * kPixelBytes;
      p.cut.slot_bytes = Shape::kStepRows * p.cut.row_bytes;
      return Shape::kSteps * p.cut.slot_bytes + filters_bytes(p);
    };
    // Whether it is taken must not depend on the batch.
    if (bytes_of(1) > most) return false;
    int images = most_images;
    while (bytes_of(images) > most) --images;
    const int bytes = bytes_of(images);
    const int blocks = std::min(Shape::kBlocks, (most + 1024) / (bytes + 1024));
    cut_rows(p.cut, p.batch, int64_t{queue.multiprocessors} * blocks / p.c.slabs, Shape::kMoreSteps,
             Shape::kSteps, 0);
    return true;
  });
}

bool plan_grouped_rows_wgrad(GroupedRowsWgrad& p, const Queue& queue) {
  // A warp has the sums of two units of x by two of dz: wider groups have more.
  if (!takes(p.h, p.w, false) || p.c.group_units > 2) return false;
  return with_rows_wgrad_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    constexpr int kStride = Shape::kStride;
    p.cut.all_rows = p.h.outputs, p.cut.all_columns = p.w.outputs;
    p.by_group = Divisor(p.c.group);
    cut_columns(p.cut, p.batch, Shape::kColumns, Shape::kStaged, kStride, 3 - kStride);
    p.dz_at = kStride * p.cut.row_bytes;
    p.cut.slot_bytes = p.dz_at + p.cut.images * p.cut.columns * kPixelBytes;
    // By the shape alone, for a large device.
    if (rows_wgrad_bytes<Shape>(p) > shared_of_block(queue.capability)) return false;
    constexpr int kMost = 227 * 1024;
    const int blocks =
        std::min(Shape::kBlocks, (kMost + 1024) / (rows_wgrad_bytes<Shape>(p) + 1024));
    const int64_t chain = std::max(kRowsChainPixels / (16 * Shape::kStrips), 1);
    cut_rows(p.cut, p.batch, 132 * blocks / p.c.slabs, Shape::kMoreSteps, Shape::kSteps, chain);
    return true;
  });
}

}  // namespace torchconv::cuda
