// Which way a whole problem goes, where a pass computes another problem in its place, or all its
// views at once. Otherwise each view has its algorithm of conv_choice.h. The choice depends on one
// sample's problem (for wgrad on the problem), the instruction set and the switch of Winograd's
// algorithm, never on the batch or the threads.
#pragma once

#include <optional>
#include <vector>

#include "core/conv_problem.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_view.h"
#include "cpu/winograd_strided.h"

namespace torchconv::cpu {

// Whether fprop or dgrad computes the problem's patch_problem in its place (patches.h).
bool goes_by_patches(const ConvProblem& p, StridedPass pass);
// The same for wgrad.
bool wgrad_goes_by_patches(const ConvProblem& p);

// Whether fprop or wgrad, of fprop's view, computes the problem's sample_problem in its place
// (sample_patches.h).
bool fprop_by_samples(const ConvProblem& p, const ConvView& view);
bool wgrad_by_samples(const ConvProblem& p, const ConvView& view, bool winograd);

// Whether fprop computes the problem's repeated_problem in its place, see channel_repeat.h.
bool fprop_repeats_channels(const ConvProblem& p, bool winograd);

// The problem with channels_last images that fprop, of this view, computes in the problem's place,
// if any, whether dgrad, of these views, computes channels_last_problem, and whether wgrad, of
// fprop's view, computes channels_last_images; see channels_last_copy.h.
std::optional<ConvProblem> fprop_by_channels_last(const ConvProblem& p, const ConvView& view);
bool dgrad_by_channels_last(const ConvProblem& p, const std::vector<ConvView>& views,
                            bool winograd);
bool wgrad_by_channels_last(const ConvProblem& p, const ConvView& view, bool winograd);

// Whether dgrad, of these views, is the fold of a matrix product (col2im.h), patch_problem's dgrad.
bool dgrad_by_columns(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd);

// Whether fprop or dgrad goes by kStridedWinograd, which looks at the problem and not at its views:
// dgrad has several. Otherwise each view has its gather_algorithm.
bool strides_by_winograd(const ConvProblem& p, StridedPass pass, bool winograd);

// Whether dgrad of a stride goes by group_dgrad (group_gather.h), all views at once. They cover dx.
bool strides_by_groups(const ConvProblem& p, const std::vector<ConvView>& views);
// What computes all residues of dgrad of a stride above 1 at once, where there is such a thing.
std::optional<ConvAlgorithm> dgrad_at_once(const ConvProblem& p);

// Whether dgrad of a stride in bfloat16 goes by way of a channels_last image, see phase_image.h.
bool strides_by_image(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd);

}  // namespace torchconv::cpu
