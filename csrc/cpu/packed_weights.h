// Packed weights that their owner, a layer in eval mode, keeps from call to call.
//
// An owner is a number, which an operator can take. What is kept for it was packed from the weights
// at one address, of one version (PyTorch counts in-place changes) and with one checksum. The
// checksum is for changes that PyTorch does not count, as of `weight.data`: it takes a fraction of
// the time of packing. Another address, version or checksum makes all that is kept stale. Frozen
// weights have no checksum: who froze them makes no such changes.
// Thread-safe; a forked child goes on with its own copy.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "core/weights_owner.h"
#include "cpu/conv_choice.h"

namespace torchconv::cpu {

// What the packed form depends on, besides the weights' values.
struct PackedForm {
  ConvProblem problem;  // without what the form does not depend on: N, and the image where it can
  ConvAlgorithm algorithm;
  int64_t bytes;  // 0: the weights are read as they are, or packing them costs next to nothing
  std::vector<int64_t> cuts = {};  // the first filters of parts that are packed by themselves
  bool operator==(const PackedForm& other) const;
};

// The contents of weights.
struct WeightsSource {
  const void* data;
  int64_t version;
  uint64_t checksum;

  // Frozen ones.
  WeightsSource(const void* weights, int64_t weights_version)
      : data(weights), version(weights_version), checksum(0) {}
  WeightsSource(const void* weights, int64_t bytes, int64_t weights_version, const Parallel& pool);
  bool operator==(const WeightsSource& other) const {
    return data == other.data && version == other.version && checksum == other.checksum;
  }
};

using PackedBuffer = std::shared_ptr<const void>;

namespace packed_weights {

// A new owner's number, never 0.
int64_t create();
// Forgets what is kept for it; destroy: and the owner.
void clear(int64_t owner);
void destroy(int64_t owner);
// Bytes kept for it.
int64_t bytes(int64_t owner);

// Null where nothing is kept that is packed from this source in this form.
PackedBuffer find(int64_t owner, const PackedForm& form, const WeightsSource& source);
// Keeps it, and the form used last before it, for an owner that exists.
void keep(int64_t owner, const PackedForm& form, const WeightsSource& source, PackedBuffer packed);

}  // namespace packed_weights
}  // namespace torchconv::cpu
