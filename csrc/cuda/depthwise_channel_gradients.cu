// Both gradients of a depthwise convolution of stride 1 in NHWC at once, float32 and half types:
// strips of channel_strips.cuh.
//
// The gather of dx from dz meets the pairs of pixels that wgrad multiplies: where dx[h] takes
// dz[h + r] times a weight, that weight's gradient takes x[h] dz[h + r]. So a thread rolls down a
// strip of x and dx with the R rows of x, and of dx's sums, that the current row of dz meets, and
// reads dz once for both. It keeps the sums of all taps of its channels. The subs of
// a block go through a slice of all strips, cut by the shape alone; their sums meet in shared
// memory, those of slices in block_sums.cu.
// A product of a pixel and padding is not formed for a weight's gradient, for neither x nor dz need
// be finite: where numbers are finite it adds zero, and only where they are not are pixels looked
// at one by one. Either gradient alone takes the same way, so that its bits do not change. Bound:
// the bytes of x, dz and dx.
#include "cuda/channel_strips.cuh"
#include "cuda/early_launch.h"

namespace torchconv::cuda {
namespace {

// Blocks that a multiprocessor's registers hold.
template <typename S>
constexpr int kResident = S::kVector == 1 && S::R == 3 ? 4 : 3;

// kBoth: neither gradient is null.
template <typename S, bool kBoth>
__global__ void __launch_bounds__(S::kThreads, kBoth ? kResident<S> : 3)
    channel_gradients_kernel(const __grid_constant__ ChannelStrips p, uint32_t slice_positions,
                             const typename S::T* dz, const typename S::T* x,
                             const typename S::T* w, typename S::T* dx,
                             const SliceSums<typename S::T> sums) {
  using T = typename S::T;
  using A = typename S::A;
  constexpr int R = S::R, kTaps = S::kTaps, kVector = S::kVector, kUnroll = S::kUnroll;
  constexpr int kColumns = S::kColumns, kWindow = S::kWindow, kDepth = S::kDepth;
  static_assert(kUnroll == R);
  begin_early();
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t slice = blockIdx.x, sub = threadIdx.x;
  const int vector0 = static_cast<int>(p.lane_tiles.split(slice)) * lanes;
  const int lane = static_cast<int>(p.lanes.split(sub));
  const int64_t c = static_cast<int64_t>(vector0 + lane) * kVector;
  const int64_t in_row = static_cast<int64_t>(g.w.in) * p.channels;
  const int64_t out_row = static_cast<int64_t>(g.w.out) * p.channels;
  const bool wants_dx = kBoth || dx != nullptr, wants_dw = kBoth || sums.result != nullptr;

  A* shared = dynamic_shared<A>();
  stage_weights<S>(p, vector0, w, shared);
  __syncthreads();
  const A* weights = shared + lane * kVector;
  A sum[kTaps][kVector] = {};

  const uint32_t end = min((slice + 1) * slice_positions, p.positions);
  uint32_t position = slice * slice_positions + sub;
  if (sub >= static_cast<uint32_t>(p.subs) || vector0 + lane >= p.vectors) position = end;
#pragma unroll 1
  for (; position < end; position += static_cast<uint32_t>(p.subs)) {
    const StripPlace at(p, position, kColumns);
    const int rows = min(p.set_rows, g.h.out - at.row), steps = rows + R - 1;
    const int h0 = at.row + g.h.origin, w0 = at.column + g.w.origin;
    const T* line = dz + (static_cast<int64_t>(at.n) * g.h.in + h0) * in_row +
                    static_cast<int64_t>(w0) * p.channels + c;
    const int64_t first = (static_cast<int64_t>(at.n) * g.h.out + at.row) * out_row +
                          static_cast<int64_t>(at.column) * p.channels + c;
    const T* image = x + first;
    T* target = dx + first;
    const uint32_t inside = inside_bits<kWindow, false>(w0, 1, g.w.in);
    const uint32_t own = inside_bits<kColumns, false>(at.column, 1, g.w.out);
    const bool whole = inside == (1u << kWindow) - 1 && own == (1u << kColumns) - 1;
    const uint32_t of_x = wants_dw ? own : 0;
    const auto row_inside = [&](int step) {
      return static_cast<unsigned>(h0 + step) < static_cast<unsigned>(g.h.in);
    };
    typename S::Loaded dz_next[kDepth][kWindow], x_next[kDepth][kColumns];
    const auto load = [&](int step, int slot) {
      S::load(line, p.channels, step < steps && row_inside(step) ? inside : 0, dz_next[slot]);
      S::load(image, p.channels, step < rows ? of_x : 0, x_next[slot]);
      line += in_row, image += out_row;
    };
#pragma unroll
    for (int j = 0; j < kDepth; ++j) load(j, j);

    A z[R][kColumns][kVector], pixel[R][kColumns][kVector];
    uint32_t odd_rows = 0;  // bits: which of the last rows of x have a number that is not finite
#pragma unroll 1
    for (int base = 0; base < steps; base += kUnroll) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int step = base + u;
        if (step >= steps) break;
        A value[kWindow][kVector];
        S::widen(dz_next[u % kDepth], value);
        S::widen(x_next[u % kDepth], pixel[u]);
        load(step + kDepth, u % kDepth);
        // Weights are read anew for every row: beside the sums they would not fit in registers.
        asm volatile("" ::: "memory");
        const auto met = [&](int r) { return step >= r && step - r < rows; };
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (!wants_dx || !met(r)) continue;
          A(&row)[kColumns][kVector] = z[(u - r + R) % R];
#pragma unroll
          for (int s = 0; s < R; ++s) {
            const Vector<A, kVector> weight =
                *reinterpret_cast<const Vector<A, kVector>*>(weights + (r * R + s) * S::kPitch);
#pragma unroll
            for (int b = 0; b < kColumns; ++b)
#pragma unroll
              for (int v = 0; v < kVector; ++v)
                row[b][v] =
                    weight.element[v] * value[b + s][v] + (r == 0 && s == 0 ? A{0} : row[b][v]);
          }
        }
        const auto multiply = [&](auto bounded) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (!met(r)) continue;
            const A(&row)[kColumns][kVector] = pixel[(u - r + R) % R];
#pragma unroll
            for (int b = 0; b < kColumns; ++b) {
              if (decltype(bounded)::value && (own >> b & 1) == 0) continue;
#pragma unroll
              for (int s = 0; s < R; ++s) {
                if (decltype(bounded)::value && (inside >> (b + s) & 1) == 0) continue;
#pragma unroll
                for (int v = 0; v < kVector; ++v) sum[r * R + s][v] += row[b][v] * value[b + s][v];
              }
            }
          }
        };
        bool finite = true;
        if (wants_dw && !whole) {
          A odd_x{0}, odd_dz{0};
#pragma unroll
          for (int i = 0; i < kColumns * kVector; ++i)
            odd_x += pixel[u][i / kVector][i % kVector] * A{0};
#pragma unroll
          for (int i = 0; i < kWindow * kVector; ++i)
            odd_dz += value[i / kVector][i % kVector] * A{0};
          odd_rows = odd_rows << 1 | (odd_x == A{0} ? 0 : 1);
          finite = odd_dz == A{0} && (odd_rows & ((1u << R) - 1)) == 0;
        }
        if (wants_dw && row_inside(step)) {
          if (finite)
            multiply(std::false_type{});
          else
            multiply(std::true_type{});
        }

