// What a block may have of shared memory.
#pragma once

namespace torchconv::cuda {

// In bytes, by compute capability, 8.0 and later; a multiprocessor has 1 KB more.
inline int shared_of_block(int capability) {
  if (capability == 80 || capability == 87) return 163 * 1024;
  return capability >= 90 && capability < 120 ? 227 * 1024 : 99 * 1024;
}

}  // namespace torchconv::cuda
