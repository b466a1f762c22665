// See channels_last_copy.h.
#include "cpu/channels_last_copy.h"

#include <algorithm>

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Rows that are read, and elements of each that are written together: a few lines of either.
constexpr int64_t kRows = 64;

}  // namespace

ConvProblem channels_last_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.layout = q.weight_layout = Layout::kNHWC;
  return q;
}

template <typename T>
void transpose_images(const T* from, int64_t n, int64_t rows, int64_t columns, T* to,
                      const Parallel& pool) {
  const int64_t pieces = ceil_div(rows, kRows);
  const WorkSplit split(n * pieces, static_cast<double>(kRows * columns));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % pieces * kRows, image = item / pieces * rows * columns;
      pack_transposed(from + image + first * columns, columns, std::min(kRows, rows - first),
                      columns, to + image + first, rows);
    }
  });
}

template void transpose_images(const float*, int64_t, int64_t, int64_t, float*, const Parallel&);
template void transpose_images(const double*, int64_t, int64_t, int64_t, double*, const Parallel&);

}  // namespace torchconv::cpu