        if (!wants_dx || step < R - 1) continue;
        const A(&done)[kColumns][kVector] = z[(u + 1) % R];
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          Vector<T, kVector> rounded;
#pragma unroll
          for (int v = 0; v < kVector; ++v) rounded.element[v] = from_wide<T>(done[b][v]);
          if ((own >> b & 1) != 0)
            *reinterpret_cast<Vector<T, kVector>*>(target + static_cast<int64_t>(b) * p.channels) =
                rounded;
        }
        target += out_row;
      }
    }
  }

  if (!wants_dw) return;
  __syncthreads();  // everyone has its weights
  store_block_sums<S>(p, vector0, slice, sum, shared, sums);
}

// How the strips are cut: rows of a set, and strips that a thread goes through.
struct StripsPlan {
  int64_t rows, each;
};

// Few rows are loaded twice, but there are blocks enough for a large device. A thread's sums stay
// short enough for float32.
template <typename S>
StripsPlan plan_strips(const Gather& g) {
  constexpr int64_t kMostTerms = 512, kOverhead = 2, kOfBlock = 6, kDevice = 132;
  constexpr int64_t kIssue = (S::kTaps * 5 / 2 + 10) * S::kColumns * S::kVector;
  // A row of a block at a share of a large device's bandwidth.
  constexpr int64_t kMemory =
      S::kThreads * 3 * S::kColumns * S::kVector * static_cast<int64_t>(sizeof(typename S::T)) / 18;
  constexpr int64_t kRow = std::max(kIssue, kMemory);
  const ChannelStrips p = channel_strips<S>(g, g.h.out);
  const int64_t most_rows = std::min<int64_t>(g.h.out, kMostTerms / S::kColumns);
  StripsPlan best{1, 1};
  int64_t least = 0;
  for (int64_t sets = ceil_div(g.h.out, most_rows); sets <= g.h.out; ++sets) {
    const int64_t rows = ceil_div(g.h.out, sets);
    if (least > 0 && rows < S::R) break;
    if (ceil_div(g.h.out, rows) != sets) continue;
    const int64_t positions = int64_t{p.positions} * sets;
    for (int64_t each = 1; each * rows * S::kColumns <= kMostTerms; ++each) {
      const int64_t blocks = ceil_div(positions, p.subs * each) * p.lane_tiles.value();
      const int64_t steps = each * (rows + S::R - 1 + kOverhead) + kOfBlock;
      const int64_t of_device = ceil_div(blocks, kDevice);
      if (each > 1 && of_device < kResident<S>) break;
      const auto step_of = [&](int64_t held) {
        return held == 0 ? 0 : std::max(kRowLatency, held * kRow);
      };
      const int64_t waves = of_device / kResident<S>, rest = of_device % kResident<S>;
      const int64_t cost = steps * (waves * step_of(kResident<S>) + step_of(rest));
      if (least == 0 || cost < least) best = {rows, each}, least = cost;
    }
  }
  return best;
}

