// The parts of wgrad: products of dz and x over runs of positions, in float32. M is K, N is C for
// each tap, and the sum goes over the positions of all images, 64 at a time.
#ifdef TORCHCONV_CUTLASS
#include "cuda/cutlass_sm90_kernel.h"
#include "cuda/cutlass_sm90_passes.h"

namespace torchconv::cuda::sm90 {
namespace {

template <class Element, class Size, class Cluster, int kStages, int kWarpgroups, int kBlocks>
void parts_in_tiles(const ConvProblem& p, const WgradShares& s, const void* dz, const void* x,
                    float* sums, const Queue& queue) {
  using Tile = cute::Shape<Size, cute::Shape<Size>, cute::Shape<cute::_64>>;
  // (k, (c, s, r), slot)
  using Stride = cute::Stride<int64_t, cute::Stride<cute::_1, int64_t, int64_t>, int64_t>;
  using Sum = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, float, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using K = Kernel<Configuration<Operator::kWgrad, Element, float, Stride, Tile, Cluster, kStages,
                                 kWarpgroups, kBlocks, Sum, void>>;
  typename K::Epilogue::Arguments epilogue{};
  epilogue.ptr_D = sums;
  const int64_t filter = p.R * p.S * p.C;
  epilogue.dD = {filter, {{}, p.C, p.S * p.C}, p.K * filter};
  launch_kernel<K>(problem_shape<Operator::kWgrad>(fprop_gather(p)),
                   {static_cast<const Element*>(dz), static_cast<const Element*>(x)}, epilogue, s,
                   static_cast<int>(s.shares()), static_cast<int>(s.splits),
                   gains_by_early_start(p.C, p.K, p.R * p.S), queue);
}

template <class Element>
void parts_of(const ConvProblem& p, const WgradShares& s, const void* dz, const void* x,
              float* sums, const Queue& queue) {
  using cute::_1, cute::_2;
  using Alone = cute::Shape<_1, _1, _1>;
  using Pair = cute::Shape<_2, _1, _1>;
  if (s.cluster == 2)
    parts_in_tiles<Element, cute::_128, Pair, 5, 2, 1>(p, s, dz, x, sums, queue);
  else if (s.tile_k == 128)
    parts_in_tiles<Element, cute::_128, Alone, 5, 2, 1>(p, s, dz, x, sums, queue);
  else
    parts_in_tiles<Element, cute::_64, Alone, 3, 1, 3>(p, s, dz, x, sums, queue);
}

}  // namespace

void wgrad_parts(const ConvProblem& p, const WgradShares& s, const void* dz, const void* x,
                 float* sums, const Queue& queue) {
  if (p.dtype == DType::kFloat16)
    parts_of<cutlass::half_t>(p, s, dz, x, sums, queue);
  else
    parts_of<cutlass::bfloat16_t>(p, s, dz, x, sums, queue);
}

}  // namespace torchconv::cuda::sm90
#endif
