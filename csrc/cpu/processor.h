// What kernels of equal results are chosen by, beside the instruction set.
#pragma once

namespace torchconv::cpu {

// Whether a vector of AVX-512 passes through units of half its width, one half after the other, as
// on a Zen 4: vectors of half the width then do as many products a cycle, and leave fewer lanes
// empty. TORCHCONV_HALF_VECTORS=1 or 0 in the environment says so for tests.
bool halves_wide_vectors();

}  // namespace torchconv::cpu
