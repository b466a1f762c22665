// The weight gradient as a matrix product over pixels.
//
// The operand that repeats the image (x seen through the taps) is packed by plain copies in either
// layout, and the smaller one, dz, is transposed where needed. With pixels contiguous (NCHW) rows
// are (c, t) and the vector runs along filters; with channels contiguous (NHWC) rows are filters
// and the vector runs along (t, c). A task is a block of (c, t) and a slab of pixels; it adds its
// products to a partial gradient of its own, and the slabs are added in order at the end. Slabs and
// blocks follow from the shape alone, so that the bits do not depend on the number of threads.
#include "cpu/conv_wgrad.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Rows or columns of (c, t) in a task: large against the transposition of dz that each repeats,
// small against the second-level cache.
constexpr int64_t kTermsPerTask = 512;
// Slabs are cut until there are about this many tasks, but none below kMinChunks reductions.
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kMinChunks = 6;
// Partial gradients take at most about this many bytes.
constexpr int64_t kPartialBytes = 64 << 20;

// A run of pixels of one sample's row: terms [term, term + n) of a chunk.
struct ChunkRun {
  int64_t n, i, j, term, length;
};

// Copy of a run through one tap: zeros around `length` elements from src.
struct RunCopy {
  int64_t src, term, before, length, after;
};

template <typename T>
class ConvWgrad {
 public:
  using A = Wide<T>;

  ConvWgrad(const ConvView& view, const T* dz, const T* x, T* dw)
      : view_(view),
        dz_(dz),
        x_(x),
        dw_(dw),
        pixel_rows_(view.src_pixels_contiguous()),
        blocks_(reduction_blocks(view.C, static_cast<int64_t>(view.taps.size()), kTermsPerTask,
                                 pixel_rows_)),
        terms_(view.N * view.pixels()),
        chunks_(ceil_div(terms_, kDepth)),
        chunk_(round_up(ceil_div(terms_, chunks_), kLanes<A>)) {
    chunks_ = ceil_div(terms_, chunk_);
    for (const ReductionBlock& block : blocks_) most_ = std::max(most_, block.size());
    partial_ = pixel_rows_ ? most_ * padded_k() : view.K * odd_lines(most_);
    const int64_t tasks = view.groups * static_cast<int64_t>(blocks_.size());
    const int64_t bytes = std::max<int64_t>(1, tasks * partial_ * static_cast<int64_t>(sizeof(A)));
    slabs_ = std::min(ceil_div(kTasksWanted, tasks), chunks_ / kMinChunks);
    slabs_ = std::max<int64_t>(1, std::min(slabs_, kPartialBytes / bytes));
    slab_chunks_ = ceil_div(chunks_, slabs_);
    slabs_ = ceil_div(chunks_, slab_chunks_);
  }

