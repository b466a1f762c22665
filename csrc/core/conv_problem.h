// One 2D convolution, described once by csrc/ops and read by every kernel.
//
//   z[n,k,p,q] = b[k] + sum over c,r,s of w[k,c,r,s] * x[n,c',h,w],
//   h = p*stride_h - pad_top + r*dilation_h,  w = q*stride_w - pad_left + s*dilation_w
//
// with x zero outside the image and c' = (k / (K/groups)) * (C/groups) + c. Padding below and to
// the right of the image is implied by P and Q. With flip the kernel is read at (R-1-r, S-1-s): the
// true convolution of the lectures. Sizes are checked by csrc/ops: every product of sizes that
// addresses a tensor fits in int64_t, and N, K, P and Q may be zero.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace torchconv {

struct ConvProblem {
  int64_t N, C, H, W;  // x: N images, C channels, H by W
  int64_t K, R, S;     // w: K filters of C/groups channels, R by S
  int64_t P, Q;        // z: N x K x P x Q
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // may be negative (a crop), as in F.pad
  int64_t dilation_h, dilation_w;
  int64_t groups;
  DType dtype;           // of x, w, b, z and their gradients
  Layout layout;         // of x, z and their gradients
  Layout weight_layout;  // of w and its gradient
  Activation activation;
  bool flip;
  // The channels of the image that z is a part of, or 0: it is one of its own. Only on the CPU: z
  // of conv2d_fprop in NHWC where conv2d_writes_parts, and z's gradient with an activation.
  int64_t pixel_channels;
};

}  // namespace torchconv
