// Depthwise fprop and dgrad of any kernel, stride, dilation and layout: one output a thread, lanes
// along what is contiguous. Weights and overlapping windows come from L1.
#include "cuda/activation.h"
#include "cuda/depthwise.h"

namespace torchconv::cuda {
namespace {

struct TapAxis {
  int in, out, taps, stride, dilation, pad;
};

struct TapGather {
  TapAxis h, w;
  int64_t N;
  int in_channels, out_channels, multiplier;  // all channels; filters of one input channel of fprop
  int64_t in_pixel, in_channel, out_pixel, out_channel;  // distances
  bool flip;
  // Blocks are [images or planes][tiles of channels or pixels].
  Divisor tiles, lanes, channels, columns, pixels;
  bool channels_last;
};

// The input that tap r of an output meets, or a negative number.
template <bool kDgrad>
__device__ __forceinline__ int input_of(const TapAxis& axis, int out, int r) {
  int in = kDgrad ? out + axis.pad - r * axis.dilation
                  : out * axis.stride - axis.pad + r * axis.dilation;
  if (kDgrad) {
    if (in < 0 || in % axis.stride != 0) return -1;
    in /= axis.stride;
  }
  return in < axis.in ? in : -1;
}

template <typename T, bool kDgrad>
__global__ void __launch_bounds__(256)
    depthwise_taps_kernel(const __grid_constant__ TapGather p, const T* in, const T* w,
                          const Epilogue<T> epilogue) {
  uint32_t block = blockIdx.x, sub = threadIdx.x, pixel;
  const uint32_t tile = p.tiles.split(block);
  int64_t n;
  int channel;
  if (p.channels_last) {
    channel = static_cast<int>(tile * p.lanes.value() + p.lanes.split(sub));
    const uint32_t images_pixel = block * (blockDim.x / p.lanes.value()) + sub;
    if (sub >= blockDim.x / p.lanes.value() || channel >= p.out_channels) return;
    uint32_t image = images_pixel;
    pixel = p.pixels.split(image);
    n = image;
    if (n >= p.N) return;
  } else {
    pixel = tile * blockDim.x + sub;
    if (pixel >= p.pixels.value()) return;
    channel = static_cast<int>(p.channels.split(block));
    n = block;
  }
  uint32_t line = pixel;
  const int column = static_cast<int>(p.columns.split(line)), row = static_cast<int>(line);

  using A = Wide<T>;
  const int source_channel = kDgrad ? channel * p.multiplier : channel / p.multiplier;
  const int taps = p.h.taps * p.w.taps;
  const T* image = in + n * p.in_channels * p.h.in * p.w.in + source_channel * p.in_channel;
  const T* filter = w + static_cast<int64_t>(kDgrad ? source_channel : channel) * taps;
  A z = epilogue.bias_of(channel);
  for (int m = 0; m < (kDgrad ? p.multiplier : 1); ++m, image += p.in_channel, filter += taps)
    for (int r = 0; r < p.h.taps; ++r) {
      const int h = input_of<kDgrad>(p.h, row, r);
      if (h < 0) continue;
      for (int s = 0; s < p.w.taps; ++s) {
        const int v = input_of<kDgrad>(p.w, column, s);
        if (v < 0) continue;
        const int tap = r * p.w.taps + s;
        z += to_wide(filter[p.flip ? taps - 1 - tap : tap]) *
             to_wide(image[(static_cast<int64_t>(h) * p.w.in + v) * p.in_pixel]);
      }
    }
  epilogue.store(
      z, n * p.out_channels * p.pixels.value() + pixel * p.out_pixel + channel * p.out_channel);
}

}  // namespace

void depthwise_taps(const ConvProblem& p, Pass pass, const void* in, const void* w,
                    const void* bias, const void* residual, void* out, void* preactivation,
                    const Queue& queue) {
  const bool dgrad = pass == Pass::kDgrad;
  const auto axis = [&](int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation,
                        int64_t pad) {
    const auto narrow = [](int64_t v) { return static_cast<int>(v); };
    return TapAxis{narrow(dgrad ? out : in), narrow(dgrad ? in : out), narrow(taps),
                   narrow(stride),           narrow(dilation),         narrow(pad)};
  };
  TapGather g{};
  g.h = axis(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top);
  g.w = axis(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left);
  g.N = p.N;
  g.in_channels = static_cast<int>(dgrad ? p.K : p.C);
  g.out_channels = static_cast<int>(dgrad ? p.C : p.K);
  g.multiplier = static_cast<int>(p.K / p.C);
  g.flip = p.flip;
  g.channels_last = p.layout == Layout::kNHWC;
  const int64_t pixels = static_cast<int64_t>(g.h.out) * g.w.out;
  g.in_pixel = g.channels_last ? g.in_channels : 1;
  g.in_channel = g.channels_last ? 1 : static_cast<int64_t>(g.h.in) * g.w.in;
  g.out_pixel = g.channels_last ? g.out_channels : 1;
  g.out_channel = g.channels_last ? 1 : pixels;
  g.columns = Divisor(g.w.out), g.pixels = Divisor(pixels), g.channels = Divisor(g.out_channels);
  int64_t threads = 256, blocks;
  if (g.channels_last) {
    const int64_t tiles = ceil_div(g.out_channels, 64), lanes = ceil_div(g.out_channels, tiles);
    g.tiles = Divisor(tiles), g.lanes = Divisor(lanes);
    blocks = tiles * ceil_div(g.N * pixels, threads / lanes);
  } else {
    threads = std::min(threads, round_up(pixels, 32));
    const int64_t tiles = ceil_div(pixels, threads);
    g.tiles = Divisor(tiles), g.lanes = Divisor(1);
    blocks = tiles * g.N * g.out_channels;
  }
  with_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    const Epilogue<T> epilogue{
        static_cast<const T*>(bias), static_cast<T*>(out), static_cast<T*>(preactivation),
        dgrad ? Activation::kNone : p.activation, static_cast<const T*>(residual)};
    launch(dgrad ? depthwise_taps_kernel<T, true> : depthwise_taps_kernel<T, false>,
           dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, queue, g,
           static_cast<const T*>(in), static_cast<const T*>(w), epilogue);
  });
}

}  // namespace torchconv::cuda
