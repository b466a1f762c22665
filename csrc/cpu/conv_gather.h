// A pass of a convolution by an algorithm of conv_choice.h, and what that packs of the weights.
// Instantiated for float, double, BFloat16 and Float16, but where something else is said.
#pragma once

#include <type_traits>
#include <vector>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "core/types.h"
#include "core/weights_owner.h"
#include "cpu/activation.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_view.h"
#include "cpu/direct_gemm.h"
#include "cpu/packed_weights.h"
#include "cpu/winograd_strided.h"

namespace torchconv::cpu {

template <typename T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, double>   ? DType::kFloat64
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;

template <typename T>
constexpr bool kInFloat = std::is_same_v<Wide<T>, float>;

inline bool is_empty(const ConvView& view) {
  return view.N == 0 || view.K == 0 || view.pixels() == 0;
}

// What an algorithm packs of the weights that is worth keeping. frozen: also what takes no longer
// to make than a look at the weights. plan: of kDirectProduct, whose weights may be in parts, or
// null.
template <typename T>
PackedForm packed_form(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm,
                       bool frozen = false, const DirectGemmPlan* plan = nullptr);

// packed: of packed_form's size.
template <typename T>
void pack_weights(const ConvProblem& p, const ConvView& view, const PackedForm& form, const T* w,
                  Wide<T>* packed, const Parallel& pool);

// The packed weights that the owner keeps, made where they are not there yet; or null.
template <typename T>
PackedBuffer kept_weights(const ConvProblem& p, const ConvView& view, const PackedForm& form,
                          const T* w, const WeightsOwner& owner, const Parallel& pool);

// A view that is not empty; samples where the algorithm meets infinity or NaN by another one.
// packed: what `pack_weights` made for this view and algorithm, or null. plan: of kDirectProduct,
// or null.
template <typename T>
void conv_gather(const ConvView& view, ConvAlgorithm algorithm, const T* src, const T* w,
                 const void* packed, const T* bias, const Epilogue<T>& epilogue,
                 const Parallel& pool, const DirectGemmPlan* plan = nullptr);

// A problem by kStridedWinograd, which knows float only; views: the same pass for other algorithms.
// Not instantiated for double.
template <typename T>
void conv_gather_strided(const ConvProblem& p, StridedPass pass, const std::vector<ConvView>& views,
                         const T* src, const T* w, const void* packed, const T* bias,
                         const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
