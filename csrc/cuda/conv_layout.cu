// Copies in another layout, bound by memory: where rows become columns a block moves a tile through
// shared memory, so that its reads run along the source and its writes along the target.
#include "cuda/conv_layout.h"
#include "cuda/transpose_kernel.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
void transpose_bits(const T* source, T* target, int64_t N, int64_t A, int64_t B,
                    const Queue& queue) {
  constexpr int kWide = kLanes<T>;
  const bool reads = B % kWide == 0 && aligned<T>(source, kWide);
  const bool writes = A % kWide == 0 && aligned<T>(target, kWide);
  const RowsInTurn rows{A, B};
  if (reads && writes)
    launch_transpose<T, true, true>(source, target, N, A, B, rows, queue);
  else if (reads)
    launch_transpose<T, true, false>(source, target, N, A, B, rows, queue);
  else if (writes)
    launch_transpose<T, false, true>(source, target, N, A, B, rows, queue);
  else
    launch_transpose<T, false, false>(source, target, N, A, B, rows, queue);
}

// A filter's C x R*S and R*S x C, one of them in `packed` with the taps in turn from the last on
// with flip: a thread for each element of K x R x S x C, through shared memory unless both lie
// alike.
struct Filters {
  int64_t C, taps;
  unsigned c_tiles, tap_tiles;
  bool flip, packing;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    repack_filters(const __grid_constant__ Filters p, const T* source, T* target) {
  __shared__ T tile[32][33];
  unsigned rest = blockIdx.x;
  const int64_t t0 = int64_t{rest % p.tap_tiles} * 32;
  rest /= p.tap_tiles;
  const int64_t c0 = int64_t{rest % p.c_tiles} * 32, filter = int64_t{rest / p.c_tiles};
  const T* from = source + filter * p.C * p.taps;
  T* to = target + filter * p.C * p.taps;
  const int lane = threadIdx.x % 32;
  const auto turned = [&](int64_t t) { return p.flip ? p.taps - 1 - t : t; };
  // tile[c][t], t as it is packed. The lanes run along the memory that is read, then written.
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32) {
    const int c = p.packing ? i : lane, t = p.packing ? lane : i;
    if (c0 + c < p.C && t0 + t < p.taps)
      tile[c][t] =
          p.packing ? from[(c0 + c) * p.taps + turned(t0 + t)] : from[(t0 + t) * p.C + c0 + c];
  }
  __syncthreads();
  for (int i = threadIdx.x / 32; i < 32; i += kThreads / 32) {
    const int c = p.packing ? lane : i, t = p.packing ? i : lane;
    if (c0 + c >= p.C || t0 + t >= p.taps) continue;
    if (p.packing)
      to[(t0 + t) * p.C + c0 + c] = tile[c][t];
    else
      to[(c0 + c) * p.taps + turned(t0 + t)] = tile[c][t];
  }
}

// K filters of R*S rows of C, the rows in turn or from the last on: its own inverse.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    turn_filters(int64_t elements, int64_t C, int64_t taps, bool flip, const T* source, T* target) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t row = at / C, filter = row / taps, tap = row - filter * taps;
  target[at] = source[(filter * taps + (flip ? taps - 1 - tap : tap)) * C + (at - row * C)];
}

// A thread for each `Count` neighbours of the target, which are in one row.
template <typename T, int Count>
__global__ void __launch_bounds__(kThreads)
    resize(int64_t units, int64_t from, int64_t to, const T* source, T* target) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit >= units) return;
  const int64_t row = to == Count ? unit : unit * Count / to, first = unit * Count - row * to;
  Vector<T, Count> elements{};
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (first + i < from) elements.element[i] = source[row * from + first + i];
  *reinterpret_cast<Vector<T, Count>*>(target + unit * Count) = elements;
}

void repack(DType dtype, const void* source, Layout layout, bool flip, bool packing, void* target,
            int64_t K, int64_t C, int64_t taps, const Queue& queue) {
  const int64_t elements = K * C * taps;
  if (elements == 0) return;
  with_float(dtype, [&](auto zero) {
    using T = Bits<sizeof(zero)>;
    const T* from = static_cast<const T*>(source);
    T* to = static_cast<T*>(target);
    if (layout == Layout::kNHWC || taps == 1 || C == 1) {
      launch(turn_filters<T>, dim3(static_cast<unsigned>(ceil_div(elements, kThreads))), kThreads,
             0, queue, elements, C, taps, flip, from, to);
      return;
    }
    const Filters p{C,
                    taps,
                    static_cast<unsigned>(ceil_div(C, 32)),
                    static_cast<unsigned>(ceil_div(taps, 32)),
                    flip,
                    packing};
    launch(repack_filters<T>, dim3(static_cast<unsigned>(K * p.c_tiles * p.tap_tiles)), kThreads, 0,
           queue, p, from, to);
  });
}

}  // namespace

void transpose(DType dtype, const void* source, void* target, int64_t N, int64_t A, int64_t B,
               const Queue& queue) {
  if (N * A * B == 0) return;
  with_float(dtype, [&](auto zero) {
    using T = Bits<sizeof(zero)>;
    transpose_bits(static_cast<const T*>(source), static_cast<T*>(target), N, A, B, queue);
  });
}

void resize_rows(DType dtype, const void* source, void* target, int64_t rows, int64_t from,
                 int64_t to, const Queue& queue) {
  with_float(dtype, [&](auto zero) {
    using T = Bits<sizeof(zero)>;
    constexpr int kWide = kLanes<T>;
    const bool wide = to % kWide == 0 && aligned<T>(target, kWide);
    const int64_t units = rows * to / (wide ? kWide : 1);
    launch(wide ? resize<T, kWide> : resize<T, 1>,
           dim3(static_cast<unsigned>(ceil_div(units, kThreads))), kThreads, 0, queue, units, from,
           to, static_cast<const T*>(source), static_cast<T*>(target));
  });
}

void pack_weights(DType dtype, const void* w, Layout layout, bool flip, void* packed, int64_t K,
                  int64_t C, int64_t R, int64_t S, const Queue& queue) {
  repack(dtype, w, layout, flip, true, packed, K, C, R * S, queue);
}

void unpack_weights(DType dtype, const void* packed, void* w, Layout layout, bool flip, int64_t K,
                    int64_t C, int64_t R, int64_t S, const Queue& queue) {
  repack(dtype, packed, layout, flip, false, w, K, C, R * S, queue);
}

}  // namespace torchconv::cuda
