// The pixels that a direct weight gradient sums over, cut into chunks: which of them a tap sees,
// and which cache lines of x and dz a chunk reads first.
//
// A chunk is a run of pixels of the batch, short enough to be added up in registers: the rounding
// error grows with the length of a chunk plus the number of chunks instead of with the number of
// pixels. A tap sees the pixels of a chunk as a list of runs, pieces of image rows on which it
// stays inside the image, merged where they are neighbours in both images.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Neighbouring pixels of one row of the grid: terms [term, term + count) of a chunk.
struct PixelPiece {
  int64_t n, i, j, term, count;
};

// The same as one tap sees them: offsets in x and dz, which advance by x_step and dz_step.
struct TapPixels {
  int64_t x, dz, term, count;
};

// Addresses of cache lines, in the order in which they are to be fetched. Those beyond the capacity
// are dropped.
class FetchList {
 public:
  static constexpr int64_t kCapacity = 6144;
  // Elements of the memory of a list; a kernel may read kSlack entries from any index up to size.
  static constexpr int64_t kSlack = 256;

  explicit FetchList(uint64_t* lines) : lines_(lines) {}
  void clear() { size_ = 0; }
  // [p + offset, p + offset + bytes): two calls in ascending order may share a line.
  void add(const void* p, int64_t offset, int64_t bytes);
  // Fills the slack with `p`.
  void close(const void* p);
  int64_t size() const { return size_; }
  const void* const* from(int64_t i) const {
    return reinterpret_cast<const void* const*>(lines_ + (i < size_ ? i : size_));
  }

 private:
  uint64_t* lines_;
  int64_t size_ = 0;
};

class WgradPixels {
 public:
  // view is fprop's, with pixels and taps.
  explicit WgradPixels(const ConvView& view);

  int64_t chunks() const { return chunks_; }
  int64_t chunk() const { return chunk_; }  // pixels, at most FetchList::kSlack
  // Most pieces, and most runs of a tap, in a chunk.
  int64_t max_pieces() const { return chunk_ / view_.J + chunk_ / view_.pixels() + 3; }
  int64_t x_step() const { return x_step_; }
  int64_t dz_step() const { return dz_step_; }
  // Whether all taps see the same pixels, a constant distance from those of the first.
  bool shared() const { return shared_; }
  int64_t tap_offset(int64_t tap) const {
    return (view_.taps[tap].h - view_.taps[0].h) * view_.src.row +
           (view_.taps[tap].w - view_.taps[0].w) * view_.src.column;
  }

  int64_t pieces(int64_t chunk, PixelPiece* pieces) const;
  int64_t tap_pixels(int64_t tap, const PixelPiece* pieces, int64_t count, TapPixels* runs) const;
  // All pixels, as no tap sees them: their x is 0.
  int64_t dz_pixels(const PixelPiece* pieces, int64_t count, TapPixels* runs) const;

  // What a chunk reads of channels [c, c + n): of x, only what the chunk before it did not read.
  // `ranges` is scratch.
  void fetch_x(const void* x, int64_t size, int64_t c, int64_t n, const PixelPiece* pieces,
               int64_t count, Range* ranges, FetchList* list) const;
  void fetch_dz(const void* dz, int64_t size, int64_t c, int64_t n, const PixelPiece* pieces,
                int64_t count, Range* ranges, FetchList* list) const;
  int64_t max_ranges() const { return max_pieces() * new_rows(); }

 private:
  struct TapRange {
    Range i, j;
  };
  static void add_run(const TapPixels& run, int64_t x_step, int64_t dz_step, TapPixels* runs,
                      int64_t* found);
  static void add_range(Range range, int64_t size, Range* ranges, int64_t* found);
  // Rows of x that a row of the grid reads and the one above it did not.
  int64_t new_rows() const;
  int64_t x_ranges(int64_t size, const PixelPiece* pieces, int64_t count, Range* ranges) const;
  int64_t dz_ranges(int64_t size, const PixelPiece* pieces, int64_t count, Range* ranges) const;
  void fetch(const void* data, int64_t size, const ConvStrides& stride, int64_t step, int64_t c,
             int64_t n, const Range* ranges, int64_t count, FetchList* list) const;

  const ConvView& view_;
  int64_t chunk_, chunks_;
  int64_t x_step_, dz_step_;
  bool shared_;
  std::vector<TapRange> ranges_;
  // The rows and columns that the taps span, and how many different ones.
  int64_t last_h_, first_w_, last_w_, rows_, columns_;
};

}  // namespace torchconv::cpu
