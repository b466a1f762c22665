// The kernel around CUTLASS's collectives for a convolution on Hopper.
//
// A convolution is a matrix product whose operands the tensor memory accelerator gathers: its
// im2col mode walks an image's pixels under one tap, and fills what is outside the image with
// zeros. fprop: (NPQ x CRS) times (CRS x K), dgrad the same over dz; wgrad: (K x NPQ) times
// (NPQ x CRS). Bound: the tensor cores, where a layer has channels enough.
//
// A block computes one tile of the product: four warps multiply (wgmma), convert and store, a fifth
// loads. That is 160 threads, so that several blocks fit a multiprocessor's registers, and one
// multiplies while another begins or stores. (CUTLASS's own kernel spends four warps on the loads
// and has the multiprocessor to itself.) Blocks of one cluster have neighbouring tiles of M and
// share what they load of B. Tiles of N follow each other, so that blocks which run together find
// A in the cache. wgrad's sum is long and divided: blockIdx.y is a split, with a result of its own.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/launch.h"

// clang-format off
#include "cutlass/cutlass.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cuda/cutlass_sm90_tensor_map.h"  // before what makes tensor maps
#include "cute/tensor.hpp"  // the headers of CUTLASS's convolutions need these before them
#include "cutlass/kernel_hardware_info.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/pipeline/sm90_pipeline.hpp"
// clang-format on

namespace torchconv::cuda::sm90 {

using Operator = cutlass::conv::Operator;
template <Operator kOperator>
using ProblemShape = cutlass::conv::ConvProblemShape<kOperator, 2>;

// Loads and products, and the way of the sums to memory, for tiles of Tile with operands of Element
// and results of Output in the layout of OutputTag, what Fusion, a visitor tree, makes of the sums.
template <Operator kOperator, class Element, class Output, class OutputTag, class Tile_,
          class Cluster, int kStages, int kBlocks_, class Fusion>
struct Configuration {
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr int kAlignment = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kOutputAlignment = 16 / static_cast<int>(sizeof(Output));
  using Tag = cutlass::layout::TensorNHWC;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile_, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, OutputTag,
      kOutputAlignment, Output, OutputTag, kOutputAlignment, cutlass::epilogue::TmaWarpSpecialized,
      Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator, Element, Tag, kAlignment,
      Element, Tag, kAlignment, float, Tile_, Cluster,
      cutlass::conv::collective::StageCount<kStages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
};

template <class Configuration>
struct Kernel {
  using Mainloop = typename Configuration::Mainloop;
  using Epilogue = typename Configuration::Epilogue;
  using Problem = typename Mainloop::ProblemShape;
  using Tile = typename Mainloop::TileShape;
  using TiledMma = typename Mainloop::TiledMma;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr bool kSplits = Problem::ConvOp == Operator::kWgrad;
  static constexpr int kMultipliers = CUTE_STATIC_V(cute::size(TiledMma{}));
  static constexpr int kClusterSize = CUTE_STATIC_V(cute::size(Cluster{}));
  static_assert(kMultipliers == 128, "one warpgroup");
  static_assert(CUTE_STATIC_V(cute::size<0>(Cluster{})) == kClusterSize, "neighbours in M");

  // device_kernel's launch bounds.
  static constexpr uint32_t MaxThreadsPerBlock = kMultipliers + 32;
  static constexpr uint32_t MinBlocksPerMultiprocessor = Configuration::kBlocks;

  struct SharedStorage {
    union {
      typename Mainloop::TensorStorage mainloop;
      typename Epilogue::TensorStorage epilogue;
    };
    alignas(16) typename Mainloop::PipelineStorage mainloop_pipeline;
    alignas(16) typename Epilogue::PipelineStorage epilogue_pipeline;
  };
  static_assert(Configuration::kBlocks * (sizeof(SharedStorage) + 1024) <= 228 * 1024,
                "the blocks must fit a multiprocessor's shared memory");

  // M, N, K and the number of splits; M linear, or with a mode for each dimension.
  static auto linear_shape(const Problem& problem, int splits) {
    return with_splits(Mainloop::get_problem_shape_MNKL(problem), splits);
  }
  static auto nested_shape(const Problem& problem, int splits) {
    return with_splits(cutlass::conv::detail::get_transformed_problem_shape_MNKL(problem), splits);
  }

  struct Params {
    decltype(linear_shape(Problem{}, 1)) shape;
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    int tiles_n;
    int tiles_of_split;  // tiles of K; the last split may have fewer
    int first_split;
  };

