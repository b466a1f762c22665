// The register-tile product of convolutions on channels_last images, straight from where the pixels
// lie to where the result belongs:
//
//   c[m][n] = clamp(bias[n] + sum over terms t of a[pixels[m] + terms[t]] * b[t*width + n])
//
// Row m is a pixel and reads the source through its own pointer, so that a tile takes any pixels:
// neighbours or strided, of one image row or several (Dukhan, "The Indirect Convolution Algorithm",
// arXiv 1907.02129; his table has a pointer for each pixel and tap, this one a pointer for each
// pixel and an offset for each term, since padding is written out before). Column n is a filter, b
// a packed panel. The epilogue is applied while the tile is in registers. A call may do several
// tiles of the same pixels and neighbouring panels, so that what few terms sum does not wait for
// the table of pixels to be read again.
#pragma once

#include <cstdint>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

template <typename T>
inline constexpr int64_t kTileSize = kMaxRows * kPanel<T>;

// At least those of a tile, and a power of two.
inline constexpr int64_t kAskedRows = 16;
static_assert(kAskedRows >= kMaxRows);

// Terms [begin, end) of a tile. They are summed in registers up to one with ends_block, and these
// sums then in memory (see kDepth).
struct TermSegment {
  int32_t begin, end;
  bool ends_block, last;  // last also ends a block
};

template <typename T>
struct DirectTile {
  const T* a;
  const int64_t* pixels;  // [rows]
  const int32_t* terms;
  const TermSegment* segments;
  T* totals;           // scratch: kTileSize, aligned to 64 bytes
  const T* b;          // [panel][term][vectors of lanes]
  int64_t panels;      // side by side in b, bias and a row of c
  int64_t panel_size;  // elements of b
  T* c;                // row m starts at c + c_rows[m]
  const int64_t* c_rows;
  int64_t lanes;    // of the last vector that exist in c; all where there are several panels
  const T* before;  // null, or sums that are added, in rows as those of c: often c itself
  bool stream;      // past the caches: every row of c aligned and its vectors whole
  const T* bias;    // [vectors of lanes]
  bool clamp;
  T low, high;        // applied with NaN kept
  BFloat16* rounded;  // pairs only, or null: where row m goes instead of c, at rounded_rows[m]
  const int64_t* rounded_rows;
  const BFloat16* residual;  // with rounded, or null: is added, in rows as those of rounded
  const void* next;          // what a later call will read, asked for along the way: a piece of it
  int64_t next_step;         // for each term
  int64_t pixel_step;        // from a pixel to the one behind it, where these lie evenly apart
  int64_t rows;              // pixels, of those that take several kMaxRows of them
  int64_t run;               // neighbours that terms come in, as many as a tap has channels
  bool packed;               // evenly apart, their rows of c or rounded are whole vectors, no gap
  // Of direct_run.h alone: from each of their rows of c to the one behind it, and another such
  // piece, or two lines of each of kAskedRows rows that lie also_row bytes apart; in turn with the
  // same so many bytes behind it.
  int64_t c_step;
  const void* also;
  int64_t also_step, also_row, also_apart;
};

template <typename T>
using DirectMicrokernel = void (*)(const DirectTile<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors; T is float or double.
template <typename T>
DirectMicrokernel<T> direct_microkernel(int64_t rows, int64_t vectors);
// For one vector, whose products wait for loads: of several times kMaxRows pixels, all of which lie
// pixel_step apart. It reads fewer pointers, and adds to each sum as the other does.
template <typename T>
DirectMicrokernel<T> direct_even_microkernel();

// Where the processor has dot products of bfloat16 (avx512_bf16): a term is a pair of neighbouring
// channels in the 32 bits of an element of a, and in those of each element of b; sums are float.
// The instruction rounds each step to nearest even and takes denormals for zero. With
// TORCHCONV_PAIR_PRODUCTS=0 in the environment, for tests, no processor has them.
bool has_pair_products();
DirectMicrokernel<float> direct_pair_microkernel(int64_t rows, int64_t vectors);
DirectMicrokernel<float> direct_even_pair_microkernel();
// Of several times kMaxRows pixels, as direct_even_microkernel, whose terms are neighbours.
DirectMicrokernel<float> direct_pair_run_microkernel(int64_t vectors);

}  // namespace torchconv::cpu
