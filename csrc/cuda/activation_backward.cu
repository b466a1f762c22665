// dz = dy * g'(saved), and db = dz summed over all but channels, in one pass over memory, which
// bounds it: 16-byte vectors, and sums in registers.
//
// NCHW, and dz alone in any layout: a warp for each strip of a plane, 64 elements a thread. NHWC: a
// block for a range of pixels, its threads side by side along channels. Both leave rows of K
// partial sums, whose number the shape fixes, and a second kernel adds the rows up in double. db is
// summed before dz is rounded.
#include <algorithm>

#include "core/range.h"
#include "cuda/activation.h"
#include "cuda/conv_passes.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kStrip = 2048;
constexpr int64_t kMostRows = 2048;  // of NHWC's partial sums

template <typename T>
struct Arguments {
  const T *dy, *saved;
  T* dz;             // or null
  Wide<T>* partial;  // [row][K], or null
  Activation activation;
};

// `Count` neighbours: dz is stored, and added to sums.
template <int Count, typename T>
__device__ __forceinline__ void step(const Arguments<T>& a, int64_t at, Wide<T>* sums) {
  using Elements = Vector<T, Count>;
  const Elements dy = *reinterpret_cast<const Elements*>(a.dy + at);
  Elements saved{}, dz;
  if (a.activation != Activation::kNone) saved = *reinterpret_cast<const Elements*>(a.saved + at);
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const Wide<T> z =
        times_derivative(a.activation, to_wide(dy.element[i]), to_wide(saved.element[i]));
    dz.element[i] = from_wide<T>(z);
    sums[i] += z;
  }
  if (a.dz != nullptr) *reinterpret_cast<Elements*>(a.dz + at) = dz;
}

// Strips of planes; Lanes elements at once, of planes that begin aligned to them.
template <typename T, int Lanes>
__global__ void __launch_bounds__(kThreads, 2)
    backward_planes(Arguments<T> a, int64_t planes, int64_t K, int64_t plane, int64_t strips) {
  const int lane = threadIdx.x % 32;
  const int64_t unit = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (unit >= planes * strips) return;
  const int64_t which = unit / strips, strip = unit - which * strips;
  const int64_t first = which * plane + strip * kStrip;
  const int size = static_cast<int>(min(kStrip, plane - strip * kStrip));
  Wide<T> sums[Lanes] = {};
#pragma unroll 1
  for (int i = lane * Lanes; i + Lanes <= size; i += 32 * Lanes) step<Lanes>(a, first + i, sums);
  Wide<T> sum{0};
  for (int i = size / Lanes * Lanes + lane; i < size; i += 32) step<1>(a, first + i, &sum);
  if (a.partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < Lanes; ++i) sum += sums[i];
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  if (lane == 0) {
    const int64_t n = which / K;
    a.partial[(n * strips + strip) * K + (which - n * K)] = sum;
  }
}

