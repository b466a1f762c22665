// fprop and dgrad with few channels in a group. A task is a band of rows of one group, or of a block
// of output channels side by side: it copies the band once (depthwise_band.h), runs the tap kernel
// over every position for each output channel or block and hands the finished rows to the epilogue.
// Nothing is multiplied that the convolution does not need, except a few columns where one row's
// positions run into the next.
#include "cpu/depthwise_gather.h"

#include "core/buffer.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename T>
class DepthwiseGather {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  DepthwiseGather(const ConvView& view, const DepthwiseBand& band, const T* src, const T* w,
                  const T* bias, const Epilogue<T>& epilogue)
      : view_(view),
        band_(band),
        src_(src),
        epilogue_(epilogue),
        terms_(view.terms()),
        channels_(view.groups * view.K),
        padded_(band.blocks * (band.pixels ? view.K : band.lanes)),
        weights_(terms_ * padded_),
        bias_(padded_) {
    const int64_t taps = static_cast<int64_t>(view.taps.size());
    for (int64_t channel = 0; channel < padded_; ++channel) {
      const bool exists = channel < channels_;
      bias_[channel] = bias != nullptr && exists ? to_wide(bias[channel]) : A{0};
      const T* filter =
          w + channel / view.K * view.weight_group + channel % view.K * view.weight_k;
      for (int64_t term = 0; term < terms_; ++term)
        weights_[band.pixels ? channel * terms_ + term : term * padded_ + channel] =
            exists ? to_wide(filter[term / taps * view.weight_c + view.taps[term % taps].weight])
                   : A{0};
    }
  }

  void run(const Parallel& pool) {
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t out_size =
        round_up(round_up(band_.positions(band_.band, view_.J), kL) * band_.lanes, 16);
    const int64_t scratch_size = round_up(band_.size, 16);
    const int64_t slot_size =
        scratch_size + out_size + (band_.pixels ? (terms_ + 1) * kL : 0);
    const WorkSplit split(tasks, static_cast<double>(out_size) *
                                     static_cast<double>((band_.pixels ? view_.K : 1) * terms_ + 8));
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* source = scratch.get() + slot * slot_size;
      A* out = source + scratch_size;
      for (int64_t task = begin; task < end; ++task) {
        // What is innermost in memory is innermost here.
        const int64_t block = band_.pixels ? task / band_.bands % band_.blocks : task % band_.blocks;
        const int64_t b = band_.pixels ? task % band_.bands : task / band_.blocks % band_.bands;
        const int64_t n = task / (band_.bands * band_.blocks);
        const int64_t i0 = b * band_.band, rows = std::min(band_.band, view_.I - i0);
        const int64_t dst = view_.dst_offset + n * view_.dst.n + i0 * view_.dst.row;
        band_.fill(view_, src_ + n * view_.src.n, block, i0, source);
        if (band_.pixels) {
          for (int64_t channel = block * view_.K; channel < (block + 1) * view_.K; ++channel)
            run_pixels(source, channel, rows, dst + channel * view_.dst.c, out, out + out_size);
        } else {
          run_channels(source, block * band_.lanes, rows, dst, out);
        }
      }
    });
  }

 private:
  void run_pixels(const A* source, int64_t channel, int64_t rows, int64_t dst, A* out,
                  A* vectors) const {
    const A* weights = weights_.get() + channel * terms_;
    for (int64_t term = 0; term < terms_; ++term)
      Vec<A>::store(vectors + term * kL, Vec<A>::broadcast(weights[term]));
    Vec<A>::store(vectors + terms_ * kL, Vec<A>::broadcast(bias_[channel]));
    tap_sum<A>({source, out, band_.offsets.data(), vectors, vectors + terms_ * kL, terms_, kL,
                ceil_div(band_.positions(rows, view_.J), kL), kL, kL, 1});
    for (int64_t i = 0; i < rows; ++i)
      epilogue_.store(out + i * band_.width, view_.J, dst + i * view_.dst.row, view_.dst.column);
  }

  void run_channels(const A* source, int64_t channel, int64_t rows, int64_t dst, A* out) const {
    const int64_t lanes = band_.lanes, used = std::min(lanes, channels_ - channel);
    for (int64_t i = 0; i < rows; ++i) {
      tap_sum<A>({source + i * band_.width * lanes, out, band_.offsets.data(),
                  weights_.get() + channel, bias_.get() + channel, terms_, padded_, view_.J, lanes,
                  lanes, lanes / kL});
      for (int64_t j = 0; j < view_.J; ++j)
        epilogue_.store(
            out + j * lanes, used,
            dst + channel * view_.dst.c + i * view_.dst.row + j * view_.dst.column, view_.dst.c);
    }
  }

  const ConvView& view_;
  const DepthwiseBand& band_;
  const T* src_;
  const Epilogue<T>& epilogue_;
  int64_t terms_, channels_, padded_;
  Buffer<A> weights_;  // along pixels [channel][term], else [term][channel]
  Buffer<A> bias_;     // [channel]
};

}  // namespace

template <typename T>
void depthwise_gather(const ConvView& view, const DepthwiseBand& band, const T* src, const T* w,
                      const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  if (view.N == 0 || view.pixels() == 0) return;
  DepthwiseGather<T>(view, band, src, w, bias, epilogue).run(pool);
}

template void depthwise_gather(const ConvView&, const DepthwiseBand&, const float*, const float*,
                               const float*, const Epilogue<float>&, const Parallel&);
template void depthwise_gather(const ConvView&, const DepthwiseBand&, const double*, const double*,
                               const double*, const Epilogue<double>&, const Parallel&);
template void depthwise_gather(const ConvView&, const DepthwiseBand&, const BFloat16*,
                               const BFloat16*, const BFloat16*, const Epilogue<BFloat16>&,
                               const Parallel&);
template void depthwise_gather(const ConvView&, const DepthwiseBand&, const Float16*,
                               const Float16*, const Float16*, const Epilogue<Float16>&,
                               const Parallel&);

}  // namespace torchconv::cpu
