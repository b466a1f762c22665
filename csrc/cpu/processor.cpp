// See processor.h.
#include "cpu/processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace torchconv::cpu {

bool halves_wide_vectors() {
#if defined(__x86_64__)
  // AMD's family of Zen 3 and 4; the next one, and Intel's, have units as wide as the vectors.
  constexpr unsigned kFamily = 0x19;
  unsigned most = 0, signature[3] = {}, version = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0, &most, &signature[0], &signature[2], &signature[1]) == 0 ||
      __get_cpuid(1, &version, &b, &c, &d) == 0)
    return false;
  const bool amd = signature[0] == signature_AMD_ebx && signature[1] == signature_AMD_edx &&
                   signature[2] == signature_AMD_ecx;
  return amd && (version >> 8 & 0xF) + (version >> 20 & 0xFF) == kFamily;
#else
  return false;
#endif
}

}  // namespace torchconv::cpu