// `side` threads (a power of two) side by side along channels; the rest of the block along pixels.
template <typename T, int Lanes>
__global__ void __launch_bounds__(kThreads, 2)
    backward_channels(Arguments<T> a, int64_t pixels, int64_t K, int side, int64_t rows,
                      int64_t pixels_a_row) {
  __shared__ Wide<T> shared[Lanes][kThreads];
  const int beside = threadIdx.x % side, along = threadIdx.x / side, together = kThreads / side;
  const int64_t row = blockIdx.x % rows, k = (blockIdx.x / rows * side + beside) * Lanes;
  const int64_t end = min(pixels, (row + 1) * pixels_a_row);
  double total[Lanes] = {};
  if (k < K) {
    for (int64_t first = row * pixels_a_row + along; first < end; first += 32 * together) {
      Wide<T> sums[Lanes] = {};
      const int64_t last = min(end, first + 32 * together);
#pragma unroll 1
      for (int64_t pixel = first; pixel < last; pixel += together)
        step<Lanes>(a, pixel * K + k, sums);
#pragma unroll
      for (int i = 0; i < Lanes; ++i) total[i] += static_cast<double>(sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < Lanes; ++i) shared[i][threadIdx.x] = static_cast<Wide<T>>(total[i]);
  for (int half = kThreads / 2; half >= side; half /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(half)) {
#pragma unroll
      for (int i = 0; i < Lanes; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
    }
  }
  if (along != 0 || k >= K) return;
#pragma unroll
  for (int i = 0; i < Lanes; ++i) a.partial[row * K + k + i] = shared[i][threadIdx.x];
}

// 32 channels a block, and 32 threads for each, which take every 32nd row.
template <typename T>
__global__ void __launch_bounds__(1024)
    sum_rows(const Wide<T>* partial, int64_t rows, int64_t K, T* db) {
  __shared__ double sums[32][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t k = int64_t{blockIdx.x} * 32 + lane;
  double sum = 0;
  if (k < K) {
#pragma unroll 4
    for (int64_t row = part; row < rows; row += 32)
      sum += static_cast<double>(partial[row * K + k]);
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || k >= K) return;
  for (int i = 1; i < 32; ++i) sum += sums[i][lane];
  db[k] = from_wide<T>(static_cast<Wide<T>>(sum));
}

template <typename T, int Lanes>
void planes(Arguments<T> a, int64_t planes, int64_t K, int64_t plane, const Queue& queue) {
  const int64_t strips = ceil_div(plane, kStrip);
  launch(backward_planes<T, Lanes>,
         dim3(static_cast<unsigned>(ceil_div(planes * strips, kThreads / 32))), kThreads, 0, queue,
         a, planes, K, plane, strips);
}

template <typename T>
void backward(const ConvProblem& p, Arguments<T> a, T* db, const Queue& queue) {
  constexpr int kWide = kLanes<T>;
  const int64_t pixels = p.P * p.Q, elements = p.N * p.K * pixels;
  const bool vectors = aligned<T>(a.dy, kWide) &&
                       (a.saved == nullptr || aligned<T>(a.saved, kWide)) &&
                       (a.dz == nullptr || aligned<T>(a.dz, kWide));
  if (db == nullptr) {
    // One plane of all elements.
    if (vectors) return planes<T, kWide>(a, 1, 1, elements, queue);
    return planes<T, 1>(a, 1, 1, elements, queue);
  }
  int64_t rows;
  if (p.layout == Layout::kNCHW) {
    rows = p.N * ceil_div(pixels, kStrip);
    a.partial = queue.scratch<Wide<T>>(rows * p.K);
    if (vectors && pixels % kWide == 0)
      planes<T, kWide>(a, p.N * p.K, p.K, pixels, queue);
    else
      planes<T, 1>(a, p.N * p.K, p.K, pixels, queue);
  } else {
    const bool quads = vectors && p.K % kWide == 0;
    const int64_t units = quads ? p.K / kWide : p.K;
    int side = 1;
    while (side < 32 && side < units) side *= 2;
    const int64_t together = kThreads / side, all = p.N * pixels;
    const int64_t pixels_a_row =
        std::max(16 * together, ceil_div(ceil_div(all, kMostRows), together) * together);
    rows = ceil_div(all, pixels_a_row);
    a.partial = queue.scratch<Wide<T>>(rows * p.K);
    launch(quads ? backward_channels<T, kWide> : backward_channels<T, 1>,
           dim3(static_cast<unsigned>(rows * ceil_div(units, side))), kThreads, 0, queue, a, all,
           p.K, side, rows, pixels_a_row);
  }
  launch(sum_rows<T>, dim3(static_cast<unsigned>(ceil_div(p.K, 32))), 1024, 0, queue, a.partial,
         rows, p.K, db);
}

}  // namespace

void activation_backward(const ConvProblem& p, const void* dy, const void* saved, void* dz,
                         void* db, const Queue& queue) {
  if (p.K == 0) return;
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(p,
                {static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<T*>(dz),
                 nullptr, p.activation},
                static_cast<T*>(db), queue);
  });
}

}  // namespace torchconv::cuda