template <typename S>
bool launch_channel_gradients(const Gather& g, const void* dz, const void* x, const void* w,
                              void* dx, void* dw, const Queue& queue) {
  using T = typename S::T;
  if (!channel_strips_take<S>(g, dz, dx) || !aligned<T>(x, S::kVector)) return false;
  const StripsPlan plan = plan_strips<S>(g);
  const ChannelStrips p = channel_strips<S>(g, plan.rows);
  const int64_t slices = ceil_div(p.positions, p.subs * plan.each);
  const SliceSums<T> sums = slice_sums(static_cast<T*>(dw), dw == nullptr ? 1 : slices,
                                       static_cast<int64_t>(g.groups) * g.w_group, queue);
  const int64_t shared = S::kTaps * S::kThreads * S::kVector;
  const bool both = dx != nullptr && dw != nullptr;
  launch_early(both ? channel_gradients_kernel<S, true> : channel_gradients_kernel<S, false>,
               dim3(static_cast<unsigned>(p.lane_tiles.value() * slices)), dim3(S::kThreads),
               static_cast<int>(shared * static_cast<int64_t>(sizeof(Wide<T>))), queue, p,
               static_cast<uint32_t>(p.subs * plan.each), static_cast<const T*>(dz),
               static_cast<const T*>(x), static_cast<const T*>(w), static_cast<T*>(dx), sums);
  add_slices(sums, slices, queue);
  return true;
}

}  // namespace

bool depthwise_channel_gradients(DType dtype, int64_t R, const Gather& g, const void* dz,
                                 const void* x, const void* w, void* dx, void* dw,
                                 const Queue& queue) {
  const auto run = [&](auto strip) {
    return launch_channel_gradients<decltype(strip)>(g, dz, x, w, dx, dw, queue);
  };
  if (dtype == DType::kFloat32 && R == 5) return run(ChannelStrip<float, 5, 4, 1>{});
  if (R != 3) return false;
  return dtype == DType::kFloat32    ? run(ChannelStrip<float, 3, 4, 1>{})
         : dtype == DType::kFloat16  ? run(ChannelStrip<Half, 3, 4, 2>{})
         : dtype == DType::kBFloat16 ? run(ChannelStrip<BFloat16, 3, 4, 2>{})
                                     : false;
}

}  // namespace torchconv::cuda
