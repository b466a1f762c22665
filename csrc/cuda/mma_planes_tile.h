// What the kernels of mma_planes.h share that stage planes in blocks of 64 pixels: rows of 128
// bytes, one for each plane, whose chunks of 16 bytes are permuted by the row, so that ldmatrix
// reads them along the planes or across them without conflicts. 16-bit types.
#pragma once

#include "cuda/divmod.h"
#include "cuda/mma_planes_epilogue.h"

namespace torchconv::cuda {

inline constexpr int kRowPixels = 64, kRowBytes = 128, kRowUnits = 8;

__device__ __forceinline__ int place_in_plane_rows(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Fragments of one warp from a block of plane rows: of 16 rows by 16 pixels at a time.
class PlaneFragments {
 public:
  // The matrix of eight rows that a lane addresses is the (lane / 8)-th. As A of a product along
  // the pixels its lines are rows; as B along the pixels likewise; as B across the planes its lines
  // are pixels, which ldmatrix turns.
  enum class Use { kA, kB, kTurnedB };

  __device__ __forceinline__ PlaneFragments(Use use, int lane) {
    const int matrix = lane >> 3, odd = matrix & 1, high = matrix >> 1;
    const int row = (lane & 7) + 8 * (use == Use::kB ? high : odd);
    place_ = place_in_plane_rows(row, use == Use::kB ? odd : high);
  }

  // Of rows [16 * sixteen_rows, + 16) and pixels [16 * sixteen_pixels, + 16).
  __device__ __forceinline__ SharedAddress at(SharedAddress rows, int sixteen_rows,
                                              int sixteen_pixels) const {
    return rows + static_cast<SharedAddress>((place_ ^ (32 * sixteen_pixels)) +
                                             16 * kRowBytes * sixteen_rows);
  }

 private:
  int place_;
};

// Filters that stay in shared memory: a row for each output, the reduction inside, and 16 bytes
// more than its steps of 16, so that the rows of one ldmatrix meet all banks.
struct ResidentFilters {
  static __host__ __device__ constexpr int pitch(int channels) {
    return (channels + 31) / 32 * 64 + 16;
  }
  template <int kOutputs>
  static __host__ __device__ constexpr int bytes(int channels) {
    return (kOutputs * pitch(channels) + 127) / 128 * 128;
  }
};

// Stages outputs [first, first + Outputs) of `filters`, outputs x channels, or, turned, channels x
// outputs, of which both are multiples of 8; zeros where there are none. The copies join the
// thread's open group.
template <typename T, int Outputs, int Threads>
__device__ __forceinline__ void stage_filters(unsigned char* to, const T* filters, bool turned,
                                              int first, int outputs, int channels) {
  const int pitch = ResidentFilters::pitch(channels), thread = static_cast<int>(threadIdx.x);
  if (!turned) {
    const int units = pitch / 16 - 1;
    for (int unit = thread; unit < Outputs * units; unit += Threads) {
      const int row = unit / units, c = (unit - row * units) * 8;
      const bool inside = all_of(first + row < outputs, c < channels);
      copy_async<16>(shared_address(to) + static_cast<SharedAddress>(row * pitch + 2 * c),
                     inside ? filters + int64_t{first + row} * channels + c : filters, inside);
    }
    return;
  }
  // Neighbouring lanes have neighbouring channels, so that their stores are side by side.
  const int rows = (channels + 31) / 32 * 32;
#pragma unroll 4
  for (int unit = thread; unit < Outputs / 8 * rows; unit += Threads) {
    const int eight = unit / rows, c = unit - eight * rows, k = first + 8 * eight;
    Vector<T, 8> read{};
    if (c < channels && k < outputs)
      read = *reinterpret_cast<const Vector<T, 8>*>(filters + int64_t{c} * outputs + k);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      *reinterpret_cast<T*>(to + (8 * eight + e) * pitch + 2 * c) = read.element[e];
  }
}

// Fragments of A from resident filters.
class FilterFragments {
 public:
  __device__ __forceinline__ FilterFragments(const unsigned char* filters, int channels, int lane,
                                             int first_row)
      : pitch_(ResidentFilters::pitch(channels)),
        first_(shared_address(filters) +
               static_cast<SharedAddress>(
                   ((lane & 7) + 8 * ((lane >> 3) & 1) + first_row) * pitch_ + 16 * (lane >> 4))) {}
  // Of channels [16 * step, + 16).
  __device__ __forceinline__ void load(uint32_t (&word)[4], int step, int group) const {
    load_matrices(word, first_ + static_cast<SharedAddress>(32 * step + 16 * group * pitch_));
  }

 private:
  int pitch_;
  SharedAddress first_;
};

// sums += A * B of one step of 16: load_a(fragment, group), load_b(fragment, group).
template <typename T, typename Tile, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply_step(Sums<Tile>& sums, LoadA&& load_a, LoadB&& load_b) {
  uint32_t a[Tile::kGroupsM][4], b[Tile::kGroupsN][4];
#pragma unroll
  for (int i = 0; i < Tile::kGroupsM; ++i) load_a(a[i], i);
#pragma unroll
  for (int j = 0; j < Tile::kGroupsN; ++j) load_b(b[j], j);
#pragma unroll
  for (int i = 0; i < Tile::kGroupsM; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kGroupsN; ++j) {
      mma<T>(sums.value[i][2 * j], a[i], b[j][0], b[j][1]);
      mma<T>(sums.value[i][2 * j + 1], a[i], b[j][2], b[j][3]);
    }
}

// Stores a warp's sums, rows of outputs by pixels: 8 pixels of a row at a time, side by side in a
// quad. row(i) is the output of row i of the warp, or -1 where it is none, and offset(unit) the
// element of output 0 at the warp's pixels [8 * unit, + 8), or -1.
template <typename T, typename Tile, typename Row, typename Offset>
__device__ __forceinline__ void store_planes(const Sums<Tile>& sums, const Epilogue<T>& epilogue,
                                             int64_t plane, int lane, Row&& row, Offset&& offset) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int part = 0; part < Tile::kGroupsN / 2; ++part) {
    const int64_t pixel = offset(4 * part + t);
#pragma unroll
    for (int i = 0; i < Tile::kGroupsM; ++i)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int k = row(16 * i + 8 * upper + g);
        const float bias = k >= 0 ? epilogue.bias_of(k) : 0.0f;
        float z[8];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            z[2 * j + e] = sums.value[i][4 * part + j][2 * upper + e] + bias;
        store_pixels(z, epilogue, lane, k * plane + pixel, k >= 0 && pixel >= 0 ? 8 : 0, true);
      }
  }
}

}  // namespace torchconv::cuda