  void run(const Parallel& pool) {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    const int64_t tasks = view_.groups * blocks * slabs_;
    const WorkSplit split(tasks, static_cast<double>(slab_chunks_ * chunk_) *
                                     static_cast<double>(view_.K) * static_cast<double>(most_));
    const int64_t rows_size = round_up((pixel_rows_ ? most_ : view_.K) * kARow<A>, 16);
    const int64_t columns_size = kDepth * (pixel_rows_ ? padded_k() : odd_lines(most_)) + 16;
    const int64_t runs = max_runs();
    int64_t taps = 0;
    for (const ReductionBlock& block : blocks_) taps = std::max(taps, block.tn);
    const int64_t copies = pixel_rows_ ? taps * runs : 0;
    std::vector<std::vector<TapRun>> tap_run_lists;
    if (!pixel_rows_)
      for (const ReductionBlock& block : blocks_) tap_run_lists.push_back(tap_runs(view_, block));

    Buffer<A> partial(tasks * partial_);
    Buffer<A> rows(split.slots * rows_size);
    Buffer<A> columns(split.slots * columns_size);
    Buffer<ChunkRun> run_lists(split.slots * runs);
    Buffer<RunCopy> copy_lists(split.slots * copies);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t task = begin; task < end; ++task) {
        Task t;
        t.slab = task % slabs_;
        const int64_t b = task / slabs_ % blocks;
        t.g = task / slabs_ / blocks;
        t.block = &blocks_[b];
        t.taps = pixel_rows_ ? nullptr : &tap_run_lists[b];
        t.rows = rows.get() + slot * rows_size;
        t.columns = columns.get() + slot * columns_size;
        t.runs = run_lists.get() + slot * runs;
        t.copies = copy_lists.get() + slot * copies;
        t.partial = partial.get() + task * partial_;
        accumulate(t);
      }
    });
    finish(partial.get(), pool);
  }

 private:
  struct Task {
    int64_t slab, g;
    const ReductionBlock* block;
    const std::vector<TapRun>* taps;
    A* rows;
    A* columns;
    ChunkRun* runs;
    RunCopy* copies;
    A* partial;
  };

  int64_t padded_k() const { return round_up(view_.K, kLanes<A>); }
  // A row stride of an odd number of vectors: neighbouring rows fall into different cache sets.
  static int64_t odd_lines(int64_t columns) {
    return (ceil_div(columns, kLanes<A>) | 1) * kLanes<A>;
  }
  int64_t max_runs() const {
    return std::min(chunk_, chunk_ / view_.J + 3 + chunk_ / view_.pixels());
  }

  int64_t chunk_runs(int64_t first, int64_t count, ChunkRun* runs) const {
    int64_t found = 0;
    for (int64_t term = 0; term < count;) {
      const int64_t n = (first + term) / view_.pixels(), pixel = (first + term) % view_.pixels();
      const int64_t i = pixel / view_.J, j = pixel % view_.J;
      const int64_t length = std::min(view_.J - j, count - term);
      runs[found++] = {n, i, j, term, length};
      term += length;
    }
    return found;
  }

  void accumulate(const Task& t) const {
    const int64_t first = t.slab * slab_chunks_, last = std::min(first + slab_chunks_, chunks_);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * chunk_, depth = std::min(chunk_, terms_ - begin);
      const int64_t run_count = chunk_runs(begin, depth, t.runs);
      if (pixel_rows_) {
        pack_x_rows(t, run_count);
        pack_dz_columns(t, run_count);
        multiply(t, t.block->size(), view_.K, padded_k(), depth, chunk > first);
      } else {
        pack_dz_rows(t, run_count);
        pack_x_columns(t, run_count);
        multiply(t, view_.K, t.block->size(), odd_lines(most_), depth, chunk > first);
      }
    }
  }

  // partial[row][ld] (+)= rows x columns, where columns is [depth][ld].
  void multiply(const Task& t, int64_t rows, int64_t columns, int64_t ld, int64_t depth,
                bool accumulate) const {
    const int64_t tiles = ceil_div(rows, kMaxRows);
    for (int64_t column = 0; column < columns; column += kPanel<A>) {
      const int64_t vectors = ceil_div(std::min(kPanel<A>, columns - column), kLanes<A>);
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t n = rows / tiles + (tile < rows % tiles ? 1 : 0);
        gemm_microkernel<A>(n, vectors)({t.rows + row * kARow<A>, t.columns + column,
                                         t.partial + row * ld + column, depth, ld, ld, accumulate});
        row += n;
      }
    }
  }

  // ---- Pixels contiguous: rows [c][t][term], columns [term][k].

  void pack_x_rows(const Task& t, int64_t run_count) const {
    const ReductionBlock& block = *t.block;
    RunCopy* copy = t.copies;
    for (int64_t tap = block.t0; tap < block.t0 + block.tn; ++tap) {
      for (int64_t r = 0; r < run_count; ++r, ++copy) {
        const ChunkRun& run = t.runs[r];
        const int64_t h = run.i * view_.step_h + view_.taps[tap].h;
        const int64_t w = run.j * view_.step_w + view_.taps[tap].w;
        Range range{0, 0};
        if (h >= 0 && h < view_.H) range = valid_range(run.length, view_.step_w, w, view_.W);
        if (range.begin >= range.end) range = {0, 0};
        *copy = {run.n * view_.src.n + h * view_.src.row + w + range.begin * view_.step_w, run.term,
                 range.begin, range.end - range.begin, run.length - range.end};
      }
    }
    for (int64_t c = 0; c < block.cn; ++c) {
      const T* src = x_ + (t.g * view_.C + block.c0 + c) * view_.src.c;
      copy = t.copies;
      for (int64_t tap = 0; tap < block.tn; ++tap) {
        A* row = t.rows + (c * block.tn + tap) * kARow<A>;
        for (int64_t r = 0; r < run_count; ++r, ++copy) {
          A* dst = row + copy->term;
          fill_zero(dst, copy->before);
          dst += copy->before;
          if (view_.step_w == 1) {
            if (copy->length > 0) copy_wide(dst, src + copy->src, copy->length);
          } else {
            for (int64_t l = 0; l < copy->length; ++l)
              dst[l] = to_wide(src[copy->src + l * view_.step_w]);
          }
          fill_zero(dst + copy->length, copy->after);
        }
      }
    }
  }

  void pack_dz_columns(const Task& t, int64_t run_count) const {
    const int64_t ld = padded_k();
    const T* dz = dz_ + t.g * view_.K * view_.dst.c;
    for (int64_t r = 0; r < run_count; ++r) {
      const ChunkRun& run = t.runs[r];
      const T* src = dz + run.n * view_.dst.n + run.i * view_.dst.row + run.j * view_.dst.column;
      A* dst = t.columns + run.term * ld;
      if (view_.dst.column == 1 && view_.dst.c != 1) {
        pack_transposed(src, view_.dst.c, view_.K, run.length, dst, ld);
      } else {
        for (int64_t l = 0; l < run.length; ++l, src += view_.dst.column)
          for (int64_t k = 0; k < view_.K; ++k) dst[l * ld + k] = to_wide(src[k * view_.dst.c]);
      }
      for (int64_t l = 0; l < run.length; ++l)
        for (int64_t k = view_.K; k < ld; ++k) dst[l * ld + k] = 0;
    }
  }

  // ---- Channels contiguous: rows [k][term], columns [term][t][c].

  void pack_dz_rows(const Task& t, int64_t run_count) const {
    const T* dz = dz_ + t.g * view_.K * view_.dst.c;
    for (int64_t r = 0; r < run_count; ++r) {
      const ChunkRun& run = t.runs[r];
      const T* src = dz + run.n * view_.dst.n + run.i * view_.dst.row + run.j * view_.dst.column;
      pack_transposed(src, view_.dst.column, run.length, view_.K, t.rows + run.term, kARow<A>);
    }
  }

  void pack_x_columns(const Task& t, int64_t run_count) const {
    const ReductionBlock& block = *t.block;
    const int64_t ld = odd_lines(most_), padded = round_up(block.size(), kLanes<A>);
    for (int64_t r = 0; r < run_count; ++r) {
      const ChunkRun& run = t.runs[r];
      const T* src = x_ + run.n * view_.src.n + t.g * view_.C + block.c0;
      for (int64_t l = 0; l < run.length; ++l) {
        A* row = t.columns + (run.term + l) * ld;
        pack_channel_row(view_, block, *t.taps, src, run.i, run.j + l, row);
        fill_zero(row + block.size(), padded - block.size());
      }
    }
  }

  // ---- dw from the slabs' partial gradients, in order.

  void finish(A* partial, const Parallel& pool) const {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    const int64_t ld = pixel_rows_ ? padded_k() : odd_lines(most_);
    const WorkSplit split(view_.groups * blocks * view_.K,
                          static_cast<double>(most_) * static_cast<double>(4 * slabs_ + 4));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t k = item % view_.K, b = item / view_.K % blocks;
        const int64_t g = item / view_.K / blocks;
        const ReductionBlock& block = blocks_[b];
        const A* first = partial + (g * blocks + b) * slabs_ * partial_;
        T* dw = dw_ + g * view_.weight_group + k * view_.weight_k;
        for (int64_t c = 0; c < block.cn; ++c) {
          for (int64_t tap = 0; tap < block.tn; ++tap) {
            const int64_t at =
                pixel_rows_ ? (c * block.tn + tap) * ld + k : k * ld + tap * block.cn + c;
            A sum = first[at];
            for (int64_t s = 1; s < slabs_; ++s) sum += first[s * partial_ + at];
            dw[(block.c0 + c) * view_.weight_c + view_.taps[block.t0 + tap].weight] =
                from_wide<T>(sum);
          }
        }
      }
    });
  }

  const ConvView& view_;
  const T* dz_;
  const T* x_;
  T* dw_;
  bool pixel_rows_;
  std::vector<ReductionBlock> blocks_;
  int64_t terms_, chunks_, chunk_;
  int64_t most_ = 0;  // (c, t) in a block
  int64_t partial_, slabs_, slab_chunks_;
};

}  // namespace

template <typename T>
void conv_wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  ConvWgrad<T>(view, dz, x, dw).run(pool);
}

template void conv_wgrad(const ConvView&, const float*, const float*, float*, const Parallel&);
template void conv_wgrad(const ConvView&, const double*, const double*, double*, const Parallel&);
template void conv_wgrad(const ConvView&, const BFloat16*, const BFloat16*, BFloat16*,
                         const Parallel&);
template void conv_wgrad(const ConvView&, const Float16*, const Float16*, Float16*,
                         const Parallel&);

}  // namespace torchconv::cpu
