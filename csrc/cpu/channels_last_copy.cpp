// See channels_last_copy.h.
#include "cpu/channels_last_copy.h"

#include <algorithm>
#include <utility>

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// Rows that are read, and elements of each that are written together: a few lines of either.
constexpr int64_t kRows = 64;
// Columns of few rows that are written together.
constexpr int64_t kColumns = 4096;

bool is_few(int64_t rows) { return 2 <= rows && rows <= 4; }

// Vector kPart of kFew rows whose elements take turns, of these rows' vectors: lane e of all is
// element e / kFew of row e % kFew. Each shuffle puts the lanes of one more row in their places.
template <int kFew, int kPart, typename Type, int... I>
TORCHCONV_INLINE Type take_turns(const Type (&rows)[kFew], std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I), kFirst = kPart * kN;
  Type turns = shuffle<((kFirst + I) / kFew % kN + ((kFirst + I) % kFew == 1 ? kN : 0))...>(
      rows[0], rows[1]);
  if constexpr (kFew > 2)
    turns = shuffle<((kFirst + I) % kFew == 2 ? kN + (kFirst + I) / kFew : I)...>(turns, rows[2]);
  if constexpr (kFew > 3)
    turns = shuffle<((kFirst + I) % kFew == 3 ? kN + (kFirst + I) / kFew : I)...>(turns, rows[3]);
  return turns;
}

template <int kFew, typename V, int... kParts>
TORCHCONV_INLINE void store_turns(const typename V::Type (&rows)[kFew], void* to,
                                  std::integer_sequence<int, kParts...>) {
  using Lanes = std::make_integer_sequence<int, V::kLanes>;
  (V::store(static_cast<char*>(to) + kParts * sizeof(typename V::Type),
            take_turns<kFew, kParts>(rows, Lanes())),
   ...);
}

// Of the images of cameras and the like, whose channels fill no vector.
template <int kFew, typename T>
void interleave_rows(const T* from, int64_t columns, int64_t count, T* to) {
  using V = Vec<T, kVectorBytes / sizeof(T)>;
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    typename V::Type rows[kFew];
    for (int r = 0; r < kFew; ++r) rows[r] = V::load(from + r * columns + i);
    store_turns<kFew, V>(rows, to + kFew * i, std::make_integer_sequence<int, kFew>());
  }
  for (; i < count; ++i)
    for (int r = 0; r < kFew; ++r) to[kFew * i + r] = from[r * columns + i];
}

template <int kFew, typename T>
void interleave_images(const T* from, int64_t n, int64_t columns, T* to, const Parallel& pool) {
  const int64_t pieces = ceil_div(columns, kColumns);
  const WorkSplit split(n * pieces, static_cast<double>(kFew * kColumns));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % pieces * kColumns, image = item / pieces * kFew * columns;
      interleave_rows<kFew>(from + image + first, columns, std::min(kColumns, columns - first),
                            to + image + kFew * first);
    }
  });
}

// Whether rows were so few.
template <typename T>
bool interleave_few(const T* from, int64_t n, int64_t rows, int64_t columns, T* to,
                    const Parallel& pool) {
  if (rows == 2) interleave_images<2>(from, n, columns, to, pool);
  if (rows == 3) interleave_images<3>(from, n, columns, to, pool);
  if (rows == 4) interleave_images<4>(from, n, columns, to, pool);
  return is_few(rows);
}

template <typename T>
void change_layout(const LayoutChange& c, const T* from, T* to, const Parallel& pool) {
  if (c.layout == Layout::kNHWC)
    transpose_images(from, c.n, c.channels, c.pixels, to, pool);
  else
    transpose_images(from, c.n, c.pixels, c.channels, to, pool);
}

}  // namespace

ConvProblem channels_last_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.layout = q.weight_layout = Layout::kNHWC;
  return q;
}

ConvProblem channels_last_images(const ConvProblem& p) {
  ConvProblem q = p;
  q.layout = Layout::kNHWC;
  return q;
}

ConvProblem contiguous_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.layout = q.weight_layout = Layout::kNCHW;
  return q;
}

template <typename T>
void transpose_images(const T* from, int64_t n, int64_t rows, int64_t columns, T* to,
                      const Parallel& pool) {
  if (interleave_few(from, n, rows, columns, to, pool)) return;
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

bool LayoutChange::exists() const {
  return size == 4 || size == 8 || (size == 2 && layout == Layout::kNHWC && is_few(channels));
}

void LayoutChange::run(const void* from, void* to, const Parallel& pool) const {
  if (size == 8)
    change_layout(*this, static_cast<const double*>(from), static_cast<double*>(to), pool);
  else if (size == 4)
    change_layout(*this, static_cast<const float*>(from), static_cast<float*>(to), pool);
  else
    interleave_few(static_cast<const uint16_t*>(from), n, channels, pixels,
                   static_cast<uint16_t*>(to), pool);
}

template void transpose_images(const float*, int64_t, int64_t, int64_t, float*, const Parallel&);
template void transpose_images(const double*, int64_t, int64_t, int64_t, double*, const Parallel&);

}  // namespace torchconv::cpu
