// See processor.h.
#include "cpu/processor.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace torchconv::cpu {
namespace {

bool is_zen4() {
#if defined(__x86_64__)
  // AMD's family, with Zen 3; the next one, and Intel's, have units as wide as the vectors.
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

}  // namespace

bool halves_wide_vectors() {
  const char* const told = std::getenv("TORCHCONV_HALF_VECTORS");
  return told != nullptr ? std::strcmp(told, "0") != 0 : is_zen4();
}

}  // namespace torchconv::cpu
