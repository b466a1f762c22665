// The convolution algorithms of csrc/cuda, one pass each, as conv2d.cpp chooses among them.
//
// Pointers are device memory, dense in the problem's layouts. dz is the gradient by z, after the
// activation's derivative. Every element of an output is written. A `takes` says whether an
// algorithm can compute a pass; what it does not take, simt_* computes. Where a pass needs the
// weights as K x R x S x C, or an image as N x H x W x C, `takes` asks that the problem says so:
// conv2d.cpp makes copies in that form with conv_layout.h's functions and asks again. Algorithms
// without a residual among their arguments add none.
#pragma once

#include "core/conv_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

enum class Pass : uint8_t { kFprop, kDgrad, kWgrad };

// --- simt_*.cu: any type (integers in fprop alone), layouts, groups, sizes, and flip. Exact
// float32; integers wrap around.
void simt_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                const void* residual, void* y, void* preactivation, const Queue& queue);
void simt_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx, const Queue& queue);
void simt_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue);

// --- depthwise_*.cu: groups == C, K a multiple of C.
bool depthwise_takes(const ConvProblem& p, Pass pass);
void depthwise_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                     const void* residual, void* y, void* preactivation, const Queue& queue);
void depthwise_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                     const Queue& queue);
void depthwise_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                     const Queue& queue);
// Both gradients at once, of which one may be null. False, and nothing done, where they are
// computed one after the other.
bool depthwise_gradients(const ConvProblem& p, const void* dz, const void* x, const void* w,
                         void* dx, void* dw, const Queue& queue);

// --- grouped_*.cu: groups of more than one channel.
bool grouped_takes(const ConvProblem& p, Pass pass);
void grouped_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                   void* preactivation, const Queue& queue);
void grouped_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                   const Queue& queue);
void grouped_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue);

// --- grouped_mma_*.cu: tensor cores through mma.sync, float16 and bfloat16, as many filters as
// channels a group. Layouts NHWC and K x R x S x C, no flip.
bool grouped_mma_takes(const ConvProblem& p, Pass pass, const Queue& queue);
void grouped_mma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                       const void* residual, void* y, void* preactivation, const Queue& queue);
void grouped_mma_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                       const Queue& queue);
void grouped_mma_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                       const Queue& queue);

// --- mma_*.cu: tensor cores through mma.sync (compute capability 8.0 and later), float16,
// bfloat16, and float32 rounded to TF32. Layouts NHWC and K x R x S x C, one group, no flip, or
// fprop and dgrad of groups of at least 32 channels and filters; over NCHW 1x1 kernels, and
// fprop of few channels.
bool mma_takes(const ConvProblem& p, Pass pass, const Queue& queue);
void mma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
               const void* residual, void* y, void* preactivation, const Queue& queue);
void mma_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx, const Queue& queue);
void mma_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue);

// --- cutlass_sm90_*.cu: CUTLASS 3.x, TMA and wgmma (compute capability 9.0). As mma_*, for what
// the hardware's im2col takes; dgrad reads weights of either layout. Also 3x3 of groups of 32
// or 64 channels and as many filters, with weights as K x R x S x C (cutlass_sm90_groups.h).
// Absent (takes nothing) where CUTLASS was not there at build time.
bool cutlass_takes(const ConvProblem& p, Pass pass, bool preactivation, bool residual,
                   const Queue& queue);
void cutlass_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                   const void* residual, void* y, const Queue& queue);
void cutlass_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                   const Queue& queue);
void cutlass_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue);

// --- activation_backward.cu: dz = dy * g'(saved), and db = dz summed over all but channels, in an
// order that the shape alone fixes. saved and dz are null with kNone; dz or db may be null.
void activation_backward(const ConvProblem& p, const void* dy, const void* saved, void* dz,
                         void* db, const Queue& queue);

}  // namespace torchconv::cuda