  CUTLASS_DEVICE void operator()(const Params& params, char* shared) const {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __trap();  // cutlass_takes refuses every device that runs this
#else
    using namespace cute;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = cutlass::canonical_warp_idx_sync();
    const bool loads = warp == kMultipliers / 32;
    if (warp == 0 && elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(params.mainloop);
      Epilogue::prefetch_tma_descriptors(params.epilogue);
    }

    using Pipeline = typename Mainloop::MainloopPipeline;
    typename Pipeline::Params pipeline_params;
    pipeline_params.role =
        loads ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = thread == kMultipliers;
    pipeline_params.num_consumers = kMultipliers;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(storage.mainloop_pipeline, pipeline_params, Cluster{});
    // The barriers must be there before a block of the cluster signals on them.
    if constexpr (kClusterSize > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
    } else {
      __syncthreads();
    }

    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.shape, params.mainloop);
    const auto& a = get<0>(inputs);  // (tile of M, tile of K, tiles of M, tiles of K)
    const auto& b = get<1>(inputs);
    const int block = static_cast<int>(blockIdx.x);
    const int cluster = block / kClusterSize;
    const int m = cluster / params.tiles_n * kClusterSize + block % kClusterSize;
    const auto n = idx2crd(cluster % params.tiles_n, shape<2>(b));
    const int first = (params.first_split + static_cast<int>(blockIdx.y)) * params.tiles_of_split;
    const int count = min(params.tiles_of_split, static_cast<int>(size<3>(a)) - first);
    const auto tile = [&] {
      if constexpr (kSplits)
        return make_coord(m, n, _, static_cast<int>(blockIdx.y));
      else
        return make_coord(m, n, _, Int<0>{});
    }();

    if (loads) {
      const auto tiles_k = shape<3>(a);  // the iterator refers to it
      const auto tiles = make_coord_iterator(idx2crd(first, tiles_k), tiles_k);
      auto state = cutlass::make_producer_start_state<Pipeline>();
      mainloop.load(params.mainloop, pipeline, state, inputs, tile, tiles, count, thread % 32,
                    block_rank_in_cluster(), storage.mainloop);
      state.advance(count);
      mainloop.load_tail(pipeline, state);
      return;
    }

    TiledMma tiled_mma;
    auto sums = partition_fragment_C(tiled_mma, take<0, 2>(Tile{}));
    typename Pipeline::PipelineState state;
    mainloop.mma(pipeline, state, sums, count, thread, storage.mainloop, params.mainloop);
    mainloop.mma_tail(pipeline, state, count);
    // What is stored goes through memory that another warp's last product may still read.
    cutlass::arch::NamedBarrier::sync(kMultipliers,
                                      cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    store(params, storage, tile, sums, tiled_mma, thread);
#endif
  }

 private:
  template <class Shape>
  static auto with_splits(const Shape& shape, int splits) {
    if constexpr (kSplits)
      return cute::replace<3>(shape, splits);
    else
      return shape;
  }

  // The epilogue loads nothing, so that its pipeline of loads is never used.
  template <class TileCoord, class Sums>
  CUTLASS_DEVICE static void store(const Params& params, SharedStorage& storage,
                                   const TileCoord& tile, const Sums& sums,
                                   const TiledMma& tiled_mma, int thread) {
    using LoadPipeline = typename Epilogue::LoadPipeline;
    using StorePipeline = typename Epilogue::StorePipeline;
    typename LoadPipeline::Params load_params;
    LoadPipeline load_pipeline(storage.epilogue_pipeline, load_params, cute::false_type{});
    typename Epilogue::LoadPipelineState load_state;
    typename StorePipeline::Params store_params;
    store_params.always_wait = true;
    StorePipeline store_pipeline(store_params);
    const auto store_state = cutlass::make_producer_start_state<StorePipeline>();
    Epilogue epilogue(params.epilogue, storage.epilogue);
    const auto [loaded, stored] =
        epilogue.store(load_pipeline, load_state, store_pipeline, store_state, params.shape, Tile{},
                       tile, sums, tiled_mma, thread, storage.epilogue);
    epilogue.store_tail(load_pipeline, loaded, store_pipeline, stored);
  }
};

// Splits first_split to first_split + splits - 1, of tiles_of_split tiles of K each.
template <class Kernel>
void launch_kernel(const typename Kernel::Problem& problem,
                   const typename Kernel::Mainloop::Arguments& mainloop,
                   const typename Kernel::Epilogue::Arguments& epilogue, int tiles_of_split,
                   int first_split, int splits, const Queue& queue) {
  using Tile = typename Kernel::Tile;
  const auto shape = Kernel::linear_shape(problem, splits);
  const int tiles_m =
      static_cast<int>(cute::size(cute::ceil_div(cute::shape<0>(shape), cute::shape<0>(Tile{}))));
  const int tiles_n =
      static_cast<int>(cute::size(cute::ceil_div(cute::shape<1>(shape), cute::shape<1>(Tile{}))));
  const typename Kernel::Params params{
      shape,
      Kernel::Mainloop::to_underlying_arguments(problem, mainloop, nullptr),
      Kernel::Epilogue::to_underlying_arguments(Kernel::nested_shape(problem, splits), epilogue,
                                                nullptr),
      tiles_n,
      tiles_of_split,
      first_split};

  const auto function = &cutlass::device_kernel<Kernel>;
  constexpr int kShared = sizeof(typename Kernel::SharedStorage);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
        "shared memory");
  constexpr int kCluster = Kernel::kClusterSize;
  const int clusters = cute::ceil_div(tiles_m, kCluster) * tiles_n;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster), static_cast<unsigned>(splits));
  config.blockDim = dim3(Kernel::MaxThreadsPerBlock);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &cluster;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, function, params), "launch");
}

}  // namespace torchconv::cuda::sm90
