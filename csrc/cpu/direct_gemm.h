// Convolution of channels_last images as a matrix product that reads pixels where they lie.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether direct_gemm computes the view: channels are neighbours in both images.
inline bool direct_gemm_applies(const ConvView& view) { return view.src.c == 1 && view.dst.c == 1; }
// The same for bfloat16 with dot products of pairs, which reads and writes either layout.
bool direct_gemm_by_pairs(const ConvView& view);

// The reduction is cut into chunks: all taps of so many channels.
int64_t direct_gemm_chunk(const ConvView& view, int64_t element_size);

// Elements of the packed weights, [group][chunk][panel][tap][channel][filter]. What they hold
// depends on the weights, C, K, the groups and the taps: not on the batch or the image.
template <typename T>
int64_t direct_gemm_weights_size(const ConvView& view);

template <typename T>
void direct_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                              const Parallel& pool);

// Whether so few pixels meet the weights that direct_gemm packs them panel by panel between the
// products, while it fetches those to come from memory: less than packing them before, or than
// reading both these weights, to know that they have not changed, and the packed ones. Weights of a
// group are few, and mostly read by one thread: those of groups are never packed before. Where
// nothing is kept, DirectPlan::packs_along decides too.
template <typename T>
bool direct_gemm_packs_along(const ConvView& view);
// The panel of these filters over so many channels, of all taps. Of bfloat16 it is one of pairs.
template <typename T>
void direct_gemm_pack_panel(const ConvView& view, const T* w, int64_t channels, int64_t filters,
                            Wide<T>* panel);
template <>
void direct_gemm_pack_panel(const ConvView& view, const BFloat16* w, int64_t channels,
                            int64_t filters, float* panel);

// What direct_gemm finds out about a view before it sees memory.
class DirectGemmPlan;
// The weights of its calls: unpacked, packed, or in parts where they would be packed along, and
// else packed.
enum class DirectWeights : uint8_t { kUnpacked, kPacked, kInParts };
// In float.
std::shared_ptr<const DirectGemmPlan> plan_direct_gemm(const ConvView& view, DirectWeights weights);

// Weights in parts: each has the filters of one task's panels, as direct_gemm_pack_weights has all.
// The first filters of the parts; none where the plan's weights are in no parts.
std::vector<int64_t> direct_gemm_cuts(const DirectGemmPlan& plan);
int64_t direct_gemm_parts_size(const ConvView& view, const std::vector<int64_t>& cuts);
void direct_gemm_pack_parts(const ConvView& view, const std::vector<int64_t>& cuts, const float* w,
                            float* packed, const Parallel& pool);

// The grid must not be empty; the terms may be. packed: from direct_gemm_pack_weights, or null, or
// in parts as the plan has them; bias may be null; so may plan, of this view. Instantiated for
// float, double, BFloat16 and Float16.
template <typename T>
void direct_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool,
                 const DirectGemmPlan* plan = nullptr);

}  // namespace torchconv::cpu
