// Copies in another layout, bound by memory. Where rows become columns a block moves a tile through
// shared memory, so that its reads run along the source and its writes along the target; or, where
// rows have no whole vectors, a run of them as it is, whose columns it gathers.
#include <algorithm>
#include <numeric>

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

// SmallMatrices: a block moves whole rows of A x B, one run of memory, through shared memory, where
// they lie as there. Blocks of the first copy come first.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    transpose_small(const __grid_constant__ SmallCopies copies) {
  constexpr int kWide = kLanes<T>;
  using Unit = Vector<T, kWide>;
  unsigned block = blockIdx.x;
  int number = 0;
  while (block >= copies.copy[number].blocks) block -= copies.copy[number++].blocks;
  const SmallMatrices& p = copies.copy[number];
  const T* source = static_cast<const T*>(p.source);
  T* target = static_cast<T*>(p.target);
  T* run = dynamic_shared<T>();
  const int64_t n0 = int64_t{block / static_cast<unsigned>(p.pieces)} * p.matrices;
  const int64_t a0 = int64_t{block % static_cast<unsigned>(p.pieces)} * p.rows;
  const int rows = static_cast<int>(min(int64_t{p.rows}, p.A - a0));
  const int matrices = static_cast<int>(min(int64_t{p.matrices}, p.N - n0));
  const int lines = matrices * p.B, units = lines * rows / kWide;
  const int64_t first = (n0 * p.A + a0) * p.B;
  // f(element in B x A, element in the run) of each unit of B x A. A warp has a few units of each
  // of several lines: those of one line are far apart in the run, but next to the other lines'.
  const auto for_each_unit = [&](auto&& f) {
    for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += kThreads) {
      const int pair = unit / p.together, group = pair / lines, line = pair - group * lines;
      const int a = (group * p.together + unit - pair * p.together) * kWide;
      const int n = line / p.B, b = line - n * p.B;
      f(((n0 + n) * p.B + b) * p.A + a0 + a, (n * rows + a) * p.B + (p.flip ? p.B - 1 - b : b));
    }
  };
  const auto copy_run = [&](T* to, const T* from) {
#pragma unroll 4
    for (int unit = static_cast<int>(threadIdx.x); unit < units; unit += kThreads)
      *reinterpret_cast<Unit*>(to + unit * kWide) =
          *reinterpret_cast<const Unit*>(from + unit * kWide);
  };
  if (p.forth) {
    copy_run(run, source + first);
    __syncthreads();
    for_each_unit([&](int64_t to, int from) {
      Unit unit;
#pragma unroll
      for (int e = 0; e < kWide; ++e) unit.element[e] = run[from + e * p.B];
      *reinterpret_cast<Unit*>(target + to) = unit;
    });
  } else {
    for_each_unit([&](int64_t from, int to) {
      const Unit unit = *reinterpret_cast<const Unit*>(source + from);
#pragma unroll
      for (int e = 0; e < kWide; ++e) run[to + e * p.B] = unit.element[e];
    });
    __syncthreads();
    copy_run(target + first, run);
  }
}

// Whether the copy can be one of SmallMatrices.
template <typename T>
bool set_small(SmallMatrices& small, const void* source, void* target, int64_t N, int64_t A,
               int64_t B, bool flip, bool forth) {
  constexpr int64_t kWide = kLanes<T>, kSize = sizeof(T), kRun = 16 * 1024 / kSize;
  constexpr int64_t kWanted = kThreads * kWide, kRows = 4 * kWide;
  // Of long rows a run of the fewest may be twice as long.
  if (A % kWide != 0 || B * kWide > 2 * kRun || !aligned<T>(source, kWide) ||
      !aligned<T>(target, kWide))
    return false;
  const int64_t most = std::max(kRun / B, kWide), step = most < kRows ? kWide : kRows;
  const int64_t rows = std::min(round_up(ceil_div(A, ceil_div(A, most / step * step)), step), A);
  const int64_t pieces = ceil_div(A, rows);
  const int64_t matrices = std::max<int64_t>(pieces == 1 ? kWanted / (A * B) : 1, 1);
  const int64_t together = std::gcd(int64_t{4}, std::gcd(A / kWide, rows / kWide));
  const int64_t blocks = ceil_div(N, matrices) * pieces;
  if (blocks >= 1 << 29) return false;
  small = {source,
           target,
           N,
           A,
           static_cast<int>(B),
           static_cast<int>(matrices),
           static_cast<int>(rows),
           static_cast<int>(pieces),
           static_cast<int>(together),
           flip,
           forth,
           static_cast<unsigned>(blocks),
           static_cast<int>(matrices * rows * B * kSize)};
  return true;
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

bool Copies::takes(const void* source, void* target, int64_t N, int64_t A, int64_t B, bool flip,
                   bool forth) {
  bool taken = false;
  with_float(dtype_, [&](auto zero) {
    using T = Bits<sizeof(zero)>;
    taken = set_small<T>(small_.copy[count_], source, target, N, A, B, flip, forth);
  });
  if (taken && ++count_ == SmallCopies::kMost) run();
  return taken;
}

void Copies::run() {
  unsigned blocks = 0;
  int bytes = 0;
  for (int i = 0; i < count_; ++i) {
    blocks += small_.copy[i].blocks;
    bytes = std::max(bytes, small_.copy[i].bytes);
  }
  count_ = 0;
  with_float(dtype_, [&](auto zero) {
    launch(transpose_small<Bits<sizeof(zero)>>, dim3(blocks), kThreads, bytes, queue_, small_);
  });
}

void Copies::transpose(const void* source, void* target, int64_t N, int64_t A, int64_t B) {
  if (N * A * B == 0) return;
  with_float(dtype_, [&](auto zero) {
    using T = Bits<sizeof(zero)>;
    // Of rows of whole vectors tiles are as fast.
    if (B % kLanes<T> != 0 && takes(source, target, N, A, B, false, true)) return;
    if (A % kLanes<T> != 0 && takes(source, target, N, B, A, false, false)) return;
    transpose_bits(static_cast<const T*>(source), static_cast<T*>(target), N, A, B, queue_);
  });
}

void Copies::pack_weights(const void* w, Layout layout, bool flip, void* packed, int64_t K,
                          int64_t C, int64_t R, int64_t S) {
  if (K * C * R * S == 0) return;
  if (layout == Layout::kNHWC || R * S == 1 || C == 1 || !takes(w, packed, K, C, R * S, flip, true))
    repack(dtype_, w, layout, flip, true, packed, K, C, R * S, queue_);
}

void Copies::unpack_weights(const void* packed, void* w, Layout layout, bool flip, int64_t K,
                            int64_t C, int64_t R, int64_t S) {
  if (K * C * R * S == 0) return;
  if (layout == Layout::kNHWC || R * S == 1 || C == 1 ||
      !takes(packed, w, K, C, R * S, flip, false))
    repack(dtype_, packed, layout, flip, false, w, K, C, R * S, queue_);
}

void transpose(DType dtype, const void* source, void* target, int64_t N, int64_t A, int64_t B,
               const Queue& queue) {
  Copies copies(dtype, queue);
  copies.transpose(source, target, N, A, B);
  copies.run();
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
  Copies copies(dtype, queue);
  copies.pack_weights(w, layout, flip, packed, K, C, R, S);
  copies.run();
}

}  // namespace torchconv::cuda
